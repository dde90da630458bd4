"""What the steps of a run say: when it became feasible, how it ended, what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .experiment import Bound

#: One line of metrics.jsonl.
Line = dict[str, Any]
#: So many steps in a row inside make it feasible: a run that swings through its bounds is not.
_IN_A_ROW = 3
#: Points of a picture's line.
_POINTS = 100


def inside(lines: Sequence[Line], bounds: Sequence[Bound]) -> list[bool]:
    """For every step, whether all estimates were within their bounds; an unknown one is not."""

    def within(value: float | None, bound: Bound) -> bool:
        if value is None or not math.isfinite(value):
            return False
        return (bound.lower is None or value >= bound.lower) and (bound.upper is None or value <= bound.upper)

    return [all(within(line.get(f"constraints/{b.name}/value"), b) for b in bounds) for line in lines]


def steps_to_feasibility(feasible: Sequence[bool]) -> int | None:
    """The first step, counted from 1, of three feasible ones in a row; None: there are no such steps."""
    starts = range(len(feasible) - _IN_A_ROW + 1)
    return next((t + 1 for t in starts if all(feasible[t : t + _IN_A_ROW])), None)


def last_quarter(values: Sequence[Any]) -> list[Any]:
    """The last quarter of a series, at least its last entry."""
    return list(values[-max(1, len(values) // 4) :])


def infeasible_share(feasible: Sequence[bool]) -> float:
    """Share of the last quarter of the steps with an estimate outside of its bounds."""
    last = last_quarter(feasible)
    return sum(not ok for ok in last) / len(last)


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def thinned(values: Sequence[float | None], points: int = _POINTS) -> list[float | None]:
    """Means of as many stretches of equal length as there are points, for a picture."""
    count = min(points, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    found = [mean(values[a:b]) for a, b in pairwise(cuts)]
    return [None if value is None else float(f"{value:.4g}") for value in found]


def of_training(lines: Sequence[Line], bounds: Sequence[Bound], responses_per_step: int) -> dict[str, Any]:
    """All numbers of a run's steps.

    Args:
        lines: metrics.jsonl, whole.
        bounds: The problem's; none: plain fine-tuning, which samples nothing.
        responses_per_step: In all.

    Returns:
        JSON: ``seconds`` of training, ``task_loss`` of the last quarter, the mean ``grad_norm``
        before it is clipped, and with bounds the feasibility, the mean
        multiplier of the last quarter by bound in nats per token and unit of violation, the censored share of the
        last quarter, the scale of every constraint, and the series for pictures.
    """
    seconds = sum(value for line in lines for key, value in line.items() if key.startswith("seconds/"))
    found: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "responses": responses_per_step * len(lines) if bounds else 0,
        "task_loss": mean(last_quarter([line["loss/task"] for line in lines])),
        "grad_norm": mean([line["grad_norm"] for line in lines]),
        "series": {"loss/task": thinned([line["loss/task"] for line in lines])},
    }
    if not bounds:
        return found
    feasible = inside(lines, bounds)
    sides = [
        f"constraints/{b.name}/{s}/multiplier" for b in bounds for s in ("lower", "upper") if getattr(b, s) is not None
    ]
    names = [f"constraints/{b.name}/value" for b in bounds] + sides
    found |= {
        "feasible_at": steps_to_feasibility(feasible),
        "infeasible_share": infeasible_share(feasible),
        "censored": mean(last_quarter([line["rollout/censored"] for line in lines])),
        "multipliers": {name: mean(last_quarter([line.get(name) for line in lines])) for name in sides},
        "scales": {b.name: lines[-1].get(f"constraints/{b.name}/scale") for b in bounds},
    }
    found["series"] |= {name: thinned([line.get(name) for line in lines]) for name in names}
    return found
