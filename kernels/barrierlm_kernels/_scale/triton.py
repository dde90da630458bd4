"""The product of a gradient and a factor as a Triton kernel, which reads nothing where the factor is 1."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@triton.jit
def scale_kernel(gradient, factor, numel, BLOCK: tl.constexpr):
    """One program a block. An unscaled loss goes into backward() with the factor 1, which only the device knows."""
    by = tl.load(factor)
    if by != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        scaled = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(gradient + at, scaled.to(gradient.dtype.element_ty), mask=inside)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """In one pass, in place; `gradient` is contiguous, `factor` fp32."""
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            scale_kernel[(triton.cdiv(gradient.numel(), _BLOCK),)](
                gradient, factor, gradient.numel(), BLOCK=_BLOCK, num_warps=_WARPS
            )
    return gradient


#: Every compile-time configuration, for the resource report.
CONFIGS: list[dict[str, Any]] = [
    {
        "name": f"scale {dtype}",
        "kernel": scale_kernel,
        "signature": {"gradient": f"*{dtype}", "factor": "*fp32", "numel": "i64"},
        "constexprs": {"BLOCK": _BLOCK},
        "divisible": ["gradient", "factor", "numel"],
        "num_warps": _WARPS,
    }
    for dtype in ("bf16", "fp32")
]
