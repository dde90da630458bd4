"""The collectives of this package, and the facts about ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
    all_reduce(buffer, group)
    return buffer.cpu()


def all_reduce(buffer: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum ``buffer`` over the group, in place; a rank that is gone is an error that says so.

    NCCL reports such a rank later, and by its own watchdog: nothing here waits for the device.
    """
    try:
        dist.all_reduce(buffer, op=dist.ReduceOp.SUM, group=group)
    except RuntimeError as error:
        raise LostRankError(
            f"the sums of {world_size(group)} ranks could not be added up: seen from rank {dist.get_rank()}, another "
            "one has stopped, or has not made this call within the timeout of init_process_group; allowed: the same "
            "calls, such as step(), on every rank of process_group. Nothing was committed. The reason given: "
            f"{str(error).splitlines()[0]}"
        ) from error


class LostRankError(RuntimeError):
    """Another rank has stopped, or does not come."""


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Within, what a backend says of a lost rank becomes an error in plain words, whoever made the call."""
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        # gloo has no class of its own for it.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostRankError(
            f"rank {dist.get_rank()} has lost another one, which has stopped, or has not come within the timeout; the "
            f"other rank's own message, if it could give one, says why. The reason given: {str(error).splitlines()[0]}"
        ) from error


def gathered(weight: Any, *, mean: bool) -> Any:
    """A sharded weight as a whole tensor, on every rank; its gradient is the sum, or mean, over those ranks, sharded.

    Anything but a DTensor is returned as it is.
    """
    if not (isinstance(weight, Tensor) and hasattr(weight, "full_tensor")):
        return weight
    from torch.distributed.tensor import Partial

    sharded: Any = weight
    mesh = sharded.device_mesh
    whole = sharded.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if mean and whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())  # gloo knows no mean
    return whole


def rows_of_all_ranks(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' rows [n, d] below each other, on every rank, in fp64 on the CPU; n may differ and be 0."""
    ranks = world_size(group)
    if ranks == 1:
        return rows.double().cpu()
    rank = dist.get_rank(group)
    counts = torch.zeros(ranks, dtype=torch.float64, device="cpu")
    counts[rank] = len(rows)
    ends = sum_over_ranks(counts, group).cumsum(0).long().tolist()
    everything = torch.zeros(ends[-1], rows.shape[1], dtype=torch.float64, device="cpu")
    everything[ends[rank] - len(rows) : ends[rank]] = rows
    return sum_over_ranks(everything, group)


def combine_over_ranks(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], group: dist.ProcessGroup | None, *, mean: bool
) -> list[Tensor | None]:
    """The sum, or mean, over the group of every parameter's gradient; None counts as 0 where another rank has one.

    One all-reduce per device and dtype, whatever each rank has a gradient of. Waits for the device.
    """
    result = list(gradients)
    ranks = world_size(group)
    if ranks == 1:
        return result
    for kind in dict.fromkeys((p.device, p.dtype) for p in parameters):
        mine = [i for i, p in enumerate(parameters) if (p.device, p.dtype) == kind]
        pieces = [torch.zeros_like(parameters[i]) if (g := gradients[i]) is None else g for i in mine]
        # The last entries count the ranks that have a gradient: what no rank has stays None, as in one process.
        present = pieces[0].new_tensor([gradients[i] is not None for i in mine])
        flat = torch.cat([*(piece.detach().reshape(-1) for piece in pieces), present])
        if mean:
            flat /= ranks
        all_reduce(flat, group)
        *combined, present = flat.split([*(piece.numel() for piece in pieces), len(mine)])
        for i, piece, anywhere in zip(mine, combined, present.tolist(), strict=True):
            result[i] = piece.view_as(parameters[i]) if anywhere else None
    return result
