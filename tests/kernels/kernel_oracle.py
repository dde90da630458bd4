"""Plain PyTorch twins of the operations, packed batches to compare them on, and a recorder of what ran."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from barrierlm_kernels import (
    SequenceLogProbs,
    linear_sequence_logprob,
    linear_weighted_logprob,
    sequence_logprob,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IGNORE = -100


def device_for(impl: str) -> str:
    """Where an implementation is tested: Triton natively if it can be, else in its interpreter."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


@dataclass
class Batch:
    """A packed batch with a head; `lengths` decide everything else."""

    lengths: list[int]
    hidden_size: int
    vocab: int
    dtype: torch.dtype = torch.float64
    seed: int = 0
    ignored: float = 0.3
    scale: float = 1.0
    hidden: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    targets: Tensor = field(init=False)
    cu_seqlens: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        rows, vocab, size = sum(self.lengths), self.vocab, self.hidden_size

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.hidden = (self.scale * randn(rows, size)).to(self.dtype)
        self.weight = randn(vocab, size).to(self.dtype)
        self.bias = randn(vocab).to(self.dtype)
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        self.targets[torch.rand(rows, generator=generator) < self.ignored] = IGNORE
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0)
        self.weights = randn(len(self.lengths))
        self.row_weights = self.weights.repeat_interleave(torch.tensor(self.lengths, dtype=torch.long))

    def to(self, device: str) -> "Batch":
        """This batch with all its tensors moved."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight)

    @property
    def packing(self) -> tuple[Tensor, Tensor]:
        return self.targets, self.cu_seqlens


def naive_sequence_logprob(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    reduction: str = "sum",
    ignore_index: int = IGNORE,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> SequenceLogProbs:
    """The definition, one Python loop over the sequences; low-precision logits become fp32 as users do it."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    counted = targets != ignore_index
    picked = log_p.gather(1, torch.where(counted, targets, 0)[:, None])[:, 0]
    token_logps = torch.where(counted, picked, 0)
    token_entropy = torch.where(counted, -(log_p.exp() * log_p).sum(-1), 0)
    logps, counts, entropy = [], [], []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        count = counted[start:stop].sum()
        divisor = count.clamp(min=1) if reduction == "mean" else 1
        logps.append(token_logps[start:stop].sum() / divisor)
        entropy.append(token_entropy[start:stop].sum() / divisor)
        counts.append(count)
    empty = token_logps[:0]
    return SequenceLogProbs(
        torch.stack(logps) if logps else empty,
        torch.stack(counts) if counts else torch.zeros(0, dtype=torch.long),
        token_logps,
        torch.stack(entropy) if entropy else empty,
    )


def naive_linear(hidden: Tensor, weight: Tensor, *packing: Tensor, bias: Any = None, **kw: Any) -> SequenceLogProbs:
    return naive_sequence_logprob(F.linear(hidden, weight, bias), *packing, **kw)


# One row an operation: every property below holds for each. The arguments are (hidden, weight, bias, batch), the
# result is the tuple of its differentiable outputs. An operation that takes logits gets the product.
ALL = {"return_token_logps": True, "return_entropy": True}


def from_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, **kw: Any) -> tuple[Tensor, ...]:
    kw.pop("memory_budget", None)
    out = sequence_logprob(F.linear(hidden, weight, bias), *batch.packing, **ALL, **kw)
    return out.logps, out.token_logps, out.entropy


def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, **kw: Any) -> tuple[Tensor, ...]:
    out = linear_sequence_logprob(hidden, weight, *batch.packing, bias=bias, **ALL, **kw)
    return out.logps, out.token_logps, out.entropy


def weighted(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, **kw: Any) -> tuple[Tensor, ...]:
    weights = batch.row_weights if kw.pop("per_token", False) else batch.weights
    per = "sequence" if weights is batch.weights else "token"
    out = linear_weighted_logprob(hidden, weight, *batch.packing, weights, bias=bias, weights_per=per, **kw)
    return (out.total,)


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, **kw: Any) -> tuple[Tensor, ...]:
    kw.pop("memory_budget", None)
    out = naive_linear(hidden, weight, *batch.packing, bias=bias, **kw)
    return out.logps, out.token_logps, out.entropy


def naive_weighted(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, **kw: Any) -> tuple[Tensor, ...]:
    for name in ("memory_budget", "compact", "per_token"):
        kw.pop(name, None)
    logps = naive_linear(hidden, weight, *batch.packing, bias=bias, **kw).logps
    return ((batch.weights.to(logps) * logps).sum(),)


OPERATIONS = {
    "sequence_logprob": (from_logits, naive),
    "linear_sequence_logprob": (from_hidden, naive),
    "linear_weighted_logprob": (weighted, naive_weighted),
}


def run(function: Any, batch: Batch, *, upstream: int = 1, use_bias: bool = True, **kw: Any) -> list[Tensor]:
    """Outputs, then the gradients for hidden, weight and bias under a fixed random upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    outputs = function(leaves[0], leaves[1], leaves[2] if use_bias else None, batch, **kw)
    generator = torch.Generator().manual_seed(upstream)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    inputs = leaves if use_bias else leaves[:2]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


def body_of(operator: Any) -> Any:
    """The Python function behind a registered operation of this package."""
    from torch._library.custom_ops import OPDEFS

    return OPDEFS[operator._schema.name]._init_fn


def in_fp64(batch: Batch) -> Batch:
    """The same numbers in fp64: the oracle's input."""
    twin = copy.copy(batch)
    twin.hidden, twin.weight, twin.bias = batch.hidden.double(), batch.weight.double(), batch.bias.double()
    return twin


FACTOR = 2.0  # times plain PyTorch's error in that dtype, plus half a unit in the last place


def as_accurate_as_torch(results: Any, *, given: torch.dtype | None = None) -> None:
    """Assert it of (ours, plain PyTorch's, fp64's) for several batches; see `share_of_allowed_error`."""
    assert share_of_allowed_error(results, given=given) <= 1


def share_of_allowed_error(results: Any, *, given: torch.dtype | None = None) -> float:
    """The largest error of any output, over the one allowed, of (ours, plain PyTorch's, fp64's) for several batches.

    Errors are norms over all batches: a largest error is one number's luck. Where there are few numbers, plain
    PyTorch's may all be lucky, so it counts as no smaller than a rounding of the results, to the dtype that is `given`
    (that of the inputs, in which logits are rounded) or to their own.
    """
    shares = [0.0]
    for index in range(len(results[0][0])):
        ours, theirs, exact = (
            torch.cat([outcome[which][index].flatten() for outcome in results]) for which in range(3)
        )
        assert ours.isfinite().all(), index
        assert ours.dtype == theirs.dtype, index
        rounding = torch.finfo(ours.dtype).eps / 2 * exact.norm()
        luck = rounding if given is None else torch.finfo(given).eps / 2 * exact.norm()
        allowed = FACTOR * torch.maximum((theirs.double() - exact).norm(), luck) + rounding
        shares.append(((ours.double() - exact).norm() / allowed).item())
    return max(shares)


class Recorder(TorchDispatchMode):
    """The largest tensor that any operator made, and the flops of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "barrierlm":  # look inside
            with self:
                return body_of(func)(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result
