"""The grid of runs: problems, methods, seeds, and what has to be known before the next ones can be named."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .methods import METHODS, PENALTY, REWARD_UNIT, SFT, UNIT, recipe_options

Row = dict[str, Any]

#: As in the packaged demo.
BASE = (
    "data.max_prompt_tokens=40",
    "data.max_response_tokens=64",
    "objective.estimator_options.smoothing=0.5",
    "rollout.prompts=24",
    "optim.batch_size=8",
    "optim.learning_rate=5e-4",
    "optim.decay=cosine",
    "optim.min_learning_rate=0.02",
    "optim.momentum=0.5",
    "evaluation.pairs=256",
    "evaluation.prompts=256",
    "checkpoint_every=20",
)
QUICK_WINDOW = (16, 24)
WINDOWS = ((8, 12), (12, 16), (16, 24), (24, 32), (32, 48))
#: Steps of the quick version: what 75 minutes on two cores allow.
QUICK_STEPS = 44
#: Steps that are tried for SFT, each with a learning rate that has decayed at their end; the best is everyone's number.
SFT_STEPS = (100, 200, 400, 800, 1600, 3200, 6400)
SEEDS = 3
QUICK_WEIGHTS = tuple(UNIT * factor for factor in (0.3, 3))
#: Of the unit.
WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
#: Training for the reward alone: a weight beside which the task hardly counts, on a bound that nothing reaches.
_REWARD_ONLY, UNREACHABLE = 10.0, 1e4
_SHORTEST_CAP = 48


class Bound(NamedTuple):
    """A constraint on one of the measures."""

    name: str
    measure: str
    lower: float | None = None
    upper: float | None = None


@dataclass(frozen=True)
class Problem:
    """Bounds, the token cap of the rollouts, and where training starts: "base" or "sft"."""

    name: str
    bounds: tuple[Bound, ...] = ()
    cap: int = _SHORTEST_CAP
    start: str = "base"

    @property
    def unit(self) -> float:
        """An ordinary multiplier here, in nats per token and unit of violation."""
        return UNIT if all(bound.measure == "length" for bound in self.bounds) else REWARD_UNIT


@dataclass(frozen=True)
class Sources:
    """Model, data and rewards; ``extra`` are overrides of the recipe for every run."""

    model: str = "smollm2-135m-instruct"
    data: str = "dialogues"
    helpful: str = "sentiment"
    harmless: str = "benchmarks.paper.rewards:harmless"
    extra: tuple[str, ...] = ()

    @property
    def costs(self) -> dict[str, str]:
        """Measure: the recipe's name of the cost."""
        return {"length": "length", "helpful": self.helpful, "harmless": self.harmless}

    @property
    def contents(self) -> list[str]:
        """What stands in the files and folders that these name."""
        return [_contents(name) for name in (self.model, self.data, self.helpful, self.harmless)]


