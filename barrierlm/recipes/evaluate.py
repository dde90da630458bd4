"""Held-out evaluation: the task, and every constraint with its uncertainty."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table

from barrierlm.files import replacing
from barrierlm.integrations.models import in_evaluation

from .costs import measure_rollouts, per_response
from .model import lay_out
from .rollout import Rollout
from .workspace import Workspace

_SAMPLING_SEED = 20_240


@dataclass(frozen=True)
class ConstraintResult:
    """Mean of one constraint over held-out prompts, one sampled response each.

    ``satisfied``: the mean is within the bounds. ``censored``: share of responses cut at the token cap.
    """

    mean: float
    stderr: float
    lower: float | None
    upper: float | None
    satisfied: bool
    censored: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the mean."""
        return self.mean - 1.96 * self.stderr, self.mean + 1.96 * self.stderr


@dataclass(frozen=True)
class Evaluation:
    """Every constraint, ``nlls`` and ``tokens`` of the held-out responses, ``seconds`` of training and evaluation.

    By response, since two models are told apart on the same ones far better than by their means: most of the spread
    is the responses' own.
    """

    nlls: list[float]
    tokens: list[int]
    seconds: float
    constraints: dict[str, ConstraintResult]
    samples: list[tuple[str, str]]
    mean_tokens: float
    censored: float

    @property
    def nll(self) -> float:
        """Per held-out response token, in nats."""
        return sum(self.nlls) / sum(self.tokens)

    def summary(self) -> dict[str, Any]:
        """The entry in summary.json."""
        return {
            "nll": self.nll,
            "seconds": self.seconds,
            # JSON has no NaN: what no response could tell is null.
            "constraints": {
                name: {key: None if value != value else value for key, value in asdict(result).items()}
                for name, result in self.constraints.items()
            },
        }


def evaluate(workspace: Workspace, seconds: float = 0.0) -> Evaluation:
    """Evaluate the model as it is; every process does its share.

    Responses are sampled with seeds of their own, so that evaluating changes no later random number.

    Args:
        workspace: Model, data and costs.
        seconds: What training took, to be added to the evaluation's own time.
    """
    began = time.perf_counter()
    options, accelerator = workspace.options.evaluation, workspace.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    pairs = workspace.heldout[: options.pairs][rank::world]
    prompts = workspace.heldout[: options.prompts][rank::world]
    policy, size = workspace.policy, options.batch_size
    nlls: list[float] = []
    rollouts: list[Rollout] = []
    values: dict[str, list[float]] = {name: [] for name in workspace.costs}
    with in_evaluation(policy.lm), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(_SAMPLING_SEED + rank)
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            prompt_ids, response_ids = [t.prompt_ids for t in batch], [t.response_ids for t in batch]
            logps = policy(lay_out(prompt_ids, response_ids, packed=policy.packed, device=policy.device))
            parts = logps.double().split([len(ids) for ids in response_ids])
            nlls += torch.stack([-part.sum() for part in parts]).tolist()
        for start in range(0, len(prompts), size):
            sampled = workspace.sample(prompts[start : start + size])
            rollouts += sampled
            measurements, sequences = measure_rollouts(workspace.costs, policy, sampled)
            needed = any(m.needs_logps for m in measurements.values())
            logps = policy(sequences) if needed else None
            for name, measurement in measurements.items():
                values[name] += per_response(measurement, sequences, logps).tolist()
    shown = [(r.prompt.pair.prompt, r.text) for r in rollouts]
    shares = gather_object([(nlls, values, [(len(r.ids), r.censored) for r in rollouts], shown)])
    lengths = [entry for part in shares for entry in part[2]]
    share = sum(censored for _, censored in lengths) / len(lengths)
    for name in values:
        missing = sum(not math.isfinite(v) for part in shares for v in part[1][name])
        if missing:
            workspace.console.print(
                f"Warning: {missing} of {len(lengths)} held-out responses have no cost for {name!r}, and are left out "
                "of its mean",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    results = {
        name: _result([v for part in shares for v in part[1][name]], bounds.lower, bounds.upper, share)
        for name, bounds in workspace.options.constraints.items()
    }
    tokens = [len(pair.response_ids) for pair in workspace.heldout[: options.pairs]]
    return Evaluation(
        nlls=_in_order([part[0] for part in shares]),
        tokens=tokens,
        seconds=seconds + time.perf_counter() - began,
        constraints=results,
        samples=[sample for part in shares for sample in part[3]][: options.samples],
        mean_tokens=sum(length for length, _ in lengths) / len(lengths),
        censored=share,
    )


def _in_order(shares: list[list[float]]) -> list[float]:
    """What was dealt to the ranks, every ``world``-th each, as it was."""
    found = [0.0] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        found[rank :: len(shares)] = share
    return found


def _result(values: list[float], lower: float | None, upper: float | None, censored: float) -> ConstraintResult:
    x = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
    mean, stderr = (x.mean().item(), x.std().item() / math.sqrt(len(x))) if len(x) > 1 else (math.nan, math.nan)
    satisfied = (lower is None or mean >= lower) and (upper is None or mean <= upper)
    return ConstraintResult(mean, stderr, lower, upper, satisfied, censored)


def write_summary(folder: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Write ``summary.json``, and the sample responses to ``samples.jsonl``."""
    summary = {"runs": {name: evaluation.summary() for name, evaluation in evaluations.items()}}
    with replacing(folder / "summary.json") as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    with replacing(folder / "samples.jsonl") as file:
        for name, evaluation in evaluations.items():
            for prompt, response in evaluation.samples:
                row = {"run": name, "prompt": prompt, "response": response}
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def print_evaluations(console: Console, evaluations: Mapping[str, Evaluation]) -> None:
    """One table of all runs, then a few sample responses side by side."""
    table = Table(title="Held-out evaluation")
    columns = "run", "NLL / token", "constraint", "mean", "95% interval", "bounds", "verdict", "censored", "seconds"
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "constraint", "verdict") else "right")
    for name, evaluation in evaluations.items():
        head = [name, f"{evaluation.nll:.3f}"]
        for constraint, result in evaluation.constraints.items():
            low, high = result.interval
            table.add_row(
                *head,
                constraint,
                f"{result.mean:.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{'-∞' if result.lower is None else f'{result.lower:g}'} to "
                f"{'∞' if result.upper is None else f'{result.upper:g}'}",
                "[green]met[/]" if result.satisfied else "[red]violated[/]",
                f"{result.censored:.1%}",
                f"{evaluation.seconds:.0f}",
            )
            head = ["", ""]
        if not evaluation.constraints:
            table.add_row(*head, "", "", "", "", "", f"{evaluation.censored:.1%}", f"{evaluation.seconds:.0f}")
    console.print(table)
    samples = Table(title="Sample responses", show_lines=True)
    samples.add_column("prompt", ratio=1)
    for name in evaluations:
        samples.add_column(name, ratio=1)
    for rows in zip(*(evaluation.samples for evaluation in evaluations.values()), strict=True):
        samples.add_row(*(_plain(text) for text in (rows[0][0], *(response for _, response in rows))))
    if samples.row_count:
        console.print(samples)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
