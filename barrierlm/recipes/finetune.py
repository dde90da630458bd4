"""The training loop: supervised fine-tuning with sampled constraints."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from barrierlm import BarrierObjective, Sampled, SplitGradients
from barrierlm.distributed import lost_ranks
from barrierlm.files import make_folder, replacing

from .best import BestWeights
from .checkpoint import Checkpoints
from .config import to_yaml
from .costs import measure_rollouts
from .evaluate import Evaluation, evaluate, print_evaluations, write_summary
from .figure import draw_figure
from .gradients import gradient_balance
from .identity import same_run
from .limit import LimitWatch
from .microbatch import collect, one_pass, rollout_metrics, window_counts
from .model import save_model
from .options import OptimOptions, Options
from .progress import MetricsFile, ProgressBar
from .random_state import seed_generators
from .workspace import Workspace, build_objective, open_workspace


def finetune(options: Options) -> Evaluation:
    """The whole recipe: load, train, evaluate, and write everything to ``options.output_dir``.

    Args:
        options: Checked options, from `load_options`.

    Returns:
        The held-out evaluation of the trained model.

    Raises:
        ConfigError: A mistake in the options, the data or the cost functions; ``resume`` without a checkpoint.
        ModuleNotFoundError: A package that an option needs is missing; names the extra.
        StorageError: Something cannot be written, as on a full disk.
    """
    build_objective(options)  # its errors come before anything is loaded
    workspace = open_workspace(options)
    folder = Path(options.output_dir)
    best = BestWeights(workspace.policy.trained()) if options.keep_best else None
    seconds = train(workspace, folder, best=best)
    evaluations = {"final": evaluate(workspace, seconds)}
    if workspace.accelerator.is_main_process and options.save_model:
        save_model(workspace.policy, workspace.tokenizer, options.model, folder / "model")
    if best is not None:
        evaluations |= evaluate_best(workspace, best, folder, seconds)
    if workspace.accelerator.is_main_process:
        write_summary(folder, evaluations)
        draw_figure(folder / "metrics.jsonl", options.constraints, folder / "figure.png")
    print_evaluations(workspace.console, evaluations)
    return evaluations["final"]


def evaluate_best(workspace: Workspace, best: BestWeights, folder: Path, seconds: float) -> dict[str, Evaluation]:
    """Say which state was the best, evaluate it as ``best``, and write its weights to ``folder / "best"``."""
    workspace.console.print(f"best: {best.choice}", highlight=False, markup=False, soft_wrap=True)
    if best.copy is None:
        return {}
    with best.in_place():
        evaluation = evaluate(workspace, seconds)
        if workspace.accelerator.is_main_process and workspace.options.save_model:
            save_model(workspace.policy, workspace.tokenizer, workspace.options.model, folder / "best")
    return {"best": evaluation}


def train(
    workspace: Workspace,
    folder: Path,
    *,
    constrained: bool = True,
    label: str = "training",
    best: BestWeights | None = None,
) -> float:
    """Train from the current weights; metrics.jsonl, config.yaml and checkpoints go to ``folder``.

    Args:
        workspace: Model, data and costs.
        folder: Made if it does not exist.
        constrained: False: plain supervised fine-tuning on the same pairs in the same order.
        label: Name in the progress bar.
        best: Keeps the best weights of a constrained run.

    Returns:
        Seconds that it took.
    """
    began = time.perf_counter()
    options, accelerator, weights = workspace.options, workspace.accelerator, workspace.policy.trained()
    objective = build_objective(options) if constrained else None
    limit = options.optim.constraint_max_grad_norm
    watch = LimitWatch(limit, options.optim.steps) if objective is not None and limit is not None else None
    model, optimizer = prepare(workspace)
    say = partial(workspace.console.print, markup=False, highlight=False, soft_wrap=True)
    run = same_run(options, workspace.train, accelerator.num_processes)
    checkpoints = Checkpoints(
        folder / "checkpoints", accelerator, weights, optimizer, objective, best, run=run, say=say
    )
    if not options.resume:
        checkpoints.refuse_older()
    first = checkpoints.load() if options.resume else 0
    if accelerator.is_main_process:
        make_folder(folder)
        with replacing(folder / "config.yaml") as file:
            file.write(to_yaml(options).encode())
    workspace.policy.lm.train()
    with (
        MetricsFile(folder, keep=first, enabled=accelerator.is_main_process) as metrics_file,
        ProgressBar(workspace.console, label, options.optim.steps, first) as bar,
    ):
        if metrics_file.enabled and metrics_file.kept < first:
            say(f"Warning: {metrics_file.path} holds only {metrics_file.kept} of the first {first} steps")
        for step in range(first, options.optim.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.optim)
            with lost_ranks():
                metrics = train_step(workspace, model, optimizer, objective, step)
            metrics_file.write(step + 1, {"lr": learning_rate(step, options.optim), **metrics})
            bar.update(metrics["loss/task"], objective)
            if watch is not None and objective is not None:
                for warning in watch.update(metrics["balance/constraint_norm"], objective.report()):
                    say(warning)
            if best is not None and objective is not None:
                best.update(objective.report(), metrics["loss/task"])
            if options.checkpoint_every and (step + 1) % options.checkpoint_every == 0:
                metrics_file.sync()
                checkpoints.save(step + 1)
    return time.perf_counter() - began


def prepare(workspace: Workspace) -> tuple[Any, Any]:
    """Model and optimizer as the accelerator wants them, and the seed of the run."""
    options, accelerator = workspace.options, workspace.accelerator
    betas = (options.optim.momentum, 0.999)
    weights, decay = workspace.policy.trained(), options.optim.weight_decay
    optimizer = torch.optim.AdamW(weights, lr=1.0, betas=betas, weight_decay=decay)
    prepared = accelerator.prepare(workspace.policy, optimizer)
    seed_generators(options.seed * 1_000_003 + accelerator.process_index)
    return prepared[0], prepared[1]


def train_step(
    workspace: Workspace,
    model: Any,
    optimizer: Any,
    objective: BarrierObjective | None,
    step: int,
    *,
    clock: Clock | None = None,
) -> dict[str, float]:
    """One optimizer step: a window of micro-batches, all sampled before the weights change."""
    accelerator, optim, every = workspace.accelerator, workspace.options.optim, workspace.options.balance_every
    clock, repeats = clock or Clock(), optim.gradient_accumulation
    with clock("generation"):
        window = [collect(workspace, step * repeats + k, sampled=objective is not None) for k in range(repeats)]
    tokens, samples = window_counts(window, accelerator)
    task = total = 0.0
    balance: dict[str, float] = {}
    grad_norm = torch.zeros(())
    apart = objective is not None and optim.constraint_max_grad_norm is not None
    parts = SplitGradients(workspace.policy.trained()) if apart else None
    # The window's token mean, whatever backward and the ranks divide by.
    task_weight = repeats * accelerator.num_processes / tokens
    run = partial(one_pass, packed=workspace.policy.packed, task_weight=task_weight)
    for batch in window:
        with accelerator.accumulate(model):
            measurements: dict[str, Sampled] = {}
            if objective is not None:
                groups = batch.groups if workspace.options.rollout.responses_per_prompt > 1 else None
                with clock("costs"):
                    measurements, _ = measure_rollouts(workspace.costs, workspace.policy, batch.rollouts, groups)
            counts: dict[str, Any] = {
                "num_samples_in_window": dict.fromkeys(measurements, samples),
                "loss_divisor": repeats,
            }
            if parts is None:
                with clock("forward"):
                    loss, task_loss = run(model, batch, objective, measurements, **counts)
                with clock("backward"):
                    accelerator.backward(loss)
            else:
                with clock("forward"):
                    task_loss, _ = run(model, batch._replace(rollouts=[]), None, {})
                with clock("backward"):
                    accelerator.backward(task_loss)
                with clock("forward"):
                    loss, _ = run(workspace.policy, batch._replace(pairs=[]), objective, measurements, **counts)
                with clock("backward"):
                    parts.backward_parts(constraint=loss, divisor=repeats)
                loss = task_loss + loss.detach()
            if accelerator.sync_gradients and every and parts is None and objective is not None and step % every == 0:
                with clock("balance"):
                    balance = gradient_balance(workspace, window, accelerator.num_processes / tokens)
            with clock("optimizer"):
                if accelerator.sync_gradients and parts is not None:
                    limits = optim.max_grad_norm, optim.constraint_max_grad_norm
                    norms = parts.clip_(*limits, error_if_nonfinite=False)
                    balance, grad_norm = norms.metrics(), norms.total
                elif accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(workspace.policy.trained(), optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            task, total = task + float(task_loss.detach()) / repeats, total + float(loss.detach()) / repeats
    metrics = {}
    if objective is not None:
        with clock("objective"):
            objective.step()
            metrics = objective.metrics()
        metrics |= rollout_metrics(window, accelerator)
    sums = accelerator.reduce(torch.tensor([task, total], device=accelerator.device), "sum").tolist()
    metrics |= balance | {
        "loss/task": sums[0] / accelerator.num_processes,
        "loss/total": sums[1] / accelerator.num_processes,
        "grad_norm": float(grad_norm),
    }
    return metrics | {f"seconds/{name}": seconds for name, seconds in clock.seconds.items()}


def learning_rate(step: int, optim: OptimOptions) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then the decay."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[optim.decay]
    return optim.learning_rate * (optim.min_learning_rate + (1 - optim.min_learning_rate) * left)


class Clock:
    """Wall-clock seconds by activity; what runs inside another one counts for itself alone.

    Args:
        wait: Called before every look at the clock; a benchmark waits for its device there, training does not.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait = wait

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        began, before = time.perf_counter(), sum(self.seconds.values())
        yield
        self._wait()
        inside = sum(self.seconds.values()) - before
        self.seconds[name] += time.perf_counter() - began - inside
