"""The open window: sums of all micro-batches since the last step, and their reduction over the ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from .distributed import sum_over_ranks, world_size
from .estimators import NUM_COLUMNS, Column, neighbours, wide_dtype

#: More calls than a window has over all ranks; what is above it in the sum is the ranks' marks, exact in fp64.
_CALLS = 2**20


class Window:
    """Rows that add up on the device of the measurements; nothing waits for it until `reduce`."""

    def __init__(self, num_constraints: int, mark: int = 0) -> None:
        self.num_constraints = num_constraints
        #: A number below `_CALLS` that stands for the constraints: ranks must have the same, in the same order.
        self.mark = mark
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self.calls = 0
        #: The numbers of samples that the user announced, by constraint.
        self.expected: dict[int, int | Tensor] = {}

    def add(self, rows: Mapping[tuple[int, ...], Tensor], expected: dict[int, int | Tensor]) -> None:
        """One call's rows [S, C], by the S constraints that they are of; what is from column C on is 0."""
        for index, its_rows in rows.items():
            before = self._rows.get(index)
            if before is not None:
                if before.shape != its_rows.shape:
                    before, its_rows = (pad(x, (0, NUM_COLUMNS - x.shape[1])) for x in (before, its_rows))
                its_rows = before + its_rows.to(before)
            self._rows[index] = its_rows
        self.expected |= expected
        self.calls += 1

    def _table(self, width: int = 0) -> Tensor:
        """All rows [K, C] on the device of the first that came, with at least ``width`` columns."""
        parts = list(self._rows.items())
        width = max([width, Column.POSITIONS, *(its_rows.shape[1] for _, its_rows in parts)])
        if len(parts) == 1 and parts[0][0] == tuple(range(self.num_constraints)) and width == parts[0][1].shape[1]:
            return parts[0][1]
        device = parts[0][1].device if parts else torch.device("cpu")
        table = torch.zeros(self.num_constraints, width, dtype=wide_dtype(device), device=device)
        for index, its_rows in parts:
            its_rows = its_rows.to(table)
            # At once where it can be: an operation for each constraint adds up.
            if neighbours(index):
                table[index[0] : index[-1] + 1, : its_rows.shape[1]].add_(its_rows)
            else:
                for k, row in zip(index, its_rows.unbind(), strict=True):
                    table[k, : len(row)].add_(row)
        return table

    def reduce(self, group: dist.ProcessGroup | None) -> tuple[int, Tensor]:
        """Numbers of calls and rows [K, C] summed over the ranks, in fp64 on the CPU; the window itself stays.

        Raises:
            RuntimeError: The ranks have other constraints; their sums would be of different things.
        """
        ranks = world_size(group)
        rows = self._table(NUM_COLUMNS if ranks > 1 else 0)  # ranks may have measured other things
        if rows.dtype == torch.float32:  # where squares of large numbers overflow
            lost = (~rows.isfinite().all(1, keepdim=True)).to(rows)
            rows = torch.where(torch.arange(rows.shape[1], device=rows.device) == Column.NONFINITE, rows + lost, rows)
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
