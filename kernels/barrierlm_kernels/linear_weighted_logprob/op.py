"""The registered operation behind `linear_weighted_logprob`: loss and gradient in one pass over the head.

The weights are known before the head runs, so each chunk of logits can be turned into its gradient while it is
there: three products (6 N V H operations) where recomputing the logits in backward needs four (8 N V H).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autograd import may_overwrite
from .._head import HeadGradients, empty_gradients, live_rows, no_autocast, rows_per_chunk
from .._rows import accumulation_dtype, head_rows, spans
from .._scale import scale_
from ..vocab_parallel import group_of


@torch.library.custom_op("barrierlm::linear_weighted_total", mutates_args=())
def linear_weighted_total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
    memory_budget: int | None,
    inplace_backward: bool,
    impl: str,
    needs: list[bool],
    vocab_group: str | None,
    first: int,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum_i w_i log p_i, log p [N], unit, and the gradients for hidden, weight and bias divided by `unit`).

    log p is 0 where `row_weights` [N] is 0. `targets` must be valid indices in every row. `row_weights` has the
    accumulation dtype. A gradient that `needs` does not name is an empty tensor; those of weight and bias are in
    `_saved_dtype`. With `inplace_backward` they belong to backward, which writes over them where it may. With a
    `vocab_group` the head is the slice of a vocabulary of `vocab` that begins with number `first`.
    """
    count, group = len(hidden), group_of(vocab_group)
    at_most = rows_per_chunk(hidden, vocab, dtype, memory_budget, 1 if group is None else group.size())
    options = {"temperature": temperature, "softcap": softcap, "entropy": False}
    rows = head_rows(impl, count, len(weight), hidden, group, first, block_rows=at_most, **options)
    live = row_weights != 0
    unit = _weight_unit(row_weights, dtype)
    grad_logps = row_weights / unit
    one_chunk = at_most == count
    gradients = HeadGradients(hidden, weight, bias, needs, _saved_dtype(weight), one_chunk=one_chunk, group=group)
    with no_autocast(hidden.device):
        head = weight.to(dtype)
        buffer = hidden.new_empty(at_most, len(weight), dtype=dtype)
        for lo, hi in spans(count, at_most):
            chunk = live_rows(hidden[lo:hi], live[lo:hi], dtype)
            logits = torch.mm(chunk, head.t(), out=buffer[: hi - lo])
            if any(needs):
                rows.measure_and_differentiate_(logits, targets[lo:hi], lo, grad_logps[lo:hi], bias)
                gradients.add(lo, hi, logits, chunk, head)
            else:
                rows.measure(logits, targets[lo:hi], lo, bias, overwrite=True)
    logps = torch.where(live, rows.logps, 0)
    total = (row_weights.double() * logps.double()).sum().to(logps.dtype)
    return total, logps, unit, *gradients.finish()


@linear_weighted_total.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_weights: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(hidden.dtype)
    gradients = empty_gradients(hidden, weight, bias, rest[-4], _saved_dtype(weight))
    total, logps = hidden.new_empty((), dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)
    return total, logps, torch.empty_like(total), *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.inplace, ctx.impl, ctx.needs = inputs[-6:-3]
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_total is None:
        return (None,) * 15
    unit, *gradients = ctx.saved_tensors
    factor = grad_total * unit
    scaled: list[Tensor | None] = []
    for gradient, dtype, need in zip(gradients, ctx.dtypes, ctx.needs, strict=True):
        if not need:
            scaled.append(None)
        elif ctx.inplace and may_overwrite(gradient):
            scaled.append(scale_(gradient, factor, ctx.impl).to(dtype))
        else:
            # Not 0-d: a 0-d factor would be rounded to the dtype of the gradient before the product.
            scaled.append((gradient * factor.reshape(1)).to(dtype))
    return *scaled, *[None] * 12


linear_weighted_total.register_autograd(_backward, setup_context=_save)


def _saved_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which dW and dbias wait for backward: the weight's, but fp32 for fp16, whose range ends at 65,504.

    Weights are around 1 there (see `_weight_unit`), so a sum over many rows may pass that before it is scaled down.
    """
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _weight_unit(row_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What the weights are divided by until backward, 0-d.

    In fp16 a weight of 1e-5 times a probability underflows, and a loss scale arrives only in backward, when the
    gradient has been made. So there the largest weight becomes 1. Other dtypes have the range.
    """
    if dtype != torch.float16 or row_weights.numel() == 0:
        return row_weights.new_ones(())
    largest = row_weights.abs().amax()
    return torch.where(largest > 0, largest, 1)
