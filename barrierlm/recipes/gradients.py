"""How large the gradients of task and constraints are, beside a run that makes both in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from barrierlm.distributed import combine_over_ranks

from .microbatch import MicroBatch, one_pass
from .workspace import Workspace


def gradient_balance(workspace: Workspace, window: list[MicroBatch], task_weight: float) -> dict[str, float]:
    """Norms of both gradients before clipping, and the cosine of the angle between them; changes nothing.

    The task's gradient is made once more by itself, and the constraints' is what is left of ``.grad``. So it costs a
    forward and a backward pass over the window. The responses take part with weight 0, in their old places: then the
    round-off of the two passes is the same, and a multiplier of 0 shows as a norm of 0.

    Args:
        workspace: After the window's backward passes, before clipping.
        window: All of this process's micro-batches.
        task_weight: Of every token's NLL in the sum of the window's task losses.

    Returns:
        ``balance/task_norm``, ``balance/constraint_norm`` and ``balance/cosine`` (NaN where one of them is 0).
    """
    weights = workspace.policy.trained()
    gradients: list[Tensor | None] = [None] * len(weights)
    for batch in window:
        packed = workspace.policy.packed
        loss, _ = one_pass(workspace.policy, batch, None, {}, packed=packed, task_weight=task_weight)
        news = torch.autograd.grad(loss, weights, allow_unused=True)
        gradients = [a if b is None else b if a is None else a + b for a, b in zip(gradients, news, strict=True)]
    gradients = combine_over_ranks(gradients, weights, None, mean=True)
    none = torch.zeros((), device=workspace.policy.device)
    task2, rest2, dot = none, none, none
    for p, task in zip(weights, gradients, strict=True):
        if p.grad is None:
            continue
        task = torch.zeros_like(p.grad) if task is None else task
        rest = p.grad - task
        task2, rest2, dot = task2 + task.square().sum(), rest2 + rest.square().sum(), dot + (task * rest).sum()
    size, rest_size = task2.sqrt().item(), rest2.sqrt().item()
    if rest_size < 1e-4 * size:  # the difference of two passes: round-off
        rest_size = 0.0
    cosine = dot.item() / (size * rest_size) if size * rest_size > 0 else math.nan
    return {
        "balance/task_norm": size,
        "balance/constraint_norm": rest_size,
        "balance/cosine": cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine)),
    }
