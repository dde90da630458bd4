"""One size varied at a time: rows, vocabulary, hidden size, unevenness of lengths, constraints."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..candidate import Case
from ..measure import compare
from ..problems import BOTH, HeadProblem
from ..settings import Settings
from . import head, weights

#: The point that all axes go through, and the other values of each.
BASE = {"cpu": (512, 512, 32768), "cuda": (4096, 2048, 65536)}
AXES: dict[str, dict[str, list[Any]]] = {
    "cpu": {
        "N": [128, 256, 1024, 2048],
        "V": [8192, 16384, 65536, 131072],
        "H": [128, 256, 1024, 2048],
        "lengths": ["equal", "one"],
        "K": [1, 2, 4, 8, 16, 32, 64],
    },
    "cuda": {
        "N": [1024, 2048, 8192, 16384],
        "V": [16384, 32768, 131072, 262144],
        "H": [512, 1024, 4096, 8192],
        "lengths": ["equal", "one"],
        "K": [1, 4, 16, 64],
    },
}
QUICK_BASE = {"cpu": (32, 16, 128), "cuda": (256, 256, 4096)}
QUICK_AXES: dict[str, list[Any]] = {"N": [64], "V": [256], "H": [32], "lengths": ["one"], "K": [2]}
#: Responses of the K axis.
RESPONSES = 64


def points(settings: Settings) -> list[tuple[str, Any]]:
    """(axis, value) of every point; the base is there once, as its number of rows."""
    device = settings.device.type
    axes = QUICK_AXES if settings.quick else AXES[device]
    base = (QUICK_BASE if settings.quick else BASE)[device]
    return [("N", base[0]), *((axis, value) for axis, values in axes.items() for value in values)]


def cases(settings: Settings) -> Iterator[Case]:
    """The linear operations against naive PyTorch and the bare products; K for `constraint_weights`."""
    every = points(settings)
    for index, (axis, value) in enumerate(every):
        fields = {"axis": axis, "value": value}
        left = len(every) - index
        if axis == "K":
            which = [c for c in weights.candidates(settings.device) if c.role != "peer"]
            yield Case(fields, partial(weights.measure, (value, RESPONSES, False), settings, left, which))
            continue
        rows, size, vocab = (QUICK_BASE if settings.quick else BASE)[settings.device.type]
        sizes: dict[str, Any] = {"N": rows, "H": size, "V": vocab, "lengths": "spread"} | {axis: value}
        yield Case(fields | sizes | {"direction": BOTH}, partial(_measure, sizes, settings, left))


def _measure(sizes: dict[str, Any], settings: Settings, left: int) -> list[dict[str, Any]]:
    dtype = torch.float32 if settings.device.type == "cpu" else torch.bfloat16
    problem = HeadProblem((sizes["N"], sizes["H"], sizes["V"]), dtype, settings.device, skew=sizes["lengths"])
    own = [c for c in head.ours(settings.device) if "reference" not in c.name]
    rows = compare([*head.STANDARDS, *own], problem, settings, seconds=min(5.0, settings.share(left)))
    return [row | {"floor": problem.floor()} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """One table: a line for each point, a column for each candidate."""
    from ..tables import scaling_table

    return scaling_table(rows)


def plot(rows: list[dict[str, Any]], figure: Any) -> None:
    """One panel for each axis."""
    from ..plots import lines

    lines(rows, figure)
