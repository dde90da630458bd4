"""The torch implementation of `linear_sequence_logprob`: chunked matmuls, logits made again in backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._head import add_weight_grad, live_rows, matmul_dtype, no_autocast, rows_per_chunk, set_hidden_grad
from .._softmax import RowSoftmax, accumulation_dtype, spans


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counted: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Per-token log-probabilities and entropies, [N] each, 0 where `counted` is False.

    `targets` must be valid indices in every row, counted or not.
    """
    result: tuple[Tensor, Tensor | None] = _LinearTokenLogProbs.apply(
        hidden,
        weight,
        bias,
        targets,
        counted,
        (temperature, softcap, entropy),
        matmul_dtype(hidden),
        memory_budget,
    )
    return result


class _LinearTokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counted: Tensor,
        options: tuple[float, float | None, bool],
        dtype: torch.dtype,
        memory_budget: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        temperature, softcap, entropy = options
        rows, vocab = hidden.shape[0], weight.shape[0]
        at_most = max(1, min(rows, rows_per_chunk(weight, dtype, memory_budget)))
        softmax = RowSoftmax(
            rows, vocab, hidden, block_rows=at_most, temperature=temperature, softcap=softcap, entropy=entropy
        )
        head = weight.to(dtype).t()
        buffer = hidden.new_empty(at_most, vocab, dtype=dtype)
        for lo, hi in spans(rows, at_most):
            chunk = live_rows(hidden[lo:hi], counted[lo:hi], dtype)
            logits = torch.mm(chunk, head, out=buffer[: hi - lo])
            softmax.measure(logits, targets[lo:hi], lo, bias, overwrite=True)
        # The inputs are saved as they came: a copy cast for autocast would live until backward.
        ctx.save_for_backward(hidden, weight, bias, targets, counted, softmax.peak, softmax.total, softmax.moment)
        ctx.options, ctx.dtype, ctx.at_most = options, dtype, at_most
        ctx.set_materialize_grads(False)
        return (
            torch.where(counted, softmax.logps, 0),
            torch.where(counted, softmax.entropies(), 0) if entropy else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, counted, *statistics = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        (temperature, softcap, _), dtype = ctx.options, ctx.dtype
        softmax = RowSoftmax(
            hidden.shape[0],
            weight.shape[0],
            hidden,
            block_rows=ctx.at_most,
            temperature=temperature,
            softcap=softcap,
            entropy=grad_entropy is not None,
        )
        live, grad_logps, grad_entropy = softmax.resume(statistics, counted, grad_logps, grad_entropy)
        wide = accumulation_dtype(weight.dtype)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        with no_autocast(hidden.device):
            head = weight.to(dtype)
            buffer = hidden.new_empty(ctx.at_most, weight.shape[0], dtype=dtype)
            for lo, hi in spans(hidden.shape[0], ctx.at_most):
                chunk = live_rows(hidden[lo:hi], live[lo:hi], dtype)
                logits = torch.mm(chunk, head.t(), out=buffer[: hi - lo])
                entropy_part = None if grad_entropy is None else grad_entropy[lo:hi]
                softmax.differentiate(logits, logits, targets[lo:hi], lo, grad_logps[lo:hi], entropy_part, bias)
                if grad_hidden is not None:
                    set_hidden_grad(grad_hidden[lo:hi], logits, head)
                if grad_weight is not None:
                    add_weight_grad(grad_weight, logits, chunk)
                if grad_bias is not None:
                    grad_bias += logits.sum(0, dtype=wide)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 5,
        )
