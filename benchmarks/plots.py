"""Pictures of a result, one file for each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .candidate import GEMMS, NAIVE
from .measure import SLOW
from .problems import BOTH
from .tables import PARTS, Row, by_case, case_title, number

_COLORS = {"ours": "#c1121f", "naive": "#6c757d", "peer": "#669bbc", "floor": "#adb5bd"}
_WIDTH = 10.0


def save_picture(document: dict[str, Any], path: Path) -> None:
    """Draw a result's rows with its suite's `plot`; nothing is written if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .suites import suite

    if not any(row["status"] == "ok" for row in document["rows"]):
        return
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    suite(document["suite"]).plot(document["rows"], figure)
    figure.suptitle(f"{document['suite']} - {document['hardware']['name']}", fontsize=11)
    figure.savefig(path, dpi=110)


def bars(
    rows: list[Row],
    figure: Any,
    *,
    shape: Sequence[str],
    divisor: str,
    memory: tuple[str, str] | None = None,
    unit: str = "ms",
) -> None:
    """A line of panels for each case: time of forward + backward, and memory where it was measured."""
    timed = [r for r in rows if r["status"] == "ok" and r["case"].get("direction", BOTH) == BOTH]
    cases = by_case(timed, shape)
    most = max(len(of_case) for of_case in cases.values())
    figure.set_size_inches(_WIDTH, (0.28 * most + 1.0) * len(cases) + 0.4)
    panels = figure.subplots(len(cases), 1 + (memory is not None), squeeze=False)
    factor = 1e3 if unit == "us" else 1.0
    for line, (values, of_case) in zip(panels, cases.items(), strict=True):
        ordered = sorted(of_case, key=lambda r: -r["time_ms"]["median"])
        names, colors = [r["candidate"] for r in ordered], [_COLORS[r["role"]] for r in ordered]
        middle = [r["time_ms"]["median"] * factor for r in ordered]
        divided_by = {r["candidate"]: r["time_ms"]["median"] * factor for r in of_case}
        # What is many times slower would leave no room for the others: its bar is cut, its number stays.
        end = min(max(middle), SLOW * divided_by.get(NAIVE, max(middle)))
        for place, row in enumerate(ordered):
            value, low, high = (row["time_ms"][key] * factor for key in ("median", "q1", "q3"))
            line[0].barh(place, min(value, end), color=colors[place])
            if value <= end:
                line[0].plot([low, high], [place, place], color="#333333", lw=0.8)
            text = number(value) if value <= end else f"{number(value)} (cut)"
            after = end if value > end else min(max(value, high), 1.05 * end)
            line[0].text(after + end * 0.01, place, text, va="center", fontsize=7)
        line[0].set_yticks(range(len(names)), names)
        line[0].set_xlim(0, end * 1.25)
        line[0].set_title(case_title(shape, values), fontsize=9, loc="left")
        if divisor in divided_by:
            line[0].axvline(divided_by[divisor], color="#333333", lw=0.8, ls="--", zorder=0)
        label = "µs" if unit == "us" else "ms, forward + backward"
        line[0].set_xlabel(f"{label} (dashed: {divisor})", fontsize=8)
        if memory is not None:
            room = [0.0 if r["role"] == "floor" else r["memory"][memory[0]] / 2**20 for r in ordered]
            line[1].barh(range(len(names)), room, color=colors)
            line[1].set_yticks([])
            line[1].set_xlabel(f"MiB beyond {memory[1]}", fontsize=8)
        for panel in line:
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)


def lines(rows: list[Row], figure: Any) -> None:
    """A panel for each axis: time over that of naive PyTorch."""
    timed = [row for row in rows if row["status"] == "ok" and row["candidate"] != NAIVE]
    axes = by_case(timed, ("axis",))
    columns = min(3, len(axes))
    figure.set_size_inches(_WIDTH, 3.2 * -(-len(axes) // columns) + 0.4)
    panels = figure.subplots(-(-len(axes) // columns), columns, squeeze=False).reshape(-1)
    first = timed[0]["case"]
    base = {row["candidate"]: row["ratio"][NAIVE]["median"] for row in timed if row["case"] == first}
    for panel, ((axis,), of_axis) in zip(panels, axes.items(), strict=False):
        colors = iter(["#c1121f", "#003049", "#f4a261"])
        for name in dict.fromkeys(row["candidate"] for row in of_axis):
            points = {r["case"]["value"]: r["ratio"][NAIVE]["median"] for r in of_axis if r["candidate"] == name}
            if axis in first and name in base:  # the point that all axes go through was measured once
                points[first[axis]] = base[name]
            where = sorted(points, key=lambda v: (isinstance(v, str), v))
            style = {"color": "#adb5bd", "ls": "--"} if name == GEMMS else {"color": next(colors)}
            panel.plot([str(v) for v in where], [points[v] for v in where], marker="o", ms=3, label=name, **style)
        panel.axhline(1, color="#333333", lw=0.8)
        panel.set_ylim(bottom=0)
        panel.set_title(axis, fontsize=9, loc="left")
        panel.set_ylabel("time ÷ naive", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)


_PART_COLORS = ("#c1121f", "#f4a261", "#003049", "#669bbc", "#588157", "#adb5bd", "#000000")


def stacked(rows: list[Row], figure: Any) -> None:
    """A panel for each case: the parts of a training step, beside each other in one bar for each version."""
    timed = [row for row in rows if row["status"] == "ok"]
    cases = by_case(timed, ("model", "start", "responses"))
    figure.set_size_inches(_WIDTH, sum(0.35 * len(of_case) + 0.8 for of_case in cases.values()) + 0.6)
    heights = [0.35 * len(of_case) + 0.4 for of_case in cases.values()]
    panels = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, (values, of_case) in zip(panels, cases.items(), strict=True):
        ordered = sorted(of_case, key=lambda r: float(r["time_ms"]["median"]))
        for place, row in enumerate(ordered):
            left = 0.0
            for part, color in zip(PARTS, _PART_COLORS, strict=True):
                panel.barh(place, row["seconds"][part], left=left, color=color, label=part if place == 0 else None)
                left += row["seconds"][part]
            panel.text(left * 1.01, place, f"{number(left)} s", va="center", fontsize=7)
        panel.set_yticks(range(len(ordered)), [row["candidate"] for row in ordered])
        panel.set_xlim(0, 1.12 * max(sum(row["seconds"].values()) for row in ordered))
        panel.set_title(", ".join(values), fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7, frameon=False, ncols=len(PARTS), loc="lower right", bbox_to_anchor=(1, 1.25))
    panels[-1].set_xlabel("seconds of the parts of a step", fontsize=8)
