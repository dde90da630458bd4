"""How close a rule comes to one that is told the answer: a constant true multiplier, for the bound or one below it.

Under noise being feasible more often costs task loss. An oracle that holds the multiplier of the bound shifted by d
traces out what that trade costs at best with this optimizer; a rule is judged by its gap over the oracle's at the same
share of steps above the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from .methods import METHODS, ORACLE
from .run import Row, Task

PROBLEM = "gibbs"
RULES = ("AdaptiveBarrier", "ModifiedBarrier")
#: Shares of the learning rate at the end of a run: constant, and decayed.
FINAL_LRS = (1.0, 0.1)


def tasks(steps: int, seeds: int) -> Iterator[Task]:
    """The oracle's and the rules' runs, on the same seeds."""
    for final_lr in FINAL_LRS:
        for seed in range(seeds):
            for setting in ORACLE.settings:
                yield Task(PROBLEM, ORACLE.name, setting, seed, steps, final_lr)
            for name in RULES:
                yield Task(PROBLEM, name, next(iter(METHODS[name].settings)), seed, steps, final_lr)


def mean_of(rows: list[Row], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def frontier_gap(points: list[tuple[float, float]], share: float) -> float | None:
    """The oracle's gap at this share of steps above the bound, between its points; None beyond them."""
    points = sorted(points)
    for (left, before), (right, after) in pairwise(points):
        if left <= share <= right:
            part = (share - left) / (right - left) if right > left else 0.0
            return before + part * (after - before)
    return None


def summary(rows: list[Row]) -> list[Row]:
    """A row for each oracle setting and rule, per learning-rate schedule, with the gap over the frontier's."""
    found: list[Row] = []
    for final_lr in FINAL_LRS:
        of_rate = [row for row in rows if row["final_lr"] == final_lr and row["status"] == "ok"]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in of_rate:
            groups.setdefault((row["method"], row["setting"]), []).append(row)
        points = [(mean_of(g, "above"), mean_of(g, "gap")) for (name, _), g in groups.items() if name == ORACLE.name]
        for (name, setting), group in groups.items():
            share, gap = mean_of(group, "above"), mean_of(group, "gap")
            best = None if name == ORACLE.name else frontier_gap(points, share)
            main = [row["multiplier"][0] for row in group]
            found.append(
                {
                    "final_lr": final_lr,
                    "method": name,
                    "setting": setting,
                    "seeds": len(group),
                    "above": share,
                    "gap": gap,
                    "over_frontier": gap / best if best is not None and best > 0 else None,
                    "multiplier": sum(main) / len(main),
                }
            )
    return found
