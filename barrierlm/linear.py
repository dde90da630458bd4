"""One pass over the LM head: task and sampled constraints as one weighted sum of token log-probabilities.

    task = -sum_i t_i log p_i        sum_k w_k share_k total_k: gradient sum_i (sum_k w_k share_k a_ki) grad log p_i

The advantages a_ki come from costs and committed state alone, so the weight of every log p_i is known before the head
runs. `linear_weighted_logprob` then makes loss and gradient together, and no [N, V] tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from barrierlm_kernels import VocabParallel, constraint_weights, linear_sequence_logprob, linear_weighted_logprob
from torch import Tensor

from .committed import View
from .estimators import NUM_COLUMNS, Column, rows_of, wide_dtype
from .packing import PackedBatch, check_responses, owner_of_rows
from .sampling import Sampled, stacks

#: Where the statistics of `constraint_weights`, whose first columns are those of `Column`, differ from them.
_NONFINITE, _FIRST_POSITION = 7, 8


class Head(NamedTuple):
    """The LM head, and how its logits become log-probabilities: arguments of the kernels."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    ignore_index: int
    impl: str
    memory_budget: int | None
    vocab_parallel: VocabParallel | None

    def options(self) -> dict[str, Any]:
        """All but the weight, by name."""
        return {name: value for name, value in self._asdict().items() if name != "weight"}


class OnePass(NamedTuple):
    """``loss`` with gradient: task and sampled constraints; ``window_rows``: sums [S, NUM_COLUMNS] by constraints."""

    loss: Tensor
    task_loss: Tensor
    window_rows: dict[tuple[int, ...], Tensor]


def check_pass(hidden: Any, head: Head, batch: Any, sampled: Mapping[str, Sampled]) -> None:
    """Hidden states, head, batch and measurements against each other, before any state changes."""
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"batch is a {type(batch).__name__}; allowed: a PackedBatch")
    for name, value in (("hidden", hidden), ("weight", head.weight)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} is {given}; allowed: a floating torch.Tensor")
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: 2 dimensions")
    if len(hidden) != batch.num_rows or hidden.device != batch.targets.device:
        raise ValueError(
            f"hidden has {len(hidden)} rows on {hidden.device}; allowed: one for each of the batch's "
            f"{batch.num_rows} targets, on {batch.targets.device}"
        )
    check_responses(batch, sampled)
    learns = hidden.requires_grad or head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if torch.is_grad_enabled() and sampled and batch.num_sampled and not learns:
        raise ValueError(
            "neither hidden nor the head requires grad; allowed: hidden states that the policy computed with gradients "
            "on, or torch.no_grad()"
        )


def one_pass(
    hidden: Tensor,
    head: Head,
    batch: PackedBatch,
    sampled: Mapping[int, Sampled],
    view: View,
    weights: Mapping[int, Tensor],
    *,
    compact: bool,
) -> OnePass:
    """Loss and gradient of the task and of all sampled constraints, from hidden states [N, H].

    ``weights`` holds, by constraint, what one unit of the batch's summed cost adds to the loss, 0-d.
    """
    wide = wide_dtype(hidden.device)
    task_weights = batch.row_task_weights().to(torch.promote_types(hidden.dtype, torch.float32))
    row_weights = -task_weights
    value = torch.zeros((), dtype=wide, device=hidden.device)
    window_rows: dict[tuple[int, ...], Tensor] = {}
    responses = None
    if sampled and batch.num_sampled:
        responses = _Responses(hidden, head, batch, sampled)
        for stack in stacks(sampled, _structure):
            own_weights, own_value, own_rows = _weigh(stack, responses, view, weights, head.impl)
            row_weights[responses.first :] += own_weights.to(row_weights)
            value = value + own_value
            window_rows[tuple(stack)] = own_rows
    # Rows of no weight are left out of the pass; the task's value may need them all the same.
    tiny = torch.finfo(row_weights.dtype).tiny
    row_weights = torch.where((row_weights == 0) & (task_weights != 0), tiny, row_weights)
    out = linear_weighted_logprob(
        hidden,
        head.weight,
        batch.targets,
        batch.cu_seqlens,
        row_weights,
        weights_per="token",
        compact=compact,
        return_token_logps=True,
        **head.options(),
    )
    logps = out.token_logps
    assert logps is not None
    if responses is not None:
        responses.count_nonfinite(window_rows, logps)
    task = -torch.where(task_weights != 0, task_weights.to(wide) * logps.to(wide), 0).sum()
    # `total` has the gradient; its value, in which advantages stand for costs, is no loss.
    loss = (task + value).to(out.total) + (out.total - out.total.detach())
    return OnePass(loss, task.to(out.total), window_rows)


