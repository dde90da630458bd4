"""The torch implementation of `sequence_logprob`: differentiable per-token values from given logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._softmax import RowSoftmax


def token_logprobs(
    logits: Tensor, targets: Tensor, counted: Tensor, *, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Per-token log-probabilities and entropies, [N] each, 0 where `counted` is False.

    `targets` must be valid indices in every row, counted or not. Only what autograd keeps anyway (the logits
    and a few numbers a row) is saved; the softmax is made again in backward, a tile at a time.
    """
    result: tuple[Tensor, Tensor | None] = _TokenLogProbs.apply(logits, targets, counted, temperature, softcap, entropy)
    return result


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        counted: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        softmax = RowSoftmax(
            logits.shape[0],
            logits.shape[1],
            logits,
            block_rows=logits.shape[0],
            temperature=temperature,
            softcap=softcap,
            entropy=entropy,
        )
        softmax.measure(logits, targets, 0)
        ctx.options = (temperature, softcap, entropy)
        ctx.save_for_backward(logits, targets, counted, softmax.peak, softmax.total, softmax.moment)
        ctx.set_materialize_grads(False)
        # An ignored row may hold anything. Rows never mix here, so hiding its results is enough.
        return (
            torch.where(counted, softmax.logps, 0),
            torch.where(counted, softmax.entropies(), 0) if entropy else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, counted, *statistics = ctx.saved_tensors
        temperature, softcap, _ = ctx.options
        softmax = RowSoftmax(
            logits.shape[0],
            logits.shape[1],
            logits,
            block_rows=logits.shape[0],
            temperature=temperature,
            softcap=softcap,
            entropy=grad_entropy is not None,
        )
        live, grad_logps, grad_entropy = softmax.resume(statistics, counted, grad_logps, grad_entropy)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        softmax.differentiate(logits, grad, targets, 0, grad_logps, grad_entropy)
        # 0 * NaN is NaN, so rows without an upstream gradient are set to zero, not multiplied by it.
        return grad.masked_fill_(~live[:, None], 0), None, None, None, None, None
