"""How the samples of a window become a mean with a standard error.

A window is summed up by one row of numbers per constraint (`Column`). Rows add up over micro-batches and over
ranks, which is what makes estimates independent of how the window was split.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .constraints import Bounds
from .saved import saved_tensor

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


def window_row(d: Tensor, same: Tensor | None = None) -> Tensor:
    """Sums of one micro-batch's samples ``d`` [n] as the first columns of a row [Column.EXACT]; no host sync.

    ``same`` [n, n] is 1 where two samples are of one group; None: every sample is a group of its own.
    """
    n = torch.full((), float(d.numel()), dtype=d.dtype, device=d.device)
    total, squares = d.sum(), (d * d).sum()
    if same is None:
        return torch.stack([n, total, squares, n, squares, total, n])
    size, group_sum = same.sum(1), (same * d).sum(1)
    # Each group is seen once per member, hence the divisions by its size.
    return torch.stack([n, total, squares, (1 / size).sum(), (group_sum**2 / size).sum(), group_sum.sum(), size.sum()])


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
        self._sums: dict[str, Tensor] = {}

    def start(self, origin: Tensor) -> None:
        """Forget everything; ``origin`` [K] is what first samples are centred by. Called by the objective."""
        zeros = torch.zeros_like(origin, dtype=torch.float64)
        names = ("weight", "weight2", "within", "within_weight2", "spread", "mean", "exact")
        self._sums = {name: zeros.clone() for name in names} | {"mean": origin.double()}

    @property
    def known(self) -> Tensor:
        """Which constraints [K] have an estimate."""
        return self._sums["weight"] > 0

    @property
    def mean(self) -> Tensor:
        """Estimates [K] in the users' units; NaN before the first window."""
        return torch.where(self.known, self._sums["mean"], math.nan)

    @property
    def center(self) -> Tensor:
        """Estimates [K], before the first window the origin: the baseline, and what samples are centred by."""
        return self._sums["mean"]

    @property
    def stderr(self) -> Tensor:
        """Standard errors [K] in the users' units; 0 for exact values, NaN where not yet known."""
        s = self._sums
        return self._stderr(s["weight2"] / s["weight"].clamp(min=1e-300) ** 2)

    def stderr_over(self, windows: int) -> Tensor:
        """Standard errors [K] that the mean of so many windows, as noisy as the recent ones, would have."""
        return self._stderr(torch.full_like(self._sums["weight"], 1 / windows))

    def _stderr(self, share: Tensor) -> Tensor:
        """Of a mean whose variance is ``share`` [K] times that of one window's mean."""
        s = self._sums
        nan = torch.full_like(s["mean"], math.nan)
        own = s["weight2"] / s["weight"].clamp(min=1e-300) ** 2
        # Windows without a spread of their own are taken to be as noisy as those that have one.
        within = torch.where(s["within_weight2"] > 0, s["within"] / s["within_weight2"], nan)
        between = torch.where(own < 1, s["spread"] / s["weight"] / (1 - own), nan)
        variance = torch.where(s["within_weight2"] >= 0.5 * s["weight2"], within, between) * share
        variance = torch.where(self.known, variance.clamp(min=0), nan)
        return torch.where(s["exact"] >= s["weight"] * (1 - 1e-12), torch.zeros_like(variance), variance).sqrt()

    def update(self, rows: Tensor) -> Tensor:
        """Commit a window's reduced rows [K, NUM_COLUMNS]; returns which constraints [K] it had samples of."""
        count, groups = rows[:, Column.COUNT], rows[:, Column.GROUPS]
        measured = count > 0
        n = count.clamp(min=1)
        d = rows[:, Column.SUM] / n
        deviation = (
            rows[:, Column.GROUP_SQUARES] - 2 * d * rows[:, Column.GROUP_CROSS] + d * d * rows[:, Column.GROUP_SIZES]
        ).clamp(min=0)
        has_spread = (groups > 1.5).double()
        variance = deviation / n**2 * groups / (groups - 1).clamp(min=0.5)
        # Exact values that differ within a window are samples after all.
        same = deviation <= 1e-20 * rows[:, Column.GROUP_SQUARES]
        exact = ((rows[:, Column.EXACT] >= count) & same).double()

        a, s = self.smoothing, self._sums
        x = self.center + d
        weight = (1 - a) * s["weight"] + a
        step = x - s["mean"]
        mean = s["mean"] + a / weight * step
        new = {
            "weight": weight,
            "weight2": (1 - a) ** 2 * s["weight2"] + a**2,
            "within": (1 - a) ** 2 * s["within"] + a**2 * variance * has_spread,
            "within_weight2": (1 - a) ** 2 * s["within_weight2"] + a**2 * has_spread,
            "spread": (1 - a) * s["spread"] + a * step * (x - mean),
            "mean": mean,
            "exact": (1 - a) * s["exact"] + a * exact,
        }
        self._sums = {key: torch.where(measured, new[key], s[key]) for key in s}
        return measured

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of the state: tensors only."""
        return {key: value.clone() for key, value in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        signed = ("mean", "spread")
        self._sums = {
            key: saved_tensor(state, key, [own.shape], low=-math.inf if key in signed else 0.0)
            for key, own in self._sums.items()
        }


class BatchMean(EMA):
    """The newest window's own mean and standard error, with no memory.

    Right where windows are large or values exact; `EMA` averages over windows where they are not.

    Example:
        >>> BatchMean().smoothing
        1.0
    """

    def __init__(self) -> None:
        super().__init__(1.0)


class Scales:
    """What one unit of violation stands for, per constraint [K]; NaN until it is known, then frozen.

    Where the definition does not tell, it is 1 for exact values and else the standard deviation of the
    first two or more samples. If those are all the same it is their distance from the bound.
    """

    def __init__(self, bounds: Bounds, origin: Tensor) -> None:
        self._origin = origin
        self.value = torch.tensor([c.known_scale() for c in bounds.constraints], dtype=torch.float64)
        self._sums = torch.zeros(len(bounds.constraints), 3, dtype=torch.float64)

    def update(self, rows: Tensor, center: Tensor) -> None:
        """Look at a window's reduced rows [K, NUM_COLUMNS], whose samples were centred by ``center`` [K]."""
        if not bool(self.value.isnan().any()):
            return
        # Sums about the origin, a bound of the constraint: large offsets cost no digits.
        n, d, dd, shift = rows[:, Column.COUNT], rows[:, Column.SUM], rows[:, Column.SQUARES], center - self._origin
        self._sums = self._sums + torch.stack([n, d + n * shift, dd + 2 * shift * d + n * shift**2], 1)
        value = self.value.clone()
        for k in torch.nonzero(value.isnan() & (n > 0)).flatten().tolist():
            count, total, squares = self._sums[k].tolist()
            if rows[k, Column.EXACT] >= n[k]:
                value[k] = 1.0
            elif count >= 2:
                distance = abs(total / count)
                std = math.sqrt(max(squares - total**2 / count, 0.0) / (count - 1))
                value[k] = std if std > 1e-9 * distance else distance or 1.0
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of the state: tensors only."""
        return {"value": self.value.clone(), "sums": self._sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        value = saved_tensor(state, "value", [self.value.shape], allow=[math.nan], low=5e-324)
        self.value, self._sums = value, saved_tensor(state, "sums", [self._sums.shape])
