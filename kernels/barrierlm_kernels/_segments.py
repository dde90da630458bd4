"""Sums over the sequences of a packed batch: deterministic, and with no wait for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rows_to_sequences(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Index of the sequence that each row belongs to, [rows] int64."""
    # A sequence starts at or before row r exactly if its predecessors end at or before r. Counting the ends
    # skips empty sequences, and unlike repeat_interleave needs no output size from the device.
    positions = torch.arange(rows, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [B]: sums within sequences, in fp64, rounded once to the dtype of `values`; differentiable."""
    result: Tensor = _SegmentSum.apply(values, cu_seqlens)
    return result


def segment_reduce(values: Tensor, cu_seqlens: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """[N] -> [B]: sum, or sum / count with 0 for a count of 0; differentiable."""
    sums = segment_sum(values, cu_seqlens)
    return sums if reduction == "sum" else sums / counts.clamp(min=1)


def count_tokens(counted: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] bool -> [B] int64: how many rows of each sequence are set."""
    return segment_sum(counted.double(), cu_seqlens).long()


class _SegmentSum(torch.autograd.Function):
    # segment_reduce works one sequence at a time: a NaN stays in its own sequence (a difference of cumulative
    # sums would spread it to all later ones), and there are no float atomics (index_add has them).

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.rows = values.shape[0]
        ctx.save_for_backward(cu_seqlens)
        sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, axis=0, unsafe=True)
        return sums.to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return grad[rows_to_sequences(cu_seqlens, ctx.rows)], None
