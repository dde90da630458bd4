"""What was to be reached, and whether it was, by the rows of a result."""

from __future__ import annotations

from collections.abc import Iterator

from ..tables import number
from .experiment import TOGETHER, Row, best_penalty
from .groups import bounds_of, by_problem, change, difference, name_of, search, sft_rows
from .methods import DEFAULT, METHODS, MM

#: NLL over SFT's, for windows that hold SFT's own length and for the others.
_HELD, _OTHER = 0.03, 0.08

#: So many runs are all named; of more, those that missed.
_FEW = 3

#: Target, what was measured, "yes", "no", "so far" where runs are missing or failed and the others reach it, or "open".
Line = tuple[str, str, str]


def is_window(rows: list[Row]) -> bool:
    """Whether a problem is a window of lengths with an infeasible start."""
    problem, bounds = rows[0]["task"]["problem"], bounds_of(rows[0])
    two_sided = len(bounds) == 1 and None not in (bounds[0].lower, bounds[0].upper)
    return two_sided and bounds[0].measure == "length" and problem["start"] == "base"


def _met(row: Row) -> bool:
    return row["status"] == "ok" and row["test"]["verdict"].startswith("met")


def _of(rows: list[Row], method: str) -> dict[int, Row]:
    return {row["task"]["seed"]: row for row in rows if row["task"]["method"] == method}


def _sum_up(target: str, parts: list[tuple[str, bool]], reached: str) -> Line:
    if not parts:
        return target, "no run says so yet", "open"
    missed = [text for text, ok in parts if not ok]
    shown = [text for text, _ in parts] if len(parts) <= _FEW else missed
    count = f"{len(parts) - len(missed)} of {len(parts)}"
    text = f"{count}{', not' if len(parts) > _FEW and shown else ''}{': ' if shown else ''}{'; '.join(shown)}"
    return target, text, "no" if missed else reached


def targets(rows: list[Row], *, complete: bool) -> list[Line]:
    """The targets, in order.

    Args:
        rows: Of a result.
        complete: Whether they are all that there should be, and none failed.
    """
    plain = sft_rows(rows)
    windows = {name: part for name, part in by_problem(rows).items() if is_window(part)}
    met: list[tuple[str, bool]] = []
    held: list[tuple[str, bool]] = []
    other: list[tuple[str, bool]] = []
    for name, part in windows.items():
        for seed, row in _of(part, DEFAULT).items():
            at = f"{name}, seed {seed}"
            if row["status"] != "ok":
                met.append((f"{at} failed", False))
                continue
            length = row["test"]["measures"]["length"]
            met.append((f"{at} {number(length['mean'])} ± {number(1.96 * length['stderr'], 2)}", _met(row)))
            more = change(row, plain)
            if more is not None:
                bound, own = bounds_of(row)[0], plain[seed]["test"]["measures"]["length"]["mean"]
                assert bound.lower is not None
                assert bound.upper is not None
                inside = bound.lower <= own <= bound.upper
                (held if inside else other).append((f"{at} {more[0]:+.1%}", more[0] <= (_HELD if inside else _OTHER)))
    lines = {
        "every window met on held-out prompts by the default, every seed": met,
        f"NLL within {_HELD:.0%} of SFT's, windows that hold SFT's own length": held,
        f"NLL within {_OTHER:.0%} of SFT's, other windows": other,
        "NLL not above MM's where both meet the bounds": list(_against_mm(rows)),
        "at most half of MM's share of infeasible steps in the last quarter": list(_half_of_mm(rows)),
    }
    return [_sum_up(target, parts, "yes" if complete else "so far") for target, parts in lines.items()]


def _pairs(rows: list[Row]) -> Iterator[tuple[str, Row, Row]]:
    for name, part in by_problem(rows).items():
        if name == TOGETHER:
            continue
        theirs = _of(part, MM)
        for seed, own in _of(part, DEFAULT).items():
            if seed in theirs and own["status"] == theirs[seed]["status"] == "ok":
                yield f"{name}, seed {seed}", own, theirs[seed]


def _against_mm(rows: list[Row]) -> Iterator[tuple[str, bool]]:
    for at, own, theirs in _pairs(rows):
        if _met(own) and _met(theirs):
            above, half = difference(own, theirs)
            by = "" if half is None else f" ({above:+.4f} ± {half:.4f})"
            yield f"{at} {own['test']['nll']:.4f} against {theirs['test']['nll']:.4f}{by}", above <= 0


def _half_of_mm(rows: list[Row]) -> Iterator[tuple[str, bool]]:
    for at, own, theirs in _pairs(rows):
        share = own["training"]["infeasible_share"], theirs["training"]["infeasible_share"]
        yield f"{at} {share[0]:.0%} against {share[1]:.0%}", share[0] <= share[1] / 2


def search_lines(rows: list[Row]) -> list[list[str]]:
    """By problem: the search for a penalty's weight against one run of the default.

    Problem, weights, steps of the search over those of one run, weights that met, the one that was kept, and what it
    ended with.
    """
    lines = []
    for name, part in by_problem(rows).items():
        tried, own = search(part), _of(part, DEFAULT)
        if not tried or not own:
            continue
        one = own[min(own)]["task"]["steps"]
        steps = sum(row["task"]["steps"] for row in tried)
        kept = tried[best_penalty(tried)]
        met = sum(_met(row) for row in tried)
        ended = f"{kept['test']['verdict']}, NLL {kept['test']['nll']:.3f}" if kept["status"] == "ok" else "failed"
        lines.append([name, str(len(tried)), f"{steps / one:.1f}", f"{met} of {len(tried)}", name_of(kept), ended])
    return lines


def satisfied(rows: list[Row], windows: bool) -> dict[str, tuple[int, int]]:
    """By method: (runs that met their bounds on held-out prompts, runs), over windows or over rewards."""
    found = {}
    for method in METHODS:
        runs = [
            row
            for part in by_problem(rows).values()
            if (is_window(part) if windows else bounds_of(part[0])[0].measure != "length")
            for row in _of(part, method).values()
        ]
        if runs:
            found[method] = sum(map(_met, runs)), len(runs)
    return found
