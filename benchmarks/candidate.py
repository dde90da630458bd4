"""What is compared: a candidate computes one suite's result in one way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: Rows that others are divided by. Their names are keys in the JSON.
NAIVE, GEMMS, COPY, SFT = "naive PyTorch", "bare GEMMs", "copy", "plain fine-tuning, packed"

Outputs = dict[str, Tensor]


class Case(NamedTuple):
    """One table or point of a suite: what it is, and how to get its rows, which is where its memory is taken."""

    fields: dict[str, Any]
    measure: Callable[[], list[dict[str, Any]]]


class Problem(Protocol):
    """Fixed tensors, the right answer for them, and how a candidate's forward function becomes a step."""

    dtype: torch.dtype
    device: torch.device

    def step(self, forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """One run of what is timed: forward alone, or with the backward pass."""

    def reset(self, restore: bool) -> None:
        """Before each run, outside the clock: restore inputs that were written into."""

    def oracle(self) -> Outputs:
        """What a step must return, computed in fp64. A candidate may return fewer of these, not none."""

    def kept_bytes(self) -> dict[str, int]:
        """Bytes of the results that every candidate has to hold, so that they do not count as its memory."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a suite's result.

    Attributes:
        build: takes the problem, imports what is needed, and returns the forward function. What it raises is the
            reason that the table gives.
        role: "ours", "peer", "naive" (what the others are divided by, and what bounds their errors) or "floor"
            (bare products or copies: divided by too, but it has no result to check).
        gives: "sequence", "token" or "scalar": the finest values it returns that carry a gradient.
        holds_logits: whether a tensor [N, V] exists.
        package: the distribution it comes from, whose version is recorded.
        writes_input: whether a run destroys its input, which is then restored outside the clock.
        compiled: whether it goes through torch.compile, which takes long to start.
    """

    name: str
    build: Callable[[Any], Callable[[], Any]]
    role: str = "peer"
    gives: str = "token"
    holds_logits: bool = False
    package: str | None = None
    writes_input: bool = False
    compiled: bool = False

    def describe(self) -> dict[str, Any]:
        """The fields of a row that are known before anything runs."""
        return {
            "candidate": self.name,
            "role": self.role,
            "gives": self.gives,
            "holds_logits": self.holds_logits,
            "package": self.package,
        }
