"""The pictures of a report, as plotly figures. Colours of text, axes and background come from the page's CSS."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ..extras import missing_extra
from .runs import Column, Run

try:
    import plotly.graph_objects as go
except ModuleNotFoundError:
    raise missing_extra("barrierlm report", "plotly") from None

#: Told apart on white and on black; more runs than colours start over.
PALETTE = ("#3b82d6", "#e0812b", "#1fa187", "#c2519c", "#8b6fd8", "#9a8a1c", "#d6504b", "#5c8f3d")
#: Points of a line; a longer run keeps the extremes of so many stretches.
POINTS = 1600
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_BOUND = "#d6504b"


@dataclass(frozen=True)
class Chart:
    """A figure with its title and what its lines are."""

    title: str
    caption: str
    figure: Any
    wide: bool = False

    @property
    def spec(self) -> Any:
        """Data and layout as plain JSON values; the runs by number, so that the page can hide one."""
        return json.loads(self.figure.to_json())


@dataclass(frozen=True)
class Section:
    """Charts that belong together."""

    title: str
    charts: list[Chart] = field(default_factory=list)


def thin(lead: Column, points: int = POINTS) -> np.ndarray[Any, Any]:
    """Indices of at most about ``points`` entries that keep the ends, and the extremes of every stretch in between."""
    n = len(lead)
    if n <= points:
        return np.arange(n)
    edges = np.linspace(0, n, points // 2 + 1).astype(int)
    kept = {0, n - 1}
    for start, end in pairwise(edges):
        part = lead[start:end]
        finite = np.flatnonzero(np.isfinite(part))
        if len(finite) < len(part):
            kept.add(start + int(np.flatnonzero(~np.isfinite(part))[0]))  # a gap stays a gap
        if len(finite):
            kept |= {start + int(finite[part[finite].argmin()]), start + int(finite[part[finite].argmax()])}
    return np.array(sorted(kept))


def smooth(values: Column, width: int) -> Column:
    """Mean of the last ``width`` entries, of those that are finite."""
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0], np.cumsum(x)]) for x in (np.where(finite, values, 0.0), finite))
    start = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    total, count = sums[1:] - sums[start], counts[1:] - counts[start]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Every picture that the runs have numbers for."""
    names = list(dict.fromkeys(name for run in runs for name in run.constraints))
    trade = [c for name in names if (c := _trade_off(runs, name))]
    task = _lines(runs, "Task loss", ["loss/task"], smoothed=True, wide=len(trade) % 2 == 0)
    found = [Section("Task loss and constraints", [c for c in (task, *trade) if c])]
    found += [Section(_constraint_title(runs, name), _constraint(runs, name)) for name in names]
    norms = {"task": "balance/task_norm", "constraints": "balance/constraint_norm"}
    gradients = [
        _lines(runs, "Gradient norms of task and constraints", list(norms.values()), names=list(norms), log=True),
        _lines(runs, "Cosine between the two gradients", ["balance/cosine"]),
        _lines(runs, "Gradient norm before clipping", ["grad_norm"], log=True, smoothed=True),
    ]
    found.append(Section("Gradient balance", [c for c in gradients if c]))
    responses = [
        _lines(runs, "Mean tokens of the sampled responses", ["rollout/mean_tokens"], smoothed=True),
        _lines(runs, "Share of responses cut at the token cap", ["rollout/censored"], smoothed=True),
    ]
    found.append(Section("Responses", [c for c in responses if c]))
    return [section for section in found if section.charts]


def _constraint_title(runs: Sequence[Run], name: str) -> str:
    def text(side: str) -> str:
        values = sorted({run.bound(name, side) for run in runs if (name, side) in run.sides})
        return " or ".join(f"{value:g}" for value in values)

    lower, upper = text("lower"), text("upper")
    return f"{f'{lower} ≤ ' if lower else ''}{name}{f' ≤ {upper}' if upper else ''}"


def _constraint(runs: Sequence[Run], name: str) -> list[Chart]:
    prefix = f"constraints/{name}"
    figure = _figure("step", "mean")
    known = [(i, run) for i, run in enumerate(runs) if name in run.constraints]
    for i, run in known:
        value, stderr = run.column(f"{prefix}/value"), run.column(f"{prefix}/stderr")
        at = thin(value)
        x, y, margin = run.steps[at], value[at], 2 * stderr[at]
        band = np.isfinite(y) & np.isfinite(margin)
        edges = np.concatenate([(y + margin)[band], (y - margin)[band][::-1]])
        figure.add_scatter(
            x=np.concatenate([x[band], x[band][::-1]]),
            y=edges,
            fill="toself",
            fillcolor=_rgba(i, 0.2),
            mode="none",
            hoverinfo="skip",
            meta=i,
        )
        figure.add_scatter(**_line(i, run, x, y), customdata=margin, hovertemplate="%{y:.4~g} ± %{customdata:.2g}")
    for side in ("lower", "upper"):
        for bound in sorted({run.bound(name, side) for _, run in known if (name, side) in run.sides}):
            last = max(run.steps[-1] for _, run in known)
            figure.add_scatter(
                x=[min(run.steps[0] for _, run in known), last],
                y=[bound, bound],
                mode="lines",
                line={"color": _BOUND, "dash": "dash", "width": 1.5},
                hoverinfo="skip",
            )
            figure.add_annotation(
                x=1,
                xref="paper",
                y=bound,
                text=f"{'≥' if side == 'lower' else '≤'} {bound:g}",
                showarrow=False,
                xanchor="right",
                yanchor="bottom" if side == "upper" else "top",
                font={"color": _BOUND, "size": 12},
            )
    estimate = Chart("Estimate", "Band: ± 2 standard errors; dashed: bounds.", figure, wide=True)
    sides = [s for s in ("upper", "lower") if any((name, s) in run.sides for run in runs)]
    others = [
        _lines(runs, "Multiplier", [f"{prefix}/{s}/multiplier" for s in sides], names=sides),
        _lines(runs, "Barrier parameter μ", [f"{prefix}/{s}/mu" for s in sides], names=sides, log=True),
    ]
    return [estimate, *(c for c in others if c)]


