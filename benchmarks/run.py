"""Measure: `python -m benchmarks.run --suite head|logits|weights|overhead|recipe|scaling|all --device cuda|cpu`.

Writes <suite>-<device>.json, .md and .png to benchmarks/results. With --suite all, and on CUDA always, each suite
runs in a process of its own; one that dies is started again without the candidate that killed it.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .candidate import Candidate, Case
from .clock import copy_gigabytes_per_second, first_line, quick_collection
from .environment import RESULTS
from .isolate import DEVICE_LOST, run_isolated, without
from .measure import DeviceLost
from .output import new_document, path_of, save, write_beside
from .settings import Settings
from .suites import SUITES, suite

#: Seconds of --suite all on CUDA: ten minutes with what starting and ending takes.
CUDA_BUDGET = 540.0
#: How the time of --suite all is divided.
SHARES = {"head": 0.4, "logits": 0.2, "weights": 0.1, "overhead": 0.05, "recipe": 0.2, "scaling": 0.15}


def run_suite(
    name: str, settings: Settings, folder: Path, command: str, *, case: str | None = None, picture: bool = True
) -> Path:
    """Run one suite here, or those of its cases that `case` names; what is there is saved after every case."""
    document = new_document(name, settings, command) | {"case": case}
    settings.say(f"{name} on {document['hardware']['name']}")
    document["copy_gb_per_s"] = copy_gigabytes_per_second(settings.device, quick=settings.quick)
    try:
        with quick_collection():
            for one in suite(name).cases(settings):
                title = ", ".join(f"{key} {value}" for key, value in one.fields.items())
                if case is not None and case not in title:
                    continue
                settings.say(f"  {title}")
                settings.title = f"{name} {title}"
                document["rows"] += [{"case": one.fields} | row for row in rows_of(one)]
                save(document, folder)
    except DeviceLost as lost:
        settings.now(str(lost))
        raise
    document["complete"] = True
    save(document, folder)
    write_beside(document, folder, picture=picture)
    path = path_of(document, folder)
    settings.say(f"  {path}")
    return path


def rows_of(case: Case) -> list[dict[str, Any]]:
    """The rows of a case, or one that says why it has none: it may be too large for the device."""
    try:
        return case.measure()
    except DeviceLost:
        raise
    except Exception as error:
        nothing = Candidate("the whole case", lambda problem: dict)
        return [nothing.describe() | {"status": "failed", "error": first_line(error)}]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--quick", action="store_true", help="small shapes: does everything run?")
    made.add_argument("--repeats", type=int, help="rounds of timing; default: as many as fit the time")
    made.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's")
    made.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"for all suites together; default: none on a CPU, {CUDA_BUDGET:.0f} for --suite all on CUDA",
    )
    made.add_argument("--only", action="append", default=[], metavar="WORD", help="peers whose name holds WORD")
    made.add_argument("--case", metavar="WORD", help="cases whose title holds WORD, as 'N 512,'; a file of their own")
    made.add_argument("--exclude", action="append", default=[], metavar="NAME=REASON", help="leave a candidate out")
    made.add_argument("--no-compile", action="store_true", help="leave out what goes through torch.compile")
    made.add_argument("--no-picture", action="store_true")
    made.add_argument(
        "--profile",
        type=Path,
        nargs="?",
        const=Path("runs/profile"),
        metavar="FOLDER",
        help="a torch.profiler trace of each of our candidates, and its ten costliest operations (default: %(const)s)",
    )
    made.add_argument("--here", action="store_true", help="in this process, whatever happens to it")
    made.add_argument("--progress", type=Path, metavar="FILE", help="always names the candidate that runs")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return made


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Settings of one suite."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return Settings(
        device=torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu"),
        quick=arguments.quick,
        repeats=arguments.repeats,
        budget=arguments.budget,
        only=tuple(arguments.only),
        exclude=dict(text.split("=", 1) for text in arguments.exclude),
        compile=not arguments.no_compile,
        profile=arguments.profile,
        progress=arguments.progress,
    )


def main(argv: list[str] | None = None) -> int:
    """Run what the command line says; 0 if every suite came to its end."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda, and torch sees no CUDA device")
    # Where results go and how processes talk has no influence on them.
    told = [word for word in without(argv, ("--progress", "--out")) if word != "--here"]
    command = shlex.join(["python", "-m", "benchmarks.run", *told])
    if arguments.suite != "all" and (arguments.here or arguments.device == "cpu"):
        try:
            settings = settings_from(arguments)
            picture = not arguments.no_picture
            run_suite(arguments.suite, settings, arguments.out, command, case=arguments.case, picture=picture)
        except DeviceLost as lost:
            print(f"  device lost: {lost}", file=sys.stderr)
            return DEVICE_LOST
        return 0
    if arguments.budget is None and arguments.suite == "all" and arguments.device == "cuda":
        arguments.budget = CUDA_BUDGET
    started, failed = time.monotonic(), []
    names = list(SUITES) if arguments.suite == "all" else [arguments.suite]
    for index, name in enumerate(names):
        budget = None
        if arguments.budget is not None:
            left = max(30.0, arguments.budget - (time.monotonic() - started))
            budget = left * SHARES.get(name, 0.2) / sum(SHARES.get(n, 0.2) for n in names[index:])
        if not run_isolated(name, argv, budget):
            failed.append(name)
    if failed:
        print(f"did not come to an end: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
