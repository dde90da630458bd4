"""What the estimates say about the bounds: one row per bound, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .saved import saved_count, saved_number, saved_tensor, vector


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


class Report(Sequence[BoundState]):
    """The rows of `BarrierObjective.report`, one per bound, to be read like a tuple; prints as a table.

    It is none, because DDP and Accelerate take tuples that a model returns apart and put copies of their parts together
    again: an `ObjectiveOutput` has four fields afterwards and nothing else, and finds its objective by this one.

    Args:
        rows: One `BoundState` per bound.
        metrics: Gives the numbers of `BarrierObjective.metrics`, as they are when it is called.

    Raises nothing.

    Example:
        >>> report = BarrierObjective(None, [Constraint("length", lower=5, upper=9)]).report()
        >>> len(report), report[0].verdict
        (2, 'unknown')
        >>> [row.bound for row in report]
        [5.0, 9.0]
    """

    def __init__(self, rows: Iterable[BoundState] = (), metrics: Callable[[], dict[str, float]] = dict) -> None:
        self._rows: tuple[BoundState, ...] = tuple(rows)
        self._metrics = metrics

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BoundState]:
        return iter(self._rows)

    def __getitem__(self, i: Any) -> Any:
        return self._rows[i]

    def __eq__(self, other: object) -> bool:
        return self._rows == (other._rows if isinstance(other, Report) else other)

    def __hash__(self) -> int:
        return hash(self._rows)

    def __reduce__(self) -> tuple[type[Report], tuple[tuple[BoundState, ...]]]:
        return Report, (self._rows,)  # saved for its rows, not for all that its numbers come from

    def __repr__(self) -> str:
        return f"Report({list(self._rows)})"

    def __str__(self) -> str:
        head = ("constraint", "bound", "estimate", "+-", "slack", "multiplier", "verdict")
        body = [
            (
                row.constraint,
                bound_text(row.side, row.bound),
                *(f"{number:.4g}" for number in (row.estimate, row.stderr, row.slack, row.multiplier)),
                row.verdict,
            )
            for row in self
        ]
        return table(head, body)


def bound_text(side: str, bound: float) -> str:
    """A bound as tables and messages name it."""
    return f"{'>=' if side == 'lower' else '<='} {bound:g}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns that are as wide as they need to be."""
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *body)
    )


#: An estimate within so many standard errors of its bound, or within this much of the scale, counts as at it.
_ERRORS, _LEAST = 2.0, 0.01


