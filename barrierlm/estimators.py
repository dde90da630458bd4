"""How the samples of a window become a mean with a standard error.

A window is summed up by one row of numbers per constraint (`Column`). Rows add up over micro-batches and over
ranks, which is what makes estimates independent of how the window was split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .constraints import Bounds
from .saved import saved_tensor, vector

#: Position buckets of per-token costs: exact below 64, then eight per octave up to 16,384.
NUM_POSITIONS = 128


class Column(IntEnum):
    """Columns of a window's row. d is a sample minus the committed mean (a bound, before the first commit).

    Samples of one group are dependent, so the standard error is taken over groups: T and n are a group's sum
    of d and its size. A sample without a group is a group of its own.
    """

    COUNT = 0  # number of samples
    SUM = 1  # sum of d
    SQUARES = 2  # sum of d^2
    GROUPS = 3  # number of groups
    GROUP_SQUARES = 4  # sum of T^2
    GROUP_CROSS = 5  # sum of T n
    GROUP_SIZES = 6  # sum of n^2
    EXACT = 7  # number of values without sampling noise
    NONFINITE = 8  # number of NaN and infinite inputs
    BAD_GROUPS = 9  # samples that are alone in their group
    POSITIONS = 10  # first of NUM_POSITIONS sums of reward-to-go, then as many counts


NUM_COLUMNS = Column.POSITIONS + 2 * NUM_POSITIONS


def wide_dtype(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on the one kind of device that has no fp64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def neighbours(index: tuple[int, ...]) -> bool:
    """Whether these constraints follow each other: a slice, then, and no index tensor."""
    return index == tuple(range(index[0], index[0] + len(index)))


def rows_of(table: Tensor, index: tuple[int, ...]) -> Tensor:
    """``table[index]``, without copying the index to the table's device, which would wait for it."""
    if neighbours(index):
        return table if len(index) == table.shape[0] else table[index[0] : index[-1] + 1]
    return torch.stack([table[k] for k in index])


def window_row(
    d: Tensor,
    n: Tensor,
    total: Tensor,
    bad: Tensor,
    same: Tensor | None = None,
    *,
    exact: bool = False,
    alone: Tensor | None = None,
    more: Sequence[Tensor] = (),
) -> Tensor:
    """The first columns of the rows of a micro-batch's samples ``d`` [S, n], up to `Column.POSITIONS`; no host sync.

    Args:
        d: Samples, centred, in fp64.
        n: Their numbers [S].
        total: Their sums [S].
        bad: Numbers of measurements [S] that were not finite. Where it is not 0, nothing else of the row counts, and
            may be anything.
        same: [n, n], 1 where two samples are of one group; None: every sample is a group of its own.
        exact: Whether the values have no sampling noise.
        alone: Number of samples that are alone in their group, 0-d.
        more: All columns [S, ...] from there on, if any is not 0.
    """
    squares = (d * d).sum(1)
    if same is None:
        first = [n, total, squares, n, squares, total, n]
    else:
        size, group_sum = same.sum(1), d @ same
        # Each group is seen once per member, hence the divisions by its size.
        groups, sizes = (1 / size).sum().expand_as(n), size.sum().expand_as(n)
        first = [n, total, squares, groups, (group_sum**2 / size).sum(1), group_sum.sum(1), sizes]
    # Where it matters what stands beside it, `bad` is 0.
    row = torch.stack([*first, n if exact else bad, bad, bad if alone is None else alone.expand_as(n)], 1)
    return torch.cat([row, *more], 1) if more else row


#: Exact values differ by less than this share of their distance from the mean before, squared: well above the round-off
#: of their sums, which three micro-batches have and two have not.
_EXACT = 1e-12
#: Weight of the newest window in `EMA.typical`.
_SLOW = 0.05


