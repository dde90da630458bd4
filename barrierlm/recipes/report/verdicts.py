"""What the numbers of a run say about its bounds, in rows and in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from barrierlm.diagnostics import FeasibilityWatch, verdict, verdict_tolerance

from .runs import Run

#: Of so many last steps the bounds are watched for infeasibility.
_WATCHED = 2000


@dataclass(frozen=True)
class BoundRow:
    """One bound of one run: where training left it (``low`` to ``high``: two standard errors to each side)."""

    constraint: str
    side: str
    bound: float
    estimate: float
    low: float
    high: float
    slack: float
    multiplier: float
    mu: float
    verdict: str

    @property
    def label(self) -> str:
        """Such as ``length ≤ 14``."""
        return f"{self.constraint} {'≥' if self.side == 'lower' else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class HeldOut:
    """One constraint in one held-out evaluation; ``verdict`` minds the 95% interval."""

    evaluation: str
    nll: float
    constraint: str
    mean: float
    low: float
    high: float
    bounds: str
    verdict: str
    censored: float


@dataclass(frozen=True)
class Judged:
    """A run with its verdicts."""

    run: Run
    rows: list[BoundRow]
    heldout: list[HeldOut]
    task_loss: float
    averaged: int

    @property
    def violated(self) -> list[BoundRow]:
        """Bounds that are not met by the estimates of the training."""
        return [row for row in self.rows if row.verdict.startswith(("violated", "infeasible"))]

    @property
    def missed(self) -> list[HeldOut]:
        """Constraints that the trained model does not meet on held-out prompts, beyond the interval."""
        return [row for row in self.trained if row.verdict == "violated"]

    @property
    def trained(self) -> list[HeldOut]:
        """The held-out evaluation of the weights at the end of the run, if there is one."""
        return [row for row in self.heldout if row.evaluation in ("final", "constrained") and row.constraint]

    @property
    def nll(self) -> float:
        """Per held-out token, of the weights at the end of the run; NaN if it was not evaluated."""
        return self.trained[0].nll if self.trained else math.nan

    @property
    def good(self) -> bool:
        """Whether everything is met that was measured, in training and held out, and something was."""
        return not (self.violated or self.missed or any(row.verdict == "unknown" for row in self.rows))

    @property
    def sentence(self) -> str:
        """Whether the bounds are met, for people in a hurry."""
        if not self.rows:
            return f"No bounds; task loss {number(self.task_loss)}."
        unknown = [row.label for row in self.rows if row.verdict == "unknown"]
        bad = [f"{row.label} (estimate {_pm(row.estimate, row.high)})" for row in self.violated]
        near = [row.label for row in self.rows if row.verdict == "active"]
        total = len(self.rows)
        all_of_them = {1: "The bound is", 2: "Both bounds are"}.get(total, f"All {total} bounds are")
        if bad:
            start = "The bound is" if total == 1 else f"{len(bad)} of {total} bounds {'is' if len(bad) == 1 else 'are'}"
            text = f"{start} violated: {', '.join(bad)}"
        elif unknown:
            text = f"Not measured yet: {', '.join(unknown)}"
        elif near:
            text = f"{all_of_them} met, within noise" + (f" ({', '.join(near)})" if total > 1 else "")
        else:
            text = f"{all_of_them} met"
        return f"{text}{self._heldout_clause}. Task loss {number(self.task_loss)}."

    @property
    def _heldout_clause(self) -> str:
        if not self.trained:
            return ""
        missed = [f"{row.constraint} {_pm(row.mean, row.high)}, allowed {row.bounds}" for row in self.missed]
        if missed:
            return f"{', and' if self.violated else ' in training, but not'} held out: {'; '.join(missed)}"
        if any(row.verdict == "violated, uncertain" for row in self.trained):
            return "; held out it is uncertain" if self.violated else " in training; held out it is uncertain"
        return "; held out they are met" if self.violated else ", in training and held out"


def number(value: float, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "-"


def _pm(value: float, high: float) -> str:
    return f"{number(value)} ± {number(high - value, 2)}"


def judge(run: Run) -> Judged:
    """The verdicts of the last step with an estimate, by the same rules as ``objective.report()``."""
    states = [_Bound(run, *side) for side in run.sides]
    together = _together(states)
    rows = []
    for i, state in enumerate(states):
        others = [f"{s.constraint} ({s.side})" for j, s in enumerate(states) if j in together and j != i]
        rows.append(state.row(others if i in together else []))
    loss = run.column("loss/task")
    averaged = max(min(10, len(loss)), min(200, len(loss) // 10))
    tail = loss[-averaged:][np.isfinite(loss[-averaged:])]
    heldout = [r for name, e in run.evaluations.items() for r in _heldout(name, e)]
    return Judged(run, rows, heldout, float(tail.mean()) if len(tail) else math.nan, averaged)


class _Bound:
    """One bound with its violations ``z`` over all steps, in scales (or the constraint's unit where none is known)."""

    def __init__(self, run: Run, constraint: str, side: str) -> None:
        self.constraint, self.side, self.bound = constraint, side, run.bound(constraint, side)
        prefix = f"constraints/{constraint}"
        self.value, self.stderr = run.column(f"{prefix}/value"), run.column(f"{prefix}/stderr")
        self.slack = run.slack(constraint, side)
        self.multiplier, self.mu = (run.column(f"{prefix}/{side}/{name}") for name in ("multiplier", "mu"))
        scale = run.column(f"{prefix}/scale")
        known = np.flatnonzero(np.isfinite(scale))
        self.scale = float(scale[known[-1]]) if len(known) else math.nan
        unit = self.scale if len(known) else 1.0
        self.z, self.noise = -self.slack / unit, self.stderr / unit
        # A hundredth of a scale that is not known says nothing.
        self.tolerance = verdict_tolerance if len(known) else lambda noise: 0.0 if math.isnan(noise) else 2 * noise

    def row(self, others: Sequence[str]) -> BoundRow:
        known = np.flatnonzero(np.isfinite(self.slack))
        at = int(known[-1]) if len(known) else -1
        margin = 2 * float(self.stderr[at])
        value = float(self.value[at])
        return BoundRow(
            constraint=self.constraint,
            side=self.side,
            bound=self.bound,
            estimate=value,
            low=value - margin,
            high=value + margin,
            slack=float(self.slack[at]),
            multiplier=float(self.multiplier[at]),
            mu=float(self.mu[at]),
            verdict=verdict(float(self.z[at]), self.tolerance(float(self.noise[at])), others),
        )


def _together(states: Sequence[_Bound]) -> list[int]:
    """Bounds that look infeasible together, seen from the log."""
    if len(states) < 2 or any(math.isnan(s.scale) for s in states):
        return []  # violations in different units cannot be compared
    z, noise, multiplier = (np.stack([getattr(s, name) for s in states], 1) for name in ("z", "noise", "multiplier"))
    watch = FeasibilityWatch(len(states))
    # A step's multipliers come from its estimates; those in force while it was measured are the ones before.
    for i in range(max(1, len(z) - _WATCHED), len(z)):
        if np.isfinite(z[i]).any():
            watch.update(
                z[i].tolist(), np.nan_to_num(noise[i], nan=1.0).tolist(), np.nan_to_num(multiplier[i - 1]).tolist()
            )
    return watch.together()


def _heldout(name: str, evaluation: dict[str, Any]) -> list[HeldOut]:
    nll = _number(evaluation.get("nll"))
    constraints = evaluation.get("constraints") or {}
    rows = [
        _heldout_row(name, nll, constraint, result)
        for constraint, result in constraints.items()
        if isinstance(result, dict)
    ]
    return rows or [HeldOut(name, nll, "", math.nan, math.nan, math.nan, "", "", math.nan)]


def _heldout_row(name: str, nll: float, constraint: str, result: dict[str, Any]) -> HeldOut:
    mean, stderr, censored = (_number(result.get(key)) for key in ("mean", "stderr", "censored"))
    lower, upper = (_number(result.get(key)) for key in ("lower", "upper"))
    low, high = mean - 1.96 * stderr, mean + 1.96 * stderr

    def within(value: float) -> bool:
        return not (value < lower or value > upper)  # NaN: no bound on that side

    if not math.isfinite(mean):
        word = "unknown"
    elif within(mean):
        word = "met" if within(low) and within(high) else "met, uncertain"
    else:
        outside = low > upper or high < lower
        word = "violated" if outside else "violated, uncertain"
    bounds = f"{'-∞' if math.isnan(lower) else f'{lower:g}'} to {'∞' if math.isnan(upper) else f'{upper:g}'}"
    return HeldOut(name, nll, constraint, mean, low, high, bounds, word, censored)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def headline(judged: Sequence[Judged]) -> str:
    """One sentence about all runs together."""
    if len(judged) == 1:
        return judged[0].sentence
    bound = [j for j in judged if j.rows]
    good = [j for j in bound if j.good]
    if not bound:
        return f"{len(judged)} runs without bounds."
    text = f"{len(good)} of {len(bound)} runs with bounds {'meets' if len(good) == 1 else 'meet'} all of them"
    comparable = [j for j in good if math.isfinite(j.task_loss)]
    if len(good) > 1 and all(math.isfinite(j.nll) for j in good):
        best = min(good, key=lambda j: j.nll)
        text += f"; of these {best.run.name} has the smallest held-out NLL ({number(best.nll)})"
    elif len(comparable) > 1:
        best = min(comparable, key=lambda j: j.task_loss)
        text += f"; of these {best.run.name} has the smallest task loss ({number(best.task_loss)})"
    elif len(good) == 1:
        text += f": {good[0].run.name} (task loss {number(good[0].task_loss)})"
    return text + "."
