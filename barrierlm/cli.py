"""The command ``barrierlm``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit status: 0; 1 where `check` finds that the configuration cannot work, and for a file that cannot be
        written; 2 for a mistake in the options, the data, a run's folder or the name of a cost function, told in one
        line. What goes wrong inside a cost function keeps its traceback.
    """
    parser = _parser()
    # Options may stand before, between and after the overrides.
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "report":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = []
    arguments.overrides = [*arguments.overrides, *rest]
    try:
        from barrierlm.distributed import LostRankError
        from barrierlm.files import StorageError
        from barrierlm.recipes.config import ConfigError, load_options
    except ModuleNotFoundError as error:
        parser.exit(2, f"barrierlm: {_named(error)}\n")
    overrides = list(arguments.overrides)
    try:
        if arguments.command == "options":
            from barrierlm.recipes.config import option_table

            print(option_table())
            return 0
        if arguments.command == "report":
            from barrierlm.recipes.report import write_report

            if os.environ.get("RANK", "0") != "0":  # started with a launcher: one of the processes writes
                return 0
            print(f"Written to {write_report(arguments.runs, arguments.output)}")
            return 0
        if arguments.command == "demo":
            options = load_options(arguments.config, overrides)
            if not options.constraints:
                raise ConfigError("constraints is empty; allowed: at least one, to compare with plain fine-tuning")
            from barrierlm.recipes.demo import demo

            demo(options)
            return 0
        if arguments.command == "check":
            options = load_options(arguments.config, overrides)
            from barrierlm.recipes.check import check

            return 0 if check(options, windows=arguments.windows, as_json=arguments.json).ok else 1
        if arguments.resume:
            overrides.append("resume=true")
        options = load_options(arguments.config, overrides)
        from barrierlm.recipes.finetune import finetune

        finetune(options)
    except ConfigError as error:
        print(f"barrierlm: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"barrierlm: {_named(error)}", file=sys.stderr)
        return 2
    except (StorageError, LostRankError) as error:
        print(f"barrierlm: {error}", file=sys.stderr)
        return 1
    return 0


def _named(error: ModuleNotFoundError) -> str:
    """The error with the extra that brings the package, unless it says so itself."""
    how = "; get the recipe's packages with: pip install 'barrierlm[recipes]'"
    return str(error) if "pip install" in str(error) else f"{error}{how}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="barrierlm", description="Constrained fine-tuning of language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    finetune = commands.add_parser(
        "finetune", help="fine-tune a model under constraints", description="Fine-tune a model under constraints."
    )
    finetune.add_argument("config", help="YAML file, or the name of a shipped config: demo, sentiment")
    finetune.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in output_dir")
    demo = commands.add_parser(
        "demo",
        help="compare the starting model, plain and constrained fine-tuning",
        description="Compare the starting model, plain fine-tuning and constrained fine-tuning.",
    )
    demo.add_argument("--config", default="demo", help="YAML file, or the name of a shipped config (default: demo)")
    commands.add_parser("options", help="print the table of all options").set_defaults(overrides=[])
    report = commands.add_parser(
        "report",
        help="write one HTML page about one or several runs",
        description="Write one self-contained HTML page: verdicts, estimates against their bounds, multipliers, "
        "losses, samples. Several runs are overlaid.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="output folder of finetune, or one with a metrics.jsonl")
    report.add_argument(
        "-o", "--output", help="the HTML file (default: report.html in RUN, of several in the current folder)"
    )
    check = commands.add_parser(
        "check",
        help="measure the starting model before a long run: bounds, noise, time, memory",
        description="Measure the starting model before a long run: which bounds are violated and by how much, how many "
        "responses a step each of them needs, time and memory. Writes nothing. Exit status 0: can work; 1: cannot "
        "work, and the output says why; 2: a mistake in the configuration.",
    )
    check.add_argument("config", help="YAML file, or the name of a shipped config: demo, sentiment")
    check.add_argument("--json", action="store_true", help="one JSON object on stdout; everything else on stderr")
    check.add_argument("--windows", type=_count, default=4, help="steps' worth of responses to measure (default: 4)")
    for command in (finetune, demo, check):
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="any option; `barrierlm options` lists them",
        )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: an integer >= 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