class _Sums(NamedTuple):
    """What an `EMA` keeps of one constraint: weighted sums over its windows, and their mean."""

    weight: float = 0.0
    weight2: float = 0.0
    within: float = 0.0
    within_weight2: float = 0.0
    spread: float = 0.0
    mean: float = 0.0
    exact: float = 0.0
    slow_weight: float = 0.0
    sample_variance: float = 0.0
    window_variance: float = 0.0

    @property
    def typical(self) -> float:
        """Standard deviation of single samples, or 4 of a window's mean where that is less; NaN if not known."""
        if self.slow_weight <= 0:
            return math.nan
        return math.sqrt(min(self.sample_variance, 16 * self.window_variance))

    def stderrs(self) -> tuple[float, float]:
        """Of the mean, and of one window's mean, as noisy as the recent ones; 0 if exact, NaN if not known."""
        weight, weight2 = self.weight, self.weight2
        if weight <= 0:
            return math.nan, math.nan
        if self.exact >= weight * (1 - 1e-12):
            return 0.0, 0.0
        own = weight2 / max(weight * weight, 1e-300)
        # Windows without a spread of their own are taken to be as noisy as those that have one.
        if self.within_weight2 > 0 and self.within_weight2 >= 0.5 * weight2:
            variance = self.within / self.within_weight2
        elif own < 1:
            variance = self.spread / weight / (1 - own)
        else:
            return math.nan, math.nan
        return (math.sqrt(variance * own), math.sqrt(variance)) if variance > 0 else (0.0, 0.0)


