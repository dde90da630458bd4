"""`python -m benchmarks.solvers [run | oracle | units | report]`: an honest comparison of rules under sampling noise.

`run` compares all methods on all problems, `oracle` compares with one that is told the answer, `units` measures losses
in other units, `report` writes the pages of the results that are there again. Runs that are done are remembered in a
file: an interrupted command goes on.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from ..environment import RESULTS, ROOT
from ..output import save
from . import oracle, report, units
from .methods import METHODS
from .problems import PROBLEMS
from .run import Row, Task, run_all

_STEPS = 1500
#: By command.
_SEEDS = {"run": 10, "oracle": 20, "units": 5, "report": 0}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.solvers", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "oracle", "units", "report"), default="run")
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--seeds", type=int, help=f"default by command: {_SEEDS}")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--settings", choices=("all", "default"), default="all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "solvers.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="RESULT",
        help="run: rows of methods that are not named, from an earlier result; they keep its revision",
    )
    arguments = parser.parse_args(argv)
    if arguments.seeds is None:
        arguments.seeds = _SEEDS[arguments.command]
    return arguments


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    """Seed by seed, so that what there is after an interruption is a whole comparison."""
    if arguments.command == "oracle":
        return list(oracle.tasks(arguments.steps, arguments.seeds))
    if arguments.command == "units":
        return list(units.tasks(arguments.steps, arguments.seeds))
    return [
        Task(problem, method, setting, seed, arguments.steps)
        for seed in range(arguments.seeds)
        for problem in arguments.problems
        for method in arguments.methods
        for setting in list(METHODS[method].settings)[: 1 if arguments.settings == "default" else None]
    ]


def _collect(tasks: list[Task], cache: Path, processes: int) -> list[Row]:
    found: dict[Task, Row] = {}
    begin = shown = time.monotonic()
    for row in run_all(tasks, cache, processes):
        found[Task(*(row[field] for field in Task._fields))] = row
        if time.monotonic() - shown > 30 or len(found) == len(tasks):
            shown = time.monotonic()
            print(f"{len(found)} of {len(tasks)} runs, {shown - begin:.0f} s", flush=True)
    return [found[task] for task in tasks]


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    if arguments.command == "report":
        for path in sorted(arguments.out.glob("solvers*.json")):
            print(report.write(json.loads(path.read_text(encoding="utf-8")), arguments.out))
        return 0
    kept = json.loads(arguments.keep.read_text(encoding="utf-8")) if arguments.keep else {"rows": []}
    methods = {*arguments.methods, *(row["method"] for row in kept["rows"])}
    whole = arguments.problems == list(PROBLEMS) and methods == set(METHODS)
    settings = {
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "quick": not (
            whole
            and arguments.settings == "all"
            and (arguments.steps, arguments.seeds) == (_STEPS, _SEEDS[arguments.command])
        ),
    }
    typed = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m benchmarks.solvers {typed}".rstrip()
    if arguments.keep:  # what does not fit is told before anything runs
        report.with_kept(report.new_document(report.SUITE, [], settings, command), kept)
    rows = _collect(_tasks(arguments), arguments.cache, arguments.processes)
    if arguments.command == "oracle":
        document = report.new_document(report.ORACLE_SUITE, oracle.summary(rows), settings, command)
    elif arguments.command == "units":
        document = report.new_document(report.UNITS_SUITE, units.summary(rows), settings, command)
    else:
        document = report.new_document(report.SUITE, report.averages(rows), settings, command)
        if arguments.keep:
            document = report.with_kept(document, kept)
    print(save(document, arguments.out))
    print(report.write(document, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
