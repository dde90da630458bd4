"""From runs to one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError
from ..extras import missing_extra
from .charts import PALETTE, sections
from .runs import Run, load_runs
from .verdicts import Judged, headline, judge, number

_HERE = Path(__file__).parent


def write_report(paths: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one run, or of several overlaid.

    Args:
        paths: Output folders of `finetune`, or any folders with a ``metrics.jsonl`` of the documented names.
        output: The HTML file; None: ``report.html`` in the run's folder, of several runs in the current one.

    Returns:
        The file.

    Raises:
        ConfigError: A folder without metrics, a run given twice, a file that cannot be written.
        ModuleNotFoundError: plotly or jinja2 is not installed.
    """
    runs = load_runs(paths)
    page = render(runs)
    target = Path(output) if output else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {target}: {error.strerror}; allowed: a file in a folder that exists") from None
    return target


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError:
        raise missing_extra("barrierlm report", "jinja2") from None
    from plotly.offline import get_plotlyjs

    # Escapes whatever it prints: names and responses may hold HTML.
    loader = FileSystemLoader(_HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "chip": _chip}
    judged = [judge(run) for run in runs]
    charts = sections(runs)
    return environment.get_template("page.html").render(
        headline=headline(judged),
        good=all(j.good for j in judged),
        judged=judged,
        colors=[PALETTE[i % len(PALETTE)] for i in range(len(runs))],
        times=[_times(run) for run in runs],
        sections=charts,
        specs=[chart.spec for section in charts for chart in section.charts],
        has_balance=any("balance/task_norm" in run.columns for run in runs),
        samples=_samples(judged),
        changed=_changed(runs),
        plotly=get_plotlyjs(),
        style=(_HERE / "style.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def _chip(verdict: str) -> str:
    """The CSS class of a verdict."""
    return verdict.split()[0].strip(",")


def _times(run: Run) -> dict[str, float]:
    """Mean seconds per step, by activity."""
    parts = {key.removeprefix("seconds/"): run.columns[key] for key in run.columns if key.startswith("seconds/")}
    return {name: float(np.nanmean(x)) for name, x in parts.items() if np.isfinite(x).any()}


def _samples(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """By prompt, what each run has answered."""
    prompts: dict[str, list[tuple[int, str, str]]] = {}
    for i, j in enumerate(judged):
        for sample in j.run.samples:
            prompts.setdefault(sample["prompt"], []).append((i, sample["run"], sample["response"]))
    return [{"prompt": prompt, "answers": answers} for prompt, answers in prompts.items()]


def _changed(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The options in which the runs differ."""
    flat = [_flat(run.options) for run in runs]
    if len([f for f in flat if f]) < 2:
        return []
    keys = dict.fromkeys(key for options in flat for key in options)
    rows = [(key, [str(options.get(key, "-")) for options in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key not in ("output_dir", "resume")]


def _flat(options: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(options, dict) or not options:
        return {prefix.rstrip("."): options} if prefix else {}
    return {k: v for key, value in options.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
