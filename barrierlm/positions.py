"""Baselines of per-token costs: what the mean reward-to-go has been at each position."""

from __future__ import annotations

import torch
from torch import Tensor

from .estimators import NUM_POSITIONS, Column
from .saved import saved_tensor


def position_bucket(position: Tensor) -> Tensor:
    """The bucket of a token position: exact below half the buckets, then eight buckets per octave."""
    half = NUM_POSITIONS // 2
    octaves = torch.log2(position.clamp(min=half).double() / half)
    return torch.where(position < half, position, (half + (8 * octaves).long()).clamp(max=NUM_POSITIONS - 1))


class PositionBaseline:
    """Mean reward-to-go at each token position, over committed windows, for per-token costs.

    A baseline that depends on the position alone, and not on the sample it is subtracted from, leaves the
    gradient unbiased. Positions nobody has reached yet take the value of the last one before them.
    """

    def __init__(self, num_constraints: int, smoothing: float) -> None:
        self.smoothing = smoothing
        self._sums = torch.zeros(num_constraints, 2, NUM_POSITIONS, dtype=torch.float64)

    def update(self, rows: Tensor) -> bool:
        """Commit a window's reduced rows [K, NUM_COLUMNS]; False if it had no per-token costs."""
        # Whoever has a token has a first one.
        if not any(rows[:, -NUM_POSITIONS].tolist()):
            return False
        window = rows[:, Column.POSITIONS :].reshape(-1, 2, NUM_POSITIONS)
        measured = window[:, 1].sum(-1) > 0
        moved = (1 - self.smoothing) * self._sums + self.smoothing * window
        self._sums = torch.where(measured[:, None, None], moved, self._sums)
        return True

    def table(self) -> Tensor:
        """Baselines [K, NUM_POSITIONS]; 0 where nothing has been seen."""
        total, count = self._sums[:, 0], self._sums[:, 1]
        seen = count > 1e-12
        places = torch.arange(NUM_POSITIONS).expand_as(count)
        last = torch.where(seen, places, 0).cummax(-1).values
        return torch.where(seen, total / count.clamp(min=1e-12), 0.0).gather(-1, last)

    def state_dict(self) -> Tensor:
        """A deep copy of the sums."""
        return self._sums.clone()

    def load_state_dict(self, state: Tensor) -> None:
        """Restore what `state_dict` gave."""
        self._sums = saved_tensor({"sums": state}, "sums", [self._sums.shape])
