"""What the estimates say about the bounds: one row per bound, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .saved import saved_tensor


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

    If the bounds have no common point, the largest violation stays above some number wherever the parameters go, and
    multipliers that fight push it from one bound to another. So: if the largest violation has not come down by a
    hundredth for `PATIENCE` windows, all of them with a bound violated beyond its noise, the bounds that were violated
    in a tenth of these windows or more, if two or more, are reported as infeasible together. This is evidence from the
    run, not a proof: a learning rate of zero, or multipliers that cannot grow enough, look the same.
    """

    PATIENCE = 50

    def __init__(self, num_bounds: int) -> None:
        self.start(num_bounds)

    def start(self, num_bounds: int) -> None:
        """Forget everything."""
        self.best = torch.full((), torch.inf, dtype=torch.float64)
        self.stuck = torch.zeros((), dtype=torch.float64)
        self.violated = torch.zeros(num_bounds, dtype=torch.float64)

    def update(self, z: Tensor, tolerance: Tensor) -> None:
        """One committed window with violations ``z`` [m] that mean something beyond ``tolerance`` [m]."""
        violated = z > tolerance
        if not bool(violated.any()):
            self.start(len(z))
            return
        worst = z[violated].max()
        if bool(worst < 0.99 * self.best):
            self.best, self.stuck, self.violated = worst, torch.zeros_like(worst), torch.zeros_like(self.violated)
        self.stuck = self.stuck + 1
        self.violated = self.violated + violated

    def together(self) -> list[int]:
        """The bounds that do not seem to have a common solution; fewer than two: none."""
        if self.stuck < self.PATIENCE:
            return []
        often: list[int] = torch.nonzero(self.violated >= 0.1 * self.stuck).flatten().tolist()
        return often if len(often) > 1 else []

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of the state: tensors only."""
        return {name: getattr(self, name).clone() for name in ("best", "stuck", "violated")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.best = saved_tensor(state, "best", [()], allow=[torch.inf])
        self.stuck = saved_tensor(state, "stuck", [()], low=0.0)
        self.violated = saved_tensor(state, "violated", [self.violated.shape], low=0.0)


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
