"""The open window: sums of all micro-batches since the last step, and their reduction over the ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import sum_over_ranks, world_size
from .estimators import NUM_COLUMNS, neighbours, wide_dtype

#: More calls than a window has over all ranks; what is above it in the sum is the ranks' marks, exact in fp64.
_CALLS = 2**20


class Window:
    """Rows [K, NUM_COLUMNS] that add up on the device of the measurements; nothing waits for it until `reduce`."""

    def __init__(self, num_constraints: int, mark: int = 0) -> None:
        self.num_constraints = num_constraints
        #: A number below `_CALLS` that stands for the constraints: ranks must have the same, in the same order.
        self.mark = mark
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._rows: Tensor | None = None
        self.calls = 0
        #: The numbers of samples that the user announced, by constraint.
        self.expected: dict[int, int | Tensor] = {}

    def add(self, rows: Mapping[tuple[int, ...], Tensor], expected: dict[int, int | Tensor]) -> None:
        """One call's rows [S, NUM_COLUMNS], by the S constraints that they are of."""
        for index, its_rows in rows.items():
            if self._rows is None:
                device = its_rows.device
                self._rows = torch.zeros(self.num_constraints, NUM_COLUMNS, dtype=wide_dtype(device), device=device)
            its_rows = its_rows.to(self._rows)
            # At once where it can be: a few operations for each constraint would be a tenth of a call.
            if neighbours(index):
                self._rows[index[0] : index[-1] + 1] += its_rows
            else:
                for k, row in zip(index, its_rows.unbind(), strict=True):
                    self._rows[k] += row
        self.expected |= expected
        self.calls += 1

    def reduce(self, group: dist.ProcessGroup | None) -> tuple[int, Tensor]:
        """Numbers of calls and rows summed over the ranks, in fp64 on the CPU; the window itself stays.

        Raises:
            RuntimeError: The ranks have other constraints; their sums would be of different things.
        """
        rows = self._rows
        if rows is None:
            rows = torch.zeros(self.num_constraints, NUM_COLUMNS, dtype=torch.float64)
        ranks = world_size(group)
        if ranks == 1:
            return self.calls, rows.to("cpu", torch.float64)
        # Marks cost no collective and no bytes of their own; fp32 (a device without fp64) could not hold them.
        mark = self.mark if rows.dtype == torch.float64 else 0
        first = rows.new_full((1,), self.calls + _CALLS * mark)
        flat = sum_over_ranks(torch.cat([first, rows.flatten()]), group).double()
        marks, calls = divmod(int(flat[0]), _CALLS)
        if marks != ranks * mark:
            raise RuntimeError(
                "constraints differ between the ranks of process_group; allowed: the same names, bounds and scales in "
                "the same order on every rank (a set has another order in each process)"
            )
        return calls, flat[1:].view_as(rows)
