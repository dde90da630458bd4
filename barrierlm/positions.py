"""Baselines of per-token costs: what the mean reward-to-go has been at each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .estimators import NUM_POSITIONS, Column
from .saved import saved_tensor


def position_bucket(position: Tensor) -> Tensor:
    """The bucket of a token position: exact below half the buckets, then eight buckets per octave."""
    half = NUM_POSITIONS // 2
    # 8 log2(position / half) + half; from half on a bucket is wider than a position, and before that this is half.
    eighths = 8 * torch.log2(position.double()) + (half - 8 * math.log2(half))
    return torch.minimum(position, eighths.clamp(half, NUM_POSITIONS - 1).long())


class PositionBaseline:
    """Mean reward-to-go at each token position, over committed windows, for per-token costs.

    A baseline that depends on the position alone, and not on the sample it is subtracted from, leaves the
    gradient unbiased. Positions nobody has reached yet take the value of the last one before them.
    """

    def __init__(self, num_constraints: int, smoothing: float) -> None:
        self.smoothing = smoothing
        self._sums = torch.zeros(num_constraints, 2, NUM_POSITIONS, dtype=torch.float64, device="cpu")

    def update(self, rows: Tensor) -> bool:
        """Commit a window's reduced rows [K, C]; False if it had no per-token costs."""
        if rows.shape[1] == Column.POSITIONS:
            return False
        # Whoever has a token has a first one.
        measured = [count > 0 for count in rows[:, -NUM_POSITIONS].tolist()]
        if not any(measured):
            return False
        window = rows[:, Column.POSITIONS :].reshape(-1, 2, NUM_POSITIONS)
        moved = self._sums.lerp(window, self.smoothing)
        if not all(measured):
            moved = torch.where(torch.tensor(measured, device="cpu")[:, None, None], moved, self._sums)
        self._sums = moved
        return True

    def table(self) -> Tensor:
        """Baselines [K, NUM_POSITIONS]; 0 where nothing has been seen."""
        total, count = self._sums.unbind(1)
        places = torch.arange(NUM_POSITIONS, device=count.device)
        last = torch.where(count > 1e-12, places, 0).cummax(-1).values
        # The first place has been seen if any has.
        return (total / count.clamp(min=1e-12)).gather(-1, last)

    def state_dict(self) -> Tensor:
        """A deep copy of the sums."""
        return self._sums.clone()

    def load_state_dict(self, state: Tensor) -> None:
        """Restore what `state_dict` gave."""
        self._sums = saved_tensor({"sums": state}, "sums", [self._sums.shape])