class _Responses:
    """The sampled sequences: rows ``first`` to N - 1 of a batch, or all rows where only the device knows ``first``."""

    def __init__(self, hidden: Tensor, head: Head, batch: PackedBatch, sampled: Mapping[int, Sampled]) -> None:
        sizes = [m.size for m in sampled.values() if m.credited_per_token]
        known = batch.sampled_rows()
        self.size = known if known is not None else [*sizes, batch.num_rows][0]
        self.first = batch.num_rows - self.size
        self.cu_seqlens = batch.cu_seqlens[batch.num_sequences - batch.num_sampled :] - self.first
        self.inside = torch.arange(self.size, device=hidden.device) >= self.cu_seqlens[0]
        self.owner = owner_of_rows(self.cu_seqlens, self.size)
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.counted = batch.targets[self.first :] != head.ignore_index
        # Log-probabilities of rows that are not finite cannot be either: their constraints are dropped beforehand.
        self.finite = torch.isfinite(hidden.detach()[self.first :]).all(1) | ~self.counted
        self._logps: Tensor | None = None
        if any(m.needs_logps for m in sampled.values()):
            self._logps = self._forward_only(hidden[self.first :], batch.targets[self.first :], head)

    def _forward_only(self, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        whole = torch.arange(2, device=hidden.device) * self.size
        with torch.no_grad():
            out = linear_sequence_logprob(
                hidden, head.weight, targets, whole, return_token_logps=True, **head.options()
            )
        assert out.token_logps is not None
        return out.token_logps

    def logps(self, m: Sampled) -> Tensor:
        """The policy's log-probabilities as ``m`` needs them: those it was given, or those of the forward-only pass."""
        if m.logps is not None:
            return self.mask(m.logps) if m.credited_per_token else m.logps
        assert self._logps is not None
        return self._logps if m.credited_per_token else self.per_response(self._logps)

    def costs(self, m: Sampled) -> Tensor:
        """Costs [B] or [size]; of a KL those of the tokens that count."""
        if m.ref_logps is None:
            assert m.values is not None
            return m.values
        return self.mask(self.logps(m) - m.ref_logps if m.values is None else m.values)

    def mask(self, tokens: Tensor) -> Tensor:
        """0 where a token does not count, as the kernels have it."""
        return torch.where(self.counted, tokens, 0)

    def per_response(self, tokens: Tensor) -> Tensor:
        """Sums [B] over the tokens of each response."""
        wide = torch.where(self.inside, tokens, 0).to(wide_dtype(tokens.device))
        return wide.new_zeros(len(self.cu_seqlens) - 1).index_add_(0, self.owner, wide)

    def spread(self, values: Tensor) -> Tensor:
        """Each response's value [B] at its tokens."""
        return torch.where(self.inside, values[self.owner], 0)

    def count_nonfinite(self, rows: Mapping[tuple[int, ...], Tensor], logps: Tensor) -> None:
        """Add to the rows what only the pass itself has shown: log-probabilities that are not finite."""
        late = (~torch.isfinite(logps[self.first :]) & self.finite & self.inside).sum()
        for its_rows in rows.values():
            its_rows[:, Column.NONFINITE] += late


def _structure(m: Sampled) -> Hashable:
    """Constraints with the same groups and the same importance ratios: one call weighs them all."""
    ratios = None if m.old_logps is None else (id(m.old_logps), id(m.logps), m.clip)
    return m.credited_per_token, id(m.groups), ratios


def _weigh(
    stack: dict[int, Sampled], responses: _Responses, view: View, weights: Mapping[int, Tensor], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the responses' log-probabilities, what the stack adds to the loss's value, and the window's rows."""
    one, index = next(iter(stack.values())), tuple(stack)
    per_token = one.credited_per_token
    finite = responses.finite if per_token else responses.per_response(~responses.finite) == 0
    ratios = None
    if one.old_logps is not None:
        logps, old_logps = responses.logps(one), one.old_logps.detach()
        old_logps = responses.mask(old_logps) if per_token else old_logps
        finite = finite & torch.isfinite(logps) & torch.isfinite(old_logps)
        wide = wide_dtype(logps.device)
        log_ratios = torch.where(finite, logps.to(wide) - old_logps.to(wide), 0)
        ratios = (responses.per_response(log_ratios) if per_token else log_ratios).exp()
        if one.clip is not None:
            ratios = ratios.clamp(max=1 + one.clip)
    given = [responses.costs(m) for m in stack.values()]
    dtype = functools.reduce(torch.promote_types, [c.dtype for c in given], responses.dtype)
    costs = torch.stack([torch.where(finite, c.to(dtype), math.nan) for c in given])
    center = rows_of(view.center, index)
    coefficients = torch.stack([weights[k] for k in stack])
    result = constraint_weights(
        costs,
        center,
        coefficients=coefficients,
        groups=one.groups,
        cu_seqlens=responses.cu_seqlens if per_token else None,
        baselines=rows_of(view.baselines, index) if per_token else None,
        ratios=ratios,
        num_samples=1,  # the coefficients hold the share of the window
        impl=impl,
    )
    statistics = result.statistics
    value = (coefficients * (statistics[:, Column.SUM] + center * statistics[:, Column.COUNT])).sum()
    table = statistics.new_zeros(len(stack), NUM_COLUMNS)
    table[:, : Column.EXACT] = statistics[:, : Column.EXACT]
    table[:, Column.NONFINITE] = statistics[:, _NONFINITE]
    if per_token:
        table[:, Column.POSITIONS :] = statistics[:, _FIRST_POSITION:]
    elif one.groups is not None:
        same = one.groups[:, None] == one.groups[None, :]
        table[:, Column.BAD_GROUPS] = (same.sum(1) < 2).sum()
    spread = result.weights if per_token else responses.spread(result.weights)
    return spread, value, table
