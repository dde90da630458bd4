"""What a constrained run may claim: multipliers, a bound on the gap, and how stationary the point is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .barriers import LogBarrier, RelaxedLogBarrier
from .committed import Committed
from .diagnostics import bound_text, table
from .intervals import Estimate, inner_products, jackknife_ratio, normal_quantile
from .learning import AdaptiveBarrier, ModifiedBarrier
from .probe import GradientProbe

#: Rules whose mu is a barrier's.
_BARRIERS = (LogBarrier, RelaxedLogBarrier, ModifiedBarrier, AdaptiveBarrier)
#: A residual up to this share of the task gradient (a norm) counts as stationary; a convention.
_SMALL = 0.2


class BoundMultiplier(NamedTuple):
    """One bound: its ``multiplier`` (per unit of the scale), the same ``per_unit`` of the user's, and its violation z.

    ``z`` and ``stderr`` are in units of the scale, NaN where not known.
    """

    constraint: str
    side: str
    bound: float
    multiplier: float
    per_unit: float
    z: float
    stderr: float
    verdict: str


class Stationarity(NamedTuple):
    r"""How far the Lagrangian's gradient is from zero, for task gradient t and constraint gradient c (means).

    ``rho2`` is :math:`\|t + c\|^2 / \|t\|^2`, ``cosine`` that of t and c; 0 and -1 at a KKT point. Norms are in the
    loss's unit per unit of the parameters. All are unbiased before roots and ratios, so that ``rho2.value`` may be
    below 0 and ``cosine.value`` beyond -1; a norm whose square came out below 0 is 0. Two batches give no intervals.
    """

    rho2: Estimate
    cosine: Estimate
    task_norm: float
    constraint_norm: float
    residual_norm: float
    num_batches: int


class Certificate(NamedTuple):
    r"""What may be concluded about a constrained run; prints as a table and a plain `sentence`.

    .. math:: f(x) - f^* \;\le\; -\sum_i \lambda_i z_i + \|\nabla L\| \, \|x - x^*\|, \qquad
              L = f + \sum_i \lambda_i z_i

    for convex f and z (weak duality: the multipliers, whatever they are, give a lower bound on f* where x minimises the
    Lagrangian L). Language models are not convex in their weights: there it is a sign of a stationary point only.

    ``complementarity`` is :math:`-\sum \lambda_i z_i` at the multipliers in force; its interval takes them as given.
    Both sides of a constraint share one estimate, which is combined exactly; how the estimates of *different*
    constraints vary together is not known, so their standard errors add up (the worst case). ``gap_bound`` is the
    interval's upper end. ``mu_sum`` is the sum of the mu in force (m mu): what a plain barrier leaves inside its
    bounds; learned multipliers leave less; NaN for rules that are no barriers. ``stationarity`` is None without
    gradients. ``level`` is that of each interval, not of all of them together.

    Estimates average over recent windows (`EMA`): they are about the recent policy, not exactly the last one. Bounds
    without an estimate have no multiplier, and add nothing.

    Source: Boyd and Vandenberghe, Convex Optimization, sections 5.2.2 and 5.5.
    """

    bounds: tuple[BoundMultiplier, ...]
    complementarity: Estimate
    mu_sum: float
    gap_bound: float
    stationarity: Stationarity | None
    level: float

    @property
    def sentence(self) -> str:
        """In plain words, what may be concluded and what not."""
        together = self._labels("infeasible")
        if together:
            return (
                f"{together} do not seem to have a common solution (what one gains the others "
                "lose, while their multipliers grow), so nothing is claimed about the task loss."
            )
        violated, unknown = self._labels("violated"), self._labels("unknown")
        if violated:
            return f"Violated beyond noise: {violated}; the policy is not within its bounds, and no gap is claimed."
        if unknown:
            return f"Not known yet: {unknown}; nothing is claimed before every bound has been measured."
        if not math.isfinite(self.gap_bound):
            return "The estimates' standard errors are not known yet, so nothing is claimed."
        level, m = f"{100 * self.level:.4g}%", len(self.bounds)
        met = "The bound is met or active" if m == 1 else f"All {m} bounds are met or active"
        claim = (
            f"{met}. If loss and bounds are convex, the task loss is at most {max(self.gap_bound, 0):.2g} above the "
            f"best possible within these bounds ({level} confidence), provided that the Lagrangian's gradient is zero"
        )
        if self.stationarity is None:
            return f"{claim}, which was not measured (a GradientProbe does)."
        rho2, batches = self.stationarity.rho2, self.stationarity.num_batches
        if not math.isfinite(rho2.high):
            why = "2 batches give no interval" if batches == 2 else "the task gradient itself is within its noise"
            return f"{met}, but whether the point is stationary cannot be told: {why}. More batches may tell."
        value, low, high = (math.sqrt(max(x, 0)) for x in (rho2.value, rho2.low, rho2.high))
        measured = f"{value:.0%} of the task gradient ({level} interval: {low:.0%} to {high:.0%})"
        if low > _SMALL:
            return (
                f"{met}, but the Lagrangian's gradient is not zero: {measured}. No stationary point, and no gap is "
                "claimed."
            )
        if high > _SMALL:
            return (
                f"{met}, but whether the point is stationary cannot be told: the Lagrangian's gradient is {measured}. "
                "More batches may tell."
            )
        return f"{claim}; measured: {measured}. Without convexity, read it as a stationary point, not as an optimum."

    def __str__(self) -> str:
        head = ("constraint", "bound", "multiplier", "per unit", "z", "+-", "verdict")
        body = [
            (
                row.constraint,
                bound_text(row.side, row.bound),
                *(f"{number:.4g}" for number in (row.multiplier, row.per_unit, row.z, row.stderr)),
                row.verdict,
            )
            for row in self.bounds
        ]
        numbers = [("-sum multiplier z", self.complementarity)]
        if self.stationarity is not None:
            numbers += [("|t + c|^2 / |t|^2", self.stationarity.rho2), ("cosine of t, c", self.stationarity.cosine)]
        ends = f"{100 * self.level:.4g}% interval"
        lines = [
            (name, *(f"{x:.4g}" for x in number[:2]), f"{number.low:.4g} to {number.high:.4g}")
            for name, number in numbers
        ]
        parts = [table(head, body), table(("", "estimate", "+-", ends), lines)]
        notes = ["z averages over recent windows; it is about the recent policy, not exactly the last one"]
        if not math.isnan(self.mu_sum):
            notes.append(f"sum of mu: {self.mu_sum:.4g}")
        if self.stationarity is not None:
            s = self.stationarity
            notes.append(f"|t|: {s.task_norm:.4g}, |c|: {s.constraint_norm:.4g}, from {s.num_batches} batches")
        return "\n".join([*parts, *notes, self.sentence])

    def _labels(self, verdict: str) -> str:
        return " and ".join(f"{row.constraint} ({row.side})" for row in self.bounds if row.verdict.startswith(verdict))


def certify(
    committed: Committed, gradients: GradientProbe | None, level: float, group: dist.ProcessGroup | None
) -> Certificate:
    """See `BarrierObjective.certificate`."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise ValueError(f"level={level!r}; allowed: 0 < level < 1")
    if gradients is not None and not isinstance(gradients, GradientProbe):
        raise TypeError(f"gradients is a {type(gradients).__name__}; allowed: a GradientProbe or None")
    if not bool(committed.estimator.known.any()):
        raise RuntimeError("certificate() with nothing measured yet; allowed: after step() or calibrate()")
    report = committed.report
    multipliers = [row.multiplier for row in report]
    if gradients is not None and gradients.multipliers not in (None, multipliers):
        raise ValueError(
            f"gradients were taken under the multipliers {gradients.multipliers}, and {multipliers} are in force; "
            "allowed: certificate() before the next step(), or a new GradientProbe"
        )
    bounds = tuple(
        BoundMultiplier(
            row.constraint,
            row.side,
            row.bound,
            row.multiplier,
            row.multiplier / row.scale,
            -row.slack / row.scale,
            row.stderr / row.scale,
            row.verdict,
        )
        for row in report
    )
    complementarity = _complementarity(bounds, level)
    barrier = isinstance(committed.rule, _BARRIERS)
    return Certificate(
        bounds,
        complementarity,
        sum(row.mu for row in report if row.verdict != "unknown") if barrier else math.nan,
        complementarity.high,
        None if gradients is None else _stationarity(*gradients.products(group), level),
        float(level),
    )


