"""The registered operations behind `linear_sequence_logprob`: chunked matmuls, logits made again in backward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._head import HeadGradients, empty_gradients, live_rows, no_autocast, rows_per_chunk
from .._rows import Rows, accumulation_dtype, head_rows, spans
from ..vocab_parallel import group_of


@torch.library.custom_op("barrierlm::linear_token_logprobs", mutates_args=())
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counted: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    dtype: torch.dtype,
    memory_budget: int | None,
    impl: str,
    vocab_group: str | None,
    first: int,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log p, entropy, peak, total, moment), [N] each; log p and entropy are 0 where `counted` is False.

    `targets` must be valid indices in every row, counted or not. Products are in `dtype`. With a `vocab_group` the
    head is the slice of a vocabulary of `vocab` that begins with number `first`.
    """
    shared = (dtype, memory_budget, impl, group_of(vocab_group), first, vocab)
    rows = _rows(hidden, weight, temperature, softcap, entropy, *shared)
    count, at_most = len(hidden), rows.block_rows
    with no_autocast(hidden.device):
        head = weight.to(dtype).t()
        buffer = hidden.new_empty(at_most, len(weight), dtype=dtype)
        for lo, hi in spans(count, at_most):
            chunk = live_rows(hidden[lo:hi], counted[lo:hi], dtype)
            logits = torch.mm(chunk, head, out=buffer[: hi - lo])
            rows.measure(logits, targets[lo:hi], lo, bias, overwrite=True)
    entropies = torch.where(counted, rows.entropies(), 0)
    return torch.where(counted, rows.logps, 0), entropies, rows.peak, rows.total, rows.moment


@linear_token_logprobs.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(5))


@torch.library.custom_op("barrierlm::linear_token_logprobs_backward", mutates_args=())
def linear_token_logprobs_backward(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counted: Tensor,
    statistics: list[Tensor],
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
    memory_budget: int | None,
    impl: str,
    vocab_group: str | None,
    first: int,
    vocab: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for hidden, weight and bias, the last in the weight's dtype; empty where `needs` does not ask."""
    group = group_of(vocab_group)
    shared = (dtype, memory_budget, impl, group, first, vocab)
    rows = _rows(hidden, weight, temperature, softcap, grad_entropy is not None, *shared)
    at_most, one_chunk = rows.block_rows, rows.block_rows == len(hidden)
    live, grad_logps, grad_entropy = rows.resume(statistics, counted, grad_logps, grad_entropy)
    gradients = HeadGradients(hidden, weight, bias, needs, weight.dtype, one_chunk=one_chunk, group=group)
    with no_autocast(hidden.device):
        head = weight.to(dtype)
        buffer = hidden.new_empty(at_most, len(weight), dtype=dtype)
        for lo, hi in spans(len(hidden), at_most):
            chunk = live_rows(hidden[lo:hi], live[lo:hi], dtype)
            logits = torch.mm(chunk, head.t(), out=buffer[: hi - lo])
            entropy_part = None if grad_entropy is None else grad_entropy[lo:hi]
            rows.differentiate(logits, logits, targets[lo:hi], lo, grad_logps[lo:hi], entropy_part, bias)
            gradients.add(lo, hi, logits, chunk, head)
    return gradients.finish()


@linear_token_logprobs_backward.register_fake
def _(
    grad_logps: Any, grad_entropy: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, rest[-1], weight.dtype)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    dtype: torch.dtype,
    memory_budget: int | None,
    impl: str,
    group: dist.ProcessGroup | None,
    first: int,
    vocab: int,
) -> Rows:
    at_most = rows_per_chunk(hidden, vocab, dtype, memory_budget, 1 if group is None else group.size())
    options = {"temperature": temperature, "softcap": softcap, "entropy": entropy}
    return head_rows(impl, len(hidden), len(weight), hidden, group, first, block_rows=at_most, **options)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, counted, *ctx.options = inputs
    # The inputs are saved as they came: a copy cast for autocast would live until backward.
    ctx.save_for_backward(hidden, weight, bias, targets, counted, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    hidden, weight, bias, targets, counted, *statistics = ctx.saved_tensors
    temperature, softcap, entropy, *shared = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_token_logprobs_backward(
        grad_logps,
        grad_entropy if entropy else None,
        hidden,
        weight,
        bias,
        targets,
        counted,
        statistics,
        temperature,
        softcap,
        *shared,
        needs,
    )
    inputs = zip(gradients, (hidden, weight, bias), needs, strict=True)
    return *(g.to(x.dtype) if need else None for g, x, need in inputs), *[None] * 11


linear_token_logprobs.register_autograd(_backward, setup_context=_save)
