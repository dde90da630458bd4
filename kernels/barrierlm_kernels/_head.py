"""The LM head in chunks of rows: what the two linear operations share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

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


def add_weight_grad(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """grad_weight [V, H] += grad_logits [n, V]^T hidden [n, H]; grad_weight is fp32 or fp64."""
    if grad_weight.dtype == grad_logits.dtype:
        grad_weight.addmm_(grad_logits.t(), hidden)
    else:
        grad_weight.add_(grad_logits.t() @ hidden)


def set_hidden_grad(grad_hidden: Tensor, grad_logits: Tensor, weight: Tensor) -> None:
    """grad_hidden [n, H] = grad_logits [n, V] weight [V, H]."""
    if grad_hidden.dtype == grad_logits.dtype:
        torch.mm(grad_logits, weight, out=grad_hidden)
    else:
        grad_hidden.copy_(grad_logits @ weight)
