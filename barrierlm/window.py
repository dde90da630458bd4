"""The open window: sums of all micro-batches since the last step, and their reduction over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import sum_over_ranks
from .estimators import NUM_COLUMNS, wide_dtype


class Window:
    """Rows [K, NUM_COLUMNS] that add up on the device of the measurements; nothing waits for it until `reduce`."""

    def __init__(self, num_constraints: int) -> None:
        self.num_constraints = num_constraints
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._rows: Tensor | None = None
        self.calls = 0
        #: The numbers of samples that the user announced, by constraint.
        self.expected: dict[int, int | Tensor] = {}

    def add(self, rows: dict[int, Tensor], expected: dict[int, int | Tensor]) -> None:
        """One call's rows [NUM_COLUMNS], by constraint."""
        for k, row in rows.items():
            if self._rows is None:
                shape = (self.num_constraints, NUM_COLUMNS)
                self._rows = torch.zeros(shape, dtype=wide_dtype(row.device), device=row.device)
            self._rows[k].add_(row.to(self._rows))
        self.expected |= expected
        self.calls += 1

    def reduce(self, group: dist.ProcessGroup | None) -> tuple[int, Tensor]:
        """Numbers of calls and rows summed over the ranks, in fp64 on the CPU; the window itself stays."""
        rows = self._rows
        if rows is None:
            rows = torch.zeros(self.num_constraints, NUM_COLUMNS, dtype=torch.float64)
        flat = sum_over_ranks(torch.cat([rows.new_full((1,), self.calls), rows.flatten()]), group).double()
        return int(flat[0]), flat[1:].view_as(rows)
