"""Pictures of a comparison: how the runs of a problem went, and where they ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..environment import slug
from .experiment import Row, best_penalty
from .groups import bounds_of, by_method, by_problem, change, name_of, search, sft_rows
from .methods import PENALTY

_COLORS = {
    "default": "#c1121f",
    "ModifiedBarrier": "#f4a261",
    "L3M plain": "#003049",
    "MM": "#2a9d8f",
    "AugmentedLagrangian": "#6a4c93",
    "penalty": "#6c757d",
    "SFT": "#000000",
}
_MARKERS = "osDv^<>Pdhp8"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _plain(panel: Any) -> None:
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def courses(rows: list[Row]) -> Any:
    """A column for each method, all seeds: of each constraint the estimates against its bounds, and its multipliers.

    Of more than two weights of the penalty, the one that was kept is shown.
    """
    tried = search(rows)
    kept = {name_of(row) for row in (tried if len(tried) <= 2 else [tried[best_penalty(tried)]])}
    groups = [group for group in by_method(rows) if group[0]["task"]["method"] != PENALTY or name_of(group[0]) in kept]
    bounds = bounds_of(rows[0])
    columns = max(1, len(groups))
    figure = _figure(max(6.0, 2.3 * columns), 3.4 * len(bounds) + 0.6)
    panels = figure.subplots(2 * len(bounds), columns, sharex="col", sharey="row", squeeze=False)
    for column, group in zip(panels.T, groups, strict=True):
        column[0].set_title(name_of(group[0]), fontsize=9, loc="left")
        for bound, estimates, multipliers in zip(bounds, column[::2], column[1::2], strict=True):
            for row in (row for row in group if row["status"] == "ok"):
                series, steps, color = row["training"]["series"], row["task"]["steps"], _COLORS[row["task"]["method"]]
                line = _numbers(series[f"constraints/{bound.name}/value"])
                estimates.plot(_steps(line, steps), line, color=color, lw=1.2)
                for side, style in (("lower", "-"), ("upper", "--")):
                    line = _numbers(series.get(f"constraints/{bound.name}/{side}/multiplier", []))
                    multipliers.plot(_steps(line, steps), line, color=color, lw=1, ls=style)
            for limit in (bound.lower, bound.upper):
                if limit is not None:
                    estimates.axhline(limit, color="#333333", lw=0.8, ls=":")
            # What is far away would hide all others: from 0.001 on linear, above logarithmic.
            multipliers.set_yscale("symlog", linthresh=1e-3)
        column[-1].set_xlabel("step", fontsize=7)
        for panel in column:
            _plain(panel)
    for bound, estimates, multipliers in zip(bounds, panels[::2, 0], panels[1::2, 0], strict=True):
        estimates.set_ylabel(bound.name, fontsize=8)
        multipliers.set_ylim(bottom=-2e-4)  # none is negative, and a line along 0 shows
        multipliers.set_ylabel("multiplier\n(lower —, upper - -)", fontsize=8)
    return figure


def ends(rows: list[Row]) -> Any:
    """A panel for each bound of each problem: change of the held-out NLL against SFT's, and the held-out mean."""
    plain = sft_rows(rows)
    places = [(name, bound, part) for name, part in by_problem(rows).items() for bound in bounds_of(part[0])]
    columns = min(3, len(places))
    lines = -(-len(places) // columns)
    figure = _figure(4.6 * columns, 3.4 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    # Weights are others in other problems; each has its own marker and line in the legend.
    bounded = [row for part in by_problem(rows).values() for row in part]
    markers = {name_of(group[0]): _MARKERS[k % len(_MARKERS)] for k, group in enumerate(by_method(bounded))}
    for panel, (name, bound, part) in zip(panels, places, strict=False):
        for group in by_method(part):
            for row in (row for row in group if row["status"] == "ok"):
                at, more = row["test"]["measures"][bound.measure], change(row, plain)
                if more is None:
                    continue
                style = {"color": _COLORS[row["task"]["method"]], "marker": markers[name_of(row)], "ls": "none"}
                label = name_of(row) if row is group[0] else None
                error = {"xerr": 1.96 * at["stderr"], "yerr": None if more[1] is None else 100 * more[1], "lw": 0.8}
                panel.errorbar(at["mean"], 100 * more[0], ms=5, label=label, **error, **style)
        for row in plain.values():
            at = row["test"]["measures"][bound.measure]
            panel.plot(at["mean"], 0, marker="*", ms=9, ls="none", color=_COLORS["SFT"])
        for limit in (bound.lower, bound.upper):
            if limit is not None:
                panel.axvline(limit, color="#333333", lw=0.6, ls=":")  # in sight, however far from the means
        left, right = panel.get_xlim()
        inner, outer = (end if at is None else at for at, end in ((bound.lower, left), (bound.upper, right)))
        if inner < outer:
            panel.axvspan(inner, outer, color="#e9f5ec", zorder=-1)
        panel.set_xlim(left, right)
        panel.axhline(0, color="#333333", lw=0.6)
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_xlabel(f"held-out {bound.measure}, 95% interval (shaded: allowed; ★ SFT)", fontsize=7)
        panel.set_ylabel("NLL above SFT, %", fontsize=8)
        _plain(panel)
    for panel in panels[len(places) :]:
        panel.set_visible(False)
    shown = {label: handle for p in panels for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    labels = [label for label in markers if label in shown]
    handles = [shown[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _numbers(line: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in line]


def _steps(line: list[float], steps: int) -> list[float]:
    return [(i + 1) * steps / len(line) for i in range(len(line))]


def save_pictures(rows: list[Row], beside: Path) -> dict[str, Path]:
    """Draw everything beside a result file; paths by problem, and under "ends"."""
    rows = [row for row in rows if row["status"] == "ok"]
    problems = by_problem(rows)
    figures = {name: courses(part) for name, part in problems.items()}
    if problems and sft_rows(rows):
        figures["ends"] = ends(rows)
    found = {}
    for name, figure in figures.items():
        found[name] = beside.with_name(f"{beside.stem}-{slug(name)}.png")
        figure.savefig(found[name], dpi=90)
    return found
