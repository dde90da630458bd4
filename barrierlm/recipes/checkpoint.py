"""Checkpoints: everything the next step depends on, written so that a crash leaves none half-written."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from barrierlm import BarrierObjective

from .best import BestWeights
from .config import ConfigError

_KEEP = 2


class Checkpoints:
    """Folders ``step-000020`` with the trained weights (and the best ones), optimizer, objective and random states.

    The data position needs no saving: `DataOrder` is a function of the step.

    Args:
        folder: Where they are; the newest two are kept.
        accelerator: Of the run; every process calls `save` and `load`.
        weights: The trained parameters.
        optimizer: Their optimizer.
        objective: Or None.
        best: Or None.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Any,
        weights: Sequence[nn.Parameter],
        optimizer: Any,
        objective: BarrierObjective | None,
        best: BestWeights | None = None,
    ) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.weights, self.optimizer, self.objective, self.best = weights, optimizer, objective, best

    def save(self, step: int) -> None:
        """Save after ``step`` optimizer steps: into a temporary folder, renamed when complete."""
        target, unfinished = self.folder / f"step-{step:06d}", self.folder / f".unfinished-{step:06d}"
        main, rank = self.accelerator.is_main_process, self.accelerator.process_index
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            state = {
                "step": step,
                "world": self.accelerator.num_processes,
                "weights": [p.detach().cpu() for p in self.weights],
                "optimizer": self.optimizer.state_dict(),
                "objective": None if self.objective is None else self.objective.state_dict(),
                "best": None if self.best is None else self.best.state_dict(),
            }
            _write(state, unfinished / "state.pt")
        self.accelerator.wait_for_everyone()
        _write(_random_state(), unfinished / f"random-{rank}.pt")
        self.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            for old in self._complete()[:-_KEEP]:
                shutil.rmtree(old)  # only now that the newer one is whole
        self.accelerator.wait_for_everyone()

    def refuse_older(self) -> None:
        """A new run must not mix its checkpoints with those of an earlier one.

        Raises:
            ConfigError: There are some.
        """
        if self._complete():
            raise ConfigError(
                f"{self.folder} holds checkpoints of an earlier run; allowed: resume=true to continue it, or another "
                "output_dir"
            )

    def load(self) -> int:
        """Restore the newest checkpoint.

        Returns:
            The number of optimizer steps that it had taken.

        Raises:
            ConfigError: There is none, or it is of another number of processes, another model or ``keep_best``.
            ValueError: It is of other constraints.
        """
        complete = self._complete()
        if not complete:
            raise ConfigError(
                f"resume=true: no checkpoint in {self.folder}; allowed: after a run with checkpoint_every > 0"
            )
        newest = complete[-1]
        state = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
        if state["world"] != self.accelerator.num_processes:
            raise ConfigError(
                f"{newest} is of {state['world']} processes, this run has {self.accelerator.num_processes}; "
                "allowed: the same number"
            )
        shapes, given = [p.shape for p in state["weights"]], [p.shape for p in self.weights]
        if shapes != given or (state["objective"] is None) != (self.objective is None):
            raise ConfigError(f"{newest} is of another model or of other constraints; allowed: the same options")
        best = state.get("best")
        if (best is None) != (self.best is None):
            raise ConfigError(
                f"{newest} is of a run with keep_best={best is not None}; allowed: the same (the states before it "
                "cannot be compared any more)"
            )
        if self.objective is not None:
            self.objective.load_state_dict(state["objective"])
        with torch.no_grad():
            for p, saved in zip(self.weights, state["weights"], strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.best is not None:
            self.best.load_state_dict(best)
        rank = self.accelerator.process_index
        _set_random_state(torch.load(newest / f"random-{rank}.pt", map_location="cpu", weights_only=True))
        return int(state["step"])

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _write(state: Any, path: Path) -> None:
    """Save and wait until it is on the disk: the rename that follows must not overtake it."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _random_state() -> dict[str, Any]:
    """Of torch, and of Python and NumPy for cost functions that draw; plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state, which users draw from
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})  # noqa: NPY002
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
