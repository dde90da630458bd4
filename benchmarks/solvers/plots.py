"""Pictures of a comparison: a performance profile, and for each problem how its runs went."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .methods import METHODS
from .report import best_of_grid, defaults, ratios
from .run import Row

_COLORS = (
    "#c1121f",
    "#003049",
    "#f4a261",
    "#2a9d8f",
    "#6a4c93",
    "#8ac926",
    "#1982c4",
    "#ff924c",
    "#6c757d",
    "#b5838d",
    "#000000",
)
_STYLES = {"ours": "-", "baseline": "--", "peer": ":"}
#: Where the profile ends: methods beyond are nowhere near.
_FARTHEST = 100.0


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def profile(rows: list[Row]) -> Any:
    """The share of problems on which a method's merit is within a factor of the best: defaults, best settings."""
    figure = _figure(10, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (title, chosen) in zip(
        panels, (("defaults", defaults(rows)), ("best of grid, per problem", best_of_grid(rows))), strict=True
    ):
        to_best = ratios(chosen)
        for k, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = sorted(value for (_, method), value in to_best.items() if method == name)
            reached = [value for value in own if value <= _FARTHEST]
            across = [1.0, *reached, _FARTHEST]
            up = [i / len(own) if own else 0.0 for i in [0, *range(1, len(reached) + 1), len(reached)]]
            style = _STYLES[METHODS[name].role]
            panel.step(across, up, where="post", label=name, color=_COLORS[k % len(_COLORS)], ls=style, lw=1.5)
        panel.set_xscale("log")
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("merit ÷ best merit", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of problems", fontsize=8)
    panels[1].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def courses(name: str, rows: list[Row]) -> Any:
    """A panel for each method's default on one problem: violation and multiplier against steps, means over seeds."""
    drawn = [row for row in defaults(rows) if row["problem"] == name and "trace" in row]
    columns = 4
    lines = max(1, -(-len(drawn) // columns))
    figure = _figure(10, 1.9 * lines + 0.5)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
    for panel, row in zip(panels, drawn, strict=False):
        for key, color in (("violation", "#c1121f"), ("multiplier", "#003049")):
            line = row["trace"][key]
            panel.plot([i / len(line) for i in range(len(line))], line, color=color, lw=1, label=key)
        for level in (0, 1):
            panel.axhline(level, color="#adb5bd", lw=0.6, zorder=0)
        panel.axvspan(0.75, 1, color="#f1f3f5", zorder=-1)
        panel.set_title(row["method"], fontsize=8, loc="left")
        panel.set_ylim(-1, 3)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    if drawn:
        panels[0].legend(fontsize=7, frameon=False)
    figure.suptitle(
        f"{name}: largest violation in units (red, 0 is right) and multiplier over its true value (blue, 1 is right) "
        "against the share of steps done",
        fontsize=8,
    )
    return figure


def save_pictures(rows: list[Row], beside: Path) -> dict[str, str]:
    """Draw everything beside a result's page; file names by problem, and under "profile"."""
    found = {}
    if any(math.isfinite(row["merit"]) for row in rows):
        names = dict.fromkeys(row["problem"] for row in rows)
        figures = {"profile": profile(rows)} | {name: courses(name, rows) for name in names}
        for name, figure in figures.items():
            path = beside.with_name(f"{beside.stem}-{name}.png")
            figure.savefig(path, dpi=80)
            found[name] = path.name
    return found
