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
