"""How long a version takes, before it is started: by what was measured, and by the runs that are done."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .experiment import UNREACHABLE, Done, Row, Sources, Task, full, quick
from .methods import SFT

#: Seconds on one core of an AMD EPYC beside other work, with 24 responses and 8 pairs a step, by a tenth; 135M weights.
_LOADING, _SFT_STEP, _STEP, _PER_TOKEN, _EVALUATION = 40.0, 2.6, 10.0, 0.27, 110.0
#: Gigabytes of a process there, with its caches.
_MEMORY = 6.5
#: Assumed where no run has told yet: steps of SFT, and tokens of a response that no bound says.
_SFT_ENDS, _TOKENS = 400, 20.0


def predicted(task: Task) -> float:
    """Seconds of a run on one core."""
    if not task.problem.bounds:
        return _LOADING + task.steps * _SFT_STEP + 2 * _EVALUATION
    ends = [end for b in task.problem.bounds if b.measure == "length" for end in (b.lower, b.upper) if end is not None]
    # For a reward alone responses grow to the cap.
    usual = task.problem.cap if _reward_only(task) else _TOKENS
    tokens = sum(ends) / len(ends) if ends else usual
    return _LOADING + task.steps * (_STEP + _PER_TOKEN * tokens) + 2 * _EVALUATION


def _reward_only(task: Task) -> bool:
    return any(bound.lower == UNREACHABLE for bound in task.problem.bounds)


def spent(row: Row) -> float:
    """Seconds that a run took."""
    return row["loading_seconds"] + row["training"]["seconds"] + row["test"]["seconds"] + row["shifted"]["seconds"]


def every_task(command: str, sources: Sources, done: Done, steps: int | None, seeds: int) -> list[Task]:
    """All runs; those that depend on others as they would be with plausible rows of these."""
    if command == "quick":
        return quick(sources, steps)
    return list({task.key: task for task in full(sources, lambda t: done(t) or _plausible(t), steps, seeds)}.values())


def _plausible(task: Task) -> Row:
    nll = abs(math.log(task.steps / _SFT_ENDS))
    reward = 0.5 if _reward_only(task) else 0.2
    measures = {name: {"mean": reward} for name in ("helpful", "harmless")} | {"length": {"mean": _TOKENS}}
    test = {"nll": nll, "measures": measures, "violation": 0.0}
    return {"status": "ok", "validation_nll": nll, "test": test}


def remaining(tasks: Sequence[Task], done: Done, processes: int, threads: int) -> float:
    """Seconds for the tasks that are not done, by the pace of those that are."""
    told = [(predicted(task), spent(row)) for task in tasks if (row := done(task)) and row["status"] == "ok"]
    pace = sum(took for _, took in told) / sum(said for said, _ in told) if told else 1 / max(1, threads)
    busy = [0.0] * max(1, processes)
    for task in tasks:
        if done(task) is None:  # taken by whoever is free first
            busy[busy.index(min(busy))] += predicted(task) * pace
    return max(busy)


def message(tasks: Sequence[Task], done: Done, processes: int, threads: int) -> str:
    """What is said at the start."""
    missing = sum(done(task) is None for task in tasks)
    if not missing:
        return f"{len(tasks)} runs, all done."
    known = missing < len(tasks)
    if torch.cuda.is_available() and not known:
        how_long = "how long that takes on a GPU the first runs will tell"
    else:
        seconds = remaining(tasks, done, processes, threads)
        time = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
        by = "by the runs that are done" if known else "estimated for the packaged model on two cores of an AMD EPYC"
        how_long = f"about {time}, {by}"
    plain = sum(task.method == SFT for task in tasks)
    return (
        f"{len(tasks)} runs ({plain} of them SFT), {missing} to do, {max(1, processes)} at a time with {threads} "
        f"thread(s) each: {how_long}. Memory: about {_MEMORY:g} GB for each at a time on a CPU."
    )
