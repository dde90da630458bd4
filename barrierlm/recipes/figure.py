"""The picture of a run: every constraint's estimate against its bounds, multipliers, and mu."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from barrierlm.files import replacing

from .extras import missing_extra
from .options import ConstraintOptions

_BLUE, _RED, _ORANGE = "#1f6fb2", "#b23a3a", "#d98a1f"


def draw_figure(metrics: Path, constraints: Mapping[str, ConstraintOptions], target: Path) -> None:
    """Draw ``metrics.jsonl`` of a constrained run to a PNG; without constraints there is nothing to draw.

    Args:
        metrics: The file that training wrote.
        constraints: Their bounds; one column each.
        target: The PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        StorageError: It cannot be written.
    """
    if not constraints:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise missing_extra("the figure", "matplotlib") from None
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows]

    def series(name: str) -> list[float]:
        return [float("nan") if row.get(name) is None else row[name] for row in rows]

    figure = Figure(figsize=(6.4 * len(constraints), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(3, len(constraints), sharex=True, squeeze=False, height_ratios=[2.2, 1, 1])
    for column, (name, bounds) in enumerate(constraints.items()):
        estimate, multiplier, mu = axes[:, column]
        value, stderr = series(f"constraints/{name}/value"), series(f"constraints/{name}/stderr")
        low = [v - 2 * e for v, e in zip(value, stderr, strict=True)]
        high = [v + 2 * e for v, e in zip(value, stderr, strict=True)]
        estimate.fill_between(steps, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="± 2 standard errors")
        estimate.plot(steps, value, color=_BLUE, label="estimate")
        for side, bound, color in (("lower", bounds.lower, _ORANGE), ("upper", bounds.upper, _RED)):
            if bound is None:
                continue
            estimate.axhline(bound, color=color, linestyle="--", linewidth=1.2, label=f"{side} bound {bound:g}")
            prefix = f"constraints/{name}/{side}"
            multiplier.plot(steps, series(f"{prefix}/multiplier"), color=color, label=side)
            mu.plot(steps, series(f"{prefix}/mu"), color=color, label=side)
        estimate.set_title(name)
        estimate.set_ylabel("mean")
        multiplier.set_ylabel("multiplier λ")
        mu.set_ylabel("μ")
        mu.set_yscale("log")
        mu.set_xlabel("step")
        for axis in (estimate, multiplier, mu):
            axis.legend(frameon=False, fontsize=8)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    with replacing(target) as file:
        figure.savefig(file, dpi=140, format="png")
