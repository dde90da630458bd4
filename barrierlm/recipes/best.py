"""The weights of the best state so far, kept on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from barrierlm import BestFeasible, Report


class BestWeights:
    """A copy of the trained weights, made whenever the state is the best so far by `BestFeasible`.

    Args:
        weights: The trained parameters.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        self.choice = BestFeasible()
        self.copy: list[Tensor] | None = None

    def update(self, report: Report, task_loss: float) -> None:
        """One step has passed; ``task_loss`` is the same number on every process."""
        # A window whose task loss is not finite is no candidate, and no reason to stop the run.
        if math.isfinite(task_loss) and self.choice.update(report, task_loss):
            self.copy = [p.detach().to("cpu", copy=True) for p in self.weights]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the weights of the best state; afterwards its own again."""
        assert self.copy is not None
        own = [p.detach().to("cpu", copy=True) for p in self.weights]
        _put(self.copy, self.weights)
        try:
            yield
        finally:
            _put(own, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: plain tensors, numbers and strings."""
        return {"choice": self.choice.state_dict(), "copy": self.copy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: A state of other weights, or a damaged one.
        """
        copy, shapes = state["copy"], [p.shape for p in self.weights]
        if copy is not None and [getattr(value, "shape", None) for value in copy] != shapes:
            raise ValueError("the copy of the best weights is of others; allowed: one tensor for each weight")
        self.choice.load_state_dict(state["choice"])
        self.copy = copy


def _put(values: Sequence[Tensor], weights: Sequence[nn.Parameter]) -> None:
    with torch.no_grad():
        for p, value in zip(weights, values, strict=True):
            p.copy_(value)