@lru_cache
def _contents(name: str) -> str:
    """A digest of a file or of the file of ``FILE:function``, names, sizes and times of a folder; empty for a name."""
    ends = name.removeprefix("reward_model:").partition("#")[0], name.rpartition(":")[0]
    path = next((Path(end) for end in ends if end and Path(end).exists()), None)
    if path is None:
        return ""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    found = sorted((str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*"))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """One run. Its `key` is a digest of all that it depends on but the code."""

    problem: Problem
    method: str
    seed: int
    steps: int
    sources: Sources
    weight: float | None = None
    max_pairs: int = 4000

    @property
    def key(self) -> str:
        known = [asdict(self), self.overrides(), self.sources.contents]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """For people."""
        weight = "" if self.weight is None else f" {self.weight:g}"
        return f"{self.problem.name}, {self.method}{weight}, seed {self.seed}"

    def overrides(self) -> list[str]:
        """The options of the recipe, as overrides of its defaults."""
        found = [*BASE, f"model.name={self.sources.model}", f"data.source={self.sources.data}", f"seed={self.seed}"]
        found += [f"data.max_pairs={self.max_pairs}", f"optim.steps={self.steps}"]
        found += [f"rollout.max_new_tokens={self.problem.cap}"]
        for bound in self.problem.bounds:
            found.append(f"constraints.{bound.name}.cost={self.sources.costs[bound.measure]}")
            found += [
                f"constraints.{bound.name}.{side}={value}"
                for side, value in (("lower", bound.lower), ("upper", bound.upper))
                if value is not None
            ]
        found += recipe_options(self.method, self.steps, self.weight, self.problem.unit)
        return found + list(self.sources.extra)


Done = Callable[[Task], Row | None]


def window(lower: float, upper: float, name: str = "length", start: str = "base") -> Problem:
    """A mean length within bounds; the cap is at least twice the upper one."""
    cap = max(_SHORTEST_CAP, math.ceil(2 * upper))
    return Problem(f"{name} {lower:g} to {upper:g}", (Bound("length", "length", lower, upper),), cap, start)


def quick(sources: Sources, steps: int | None = None) -> list[Task]:
    """One window, one seed; SFT, the shortest run, comes last, when another may still be busy beside it."""
    problem = window(*QUICK_WINDOW)
    steps = steps or QUICK_STEPS
    tasks = [Task(problem, name, 0, steps, sources) for name in METHODS[:3]]
    tasks += [Task(problem, PENALTY, 0, steps, sources, weight) for weight in QUICK_WEIGHTS]
    return [*tasks, Task(Problem(SFT, cap=problem.cap), SFT, 0, steps, sources)]


def full(sources: Sources, done: Done, steps: int | None = None, seeds: int = SEEDS) -> Iterator[Task]:
    """All runs that can be named with what is done; the iterator ends where something is missing.

    Args:
        sources: Model, data and rewards.
        done: The row of a task, or None.
        steps: Of every run; None: those at which SFT's held-out NLL stops falling.
        seeds: Their number.
    """
    free = Task(Problem(SFT, cap=2 * WINDOWS[-1][1]), SFT, 0, 0, sources, max_pairs=40_000)
    if steps is None:
        tried: dict[int, float] = {}
        for count in SFT_STEPS:
            task = replace(free, steps=count)
            yield task
            row = done(task)
            if row is None:
                return
            if row["status"] != "ok":
                continue
            tried[count] = row["validation_nll"]
            if tried[count] > min(tried.values()):
                break
        if not tried:
            return
        steps = min(tried, key=lambda count: tried[count])
    free = replace(free, steps=steps)
    plain = [replace(free, seed=seed) for seed in range(seeds)]
    only = {m: replace(free, problem=_reward_only(m), method=PENALTY, weight=_REWARD_ONLY) for m in REWARDS}
    yield from (*plain, *only.values())
    if any(done(task) is None for task in plain):
        return
    starts = [_finished(task, done) for task in plain]  # what failed holds up what needs it alone
    reached = {m: row for m, task in only.items() if (row := _finished(task, done)) is not None}
    bounds = {} if starts[0] is None else {m: _halfway(m, starts[0], row) for m, row in reached.items()}
    problems = problems_of(bounds, None if starts[0] is None else starts[0]["test"]["measures"]["length"]["mean"])
    for seed in range(seeds):
        for problem in problems:
            if problem.start == "sft" and starts[seed] is None:
                continue
            one = replace(free, problem=problem, seed=seed)
            yield from (replace(one, method=name) for name in METHODS)
            yield from _penalties(replace(one, method=PENALTY), done)


REWARDS = ("helpful", "harmless")
#: What the name of the problem begins with whose runs start from SFT's weights.
FEASIBLE = "feasible start"
#: The problem with bounds that nothing can meet.
TOGETHER = "infeasible together"
#: Problems whose bounds the runs for a reward alone decide about.
REWARD_PROBLEMS = (*REWARDS, "helpful and harmless")


def _finished(task: Task, done: Done) -> Row | None:
    """Its row, unless it failed."""
    row = done(task)
    return row if row is not None and row["status"] == "ok" else None


def _reward_only(measure: str) -> Problem:
    return Problem(f"{measure} only", (Bound(measure, measure, lower=UNREACHABLE),), 64)


def _halfway(measure: str, plain: Row, reached: Row) -> Bound:
    """The bound between what SFT has and what training for the reward alone reaches."""
    low, high = (row["test"]["measures"][measure]["mean"] for row in (plain, reached))
    return Bound(measure, measure, lower=round((low + high) / 2, 3))


def problems_of(rewards: dict[str, Bound], sft_length: float | None) -> list[Problem]:
    """All problems of the full version, those that other runs decide about as far as these are known.

    Args:
        rewards: The bounds of the rewards.
        sft_length: Mean length of SFT's responses, which the window of the feasible start holds.
    """
    near = [] if sft_length is None else [(math.floor(0.75 * sft_length), math.ceil(1.25 * sft_length))]
    return [
        *(window(*bounds) for bounds in WINDOWS),
        *(Problem(name, (bound,), 64) for name, bound in rewards.items()),
        *([Problem(REWARD_PROBLEMS[-1], tuple(rewards.values()), 64)] if len(rewards) == len(REWARDS) else []),
        *(window(*bounds, f"{FEASIBLE}: length", start="sft") for bounds in near),
        Problem(TOGETHER, (Bound("short", "length", upper=8.0), Bound("long", "length", lower=20.0)), 48),
    ]


def _penalties(task: Task, done: Done) -> Iterator[Task]:
    """All weights with the first seed; with the others the one that was best there."""
    search = [replace(task, seed=0, weight=task.problem.unit * factor) for factor in WEIGHTS]
    if task.seed == 0:
        yield from search
        return
    rows = [done(one) for one in search]
    if all(row is not None for row in rows):
        best = best_penalty([row for row in rows if row is not None])
        yield replace(task, weight=search[best].weight)


def best_penalty(rows: list[Row]) -> int:
    """The index of the weight that a person would keep: bounds met on average and the lowest NLL, else the nearest.

    It is chosen on the prompts that are reported, which favours the penalty. Failed runs come last.
    """

    def merit(row: Row) -> tuple[float, float]:
        if row["status"] != "ok":
            return math.inf, math.inf
        return row["test"]["violation"], row["test"]["nll"]

    return min(range(len(rows)), key=lambda i: merit(rows[i]))


def sft_task(task: Task) -> Task:
    """The plain run that a task with ``start="sft"`` starts from."""
    return replace(task, problem=Problem(SFT, cap=2 * WINDOWS[-1][1]), method=SFT, weight=None)
