"""Sums within sequences as a Triton kernel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def segment_sum_kernel(values, cu_seqlens, out, BLOCK: tl.constexpr):
    """One program a sequence, which adds it up block by block in fp64."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    stop = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(values + at, mask=at < stop, other=0.0).to(tl.float64)
    tl.store(out + sequence, tl.sum(sums, axis=0).to(out.dtype.element_ty))


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [B], added up in fp64 and rounded once to the dtype of `values`."""
    out = values.new_empty(len(cu_seqlens) - 1)
    if len(out):
        with torch.cuda.device_of(values):
            segment_sum_kernel[(len(out),)](
                values.contiguous(), cu_seqlens.contiguous(), out, BLOCK=_BLOCK, num_warps=4
            )
    return out


#: Every compile-time configuration, for the resource report.
CONFIGS: list[dict[str, Any]] = [
    {
        "name": "segment_sum",
        "kernel": segment_sum_kernel,
        "signature": {"values": "*fp32", "cu_seqlens": "*i64", "out": "*fp32"},
        "constexprs": {"BLOCK": _BLOCK},
        "divisible": ["values", "cu_seqlens", "out"],
        "num_warps": 4,
    }
]