class FeasibilityWatch:
    r"""Notices bounds that cannot be met at once, from their violations z and multipliers alone.

    Bounds have no common point if some weights :math:`w \geq 0` have :math:`\sum_i w_i z_i > 0` everywhere, which for
    convex ones means that the gradients under w balance where the sum is positive (Farkas). The multipliers are such
    weights: those of bounds in conflict grow without end, and take over from the task. Where the balance holds, what
    one bound gains the others lose, while on the way to a common point, however slow, the sum falls as the z fall.

    So progress is when the sum, beyond noise, has fallen by a share of `PROGRESS` of what the z have moved, each times
    its weight, or when the average z under the multipliers has fallen by a third. If for `PATIENCE` windows the sum was
    positive beyond noise and made no progress, while the sum of the multipliers has grown `GROWTH`-fold (for rules that
    do not let it grow: in `PATIENCE_WITHOUT_GROWTH` windows), then the bounds that took part in the exchange are
    infeasible together. They stay it until there is progress.

    This is evidence from the run, not a proof: parameters that do not move, and a task so strong that the multipliers
    grow as much without a visible effect, look the same.
    """

    PATIENCE = 100
    PATIENCE_WITHOUT_GROWTH = 400
    PROGRESS = 0.3
    GROWTH = 3.0
    #: Part of its value at the last progress below which the average z has fallen for good.
    FALLEN = 2 / 3
    #: Of these windows, a bound was at or above its limit in this share; of the largest part in the exchange, it has so
    #: much. Less: not one of them.
    SHARE = 0.1

    _LISTS = ("first", "weights", "low", "high", "present", "moved")

    def __init__(self, num_bounds: int) -> None:
        self.start(num_bounds)

    def start(self, num_bounds: int) -> None:
        """Forget everything."""
        self.stuck, self.known = 0, 0  # windows since the last progress; bounds that have been measured
        self.total, self.growth = 0.0, 1.0  # sum of the multipliers then, and its largest multiple since
        self.level = 0.0  # average z under the multipliers then
        zeros = [0.0] * num_bounds
        # By bound: z and share of the multipliers then; since then, the smallest and the largest z, the windows at or
        # above the bound, and the movement beyond noise times the weight.
        self.first = self.weights = self.low = self.high = self.present = self.moved = zeros

    def update(self, z: Sequence[float], stderr: Sequence[float], multiplier: Sequence[float]) -> None:
        """One committed window: violations [m] (NaN: not known), standard errors [m], and the multipliers in force [m].

        Lists are replaced, never changed.
        """
        at, known = [v if math.isfinite(v) else 0.0 for v in z], sum(map(math.isfinite, z))
        near = [verdict_tolerance(s) for s in stderr]
        total = sum(multiplier)
        if not sum(f * (v - t) for f, v, t in zip(multiplier, at, near, strict=True)) > 0:
            self.start(len(at))
            return
        weights = [f / total for f in multiplier]
        level = sum(w * v for w, v in zip(weights, at, strict=True))
        if not self.stuck or known != self.known or self._progress(at, stderr, weights, level):
            self.stuck, self.known, self.total, self.growth, self.level = 0, known, total, 1.0, level
            self.first, self.weights, self.low, self.high = at, weights, at, at
            self.present = self.moved = [0.0] * len(at)
        self.stuck += 1
        self.growth = max(self.growth, total / self.total)
        self.present = [p + (v > -t) for p, v, t in zip(self.present, at, near, strict=True)]

    def _progress(self, at: list[float], stderr: Sequence[float], weights: list[float], level: float) -> bool:
        """Take in how far the bounds have moved, and say whether that was towards a common point."""
        low, high, moved = [], [], []
        fallen = path = error = 0.0
        for v, s, w, w0, first, a, b in zip(
            at, stderr, weights, self.weights, self.first, self.low, self.high, strict=True
        ):
            # The weights moved too; to first order their average keeps a balance balanced on the way.
            mean = (w + w0) / 2
            a, b = (v if v < a else a), (v if v > b else b)
            low.append(a)
            high.append(b)
            beyond = b - a - 4 * s
            moved.append(mean * beyond if beyond > 0 else 0.0)
            fallen += mean * (first - v)
            path += mean * (b - a)
            error += mean * s
        self.low, self.high, self.moved = low, high, moved
        return level < self.FALLEN * self.level or fallen > max(self.PROGRESS * path, 3 * error, 1e-6 * level)

    def together(self) -> list[int]:
        """The bounds that do not seem to have a common solution; fewer than two: none."""
        if self.stuck < (self.PATIENCE if self.growth >= self.GROWTH else self.PATIENCE_WITHOUT_GROWTH):
            return []
        present = [i for i, n in enumerate(self.present) if n >= self.SHARE * self.stuck]
        # With nothing that moved beyond noise all of them take part.
        part = [i for i in present if self.moved[i] >= self.SHARE * max(self.moved)]
        return part if len(part) > 1 else []

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of the state: numbers and tensors."""
        numbers = {name: getattr(self, name) for name in ("stuck", "known", "total", "growth", "level")}
        return numbers | {name: vector(getattr(self, name)) for name in self._LISTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        size = [(len(self.first),)]
        numbers = {name: saved_number(state, name, low=0.0) for name in ("total", "growth")}
        numbers |= {name: saved_count(state, name) for name in ("stuck", "known")}
        numbers |= {"level": saved_number(state, "level", low=-math.inf)}
        lists = {name: saved_tensor(state, name, size).tolist() for name in self._LISTS}
        vars(self).update(numbers | lists)


def verdict_tolerance(stderr: float) -> float:
    """Distance from a bound, in units of the scale, below which it counts as active: 2 stderr, or a hundredth."""
    errors = _ERRORS * stderr
    return errors if errors > _LEAST else _LEAST  # not known, NaN: the least


def verdict(z: float, tolerance: float, others: Sequence[str]) -> str:
    """``unknown``, ``met``, ``active``, ``violated`` or ``infeasible together with ...`` for one bound."""
    if z != z:
        return "unknown"
    if others:
        return f"infeasible together with {', '.join(others)}"
    return "violated" if z > tolerance else "active" if z >= -tolerance else "met"