def _complementarity(bounds: tuple[BoundMultiplier, ...], level: float) -> Estimate:
    """-sum lambda z. A bound of no weight adds nothing, even if its z or standard error is not known."""
    in_force = [row for row in bounds if row.multiplier > 0]
    value = -sum(row.multiplier * row.z for row in in_force)
    weights: dict[str, float] = {}
    for row in in_force:
        weights[row.constraint] = weights.get(row.constraint, 0.0) + row.multiplier * (1 if row.side == "upper" else -1)
    errors = {row.constraint: row.stderr for row in in_force}
    stderr = math.fsum(abs(weights[name]) * errors[name] for name in weights)
    width = normal_quantile(level) * stderr
    return Estimate(value, stderr, value - width, value + width)


def _stationarity(own: Tensor, cross: Tensor, level: float) -> Stationarity:
    if len(own) < 2:
        raise ValueError(
            f"gradients has {len(own)} batch(es), over all ranks; allowed: at least 2, 4 or more for intervals"
        )
    whole, without = inner_products(own, cross)
    tt, tc, cc = ((x[..., i, j], y[..., i, j]) for x, y in [(whole, without)] for i, j in ((0, 0), (0, 1), (1, 1)))
    rr = tt[0] + 2 * tc[0] + cc[0], tt[1] + 2 * tc[1] + cc[1]
    # Both clamped: two squares below 0 would make a product above it.
    lengths, lengths_without = ((t.clamp(min=0) * c.clamp(min=0)).sqrt() for t, c in zip(tt, cc, strict=True))
    task_norm, constraint_norm, residual_norm = (math.sqrt(max(x[0].item(), 0.0)) for x in (tt, cc, rr))
    rho2 = jackknife_ratio(rr, tt, level, 0.0, math.inf)
    cosine = jackknife_ratio(tc, (lengths, lengths_without), level, -1.0, 1.0)
    return Stationarity(rho2, cosine, task_norm, constraint_norm, residual_norm, len(own))
