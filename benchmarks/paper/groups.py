"""Rows of a result, by problem and by method."""

from __future__ import annotations

import math

from .experiment import Bound, Row
from .methods import ABOUT, PENALTY, SFT


def bounds_of(row: Row) -> list[Bound]:
    """The bounds of its problem."""
    return [Bound(*values) for values in row["task"]["problem"]["bounds"]]


def name_of(row: Row) -> str:
    """Method, and the penalty's weight."""
    weight = row["task"]["weight"]
    return row["task"]["method"] + ("" if weight is None else f" {weight:g}")


def reward_only(row: Row) -> bool:
    """Whether it is one of the runs that say what a reward can reach."""
    return row["task"]["problem"]["name"].endswith(" only")


def by_problem(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of every problem that has bounds to be met."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"]["problem"]["bounds"] and not reward_only(row):
            found.setdefault(row["task"]["problem"]["name"], []).append(row)
    return found


def by_method(rows: list[Row]) -> list[list[Row]]:
    """Of one problem: the rows of each method and weight, by seed, in the order of `ABOUT`."""
    found: dict[str, list[Row]] = {}
    order = list(ABOUT)
    for row in sorted(
        rows, key=lambda r: (order.index(r["task"]["method"]), r["task"]["weight"] or 0, r["task"]["seed"])
    ):
        found.setdefault(name_of(row), []).append(row)
    return list(found.values())


def sft_rows(rows: list[Row]) -> dict[int, Row]:
    """Plain fine-tuning by seed, with the number of steps of the other runs."""
    others = [row["task"]["steps"] for row in rows if row["task"]["problem"]["bounds"]]
    plain = [row for row in rows if row["task"]["method"] == SFT and row["status"] == "ok"]
    return {row["task"]["seed"]: row for row in plain if not others or row["task"]["steps"] == others[0]}


def difference(row: Row, other: Row, split: str = "test") -> tuple[float, float | None]:
    """NLL of a run less that of another, and half of its 95% interval over the pairs of the split.

    The interval is None where the pairs are not the same, and in results of before NLLs were kept by pair.
    """
    above = row[split]["nll"] - other[split]["nll"]
    if not _same_pairs(row, other, split):
        return above, None
    tokens = row[split]["tokens"]
    nlls = zip(row[split]["nlls"], other[split]["nlls"], tokens, strict=True)
    return above, _half_interval([a - b - above * t for a, b, t in nlls], sum(tokens))


def change(row: Row, plain: dict[int, Row], split: str = "test") -> tuple[float, float | None] | None:
    """Its NLL over that of SFT with the same seed, less 1, and half of its interval, as of `difference`.

    None: there is no such run.
    """
    seed = row["task"]["seed"]
    if seed not in plain:
        return None
    other = plain[seed]
    ratio = row[split]["nll"] / other[split]["nll"]
    if not _same_pairs(row, other, split):
        return ratio - 1, None
    theirs = other[split]["nlls"]
    left = [a - ratio * b for a, b in zip(row[split]["nlls"], theirs, strict=True)]
    return ratio - 1, _half_interval(left, sum(theirs))


def _same_pairs(row: Row, other: Row, split: str) -> bool:
    """Whether both have NLLs by pair, of the same pairs, and of at least two."""
    own, theirs = row[split], other[split]
    known = "nlls" in own and "nlls" in theirs and row["splits"][split] == other["splits"][split]
    return known and own["tokens"] == theirs["tokens"] and len(own["tokens"]) > 1


def _half_interval(left: list[float], whole: float) -> float:
    """Of a ratio of two sums over pairs, by what the ratio leaves of each pair's numerator."""
    n = len(left)
    return 1.96 * math.sqrt(n / (n - 1) * sum(e * e for e in left)) / whole


def search(rows: list[Row]) -> list[Row]:
    """Of one problem: the penalty's runs with the first seed, by weight."""
    return [row for group in by_method(rows) for row in group[:1] if row["task"]["method"] == PENALTY]
