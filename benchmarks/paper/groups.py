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
    own, theirs = row[split], other[split]
    above = own["nll"] - theirs["nll"]
    if "nlls" not in own or "nlls" not in theirs or row["splits"][split] != other["splits"][split]:
        return above, None
    # Of a ratio of two sums, NLL over tokens: what is left of each pair's difference beside the mean one.
    tokens, n = own["tokens"], len(own["tokens"])
    left = [a - b - above * t for a, b, t in zip(own["nlls"], theirs["nlls"], tokens, strict=True)]
    return above, 1.96 * math.sqrt(n / (n - 1) * sum(e * e for e in left)) / sum(tokens)


def change(row: Row, plain: dict[int, Row], split: str = "test") -> tuple[float, float | None] | None:
    """`difference` to SFT with the same seed, over SFT's NLL; None: there is no such run."""
    seed = row["task"]["seed"]
    if seed not in plain:
        return None
    whole = plain[seed][split]["nll"]
    above, half = difference(row, plain[seed], split)
    return above / whole, None if half is None else half / whole


def search(rows: list[Row]) -> list[Row]:
    """Of one problem: the penalty's runs with the first seed, by weight."""
    return [row for group in by_method(rows) for row in group[:1] if row["task"]["method"] == PENALTY]
