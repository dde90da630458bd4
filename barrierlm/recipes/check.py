"""``barrierlm check``: what a run would meet, measured on the starting model before it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from barrierlm import BarrierObjective, BatchMean, Report, Sampled
from barrierlm.diagnostics import BoundState, verdict, verdict_tolerance

from .attempts import CostError
from .costs import imported_costs, measure_rollouts, per_response
from .finetune import prepare, train_step
from .microbatch import MicroBatch, collect, rollout_metrics
from .options import Options
from .workspace import Workspace, build_objective, open_workspace

#: Largest standard error of one step's mean, in scales, from which a rule can learn (docs/how-to-choose.md, Noise).
STEP_NOISE = 0.3
#: The width s that the averaged estimate must resolve where the rule has none of its own: 0.5², where the default rule
#: stops tightening.
WIDTH = 0.25
#: A larger share of responses cut at the token cap hides how much lengths differ.
MANY_CUT = 0.1
_TIMED_STEPS = 2


@dataclass
class BoundCheck:
    """One bound at the start. ``noise`` is the standard error of one step's mean, in scales; ``violation`` is as well.

    ``needed`` are the responses a step that resolve it; None: not known. ``noise_of`` says whose spread it is: that of
    the ``responses``, or, where the token cap hides it, that of the ``data``'s lengths, scaled to the bound.
    """

    constraint: str
    side: str
    bound: float
    estimate: float
    stderr: float
    scale: float
    violation: float
    verdict: str
    noise: float
    needed: int | None
    noise_of: str = "responses"
    advice: str = ""


@dataclass
class Check:
    """All that was measured; times in seconds, memory in bytes. ``problems`` say why the configuration cannot work."""

    bounds: list[BoundCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)
    responses_per_step: int = 0
    windows: int = 0
    mean_tokens: float = math.nan
    censored: float = math.nan
    max_new_tokens: int = 0
    steps: int = 0
    step_seconds: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)
    training_seconds: float = math.nan
    evaluation_seconds: float = math.nan
    peak_memory: int | None = None
    peak_cuda_memory: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found that keeps the configuration from working."""
        return not self.problems


def check(options: Options, *, windows: int = 4, as_json: bool = False) -> Check:
    """Measure the starting model and time two steps; writes no file and leaves the output folder alone.

    Args:
        options: Checked options, from `load_options`.
        windows: Steps' worth of responses to measure the bounds with, >= 1.
        as_json: Print one JSON object instead of tables; everything else then goes to stderr.

    Returns:
        What was found; also printed by the main process.

    Raises:
        ConfigError, ModuleNotFoundError: As `finetune`.
    """
    build_objective(options)
    options = dataclasses.replace(options, resume=False)
    out = sys.stdout
    with redirect_stdout(sys.stderr if as_json else out):
        workspace = open_workspace(options)
        found = run_check(workspace, windows)
        if workspace.accelerator.is_main_process and not as_json:
            print_check(workspace.console, found)
        for problem in found.problems if not workspace.accelerator.is_main_process else ():
            print(f"process {workspace.accelerator.process_index}: {problem}", file=sys.stderr)
    if workspace.accelerator.is_main_process and as_json:
        print(json.dumps(_finite(dataclasses.asdict(found) | {"ok": found.ok}), indent=2), file=out)
    return found


def run_check(workspace: Workspace, windows: int) -> Check:
    """The measurements of `check`; the weights stay as they are."""
    options = workspace.options
    found = Check(windows=windows, steps=options.optim.steps, max_new_tokens=options.rollout.max_new_tokens)
    found.imported = imported_costs(options.constraints)
    torch.manual_seed(options.seed * 1_000_003 + workspace.accelerator.process_index)
    try:
        if options.constraints:
            _measure(workspace, found)
        _time(workspace, found)
    except FloatingPointError as error:
        found.problems.append(f"a measurement is not finite: {error}")
    except CostError as error:
        found.problems.append(str(error))
    except torch.OutOfMemoryError as error:
        found.problems.append(f"out of memory: {str(error).splitlines()[0]}")
    found.peak_memory = _peak_memory()
    if torch.cuda.is_available():
        found.peak_cuda_memory = torch.cuda.max_memory_allocated()
    return found


