"""The LM head in chunks of rows: what the two linear operations share."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ._rows import accumulation_dtype, spans

# Bytes of logits that exist at a time. Each chunk reads and writes the weight gradient once, so a chunk should
# have far more rows than the device does flops per byte of memory traffic. 512 MiB is 2,000 rows of a
# vocabulary of 128k in bf16. A CPU is content with a few hundred rows (64 MiB is 340 rows of 49k in fp32), and
# there a small chunk keeps the memory well below that of plain PyTorch.
DEFAULT_MEMORY_BUDGET = {"cpu": 64 * 2**20}
DEFAULT_MEMORY_BUDGET_ACCELERATOR = 512 * 2**20


def rows_per_chunk(weight: Tensor, dtype: torch.dtype, memory_budget: int | None) -> int:
    """How many rows of logits in `dtype` fit the budget; at least one."""
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET.get(weight.device.type, DEFAULT_MEMORY_BUDGET_ACCELERATOR)
    return max(1, memory_budget // (weight.shape[0] * dtype.itemsize))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast multiplies in on this device; None where it is off or unknown."""
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype F.linear would multiply in: that of its inputs, or autocast's. fp64 is never cast down."""
    autocast = autocast_dtype(hidden.device)
    return hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For a backward pass that may run inside autocast though its forward did not, or with another dtype."""
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def live_rows(hidden: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk of hidden states in `dtype` with zeros in the rows that are not live.

    A product with a zero gradient is no protection: 0 * NaN is NaN, and in dW it would reach every row.
    """
    return torch.where(live[:, None], hidden, 0).to(dtype)


class HeadGradients:
    """Gradients for hidden [N, H], weight [V, H] and bias [V], filled in chunk by chunk of rows.

    `hidden` is in its own dtype, each row being written once; `weight` and `bias` are added up over the chunks, in
    the accumulation dtype, the first of which is written and not added: setting a large gradient to 0 takes as long
    as writing it. What `needs` does not name is an empty tensor.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self.needs, self._dtypes = needs, (weight.dtype, hidden.dtype if bias is None else bias.dtype)
        wide = accumulation_dtype(weight.dtype)
        empty = hidden.new_empty(0)
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else empty
        make = weight.new_zeros if hidden.shape[0] == 0 else weight.new_empty
        self.weight = make(weight.shape, dtype=wide) if needs[1] else torch.empty_like(empty)
        self.bias = torch.empty_like(empty) if bias is None or not needs[2] else make(bias.shape, dtype=wide)

    def add(self, lo: int, hi: int, grad_logits: Tensor, chunk: Tensor, head: Tensor) -> None:
        """Rows lo to hi: gradients of their logits [n, V], hidden states [n, H] and the head [V, H] in one dtype."""
        if self.needs[0]:
            _set_product(self.hidden[lo:hi], grad_logits, head)
        if self.needs[1]:
            _add_product(self.weight, grad_logits.t(), chunk, first=lo == 0)
        if self.needs[2]:
            sums = grad_logits.sum(0, dtype=self.bias.dtype)
            self.bias.copy_(sums if lo == 0 else self.bias + sums)

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three in the dtypes of their inputs."""
        return self.hidden, self.weight.to(self._dtypes[0]), self.bias.to(self._dtypes[1])


def _set_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, rounded to its dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


# A product in bf16 that is added to an fp32 sum is made in pieces, lest it be as large as the sum.
_PIECE_BYTES = {"cpu": 8 * 2**20}
_PIECE_BYTES_ACCELERATOR = 64 * 2**20


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total [V, H] = (0 if first else total) + left [V, n] @ right [n, H]; `total` is fp32 or fp64."""
    beta = 0 if first else 1  # 0 does not read the sum, which may hold anything then
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif _accumulates_in_product(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        row_bytes = right.shape[1] * right.dtype.itemsize
        piece = max(1, _PIECE_BYTES.get(total.device.type, _PIECE_BYTES_ACCELERATOR) // max(1, row_bytes))
        for lo, hi in spans(len(total), piece):
            product = left[lo:hi] @ right
            total[lo:hi].copy_(product) if first else total[lo:hi].add_(product)


@cache
def _accumulates_in_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device can add a product of `dtype` matrices to an fp32 sum within the product.

    Then nothing is rounded to `dtype` and the sum is read and written once. cuBLAS can; whether this torch hands it
    through depends on its version, so it is tried out.
    """
    if device.type != "cuda":
        return False
    total, small = (torch.zeros(16, 16, device=device, dtype=d) for d in (torch.float32, dtype))
    try:
        torch.addmm(total, small, small, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
