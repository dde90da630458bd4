"""The registered operations behind `sequence_logprob`: per-token values from given logits, and their gradient.

Only what autograd keeps anyway (the logits and a few numbers a row) is saved; the softmax is made again in
backward. Opaque to torch.compile, which may call them but not look inside.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autograd import may_overwrite
from .._rows import Rows, accumulation_dtype, rows_class


def _rows(logits: Tensor, impl: str, temperature: float, softcap: float | None, entropy: bool) -> Rows:
    rows, vocab = logits.shape
    return rows_class(impl)(
        rows, vocab, logits, block_rows=rows, temperature=temperature, softcap=softcap, entropy=entropy
    )


@torch.library.custom_op("barrierlm::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log p, entropy, peak, total, moment), [N] each; log p and entropy are 0 where `counted` is False.

    `targets` must be valid indices in every row, counted or not.
    """
    rows = _rows(logits, impl, temperature, softcap, entropy)
    rows.measure(logits, targets, 0)
    # An ignored row may hold anything. Rows never mix here, so hiding its results is enough.
    entropies = torch.where(counted, rows.entropies(), 0)
    return torch.where(counted, rows.logps, 0), entropies, rows.peak, rows.total, rows.moment


@token_logprobs.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(5))


@torch.library.custom_op("barrierlm::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    statistics: list[Tensor],
    temperature: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    """The gradient [N, V] with respect to the logits."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(out, grad_logps, grad_entropy, logits, targets, counted, statistics, temperature, softcap, impl)
    return out


@token_logprobs_backward.register_fake
def _(grad_logps: Any, grad_entropy: Any, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("barrierlm::token_logprobs_backward_", mutates_args={"logits"})
def token_logprobs_backward_(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    statistics: list[Tensor],
    temperature: float,
    softcap: float | None,
    impl: str,
) -> None:
    """The same, written over the logits."""
    _write_gradient(logits, grad_logps, grad_entropy, logits, targets, counted, statistics, temperature, softcap, impl)


def _write_gradient(
    out: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    statistics: list[Tensor],
    temperature: float,
    softcap: float | None,
    impl: str,
) -> None:
    rows = _rows(logits, impl, temperature, softcap, grad_entropy is not None)
    live, grad_logps, grad_entropy = rows.resume(statistics, counted, grad_logps, grad_entropy)
    rows.differentiate(logits, out, targets, 0, grad_logps, grad_entropy)
    if not rows.skips_dead_rows:
        # 0 * NaN is NaN, so rows without an upstream gradient are set to zero, not multiplied by it.
        out.masked_fill_(~live[:, None], 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, counted, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, counted, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, targets, counted, *statistics = ctx.saved_tensors
    temperature, softcap, entropy, inplace, impl = ctx.options
    arguments = (
        grad_logps,
        grad_entropy if entropy else None,
        logits,
        targets,
        counted,
        statistics,
        temperature,
        softcap,
        impl,
    )
    if inplace and may_overwrite(logits):
        token_logprobs_backward_(*arguments)
        return logits, *[None] * 7
    return token_logprobs_backward(*arguments), *[None] * 7


token_logprobs.register_autograd(_backward, setup_context=_save)
