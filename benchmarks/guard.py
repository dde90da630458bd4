"""Has anything become slower? `python -m benchmarks.guard`: a few ratios, measured here, beside the committed ones.

Only ratios to a baseline of the same run are compared, never times. A ratio may be TOLERANCE times the committed one;
what is slower by more is measured once more, and is a regression if it is again. Exits with 1 then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .candidate import NAIVE
from .environment import RESULTS, ROOT
from .problems import BOTH
from .tables import markdown_table, number

#: Chosen, not measured: slow enough to matter, and room for machines on which naive PyTorch is faster or slower.
TOLERANCE = 1.5


class Watched(NamedTuple):
    """One ratio: of which suite, case and version."""

    suite: str
    case: dict[str, Any]
    candidate: str

    @property
    def title(self) -> str:
        """As `benchmarks.run --case` knows it."""
        return ", ".join(f"{key} {value}" for key, value in self.case.items())


WATCHED = [
    Watched(
        "head",
        {"N": 1024, "H": 576, "V": 49152, "dtype": "float32", "direction": BOTH},
        "linear_weighted_logprob",
    ),
    Watched("weights", {"K": 8, "B": 64, "costs": "per response"}, "constraint_weights"),
    Watched("overhead", {"K": 8, "B": 16, "costs": "per response"}, "BarrierObjective"),
    Watched("overhead", {"K": 8, "B": 16, "costs": "per token"}, "BarrierObjective"),
]


class Compared(NamedTuple):
    """A watched ratio, committed and measured; None: not there."""

    watched: Watched
    committed: float | None
    measured: float | None

    @property
    def slower(self) -> bool:
        """Whether it is a regression: too large, or committed and now failing."""
        if self.committed is None:
            return False
        return self.measured is None or not self.measured <= TOLERANCE * self.committed


def ratio_in(document: dict[str, Any] | None, watched: Watched) -> float | None:
    """The watched version's time over the naive one's; None if it was not measured."""
    for row in document["rows"] if document is not None else ():
        fits = all(row["case"].get(key) == value for key, value in watched.case.items())
        if fits and row["candidate"] == watched.candidate and row["status"] == "ok" and NAIVE in row["ratio"]:
            return float(row["ratio"][NAIVE]["median"])
    return None


def compare_with(
    committed: dict[str, dict[str, Any]], run: Callable[[Watched], dict[str, Any] | None], watched: list[Watched]
) -> list[Compared]:
    """Every watched ratio; one that is too large is measured once more, and the better one counts."""
    found = []
    for one in watched:
        known = ratio_in(committed.get(one.suite), one)
        result = Compared(one, known, ratio_in(run(one), one))
        if result.slower:
            again = Compared(one, known, ratio_in(run(one), one))
            result = again if result.measured is None or not again.slower else result
        found.append(result)
    return found


def committed_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The committed CPU result of every watched suite."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        whole = document.get("complete") and not document["settings"]["quick"] and not document.get("case")
        if whole and document["hardware"]["type"] == "cpu":
            found[document["suite"]] = document
    return found


def measure(watched: Watched) -> dict[str, Any] | None:
    """Run the one case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.run", "--device", "cpu", "--here", "--no-compile", "--no-picture"]
        command += [
            "--suite",
            watched.suite,
            "--case",
            watched.title,
            "--only",
            f"={watched.candidate}",
            "--out",
            folder,
        ]
        subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.DEVNULL)
        paths = list(Path(folder).glob("*.json"))
        return json.loads(paths[0].read_text(encoding="utf-8")) if paths else None


def main(argv: list[str] | None = None) -> int:
    """1 if something has become slower."""
    parser = argparse.ArgumentParser("python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results to compare with")
    arguments = parser.parse_args(argv)
    compared = compare_with(committed_results(arguments.results), measure, WATCHED)
    words = {True: "**slower**", False: "yes"}
    lines = [
        [f"{c.watched.suite}, {c.watched.title}", number(c.committed), number(c.measured), words[c.slower]]
        for c in compared
    ]
    print(markdown_table(["time ÷ naive", "committed", "measured", "holds"], lines))
    missing = [c.watched.suite for c in compared if c.committed is None]
    if missing:
        print(f"not committed, so not compared: {', '.join(missing)}")
    return int(any(c.slower for c in compared))


if __name__ == "__main__":
    sys.exit(main())
