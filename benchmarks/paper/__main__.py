"""`python -m benchmarks.paper quick | full | report`: the paper's experiments with a real model.

`quick` takes about an hour on two cores, `full` many hours of a GPU or days of a CPU; both print an estimate first,
keep every run when it is done, and go on where they were interrupted. `report` writes docs/paper.md from result files.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from ..environment import RESULTS, ROOT, slug
from ..output import path_of, save
from . import report
from .estimate import every_task, message, remaining
from .experiment import FEASIBLE, REWARD_PROBLEMS, REWARDS, SEEDS, Bound, Row, Sources, Task, full, problems_of, quick
from .groups import name_of
from .methods import ABOUT
from .run import Cache, run_all

PAGE = ROOT / "docs" / "paper.md"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.paper", description=__doc__)
    parser.add_argument("command", choices=("quick", "full", "report"))
    own = Sources()
    parser.add_argument("--model", default=own.model, help="Hugging Face name or folder")
    parser.add_argument("--data", default=own.data, help="a .jsonl file with prompt and response, or a dataset")
    parser.add_argument(
        "--reward-model",
        nargs=2,
        metavar=("HELPFUL", "HARMLESS"),
        help="sequence classifiers, NAME or NAME#LABEL, in place of sentiment and profanity",
    )
    parser.add_argument("--steps", type=int, help="of every run; full: instead of looking for SFT's best")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="full: their number")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="full: only these, by the start of their names")
    parser.add_argument("--methods", nargs="+", metavar="NAME", choices=list(ABOUT), help="only these, and SFT")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of the recipe, for every run"
    )
    parser.add_argument("--name", help="of the result, to stand beside the one without these options")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="RESULT",
        help="rows that --methods and --problems leave out, from an earlier result; each says what code it ran with",
    )
    cores = os.cpu_count() or 1
    processes = 1 if torch.cuda.is_available() else min(2, cores)
    parser.add_argument("--processes", type=int, default=processes, help="runs at a time; 0: in this process")
    parser.add_argument("--threads", type=int, help="of each; default: the cores, shared out")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "paper")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--estimate", action="store_true", help="only say what there is to do and how long it takes")
    arguments = parser.parse_args(argv)
    if arguments.keep and not (arguments.methods or arguments.problems):
        parser.error("--keep needs --methods or --problems, which say what is not taken from there")
    if arguments.threads is None:
        arguments.threads = max(1, cores // max(1, arguments.processes))
    return arguments


def _wanted(task: Task, arguments: argparse.Namespace) -> bool:
    """SFT always is, and the runs that the rewards' bounds are made of if one of these problems is."""
    if not task.problem.bounds:
        return True
    if task.problem.name.endswith(" only"):
        return any(_chosen(name, arguments) for name in REWARD_PROBLEMS)
    return (not arguments.methods or task.method in arguments.methods) and _chosen(task.problem.name, arguments)


