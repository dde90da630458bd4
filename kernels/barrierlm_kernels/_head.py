"""The LM head in chunks of rows: what the two linear operations share."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._rows import accumulation_dtype, spans

# Bytes of logits that exist at a time. Each chunk reads and writes the weight gradient once, so a chunk should
# have far more rows than the device does flops per byte of memory traffic. 512 MiB is 2,000 rows of a
# vocabulary of 128k in bf16. A CPU is content with a few hundred rows (48 MiB is 256 rows of 49k in fp32), and
# there a small chunk keeps the memory well below that of plain PyTorch.
DEFAULT_MEMORY_BUDGET = {"cpu": 48 * 2**20}
DEFAULT_MEMORY_BUDGET_ACCELERATOR = 512 * 2**20


def rows_per_chunk(hidden: Tensor, vocab: int, dtype: torch.dtype, memory_budget: int | None, ranks: int = 1) -> int:
    """How many of the rows of logits in `dtype` go into a chunk that fits the budget; at least one.

    Of a vocabulary shared by several ranks it is a mean slice that counts: all have to cut at the same rows.
    """
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET.get(hidden.device.type, DEFAULT_MEMORY_BUDGET_ACCELERATOR)
    return max(1, min(len(hidden), memory_budget // (-(-vocab // ranks) * dtype.itemsize)))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast multiplies in on this device; None where it is off or unknown."""
    if device.type == "meta":  # torch.compile before torch 2.9 cannot trace `is_autocast_available`
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype F.linear would multiply in: that of its inputs, or autocast's. fp64 is never cast down."""
    autocast = autocast_dtype(hidden.device)
    return hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For a backward pass that may run inside autocast though its forward did not, or with another dtype."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def live_rows(hidden: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk of hidden states in `dtype` with zeros in the rows that are not live.

    A product with a zero gradient is no protection: 0 * NaN is NaN, and in dW it would reach every row.
    """
    return torch.where(live[:, None], hidden, 0).to(dtype)


class HeadGradients:
    """Gradients for hidden [N, H], weight [V, H] and bias [V], filled in chunk by chunk of rows.

    `hidden` is in its own dtype, each row being written once; those of weight and bias are added up over the chunks in
    the accumulation dtype, and rounded to `dtype` at the end. The first chunk is written and not added: setting a
    large gradient to 0 takes as long as writing it. Where there is but `one_chunk`, there is no sum to keep. What
    `needs` does not name is an empty tensor. With a `group`, whose ranks hold slices of the head, those of hidden are
    summed over it, each chunk while the next one is computed.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: list[bool],
        dtype: torch.dtype,
        *,
        one_chunk: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.needs = needs
        self._group, self._sums = group, list[Any]()
        wide = accumulation_dtype(weight.dtype)
        self._hidden, self._weight, self._bias = empty_gradients(hidden, weight, bias, needs, dtype)
        self._wide_bias = self._bias.to(wide)
        self._parts = []
        if needs[1]:
            self._parts = [self._weight] if one_chunk else _wide_parts(self._weight, wide)
        if hidden.shape[0] == 0:
            for total in (*self._parts, self._wide_bias):
                total.zero_()

    def add(self, lo: int, hi: int, grad_logits: Tensor, chunk: Tensor, head: Tensor) -> None:
        """Rows lo to hi: gradients of their logits [n, V], hidden states [n, H] and the head [V, H] in one dtype."""
        if self.needs[0]:
            _set_product(self._hidden[lo:hi], grad_logits, head)
            if self._group is not None:
                self._sums.append(dist.all_reduce(self._hidden[lo:hi], group=self._group, async_op=True))
        start = 0
        for total in self._parts:
            left = grad_logits[:, start : start + len(total)].t()
            _add_product(total, left, chunk, first=lo == 0)
            start += len(total)
        if self.needs[2]:
            sums = grad_logits.sum(0, dtype=self._wide_bias.dtype)
            self._wide_bias.copy_(sums if lo == 0 else self._wide_bias + sums)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three, rounded; afterwards nothing can be added."""
        if len(self._parts) > 1:
            _narrow(self._weight, *self._parts)
        self._parts = []
        for work in self._sums:
            work.wait()
        self._bias.copy_(self._wide_bias)
        return self._hidden, self._weight, self._bias


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients; an empty tensor for each that is not needed. `dtype`: that of dW and dbias."""
    none = (0,)
    return (
        hidden.new_empty(hidden.shape if needs[0] else none),
        weight.new_empty(weight.shape if needs[1] else none, dtype=dtype),
        weight.new_empty(none if bias is None or not needs[2] else bias.shape, dtype=dtype),
    )


def _wide_parts(grad: Tensor, wide: torch.dtype) -> list[Tensor]:
    """Memory for the sum of a gradient [V, H] in a wide dtype: parts whose rows are those of the gradient in order.

    If the gradient is narrow (half as wide), the second part is the gradient's own memory. So sum and gradient together
    take no more than the sum alone, which is the largest thing there is.
    """
    if grad.dtype == wide:
        return [grad]
    second = len(grad) // 2
    own = grad.view(-1)[: 2 * second * grad.shape[1]].view(wide).view(second, grad.shape[1])
    return [grad.new_empty(len(grad) - second, grad.shape[1], dtype=wide), own]


def _narrow(grad: Tensor, first: Tensor, second: Tensor) -> None:
    """Round the parts of `_wide_parts` to the gradient, in whose memory the second one lies."""
    # Row r of the second part lies at row 2 r of the gradient and belongs at row len(first) + r, which is never
    # before: so from the last row backwards nothing is written over that is still to be read.
    for lo, hi in reversed(list(spans(len(second), _piece_rows(second)))):
        grad[len(first) + lo : len(first) + hi] = second[lo:hi].to(grad.dtype)
    grad[: len(first)] = first


def _set_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, rounded to its dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


# A product in bf16 that is added to an fp32 sum is made in pieces, lest it be as large as the sum.
_PIECE_BYTES = {"cpu": 4 * 2**20}
_PIECE_BYTES_ACCELERATOR = 64 * 2**20


def piece_bytes(device: torch.device) -> int:
    """Bytes of what goes through the device at a time where all at once would be as large as a gradient."""
    return _PIECE_BYTES.get(device.type, _PIECE_BYTES_ACCELERATOR)


def _piece_rows(total: Tensor) -> int:
    """Rows of a piece of a sum [V, H], whose products have half its width."""
    return max(1, 2 * piece_bytes(total.device) // max(1, total.shape[1] * total.dtype.itemsize))


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total [V, H] = (0 if first else total) + left [V, n] @ right [n, H]; to be added to, `total` is fp32 or fp64."""
    beta = 0 if first else 1  # 0 does not read the sum, which may hold anything then
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif _accumulates_in_product(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        for lo, hi in spans(len(total), _piece_rows(total)):
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
