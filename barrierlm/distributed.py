"""The only collective of this package, and the facts about ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks that share the window; 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise RuntimeError(
            f"process_group={group!r} does not hold rank {dist.get_rank()}; allowed: a group of this rank"
        )
    return size


def sum_over_ranks(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of ``sums`` over the group as a new CPU tensor: one all-reduce and the window's one host sync."""
    if world_size(group) == 1:
        return sums.detach().to("cpu", copy=True)
    # NCCL reduces only what lives on a GPU, wherever a rank without samples kept its zeros.
    on_gpu = "nccl" in dist.get_backend(group)
    buffer = sums.detach().to(torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu", copy=True)
    dist.all_reduce(buffer, op=dist.ReduceOp.SUM, group=group)
    return buffer.cpu()


def rows_of_all_ranks(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' rows [n, d] below each other, on every rank, in fp64 on the CPU; n may differ and be 0."""
    ranks = world_size(group)
    if ranks == 1:
        return rows.double().cpu()
    rank = dist.get_rank(group)
    counts = torch.zeros(ranks, dtype=torch.float64)
    counts[rank] = len(rows)
    ends = sum_over_ranks(counts, group).cumsum(0).long().tolist()
    everything = torch.zeros(ends[-1], rows.shape[1], dtype=torch.float64)
    everything[ends[rank] - len(rows) : ends[rank]] = rows
    return sum_over_ranks(everything, group)
