"""What the unit of a multiplier is worth: problems with their loss in other units, and a rule that is told or not."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from .methods import UNITS
from .problems import PROBLEMS
from .run import Row, Task

#: What the loss is multiplied by; true multipliers grow with it, and the merit is divided by it again.
LOSS_SCALES = (0.05, 1.0, 20.0)
#: As in the pages: not told, told, and found by the rule itself.
NOT_TOLD, TOLD, FOUND = "unit=1", "told", 'unit="auto"'


def setting(name: str, loss_scale: float) -> str:
    """The setting of `UNITS` that a column stands for at this loss scale."""
    return f"unit={loss_scale:g}" if name == TOLD else name


def tasks(steps: int, seeds: int) -> Iterator[Task]:
    """Every problem at every scale; told and not told are one run at scale 1."""
    for seed in range(seeds):
        for problem in PROBLEMS:
            for scale in LOSS_SCALES:
                for chosen in dict.fromkeys(setting(name, scale) for name in (NOT_TOLD, TOLD, FOUND)):
                    yield Task(problem, UNITS.name, chosen, seed, steps, 1.0, scale)


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """A row for each problem and loss scale: the merit of each column, averaged over seeds, in the old unit."""
    found = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        for scale in LOSS_SCALES:
            merits = {
                name: fmean(
                    row["merit"]
                    for row in rows
                    if (row["problem"], row["loss_scale"], row["setting"]) == (problem, scale, setting(name, scale))
                )
                for name in (NOT_TOLD, TOLD, FOUND)
            }
            found.append({"problem": problem, "loss_scale": scale, "merits": merits})
    return found
