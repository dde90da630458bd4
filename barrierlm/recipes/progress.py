"""What a run writes and shows while it trains."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from barrierlm import BarrierObjective
from barrierlm.files import make_folder, replacing, storage_errors


class MetricsFile:
    """``metrics.jsonl``, one line a step, and TensorBoard event files where TensorBoard is installed.

    Args:
        folder: Where they go.
        keep: Keep the lines of the first so many steps (of the run that is resumed).
        enabled: False on processes that do not write.
    """

    def __init__(self, folder: Path, *, keep: int = 0, enabled: bool = True) -> None:
        self.path, self.keep, self.enabled = folder / "metrics.jsonl", keep, enabled
        #: Steps whose lines were kept; fewer than ``keep`` if someone has taken the file away.
        self.kept = 0
        self._board: Any = None

    def __enter__(self) -> MetricsFile:
        if not self.enabled:
            return self
        make_folder(self.path.parent)
        # Steps after the checkpoint are done again; the last line may be half-written.
        lines = _whole_lines(self.path, self.keep)
        self.kept = len(lines)
        with replacing(self.path) as file:
            file.write(b"".join(lines))
        self._file = self.path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return self
        self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.keep + 1)
        return self

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line; numbers that are not known yet are null.

        Raises:
            StorageError: The disk is full.
        """
        if not self.enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with storage_errors(self.path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in metrics.items():
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Wait until the lines are on the disk: a checkpoint must not be there without the lines of its steps.

        Raises:
            StorageError: They cannot be written.
        """
        if self.enabled:
            with storage_errors(self.path):
                os.fsync(self._file.fileno())

    def __exit__(self, *error: object) -> None:
        # What a full disk keeps from being written has been told by `write`.
        if self.enabled:
            with suppress(OSError):
                self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()


def _whole_lines(path: Path, steps: int) -> list[bytes]:
    """The lines of steps 1, 2, ... up to ``steps``, as far as they are there and whole."""
    lines: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True) if steps and path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if len(lines) == steps or not isinstance(row, dict) or row.get("step") != len(lines) + 1:
            break
        lines.append(line.rstrip(b"\n") + b"\n")
    return lines


class ProgressBar:
    """A progress bar with one line per bound; where there is no terminal, a line every now and then.

    Args:
        console: Where it is shown.
        label: Name of the run.
        steps: Steps in all.
        done: Steps already done.
    """

    def __init__(self, console: Console, label: str, steps: int, done: int = 0) -> None:
        self.console, self.label, self.steps, self.done = console, label, steps, done
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )
        self._task = self._bar.add_task(label, total=steps, completed=done, loss="")
        self._live = Live(self._bar, console=console, refresh_per_second=4, transient=True)
        self._began = time.perf_counter()

    def __enter__(self) -> ProgressBar:
        if self.console.is_terminal:
            self._live.start()
        return self

    def update(self, loss: float, objective: BarrierObjective | None) -> None:
        """One step has passed."""
        self.done += 1
        if self.console.is_terminal:
            self._bar.update(self._task, completed=self.done, loss=f"NLL {loss:.3f}")
            self._live.update(Group(self._bar, bound_table(objective)) if objective is not None else self._bar)
        elif self.done % max(1, self.steps // 10) == 0:
            bounds = (
                []
                if objective is None
                else [
                    f"{row.constraint} {row.estimate:.3g}±{row.stderr:.2g} {'≥' if row.side == 'lower' else '≤'} "
                    f"{row.bound:g} (λ {row.multiplier:.3g})"
                    for row in objective.report()
                ]
            )
            seconds = time.perf_counter() - self._began
            line = f"{self.label} {self.done}/{self.steps} {seconds:.0f} s"
            self.console.print(
                "  ".join([line, f"NLL {loss:.3f}", *bounds]), highlight=False, markup=False, soft_wrap=True
            )

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()


def bound_table(objective: BarrierObjective) -> Table:
    """Every bound: estimate, bound, slack, multiplier, mu and verdict."""
    table = Table(box=None, pad_edge=False)
    for name in ("constraint", "estimate", "bound", "slack", "multiplier", "mu", "verdict"):
        table.add_column(name, justify="left" if name in ("constraint", "verdict") else "right")
    for row in objective.report():
        table.add_row(
            row.constraint,
            f"{row.estimate:.3g} ± {row.stderr:.2g}",
            f"{'≥' if row.side == 'lower' else '≤'} {row.bound:g}",
            f"{row.slack:.3g}",
            f"{row.multiplier:.3g}",
            f"{row.mu:.2g}",
            row.verdict,
        )
    return table