class EMA:
    r"""Exponential moving average of window means, corrected for its start, with its standard error.

    With weights :math:`w_i = \alpha (1-\alpha)^{t-i}` over the windows that measured something,

    .. math:: m = \frac{\sum_i w_i x_i}{\sum_i w_i}, \qquad
              \operatorname{Var} m = \frac{\sum_i w_i^2 v_i}{(\sum_i w_i)^2}

    where :math:`x_i` is the mean of window i and :math:`v_i` the variance of that mean from the spread of
    the window's samples (of its groups, where responses share a prompt). Windows of fewer than two groups
    have no such spread; if they are the majority, :math:`v` is the spread between window means.

    Args:
        smoothing: Weight of the newest window, in (0, 1].

    Raises:
        ValueError: ``smoothing`` outside (0, 1].

    Example:
        >>> EMA(0.1).smoothing
        0.1

    Source: bias correction as in Adam (Kingma and Ba 2015, section 3).
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing={smoothing!r}; allowed: 0 < smoothing <= 1")
        self.smoothing = float(smoothing)
        self._sums: list[_Sums] = []

    def start(self, origin: Tensor) -> None:
        """Forget everything; ``origin`` [K] is what first samples are centred by. Called by the objective."""
        self._sums = [_Sums(mean=x) for x in origin.double().tolist()]

    @property
    def known(self) -> Tensor:
        """Which constraints [K] have an estimate."""
        return torch.tensor([s.weight > 0 for s in self._sums], device="cpu")

    @property
    def mean(self) -> list[float]:
        """Estimates [K] in the users' units; NaN before the first window."""
        return [s.mean if s.weight > 0 else math.nan for s in self._sums]

    @property
    def center(self) -> list[float]:
        """Estimates [K], before the first window the origin: the baseline, and what samples are centred by."""
        return [s.mean for s in self._sums]

    @property
    def stderr(self) -> list[float]:
        """Standard errors [K] in the users' units; 0 for exact values, NaN where not yet known."""
        return [own for own, _ in self.stderrs()]

    def stderrs(self) -> list[tuple[float, float]]:
        """By constraint [K]: `stderr`, and that of a single window's mean, as noisy as the recent ones."""
        return [s.stderrs() for s in self._sums]

    @property
    def typical(self) -> list[float]:
        """What learned multipliers count a violation in, [K] in the users' units; NaN where not known.

        The standard deviation of single samples, or four standard errors of a window's mean where that is less; both
        averaged over some 20 windows.
        """
        return [s.typical for s in self._sums]

    def update(self, rows: list[list[float]]) -> None:
        """Commit the sums of a window's reduced rows [K, Column.POSITIONS]; one without samples changes nothing."""
        self._sums = [
            self._moved(s, row) if row[Column.COUNT] > 0 else s for s, row in zip(self._sums, rows, strict=True)
        ]

    def _moved(self, s: _Sums, row: list[float]) -> _Sums:
        # Comparisons where max() would read better: a call of it costs as much as five of these lines.
        count, total, squares, groups, group_squares, group_cross, group_sizes, num_exact = row[: Column.EXACT + 1]
        d = total / count
        deviation = group_squares - 2 * d * group_cross + d * d * group_sizes
        deviation = deviation if deviation > 0 else 0.0
        # Exact values that differ within a window are samples after all.
        exact = num_exact >= count and deviation <= _EXACT * group_squares
        deviation = 0.0 if exact else deviation
        has_spread = groups > 1.5
        variance = deviation / (count * count) * groups / (groups - 1) if has_spread else 0.0
        # Of one sample alone about the mean before it, which the first window does not have.
        if count > 1.5:
            single = squares - count * d * d
            single = single / (count - 1) if single > 0 else 0.0
        else:
            single = squares
        slow = _SLOW if count > 1.5 or s.weight > 0 else 0.0
        slow_weight = (1 - slow) * s.slow_weight + slow
        share = slow / slow_weight if slow else 0.0
        own = variance if has_spread else single / count
        a, x = self.smoothing, s.mean + d
        weight = (1 - a) * s.weight + a
        step = x - s.mean
        mean = s.mean + a / weight * step
        return _Sums(
            weight,
            (1 - a) ** 2 * s.weight2 + a**2,
            (1 - a) ** 2 * s.within + a**2 * variance,
            (1 - a) ** 2 * s.within_weight2 + a**2 * has_spread,
            (1 - a) * s.spread + a * step * (x - mean),
            mean,
            (1 - a) * s.exact + a * exact,
            slow_weight,
            s.sample_variance + share * (single - s.sample_variance),
            s.window_variance + share * (own - s.window_variance),
        )

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of the state: tensors only."""
        return {name: vector([getattr(s, name) for s in self._sums]) for name in _Sums._fields}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        size, signed = [(len(self._sums),)], ("mean", "spread")
        columns = [
            saved_tensor(state, name, size, low=-math.inf if name in signed else 0.0).tolist() for name in _Sums._fields
        ]
        self._sums = [_Sums(*numbers) for numbers in zip(*columns, strict=True)]


class BatchMean(EMA):
    """The newest window's own mean and standard error, with no memory.

    Right where windows are large or values exact; `EMA` averages over windows where they are not.

    Example:
        >>> BatchMean().smoothing
        1.0
    """

    def __init__(self) -> None:
        super().__init__(1.0)


#: Of their distance from the bound: samples within it, and samples outside, that are spread less differ by round-off.
#: What starts at 0 has more of it beside its bound: a KL in bf16.
_ROUND_OFF_WITHIN, _ROUND_OFF = 1e-3, 1e-6


class Scales:
    """What one unit of violation stands for, per constraint [K]; NaN until it is known, then frozen.

    Where the definition does not tell, it is 1 for exact values and else the standard deviation of the
    first two or more samples. If these are all the same, or differ by round-off (a KL before the first step), it is
    their distance from the bound.
    """

    def __init__(self, bounds: Bounds, origin: Tensor) -> None:
        self._origin = origin.tolist()
        self._upper = [c.lower is None for c in bounds.constraints]
        self.value = [c.known_scale() for c in bounds.constraints]
        self._sums = [(0.0, 0.0, 0.0)] * len(self.value)

    def update(self, rows: list[list[float]], center: list[float]) -> None:
        """Look at the sums of a window's reduced rows [K, Column.POSITIONS], centred by ``center`` [K]."""
        if not any(math.isnan(value) for value in self.value):
            return
        seen = [self._seen(k, row, center[k]) for k, row in enumerate(rows)]
        self.value, self._sums = [value for value, _ in seen], [sums for _, sums in seen]

    def _seen(self, k: int, row: list[float], center: float) -> tuple[float, tuple[float, float, float]]:
        # Sums about the origin, a bound of the constraint: large offsets cost no digits.
        n, d, dd, shift = row[Column.COUNT], row[Column.SUM], row[Column.SQUARES], center - self._origin[k]
        before = self._sums[k]
        count, total, squares = sums = (
            before[0] + n,
            before[1] + (d + n * shift),
            before[2] + (dd + 2 * shift * d + n * (shift * shift)),
        )
        value = self.value[k]
        if not math.isnan(value) or n <= 0:
            return value, sums
        if row[Column.EXACT] >= n:
            return 1.0, sums
        if count < 2:
            return value, sums
        offset = total / count
        distance, within = abs(offset), (offset < 0) == self._upper[k]
        std = math.sqrt(max(squares - total * total / count, 0.0) / (count - 1))
        least = (_ROUND_OFF_WITHIN if within else _ROUND_OFF) * distance
        return (std if std > least else distance or 1.0), sums

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of the state: tensors only."""
        return {"value": vector(self.value), "sums": vector(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        count = len(self.value)
        value = saved_tensor(state, "value", [(count,)], allow=[math.nan], low=5e-324)
        sums = saved_tensor(state, "sums", [(count, 3)])
        self.value, self._sums = value.tolist(), [tuple(row) for row in sums.tolist()]
