"""The start of docs/paper.md: every problem by the longest and newest of its results."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from .experiment import TOGETHER, Row, Sources
from .groups import bounds_of, by_problem
from .methods import DEFAULT

Document = dict[str, Any]


def at_a_glance(documents: list[Document]) -> list[tuple[Document, list[Row]]]:
    """Of every problem that the default has run on: the rows of the result with most steps, the newest of these.

    Results with another model or other data, or with options of the recipe (``--set``), are none of these; nor are
    bounds that no run can meet.
    """
    usual = json.loads(json.dumps(asdict(Sources())))
    chosen: dict[str, tuple[Document, list[Row]]] = {}
    for document in documents:
        for name, rows in by_problem(document["rows"]).items():
            own = [row for row in rows if row["task"]["method"] == DEFAULT and row["status"] == "ok"]
            if not own or own[0]["task"]["sources"] != usual or name == TOGETHER:
                continue
            if name not in chosen or _rank(document, rows) > _rank(*chosen[name]):
                chosen[name] = document, rows
    return sorted(chosen.values(), key=lambda found: _order(found[1]))


def in_order(documents: list[Document]) -> list[Document]:
    """Those at a glance before the others; within either by hardware and name."""
    newest = [id(document) for document, _ in at_a_glance(documents)]
    # By name, and not by file: a case stands before the longer ones that add to it.
    named = sorted(documents, key=lambda d: (d["hardware"]["name"], d["settings"]["quick"], d["case"]))
    return sorted(named, key=lambda d: id(d) not in newest)


def date_of(document: Document, row: Row) -> str:
    """When it was run; rows of before they had a date have that of their document."""
    date: str = row.get("date", document["date"])
    return date


def _rank(document: Document, rows: list[Row]) -> tuple[int, str]:
    own = next(row for row in rows if row["task"]["method"] == DEFAULT and row["status"] == "ok")
    return own["task"]["steps"], date_of(document, own)


def _order(rows: list[Row]) -> tuple[bool, float]:
    """Lengths first, from concise to verbose."""
    bound = bounds_of(rows[0])[0]
    return bound.measure != "length", bound.lower or 0.0
