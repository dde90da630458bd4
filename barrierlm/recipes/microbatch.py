"""One micro-batch: pairs and sampled responses, and their one pass through decoder and head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from barrierlm_kernels import linear_weighted_logprob
from torch import Tensor

from barrierlm import BarrierObjective, PackedBatch, Sampled

from .data import DataOrder, Tokens
from .model import lay_out
from .rollout import Rollout
from .workspace import Workspace


class MicroBatch(NamedTuple):
    """Pairs to imitate, responses to measure, and the prompt that each response answers [B]."""

    pairs: list[Tokens]
    rollouts: list[Rollout]
    groups: Tensor


def collect(workspace: Workspace, micro_batch: int, *, sampled: bool) -> MicroBatch:
    """This process's pairs of a micro-batch, and responses to prompts drawn independently of them."""
    options, accelerator = workspace.options, workspace.accelerator
    ranks = (accelerator.process_index, accelerator.num_processes)
    order = DataOrder(len(workspace.train), 2 * options.seed, options.optim.batch_size, *ranks)
    pairs = [workspace.train[i] for i in order[micro_batch]]
    if not sampled:
        return MicroBatch(pairs, [], torch.zeros(0, dtype=torch.long, device=accelerator.device))
    prompts, repeats = options.rollout.prompts, options.rollout.responses_per_prompt
    order = DataOrder(len(workspace.train), 2 * options.seed + 1, prompts, *ranks)
    rollouts = workspace.sample([workspace.train[i] for i in order[micro_batch] for _ in range(repeats)])
    groups = torch.arange(prompts, device=accelerator.device).repeat_interleave(repeats)
    return MicroBatch(pairs, rollouts, groups)


def one_pass(
    model: Any,
    batch: MicroBatch,
    objective: BarrierObjective | None,
    measurements: dict[str, Sampled],
    *,
    task_weight: float,
    packed: bool = True,
    **window: Any,
) -> tuple[Tensor, Tensor]:
    """Loss and task loss: pairs and rollouts together once through the decoder and once through the head.

    Args:
        model: The `Policy`, or what wraps it.
        batch: Pairs and rollouts.
        objective: None: the task alone.
        measurements: Of the rollouts, by constraint.
        task_weight: Of every token's NLL in the task loss.
        packed: See `lay_out`.
        **window: For `BarrierObjective.linear`.
    """
    sequences = lay_out(
        [t.prompt_ids for t in batch.pairs] + [r.prompt.prompt_ids for r in batch.rollouts],
        [t.response_ids for t in batch.pairs] + [r.ids for r in batch.rollouts],
        packed=packed,
        device=batch.groups.device,
    )
    task_weights = torch.zeros(len(sequences.cu_seqlens) - 1, device=batch.groups.device)
    task_weights[: len(batch.pairs)] = task_weight
    num_sampled_tokens = sum(len(r.ids) for r in batch.rollouts)
    targets, cu_seqlens = sequences.targets, sequences.cu_seqlens
    packed_batch = PackedBatch(targets, cu_seqlens, task_weights, len(batch.rollouts), num_sampled_tokens)

    def head(hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if objective is None:
            per_sequence = {"weights_per": "sequence"} | options
            loss = linear_weighted_logprob(hidden, weight, targets, cu_seqlens, -task_weights, **per_sequence).total
            return loss, loss.detach()
        out = objective.linear(hidden, weight, packed_batch, measurements, **window, **options)
        return out.loss, out.task_loss

    loss, task_loss = model(sequences, head)
    return loss, task_loss


def window_counts(window: list[MicroBatch], accelerator: Any) -> tuple[int, int]:
    """Response tokens of the pairs, and sampled responses, over all micro-batches and processes."""
    tokens = sum(len(pair.response_ids) for batch in window for pair in batch.pairs)
    samples = sum(len(batch.rollouts) for batch in window)
    counts = accelerator.reduce(torch.tensor([tokens, samples], device=accelerator.device), "sum").tolist()
    return counts[0], counts[1]


def rollout_metrics(window: list[MicroBatch], accelerator: Any) -> dict[str, float]:
    """Mean length and censored share of the window's responses, over all processes."""
    rollouts = [r for batch in window for r in batch.rollouts]
    sums = torch.tensor(
        [len(rollouts), sum(len(r.ids) for r in rollouts), sum(r.censored for r in rollouts)],
        device=accelerator.device,
    )
    count, tokens, censored = accelerator.reduce(sums, "sum").tolist()
    return {"rollout/mean_tokens": tokens / count, "rollout/censored": censored / count}
