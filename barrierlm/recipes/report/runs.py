"""What a run has left in its folder: metrics, options, held-out evaluations, samples."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ..config import ConfigError

Column = np.ndarray[Any, np.dtype[np.float64]]
_SLACK = re.compile(r"constraints/(.+)/(lower|upper)/slack")


@dataclass
class Run:
    """One run. ``columns`` hold one number per logged step, NaN where there is none; ``notes`` say what was odd."""

    name: str
    folder: Path
    columns: dict[str, Column]
    options: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> Column:
        """The steps that were logged, in order."""
        return self.columns["step"]

    @property
    def planned(self) -> int | None:
        """How many steps the run was meant to take, where its options say."""
        steps = (self.options.get("optim") or {}).get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def sides(self) -> list[tuple[str, str]]:
        """(constraint, side) of every bound."""
        return [(m[1], m[2]) for key in self.columns if (m := _SLACK.fullmatch(key))]

    @property
    def constraints(self) -> list[str]:
        """Names of the constraints, in the order of the log."""
        return list(dict.fromkeys(name for name, _ in self.sides))

    def column(self, name: str) -> Column:
        """Numbers by step; all NaN where the run does not log them."""
        return self.columns.get(name, np.full(len(self.steps), math.nan))

    def bound(self, constraint: str, side: str) -> float:
        """The bound: estimate and slack add up to it, whoever wrote the log."""
        value, slack = self.column(f"constraints/{constraint}/value"), self.slack(constraint, side)
        bounds = value - slack if side == "lower" else value + slack
        known = bounds[np.isfinite(bounds)]
        return float(f"{known[-1]:.10g}") if len(known) else math.nan

    def slack(self, constraint: str, side: str) -> Column:
        """Distance to the bound, positive inside."""
        return self.column(f"constraints/{constraint}/{side}/slack")


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read runs, with names that tell them apart.

    Args:
        paths: Folders with a ``metrics.jsonl``, or such files.

    Raises:
        ConfigError: A folder without metrics, or metrics without a line; names both.
    """
    folders = [_folder(Path(path)) for path in paths]
    for folder in {f for f in folders if folders.count(f) > 1}:
        raise ConfigError(f"{folder} is given twice; allowed: each run once")
    depth = 1
    while len({_name(folder, depth) for folder in folders}) < len(folders):
        depth += 1
    return [load_run(folder, _name(folder, depth)) for folder in folders]


def _folder(path: Path) -> Path:
    folder = path.parent if path.name == "metrics.jsonl" else path
    if not (folder / "metrics.jsonl").is_file():
        there = "is no folder" if not folder.is_dir() else "has no metrics.jsonl"
        raise ConfigError(
            f"{folder} {there}; allowed: the output_dir of `barrierlm finetune`, or any folder whose metrics.jsonl has "
            "one JSON object of objective.metrics() a line"
        )
    return folder.resolve()


def _name(folder: Path, depth: int) -> str:
    return "/".join(folder.parts[-depth:])


def load_run(folder: Path, name: str) -> Run:
    """Read one folder; everything but the metrics may be missing."""
    run = Run(name, folder, {})
    run.columns = _metrics(folder / "metrics.jsonl", run.notes)
    run.options = _options(folder / "config.yaml", run.notes)
    summary = _json(folder / "summary.json", run.notes)
    evaluations = summary.get("runs", {}) if isinstance(summary, dict) else {}
    if isinstance(evaluations, dict):
        run.evaluations = {key: value for key, value in evaluations.items() if isinstance(value, dict)}
    if (folder / "samples.jsonl").is_file():
        for line in (folder / "samples.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            row = _object(line)
            if row is not None and "response" in row:
                run.samples.append({key: str(row.get(key, "")) for key in ("run", "prompt", "response")})
    if run.planned and run.steps[-1] < run.planned:
        run.notes.append(f"unfinished: step {run.steps[-1]:.0f} of {run.planned}")
    return run


def _metrics(path: Path, notes: list[str]) -> dict[str, Column]:
    """The log by columns: rows of a long run would take many times the memory."""
    raw: dict[str, array[float]] = {}
    rows = bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            row = _object(line)
            if row is None:
                bad += 1
                continue
            if not isinstance(row.get("step"), int | float) or not math.isfinite(row["step"]):
                row["step"] = rows + 1
            for name, value in row.items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                column = raw.setdefault(name, array("d"))
                column.extend([math.nan] * (rows - len(column)))
                column.append(float(value))
            rows += 1
    if not rows:
        raise ConfigError(f"{path} has no line with metrics; allowed: one JSON object a line, as a run writes them")
    if bad:
        notes.append(f"{bad} line{'s' if bad > 1 else ''} of metrics.jsonl left out: not JSON (cut off?)")
    columns = {}
    for name, column in raw.items():
        column.extend([math.nan] * (rows - len(column)))
        columns[name] = np.array(column)
    # A run that went on from a checkpoint may have logged steps twice: the later line is what it became.
    steps = columns["step"]
    order = np.argsort(steps, kind="stable")
    last = np.append(np.diff(steps[order]) != 0, True)
    if not last.all():
        notes.append(f"{(~last).sum()} steps were logged again after a restart; the later lines count")
    return {name: column[order[last]] for name, column in columns.items()}


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _json(path: Path, notes: list[str]) -> Any:
    if not path.is_file():
        return {}
    row = _object(path.read_text(encoding="utf-8", errors="replace"))
    if row is None:
        notes.append(f"{path.name} is not valid JSON and was left out")
    return row or {}


def _options(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        options = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        notes.append(f"config.yaml was left out: {str(error).splitlines()[0]}")
        return {}
    return {str(key): value for key, value in options.items()} if isinstance(options, dict) else {}
