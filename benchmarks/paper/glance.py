"""The start of docs/paper.md: every problem by the longest and newest of its results."""

from __future__ import annotations

from typing import Any

from .experiment import Row
from .groups import bounds_of, by_problem
from .methods import DEFAULT


def _rank(document: dict[str, Any], rows: list[Row]) -> tuple[int, str]:
    return rows[0]["task"]["steps"], document["date"]


def at_a_glance(documents: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Of every problem that the default has run on: the rows of the result with most steps, the newest of these.

    Results with other options of the recipe (``--set``) are no results of the default.
    """
    chosen: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for document in documents:
        if any(row["task"]["sources"]["extra"] for row in document["rows"]):
            continue
        for name, rows in by_problem(document["rows"]).items():
            if not any(row["task"]["method"] == DEFAULT and row["status"] == "ok" for row in rows):
                continue
            if name not in chosen or _rank(document, rows) > _rank(*chosen[name]):
                chosen[name] = document, rows
    return sorted(chosen.values(), key=lambda found: _order(found[1]))


def in_order(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those at a glance before the others; within either by hardware and name."""
    newest = [id(document) for document, _ in at_a_glance(documents)]
    # By name, and not by file: a case stands before the longer ones that add to it.
    named = sorted(documents, key=lambda d: (d["hardware"]["name"], d["settings"]["quick"], d["case"]))
    return sorted(named, key=lambda d: id(d) not in newest)


def _order(rows: list[Row]) -> tuple[bool, float]:
    """Windows first, from concise to verbose."""
    bound = bounds_of(rows[0])[0]
    return bound.measure != "length", bound.lower or 0.0
