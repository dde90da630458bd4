"""The training loop: supervised fine-tuning with sampled constraints."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from barrierlm import BarrierObjective

from .checkpoint import Checkpoints
from .config import to_yaml
from .costs import measure_rollouts
from .data import DataOrder, Tokens
from .evaluate import Evaluation, evaluate, print_evaluations, write_summary
from .figure import draw_figure
from .model import lay_out, save_model
from .options import OptimOptions, Options
from .progress import MetricsFile, ProgressBar
from .rollout import Rollout
from .workspace import Workspace, build_objective, open_workspace


class MicroBatch(NamedTuple):
    """Pairs to imitate, responses to measure, and the prompt that each response answers [B]."""

    pairs: list[Tokens]
    rollouts: list[Rollout]
    groups: Tensor


def finetune(options: Options) -> Evaluation:
    """The whole recipe: load, train, evaluate, and write everything to ``options.output_dir``.

    Args:
        options: Checked options, from `load_options`.

    Returns:
        The held-out evaluation of the trained model.

    Raises:
        ConfigError: A mistake in the options, the data or the cost functions; ``resume`` without a checkpoint.
        ModuleNotFoundError: A package that an option needs is missing; names the extra.
    """
    build_objective(options)  # its errors come before anything is loaded
    workspace = open_workspace(options)
    folder = Path(options.output_dir)
    seconds = train(workspace, folder)
    evaluation = evaluate(workspace, seconds)
    if workspace.accelerator.is_main_process:
        write_summary(folder, {"final": evaluation})
        draw_figure(folder / "metrics.jsonl", options.constraints, folder / "figure.png")
        if options.save_model:
            save_model(workspace.policy, workspace.tokenizer, options.model, folder / "model")
    print_evaluations(workspace.console, {"final": evaluation})
    return evaluation


def train(workspace: Workspace, folder: Path, *, constrained: bool = True, label: str = "training") -> float:
    """Train from the current weights; metrics.jsonl, config.yaml and checkpoints go to ``folder``.

    Args:
        workspace: Model, data and costs.
        folder: Made if it does not exist.
        constrained: False: plain supervised fine-tuning on the same pairs in the same order.
        label: Name in the progress bar.

    Returns:
        Seconds that it took.
    """
    began = time.perf_counter()
    options, accelerator, weights = workspace.options, workspace.accelerator, workspace.policy.trained()
    objective = build_objective(options) if constrained else None
    betas = (options.optim.momentum, 0.999)
    optimizer = torch.optim.AdamW(weights, lr=1.0, betas=betas, weight_decay=options.optim.weight_decay)
    model, optimizer = accelerator.prepare(workspace.policy, optimizer)
    torch.manual_seed(options.seed * 1_000_003 + accelerator.process_index)
    checkpoints = Checkpoints(folder / "checkpoints", accelerator, weights, optimizer, objective)
    if options.checkpoint_every and not options.resume:
        checkpoints.refuse_older()
    first = checkpoints.load() if options.resume else 0
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(options), encoding="utf-8")
    workspace.policy.lm.train()
    with (
        MetricsFile(folder, keep=first, enabled=accelerator.is_main_process) as metrics_file,
        ProgressBar(workspace.console, label, options.optim.steps, first) as bar,
    ):
        for step in range(first, options.optim.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.optim)
            metrics = train_step(workspace, model, optimizer, objective, step)
            metrics_file.write(step + 1, {"lr": learning_rate(step, options.optim), **metrics})
            bar.update(metrics["loss/task"], objective)
            if options.checkpoint_every and (step + 1) % options.checkpoint_every == 0:
                checkpoints.save(step + 1)
    return time.perf_counter() - began


def train_step(
    workspace: Workspace, model: Any, optimizer: Any, objective: BarrierObjective | None, step: int
) -> dict[str, float]:
    """One optimizer step: a window of micro-batches, all sampled before the weights change."""
    accelerator, optim = workspace.accelerator, workspace.options.optim
    clock, repeats = Clock(), optim.gradient_accumulation
    with clock("generation"):
        window = [collect(workspace, step * repeats + k, sampled=objective is not None) for k in range(repeats)]
    tokens, samples = window_counts(window, accelerator)
    nll = total = 0.0
    grad_norm = torch.zeros(())
    for batch in window:
        with accelerator.accumulate(model):
            with clock("forward"):
                nll_sum, logps = forward(workspace, model, batch)
                # The window's token mean, whatever backward and the ranks divide by.
                loss = nll_sum * (repeats * accelerator.num_processes / tokens)
            if objective is not None:
                with clock("costs"):
                    measures, cu_seqlens = measure_rollouts(workspace.costs, workspace.policy, batch.rollouts, logps)
                groups = batch.groups if workspace.options.rollout.responses_per_prompt > 1 else None
                loss = objective.combine(
                    loss,
                    {name: m.sampled(logps, cu_seqlens, groups) for name, m in measures.items()},
                    num_samples_in_window=dict.fromkeys(measures, samples),
                    loss_divisor=repeats,
                ).loss
            with clock("backward"):
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(workspace.policy.trained(), optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            nll, total = nll + float(nll_sum.detach()), total + float(loss.detach()) / repeats
    metrics = {}
    if objective is not None:
        objective.step()
        metrics = objective.metrics() | rollout_metrics(window, accelerator)
    sums = accelerator.reduce(torch.tensor([nll, total], device=accelerator.device), "sum").tolist()
    metrics |= {
        "loss/task": sums[0] / tokens,
        "loss/total": sums[1] / accelerator.num_processes,
        "grad_norm": float(grad_norm),
    }
    return metrics | {f"seconds/{name}": seconds for name, seconds in clock.seconds.items()}


def collect(workspace: Workspace, micro_batch: int, *, sampled: bool) -> MicroBatch:
    """This process's pairs of a micro-batch, and responses to prompts drawn independently of them."""
    options, accelerator = workspace.options, workspace.accelerator
    ranks = (accelerator.process_index, accelerator.num_processes)
    order = DataOrder(len(workspace.train), 2 * options.seed, options.optim.batch_size, *ranks)
    pairs = [workspace.train[i] for i in order[micro_batch]]
    if not sampled:
        return MicroBatch(pairs, [], torch.zeros(0, dtype=torch.long))
    prompts, repeats = options.rollout.prompts, options.rollout.responses_per_prompt
    order = DataOrder(len(workspace.train), 2 * options.seed + 1, prompts, *ranks)
    rollouts = workspace.sample([workspace.train[i] for i in order[micro_batch] for _ in range(repeats)])
    groups = torch.arange(prompts, device=accelerator.device).repeat_interleave(repeats)
    return MicroBatch(pairs, rollouts, groups)


def forward(workspace: Workspace, model: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Summed NLL of the pairs' responses, and token log-probabilities [T] of the rollouts, in one pass."""
    sequences = lay_out(
        [t.prompt_ids for t in batch.pairs] + [r.prompt.prompt_ids for r in batch.rollouts],
        [t.response_ids for t in batch.pairs] + [r.ids for r in batch.rollouts],
        packed=workspace.policy.packed,
        device=workspace.accelerator.device,
    )
    logps = model(sequences)
    imitated = sum(len(t.response_ids) for t in batch.pairs)
    return -logps[:imitated].sum(), logps[imitated:]


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


def learning_rate(step: int, optim: OptimOptions) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then the decay."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[optim.decay]
    return optim.learning_rate * (optim.min_learning_rate + (1 - optim.min_learning_rate) * left)


class Clock:
    """Wall-clock seconds by activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began
