"""The command ``barrierlm``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake in the options, the data or the name of a cost function, told in
        one line. What goes wrong inside a cost function keeps its traceback.
    """
    parser = _parser()
    # Options may stand before, between and after the overrides.
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = [*arguments.overrides, *rest]
    try:
        from barrierlm.recipes.config import ConfigError, load_options
    except ModuleNotFoundError as error:
        parser.exit(2, f"barrierlm: {_named(error)}\n")
    overrides = list(arguments.overrides)
    try:
        if arguments.command == "options":
            from barrierlm.recipes.config import option_table

            print(option_table())
            return 0
        if arguments.command == "demo":
            options = load_options(arguments.config, overrides)
            if not options.constraints:
                raise ConfigError("constraints is empty; allowed: at least one, to compare with plain fine-tuning")
            from barrierlm.recipes.demo import demo

            demo(options)
            return 0
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
    for command in (finetune, demo):
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="any option; `barrierlm options` lists them",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
