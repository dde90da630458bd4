"""Sums over the sequences of a packed batch: deterministic, and with no wait for the device."""

from typing import Any

import torch
from torch import Tensor

from . import reference

__all__ = ["rows_to_sequences", "segment_reduce", "segment_sum"]


def rows_to_sequences(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Index of the sequence that each row belongs to, [rows] int64."""
    # A sequence starts at or before row r exactly if its predecessors end at or before r. Counting the ends
    # skips empty sequences, and unlike repeat_interleave needs no output size from the device.
    positions = torch.arange(rows, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


@torch.library.custom_op("barrierlm::segment_sum", mutates_args=())
def segment_sum(values: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    """[N] -> [B]: sums within sequences, in fp64, rounded once to the dtype of `values`; differentiable."""
    if impl == "reference":
        return reference.segment_sum(values, cu_seqlens)
    from . import triton

    return triton.segment_sum(values, cu_seqlens)


@segment_sum.register_fake
def _(values: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    return values.new_empty(cu_seqlens.shape[0] - 1)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    values, cu_seqlens, _ = inputs
    ctx.rows = values.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    return grad[rows_to_sequences(cu_seqlens, ctx.rows)], None, None


segment_sum.register_autograd(_backward, setup_context=_save)


def segment_reduce(values: Tensor, cu_seqlens: Tensor, counts: Tensor, reduction: str, impl: str) -> Tensor:
    """[N] -> [B]: sum, or sum / count with 0 for a count of 0; differentiable."""
    sums = segment_sum(values, cu_seqlens, impl)
    return sums if reduction == "sum" else sums / counts.clamp(min=1)