def _measure(workspace: Workspace, found: Check) -> None:
    """Estimates and noise from ``found.windows`` windows like those of the first steps."""
    repeats = workspace.options.optim.gradient_accumulation
    objective = build_objective(workspace.options)
    assert objective is not None
    rule, estimator = objective.rule, objective.estimator
    newest = BarrierObjective(None, objective.constraints, estimator=BatchMean())
    reports: list[Report] = []
    tokens: list[dict[str, float]] = []
    for w in range(found.windows):
        window = [collect(workspace, w * repeats + k, sampled=True) for k in range(repeats)]
        newest.calibrate(_values(workspace, window))
        reports.append(newest.report())
        tokens.append(rollout_metrics(window, workspace.accelerator))
    found.mean_tokens, found.censored = (
        sum(row[f"rollout/{name}"] for row in tokens) / len(tokens) for name in ("mean_tokens", "censored")
    )
    rollout, world = workspace.options.rollout, workspace.accelerator.num_processes
    found.responses_per_step = rollout.prompts * rollout.responses_per_prompt * repeats * world
    averaging = math.sqrt(estimator.smoothing / (2 - estimator.smoothing))
    width = WIDTH if rule.s is None else rule.s
    lengths = torch.tensor([len(t.response_ids) for t in workspace.train], dtype=torch.float64)
    spread = float(lengths.std() / lengths.mean()) if len(lengths) > 1 else 0.0
    for rows in zip(*reports, strict=True):
        row = _bound(rows)
        if workspace.options.constraints[row.constraint].cost == "length" and found.censored > MANY_CUT:
            from_data = spread * row.bound / row.scale / math.sqrt(found.responses_per_step)
            if from_data > row.noise:
                row.noise, row.noise_of = from_data, "data"
        if math.isfinite(row.noise) and row.noise > 0:
            precision = max(1 / STEP_NOISE, averaging / width)
            row.needed = math.ceil(found.responses_per_step * (row.noise * precision) ** 2 - 1e-9)
        found.bounds.append(row)
    for row in found.bounds:
        row.advice = _advice(row, found, workspace.options)
        if row.noise == 0 and row.verdict == "violated":
            found.problems.append(
                f"{_label(row)} is violated, and every response has the same value ({row.estimate:.4g}): there is no "
                "gradient that could change it"
            )


def _values(workspace: Workspace, window: Sequence[MicroBatch]) -> dict[str, Sampled]:
    """Costs of all of a window's responses."""
    values: dict[str, list[torch.Tensor]] = {name: [] for name in workspace.costs}
    groups = [batch.groups + k * workspace.options.rollout.prompts for k, batch in enumerate(window)]
    for batch in window:
        with torch.no_grad():
            measured, sequences = measure_rollouts(workspace.costs, workspace.policy, batch.rollouts)
            needed = any(m.needs_logps for m in measured.values())
            logps = workspace.policy(sequences) if needed else None
            for name, m in measured.items():
                values[name].append(per_response(m, sequences, logps))
    grouped = torch.cat(groups) if workspace.options.rollout.responses_per_prompt > 1 else None
    return {name: Sampled(torch.cat(parts), groups=grouped) for name, parts in values.items()}


def _bound(rows: Sequence[BoundState]) -> BoundCheck:
    """One bound from its states after each window."""
    first, n = rows[0], len(rows)
    estimate = sum(row.estimate for row in rows) / n
    step = math.sqrt(sum(row.stderr**2 for row in rows) / n)
    stderr = step / math.sqrt(n)
    z = (estimate - first.bound) / first.scale * (1 if first.side == "upper" else -1)
    word = verdict(z, verdict_tolerance(stderr / first.scale), ())
    return BoundCheck(
        first.constraint, first.side, first.bound, estimate, stderr, first.scale, z, word, step / first.scale, None
    )


def _label(row: BoundCheck) -> str:
    return f"{row.constraint} {'≥' if row.side == 'lower' else '≤'} {row.bound:g}"


def _advice(row: BoundCheck, found: Check, options: Options) -> str:
    """A plain sentence or two about one bound; about its noise where it is the constraint's worse one."""
    worst = max((other for other in found.bounds if other.constraint == row.constraint), key=lambda r: r.violation)
    start = {
        "met": "met from the start.",
        "active": "at the bound, within the noise of this check.",
        "violated": f"violated by {row.violation * row.scale:.3g} ({row.violation:.2g} scales).",
    }.get(row.verdict, "not measured.")
    if row is not worst:
        return f"{_label(row)}: {start}"
    if row.needed is None:
        noise = "Every response has the same value, so the noise is not known yet."
    elif row.needed <= found.responses_per_step:
        noise = f"{found.responses_per_step} responses a step are enough."
    else:
        prompts = math.ceil(row.needed * options.rollout.prompts / found.responses_per_step)
        noise = (
            f"{found.responses_per_step} responses a step are too few: take {row.needed} with "
            f"rollout.prompts={prompts}, or raise optim.gradient_accumulation; else expect a multiplier that follows "
            "the noise."
        )
    if row.noise_of == "data":
        spread = row.noise * row.scale * math.sqrt(found.responses_per_step)
        noise += f" (The cap hides how lengths differ; taken from the data's: a spread of {spread:.2g} at the bound.)"
    cost = options.constraints[row.constraint].cost
    if cost == "length" and found.censored > 0.02 and row.verdict != "met":
        hides = "more" if row.side == "upper" else "less"
        noise += (
            f" {found.censored:.0%} of the responses end at max_new_tokens={found.max_new_tokens}, so the true mean is "
            f"longer and the violation {hides} than this."
        )
    elif cost == "length" and found.censored > 0.02:
        noise += f" {found.censored:.0%} of the responses are cut at max_new_tokens={found.max_new_tokens}."
    return f"{_label(row)}: {start} {noise}"


