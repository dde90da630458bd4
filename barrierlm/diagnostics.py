"""What the estimates say about the bounds: one row per bound, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BoundState(NamedTuple):
    """One bound as the last committed window left it.

    ``estimate``, ``stderr``, ``bound`` and ``slack`` (positive inside) are in the constraint's unit; ``scale``
    says how much of it one unit of violation is; ``multiplier``, ``mu`` and ``s`` are in units of the scale.
    Numbers that are not known yet are NaN.
    """

    constraint: str
    side: str
    bound: float
    estimate: float
    stderr: float
    slack: float
    multiplier: float
    mu: float
    s: float
    scale: float
    verdict: str


class Report(tuple[BoundState, ...]):
    """The rows of `BarrierObjective.report`, one per bound; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("constraint", "bound", "estimate", "+-", "slack", "multiplier", "verdict")
        body = [
            (
                row.constraint,
                f"{'>=' if row.side == 'lower' else '<='} {row.bound:g}",
                *(f"{number:.4g}" for number in (row.estimate, row.stderr, row.slack, row.multiplier)),
                row.verdict,
            )
            for row in self
        ]
        return table(head, body)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns that are as wide as they need to be."""
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *body)
    )


class FeasibilityWatch:
    """Notices bounds that cannot be met at once, from the violations alone.

    Two or more bounds that have been violated beyond their noise for `PATIENCE` windows, none of which has come
    down by a hundredth in as many windows, are reported as infeasible together. This is evidence from the run,
    not a proof: a learning rate of zero looks the same.
    """

    PATIENCE = 50

    def __init__(self, num_bounds: int) -> None:
        self.best = torch.full((num_bounds,), torch.inf, dtype=torch.float64)
        self.stuck = torch.zeros(num_bounds, dtype=torch.float64)

    def update(self, z: Tensor, tolerance: Tensor) -> None:
        """One committed window with violations ``z`` [m] that mean something beyond ``tolerance`` [m]."""
        violated = z > tolerance
        improved = z < 0.99 * self.best
        self.stuck = torch.where(violated & ~improved, self.stuck + 1, 0.0)
        self.best = torch.where(violated, torch.where(improved, z, self.best), torch.inf)

    def together(self) -> list[int]:
        """The bounds that do not seem to have a common solution; fewer than two: none."""
        stuck: list[int] = torch.nonzero(self.stuck >= self.PATIENCE).flatten().tolist()
        return stuck if len(stuck) > 1 else []

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of the state: tensors only."""
        return {"best": self.best.clone(), "stuck": self.stuck.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.best, self.stuck = (state[key].detach().cpu().clone() for key in ("best", "stuck"))


def verdict_tolerance(stderr: Tensor) -> Tensor:
    """Distance from a bound, in units of the scale, below which it counts as active: 2 stderr, or a hundredth."""
    return (2 * stderr.nan_to_num(0.0)).clamp(min=0.01)


def verdict(z: float, tolerance: float, others: Iterable[str]) -> str:
    """``unknown``, ``met``, ``active``, ``violated`` or ``infeasible together with ...`` for one bound."""
    if z != z:
        return "unknown"
    names = ", ".join(others)
    if names:
        return f"infeasible together with {names}"
    return "violated" if z > tolerance else "active" if z >= -tolerance else "met"
