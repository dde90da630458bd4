"""The torch implementation of `linear_weighted_logprob`: loss and gradient in one pass over the head.

The weights are known before the head runs, so each chunk of logits can be turned into its gradient while it is
there: three products (6 N V H operations) where recomputing the logits in backward needs four (8 N V H).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._head import add_weight_grad, live_rows, matmul_dtype, rows_per_chunk, set_hidden_grad
from .._softmax import RowSoftmax, accumulation_dtype, spans


def linear_weighted_total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor]:
    """sum_i w_i log p_i, and the log p_i [N] (detached), 0 where `row_weights` [N] is 0.

    `targets` must be valid indices in every row. `row_weights` has the accumulation dtype.
    """
    result: tuple[Tensor, Tensor] = _LinearWeightedTotal.apply(
        hidden,
        weight,
        bias,
        targets,
        row_weights,
        (temperature, softcap),
        torch.is_grad_enabled(),  # needs_input_grad is set under no_grad too
        matmul_dtype(hidden),
        memory_budget,
    )
    return result


class _LinearWeightedTotal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor,
        options: tuple[float, float | None],
        differentiate: bool,
        dtype: torch.dtype,
        memory_budget: int | None,
    ) -> tuple[Tensor, Tensor]:
        temperature, softcap = options
        rows, vocab = hidden.shape[0], weight.shape[0]
        at_most = max(1, min(rows, rows_per_chunk(weight, dtype, memory_budget)))
        softmax = RowSoftmax(
            rows, vocab, hidden, block_rows=at_most, temperature=temperature, softcap=softcap, entropy=False
        )
        live = row_weights != 0

        needs_hidden, needs_weight, needs_bias = (differentiate and need for need in ctx.needs_input_grad[:3])
        wide = accumulation_dtype(weight.dtype)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        unit = _weight_unit(row_weights, dtype)
        grad_logps = row_weights / unit

        head = weight.to(dtype)
        buffer = hidden.new_empty(at_most, vocab, dtype=dtype)
        for lo, hi in spans(rows, at_most):
            chunk = live_rows(hidden[lo:hi], live[lo:hi], dtype)
            logits = torch.mm(chunk, head.t(), out=buffer[: hi - lo])
            if not (needs_hidden or needs_weight or needs_bias):
                softmax.measure(logits, targets[lo:hi], lo, bias, overwrite=True)
                continue
            softmax.measure_and_differentiate_(logits, targets[lo:hi], lo, grad_logps[lo:hi], bias)
            if grad_hidden is not None:
                set_hidden_grad(grad_hidden[lo:hi], logits, head)
            if grad_weight is not None:
                add_weight_grad(grad_weight, logits, chunk)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)

        logps = torch.where(live, softmax.logps, 0)
        total = (row_weights.double() * logps.double()).sum().to(logps.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, unit)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(logps)
        return total, logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, unit = ctx.saved_tensors
        # The gradients are large, so they are scaled in place, unless the graph is kept for another pass.
        keep = _graph_is_kept()
        # Not 0-d: a 0-d factor would be rounded to the dtype of the gradient before the product.
        factor = (grad_total * unit).reshape(1)
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is None:
                scaled.append(None)
            elif keep:
                scaled.append((gradient * factor).to(dtype))
            else:
                scaled.append(torch.mul(gradient, factor, out=gradient).to(dtype))
        return *scaled, *[None] * 6


def _weight_unit(row_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What the weights are divided by until backward, 0-d.

    In fp16 a weight of 1e-5 times a probability underflows, and a loss scale arrives only in backward, when the
    gradient has been made. So there the largest weight becomes 1. Other dtypes have the range.
    """
    if dtype != torch.float16 or row_weights.numel() == 0:
        return row_weights.new_ones(())
    largest = row_weights.abs().amax()
    return torch.where(largest > 0, largest, 1)


def _graph_is_kept() -> bool:
    """Whether the running backward pass was called with retain_graph=True; True where torch cannot tell."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else bool(probe())