def _trade_off(runs: Sequence[Run], name: str) -> Chart | None:
    figure = _figure(html.escape(f"{name}: estimate"), "task loss")
    figure.update_layout(hovermode="closest")
    drawn = False
    for i, run in enumerate(runs):
        if name not in run.constraints or not np.isfinite(run.column("loss/task")).any():
            continue
        drawn = True
        loss = smooth(run.column("loss/task"), _width(run))
        at = thin(loss, POINTS // 2)
        x, y, steps = run.column(f"constraints/{name}/value")[at], loss[at], run.steps[at]
        text = f"{html.escape(run.name)}, step %{{customdata:.0f}}<br>{html.escape(name)} %{{x:.4~g}}"
        text += "<br>task loss %{y:.4~g}<extra></extra>"
        path = _line(i, run, x, y) | {"opacity": 0.65}
        figure.add_scatter(**path, customdata=steps, hovertemplate=text)
        last = np.flatnonzero(np.isfinite(x) & np.isfinite(y))[-1:]
        figure.add_scatter(
            x=x[last],
            y=y[last],
            mode="markers",
            marker={"color": _color(i), "size": 12, "symbol": "diamond"},
            customdata=steps[last],
            hovertemplate=text,
            meta=i,
        )
        for side in ("lower", "upper"):
            if (name, side) in run.sides:
                figure.add_vline(x=run.bound(name, side), line={"color": _BOUND, "dash": "dash", "width": 1.5})
    if not drawn:
        return None
    caption = "The path of the run, to the diamond. Dashed: bounds."
    return Chart(f"Task loss against {name}", caption, figure)


def _lines(
    runs: Sequence[Run],
    title: str,
    columns: Sequence[str],
    *,
    names: Sequence[str] = (),
    log: bool = False,
    smoothed: bool = False,
    wide: bool = False,
) -> Chart | None:
    """Lines over the steps: the first column solid, the others dotted; or None where no run has a number of them."""
    figure = _figure("step", None)
    drawn, averaged = False, 0
    for i, run in enumerate(runs):
        for k, column in enumerate(columns):
            values = run.column(column)
            finite = np.isfinite(values)
            if not finite.any():
                continue
            drawn = True
            if not smoothed and not finite.all():  # logged every now and then
                steps, values = run.steps[finite], values[finite]
            else:
                steps = run.steps
            label = names[k] if names else None
            at = thin(values)
            width = _width(run) if smoothed else 1
            if width > 1:
                averaged = max(averaged, width)
                figure.add_scatter(**_line(i, run, steps[at], values[at]) | {"opacity": 0.3, "hoverinfo": "skip"})
                values = smooth(values, width)
                at = thin(values)
            dash = "solid" if k == 0 else "dot"
            line = _line(i, run, steps[at], values[at], label, len(runs), dash)
            figure.add_scatter(**line, hovertemplate="%{y:.4~g}")
    if not drawn:
        return None
    if log and _decades(figure) <= 0.3:
        figure.update_yaxes(rangemode="tozero")
    elif log:
        figure.update_yaxes(type="log", exponentformat="power", dtick=1 if _decades(figure) > 1.5 else None)
    caption = f"Solid: {names[0]}; dotted: {names[1]}." if len(names) > 1 else ""
    if averaged:
        caption = f"Mean of the last {averaged} steps; faint: every step."
    return Chart(title, caption, figure, wide)


def _decades(figure: Any) -> float:
    """How many powers of ten the lines reach over."""
    values = np.concatenate([np.asarray(trace.y, float) for trace in figure.data])
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def _width(run: Run) -> int:
    """Steps to average noisy curves over: a tenth of a run that is long enough for it, and at most 500."""
    return min(500, len(run.steps) // 10) if len(run.steps) >= 30 else 1


def _line(
    i: int, run: Run, x: Column, y: Column, label: str | None = None, num_runs: int = 0, dash: str = "solid"
) -> dict[str, Any]:
    name = label if label and num_runs == 1 else f"{run.name} {label or ''}".strip()
    # A single point has no line.
    mode = "lines+markers" if np.isfinite(y).sum() == 1 else "lines"
    line = {"color": _color(i), "width": 2, "dash": dash}
    return {"x": x, "y": y, "mode": mode, "name": html.escape(name), "line": line, "meta": i}


def _figure(x: str, y: str | None) -> Any:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        font={"family": _FONT, "size": 12},
        margin={"l": 56, "r": 16, "t": 10, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        hovermode="x unified",
        dragmode="zoom",
    )
    spike = {"showspikes": True, "spikethickness": 1, "spikedash": "dot", "spikecolor": "#888", "spikemode": "across"}
    figure.update_xaxes(**spike, title={"text": x, "standoff": 8}, zeroline=False, automargin=True, nticks=8)
    figure.update_yaxes(title={"text": y, "standoff": 6}, zeroline=False, automargin=True, nticks=7)
    return figure


def _color(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def _rgba(i: int, alpha: float) -> str:
    color = _color(i)
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
