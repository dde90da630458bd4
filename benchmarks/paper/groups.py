"""Rows of a result, by problem and by method."""

from __future__ import annotations

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


def change(row: Row, plain: dict[int, Row], split: str = "test") -> float | None:
    """Its NLL over that of SFT with the same seed, less 1."""
    seed = row["task"]["seed"]
    return None if seed not in plain else row[split]["nll"] / plain[seed][split]["nll"] - 1


def search(rows: list[Row]) -> list[Row]:
    """Of one problem: the penalty's runs with the first seed, by weight."""
    return [row for group in by_method(rows) for row in group[:1] if row["task"]["method"] == PENALTY]
