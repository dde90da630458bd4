"""Estimates with intervals: Student's quantile, and ratios of norms and inner products of mean gradients."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A number with its standard error and the ends of its interval; NaN or infinite where not known."""

    value: float
    stderr: float
    low: float
    high: float


def normal_quantile(level: float) -> float:
    """q with P(|N| <= q) = level."""
    return NormalDist().inv_cdf((1 + level) / 2)


def student_quantile(level: float, dof: int) -> float:
    """q with P(|T| <= q) = level for a whole number of degrees of freedom.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4, closed forms in theta = atan(t / sqrt(dof)); inverted by bisection.
    """

    def inside(theta: float) -> float:
        odd, cos2 = dof % 2, math.cos(theta) ** 2
        term = math.cos(theta) if odd else 1.0
        total = term if dof > 1 else 0.0
        for i in range(2 + odd, dof - 1, 2):
            term *= (i - 1) / i * cos2
            total += term
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(dof) * math.tan(low)


def inner_products(own: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    r"""Unbiased <E g_a, E g_b> [2, 2] of two kinds of gradients, and the same without each of the batches [J, 2, 2].

    .. math:: U_{ab} = \frac{\langle S_a, S_b \rangle - \sum_j \langle g_{ja}, g_{jb} \rangle}{J (J - 1)}, \qquad
              S = \sum_j g_j

    Only pairs of different batches are in it, whose noise is independent: a batch's own product would add it.

    ``own`` [J, 2, 2] holds <g_ja, g_jb>, ``cross`` [J, 2, 2] <S_a, g_jb>. J of 2 leaves nothing to leave out: NaN.
    """
    j = len(own)
    pairs = (cross - own).sum(0)
    without = pairs - cross - cross.mT + 2 * own
    rest = (j - 1) * (j - 2)
    return pairs / (j * (j - 1)), without / rest if rest else without * math.nan


def jackknife_ratio(
    top: tuple[Tensor, Tensor], bottom: tuple[Tensor, Tensor], level: float, least: float, most: float
) -> Estimate:
    r"""a / b within [least, most], each given as (0-d estimate, estimates without each of the batches [J]).

    The interval holds the ratios that are not rejected (Fieller): with jackknife variances V of a and b,

    .. math:: (a - \rho b)^2 \le q^2 (V_{aa} - 2 \rho V_{ab} + \rho^2 V_{bb})

    It covers as it says where a symmetric one does not, b being noisy, and it is all of the range where b cannot be
    told from 0. The standard error is the jackknife's of the ratio itself.

    Source: Fieller 1954; Quenouille 1956 and Tukey 1958 (jackknife).
    """
    a, b = top[0].item(), bottom[0].item()
    value = a / b if b > 0 else math.nan
    j = len(top[1])

    def covariance(x: Tensor, y: Tensor) -> float:
        return (j - 1) / j * float(((x - x.mean()) * (y - y.mean())).sum())

    ratio = top[1] / bottom[1]
    stderr = math.sqrt(covariance(ratio, ratio)) if value == value else math.nan
    q2 = student_quantile(level, j - 1) ** 2
    curve = b * b - q2 * covariance(bottom[1], bottom[1])
    if not (b > 0 and curve > 0):
        return Estimate(value, stderr, least, most)
    middle = a * b - q2 * covariance(*(top[1], bottom[1]))
    root = math.sqrt(max(middle**2 - curve * (a * a - q2 * covariance(top[1], top[1])), 0.0))
    low, high, half = (middle - root) / curve, (middle + root) / curve, root / curve
    # Unbiased estimates may leave the range. An interval cut to a point would look like certainty: it keeps half its
    # width inside.
    low, high = min(low, most - half), max(high, least + half)
    return Estimate(value, stderr, min(max(low, least), most), min(max(high, least), most))