def _time(workspace: Workspace, found: Check) -> None:
    """Real steps, of which the faster counts: the first one also warms up."""
    options = workspace.options
    model, optimizer = prepare(workspace)
    objective = build_objective(options)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights must stay, and what is timed is the start
    workspace.policy.lm.train()
    timed = []
    for step in range(_TIMED_STEPS):
        began = time.perf_counter()
        metrics = train_step(workspace, model, optimizer, objective, step)
        timed.append((time.perf_counter() - began, metrics))
    found.step_seconds, metrics = min(timed, key=lambda entry: entry[0])
    found.parts = {key.removeprefix("seconds/"): s for key, s in metrics.items() if key.startswith("seconds/")}
    found.parts.pop("balance", None)
    passes = found.parts.get("forward", 0.0) + found.parts.get("backward", 0.0)
    if options.balance_every and options.optim.constraint_max_grad_norm is None:  # else every step logs them
        found.step_seconds = sum(found.parts.values()) + passes / options.balance_every
    found.training_seconds = options.optim.steps * found.step_seconds
    sequences = options.optim.batch_size * options.optim.gradient_accumulation + found.responses_per_step
    generation = found.parts.get("generation", 0.0) / max(found.responses_per_step, 1) if objective else 0.0
    evaluated = options.evaluation.pairs + options.evaluation.prompts
    found.evaluation_seconds = generation * options.evaluation.prompts + passes / sequences * evaluated
    for key, what in (("loss/task", "task loss"), ("grad_norm", "gradient's norm")):
        if not all(math.isfinite(metrics[key]) for _, metrics in timed):
            found.problems.append(f"the {what} of the first steps is not finite")


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_check(console: Console, found: Check) -> None:
    """The table of the bounds, a sentence for each, then time and memory."""
    if found.bounds:
        count = found.windows * found.responses_per_step
        table = Table(title=f"The starting model: {count} responses, {found.responses_per_step} a step")
        for name in ("bound", "estimate", "violation", "verdict", "noise a step", "responses needed"):
            table.add_column(name, justify="left" if name in ("bound", "verdict") else "right")
        colors = {"met": "green", "active": "yellow", "violated": "red"}
        for row in found.bounds:
            color = colors.get(row.verdict, "default")
            table.add_row(
                _label(row).replace("[", r"\["),
                f"{row.estimate:.4g} ± {row.stderr:.2g}",
                f"{row.violation:.3g} scales",
                f"[{color}]{row.verdict}[/]",
                f"{row.noise * row.scale:.2g} ({row.noise:.2f} scales){'*' if row.noise_of == 'data' else ''}",
                "?" if row.needed is None else str(row.needed),
            )
        console.print(table)
    lines = [row.advice for row in found.bounds]
    if found.bounds:
        lines.append(
            f"Responses: {found.mean_tokens:.1f} tokens on average, {found.censored:.0%} cut at "
            f"max_new_tokens={found.max_new_tokens}."
        )
    if found.imported:
        lines.append(f"Code of yours that a run imports: {', '.join(found.imported)}.")
    if math.isfinite(found.step_seconds):
        parts = ", ".join(f"{name} {seconds:.2g}" for name, seconds in found.parts.items())
        lines.append(
            f"Time: {found.step_seconds:.2g} s a step ({parts}), about {_duration(found.training_seconds)} for "
            f"{found.steps} steps and {_duration(found.evaluation_seconds)} for the evaluation, with responses as long "
            "as at the start."
        )
    memory = [f"{size / 2**30:.2f} GiB" for size in (found.peak_memory, found.peak_cuda_memory) if size is not None]
    if memory:
        lines.append(f"Memory: peak {memory[0]}" + (f", on the GPU {memory[1]}" if len(memory) > 1 else "") + ".")
    lines += [f"Cannot work: {problem}." for problem in found.problems] or [
        "No reason found why this run could not work."
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
