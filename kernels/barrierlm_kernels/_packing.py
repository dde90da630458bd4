"""Targets as every operation needs them, and the check of their values."""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_packing_values


@torch.library.custom_op("barrierlm::read_packing", mutates_args=())
def read_packing(targets: Tensor, cu_seqlens: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(targets [N] int64 valid in every row, counted [N] bool, counts [B] int64).

    Registered, so that the values are checked in compiled code as well; on the CPU only, because reading them
    would make the host wait for another device.
    """
    if targets.device.type == "cpu":
        check_packing_values(targets, cu_seqlens, vocab, ignore_index)
    counted = targets != ignore_index
    seen = torch.cat([cu_seqlens.new_zeros(1, dtype=torch.int64), counted.cumsum(0)])
    counts = seen[cu_seqlens[1:]] - seen[cu_seqlens[:-1]]
    return torch.where(counted, targets, 0).long(), counted, counts


@read_packing.register_fake
def _(targets: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        targets.new_empty(targets.shape, dtype=torch.int64),
        targets.new_empty(targets.shape, dtype=torch.bool),
        targets.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int64),
    )
