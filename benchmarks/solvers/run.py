"""One run, its scores, and many of them in two processes with a file that remembers which are done."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import time
import traceback
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import barrierlm

from ..environment import ROOT
from .methods import METHODS, ORACLE, UNITS
from .problems import F64, Problem, problem

#: What is compared, by the names of their distributions.
PACKAGES = ("torch", "scipy", "cooper-optim", "humancompatible-train")
#: Steps that make one point of a picture.
_POINTS = 75
#: Above a bound is by more than this share of the constraint's unit.
_ABOVE = 0.01
#: Bounds that are not active count in the merit with this share of the largest multiplier.
_INACTIVE = 0.1

Row = dict[str, Any]


class Task(NamedTuple):
    """One run; ``final_lr`` is the share of the learning rate that a linear decay ends with (1: none).

    ``loss_scale`` multiplies the loss that the method sees; scores are in the old unit.
    """

    problem: str
    method: str
    setting: str
    seed: int
    steps: int
    final_lr: float = 1.0
    loss_scale: float = 1.0


class Trajectory(NamedTuple):
    """After each of T steps: exact loss [T], violations and multipliers [T, m] in the constraints' own units."""

    losses: Tensor
    violations: Tensor
    multipliers: Tensor


def reference_multipliers(multipliers: Tensor) -> Tensor:
    """What a unit of violation costs in the merit, over 2: the true multiplier, or a tenth of the largest."""
    return torch.maximum(multipliers, _INACTIVE * multipliers.max())


def scores(run: Trajectory, of: Problem) -> dict[str, Any]:
    """Over the last quarter of the steps.

    The merit f - f* + 2 lambda*.max(violation, 0) is an exact penalty: for a convex problem
    f - f* >= -lambda*.violation, so it is never negative and 0 at the optimum alone. Unlike the gap it does not
    reward a run for being infeasible.
    """
    losses, violations, multipliers = (part[-max(1, len(part) // 4) :] for part in run)
    if not all(bool(part.isfinite().all()) for part in run):
        return {"status": "diverged", "merit": math.inf}
    best = of.solution
    gap = (losses - best.loss).mean()
    violation = violations.clamp(min=0).mean(0)
    largest = best.multipliers.max()
    return {
        "status": "ok",
        "merit": (gap + 2 * reference_multipliers(best.multipliers) @ violation).item(),
        "gap": gap.item(),
        "violation": (violation / of.unit_of_bounds).tolist(),
        "above": (violations > _ABOVE * of.unit_of_bounds).any(1).to(F64).mean().item(),
        "value": (violations / of.unit_of_bounds).mean(0).tolist(),
        "multiplier": (multipliers.mean(0) / largest).tolist(),
        "multiplier_std": (multipliers.std(0, correction=0) / largest).tolist(),
        "multiplier_error": ((multipliers - best.multipliers).abs().max(1).values / largest).mean().item(),
    }


def trace(run: Trajectory, of: Problem) -> dict[str, list[float]]:
    """What pictures show: the largest violation in units, and the main multiplier over its true value."""
    main = int(of.solution.multipliers.argmax())
    worst = (run.violations / of.unit_of_bounds).max(1).values
    share = run.multipliers[:, main] / of.solution.multipliers[main]

    def points(values: Tensor) -> list[float]:
        return [round(part.mean().item(), 4) for part in values.tensor_split(min(_POINTS, len(values)))]

    return {"violation": points(worst), "multiplier": points(share)}


def simulate(task: Task) -> Trajectory:
    """Run one task; every method sees the same random numbers for the same seed."""
    of, method = problem(task.problem), (METHODS | {special.name: special for special in (ORACLE, UNITS)})[task.method]
    x = of.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=of.lr)
    runner = method.start(of, optimizer, task.steps, **method.settings[task.setting])
    draw = of.stream(torch.Generator().manual_seed(task.seed))
    losses, violations, multipliers = [], [], []
    for step in range(task.steps):
        optimizer.param_groups[0]["lr"] = of.lr * (1 - (1 - task.final_lr) * step / task.steps)
        loss, measured = draw(x)
        runner.step(task.loss_scale * loss, measured)
        with torch.no_grad():
            losses.append(of.loss(x))
            violations.append(of.violations(x))
            multipliers.append(runner.multipliers() / task.loss_scale)
    return Trajectory(torch.stack(losses), torch.stack(violations), torch.stack(multipliers))


def execute(task: Task) -> Row:
    """The line of a task; what it raises is in the line, and nothing is left out."""
    torch.set_num_threads(1)
    _ = problem(task.problem).solution  # outside the clock
    begin = time.process_time()
    try:
        run = simulate(task)
        found = scores(run, problem(task.problem)) | {"cpu_s": time.process_time() - begin}
        if found["status"] == "ok":
            found |= {"trace": trace(run, problem(task.problem))}
    except Exception as error:
        text = traceback.format_exception_only(error)[-1].strip()
        found = {"status": "failed", "merit": math.inf, "error": text}
    return task._asdict() | {"code": fingerprint()} | found


def versions() -> dict[str, str | None]:
    """Of the packages that are compared; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@lru_cache
def fingerprint() -> str:
    """Of everything that a run's numbers depend on, so that old lines are not mixed with new code."""
    here = Path(__file__).parent
    files = [*Path(barrierlm.__file__).parent.glob("*.py"), ROOT / "tests" / "problems.py"]
    files += [here / f"{name}.py" for name in ("problems", "solution", "methods", "peers", "run")]
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def load(cache: Path) -> dict[Task, Row]:
    """Lines of this very code; a line that was cut off is left out."""
    found: dict[Task, Row] = {}
    if cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["code"] == fingerprint():
                found[Task(*(row[field] for field in Task._fields))] = row
    return found


def run_all(tasks: Iterable[Task], cache: Path, processes: int) -> Iterator[Row]:
    """Rows of all tasks, those in the cache first; every new one is written there before it is given."""
    tasks, done = list(tasks), load(cache)
    yield from (done[task] for task in tasks if task in done)
    missing = [task for task in tasks if task not in done]
    if not missing:
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    if cache.exists() and not cache.read_bytes().endswith(b"\n"):  # an interrupted line
        cache.write_bytes(cache.read_bytes() + b"\n")
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        cache.open("a", encoding="utf-8") as file,
    ):
        for row in pool.imap_unordered(execute, missing, chunksize=1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield row