def _asked_for(task: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether a row of an earlier result is to be made again.

    SFT is where --methods names it, and where a feasible start is chosen: that begins from weights, which no row holds.
    """
    method, problem = task["method"], task["problem"]["name"]
    if not task["problem"]["bounds"]:
        starts = [name.partition(":")[0] for name in arguments.problems or []]
        begun_from = arguments.command == "full" and (not starts or any(FEASIBLE.startswith(start) for start in starts))
        return begun_from or method in (arguments.methods or ())
    names = REWARD_PROBLEMS if problem.endswith(" only") else (problem,)
    return (not arguments.methods or method in arguments.methods) and any(_chosen(name, arguments) for name in names)


def _chosen(problem: str, arguments: argparse.Namespace) -> bool:
    return not arguments.problems or any(problem.startswith(start) for start in arguments.problems)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.command == "report":
        if not report.write(arguments.out, arguments.page):
            print(f"no paper-*.json in {arguments.out}: nothing to report")
            return 1
        print(arguments.page)
        return 0
    rewards = (
        {}
        if arguments.reward_model is None
        else dict(
            zip(("helpful", "harmless"), (f"reward_model:{name}" for name in arguments.reward_model), strict=True)
        )
    )
    sources = Sources(arguments.model, arguments.data, extra=tuple(arguments.set), **rewards)
    cache = Cache(arguments.cache)
    tried: dict[str, Row] = {}
    earlier = [] if arguments.keep is None else json.loads(arguments.keep.read_text(encoding="utf-8"))["rows"]
    # As they are in a file. Keys are of other code.
    kept = {json.dumps(row["task"]): row for row in earlier if not _asked_for(row["task"], arguments)}

    def done(task: Task) -> Row | None:
        return cache.done(task) or tried.get(task.key) or keep(task)

    def keep(task: Task) -> Row | None:
        row = kept.get(json.dumps(asdict(task)))
        return row if row is not None and row.get("options", task.overrides()) == task.overrides() else None

    def plan() -> list[Task]:
        if arguments.command == "quick":
            return quick(sources, arguments.steps)
        found = full(sources, done, arguments.steps, arguments.seeds)
        return list({task.key: task for task in found}.values())  # SFT's first seed is named twice

    def wanted(tasks: list[Task]) -> list[Task]:
        return [task for task in tasks if _wanted(task, arguments)]

    def everything() -> list[Task]:
        return wanted(every_task(arguments.command, sources, done, arguments.steps, arguments.seeds))

    # The window of the feasible start is known when SFT has run: any is let through.
    names = [p.name.partition(":")[0] for p in problems_of(dict.fromkeys(REWARDS, Bound("", "")), 20.0)]
    given = [start.partition(":")[0] for start in arguments.problems or []]
    unknown = [start for start in given if not any(name.startswith(start) for name in names)]
    if unknown:
        print(f"--problems {unknown[0]!r}; allowed: the start of one of {', '.join(names)}", file=sys.stderr)
        return 2
    pace = arguments.processes, arguments.threads
    print(message(everything(), done, *pace), flush=True)
    if arguments.estimate:
        return 0
    try:
        with cache.alone():
            while missing := [task for task in wanted(plan()) if done(task) is None]:
                for row in run_all(missing, cache, *pace):
                    tried[row["key"]] = row
                    tasks = everything()
                    left, minutes = sum(done(task) is None for task in tasks), remaining(tasks, done, *pace) / 60
                    print(f"{_told(row)}; {left} of {len(tasks)} runs left, about {minutes:.0f} min", flush=True)
                    _save(plan(), done, arguments, argv, ended=False)
    except Timeout:
        print(f"another command is at work in {arguments.cache}; allowed: another --cache", file=sys.stderr)
        return 2
    path = _save(plan(), done, arguments, argv, ended=True)
    report.write(arguments.out, arguments.page)
    print(path, arguments.page, sep="\n")
    return int(any(row["status"] != "ok" for row in tried.values()))


def _told(row: Row) -> str:
    task = row["task"]
    name = f"{task['problem']['name']}, {name_of(row)}, seed {task['seed']}"
    if row["status"] != "ok":
        return f"{name}: {row['error']}"
    return f"{name}: NLL {row['test']['nll']:.3f}, {row['test']['verdict'] or 'no bounds'}"


def _save(
    tasks: list[Task], done: Callable[[Task], Row | None], arguments: argparse.Namespace, argv: Any, *, ended: bool
) -> Path:
    """The result file, with all rows that there are so far; until all has ended it replaces no complete one."""
    rows = [row for task in tasks if (row := done(task)) is not None]
    own = Sources()
    other = [slug(Path(arguments.model).name)] if arguments.model != own.model else []
    other += [slug(Path(arguments.data).stem)] if arguments.data != own.data else []
    other += ["reward models"] if arguments.reward_model else []
    # The full version looks for its number of steps; one that was given stands beside it. So do other options.
    other += [f"{arguments.steps} steps"] if arguments.steps else []
    name = arguments.name or ("other options" if arguments.set else "")
    other += [name] if name else []
    settings = {"quick": arguments.command == "quick", "processes": arguments.processes, "threads": arguments.threads}
    typed = shlex.join(sys.argv[1:] if argv is None else argv)
    complete = len(rows) == len(tasks) and all(row["status"] == "ok" for row in rows)
    complete &= arguments.command == "quick" or arguments.seeds >= SEEDS
    case = ", ".join(other)
    command = f"python -m benchmarks.paper {typed}"
    document = report.new_document(rows, settings, command, complete=complete, case=case)
    path = path_of(document, arguments.out)
    if not ended and not complete and path.exists() and json.loads(path.read_text(encoding="utf-8"))["complete"]:
        return path
    return save(document, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
