"""What a run was asked for, and how it divides its time."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Settings:
    """Options of one run of one suite.

    Attributes:
        quick: small shapes, to see that everything runs.
        repeats: rounds of timing; None: as many as fit the time budget.
        budget: seconds for the suite; None: no limit, and a few seconds of samples for each case.
        only: keep peers whose name holds one of these, in any case; all others than peers stay. "=NAME" keeps that
            candidate and the naive one alone.
        exclude: candidates that must not run here, with the reason.
        compile: whether candidates that go through torch.compile take part.
        profile: a folder for traces of our own candidates, whose costliest operations are printed too.
        title: what runs, for the names of the traces.
        progress: a file that always names the candidate that runs, for whoever finds this process dead.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False
    repeats: int | None = None
    budget: float | None = None
    only: tuple[str, ...] = ()
    exclude: dict[str, str] = field(default_factory=dict)
    compile: bool = True
    quiet: bool = False
    profile: Path | None = None
    title: str = ""
    progress: Path | None = None
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds of the budget that are left; infinite without one."""
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.started)

    def share(self, cases_left: int) -> float:
        """Seconds of samples for the next of so many cases. Half of the time goes into checks and compilers."""
        return 30.0 if self.budget is None else max(0.0, self.left()) / cases_left / 2

    def wants(self, candidate: Any) -> bool:
        """Whether a candidate takes part."""
        if candidate.compiled and not self.compile:
            return False
        alone = [word[1:] for word in self.only if word.startswith("=")]
        if alone:
            return candidate.role == "naive" or candidate.name in alone
        named = any(word.lower() in candidate.name.lower() for word in self.only)
        return named or not self.only or candidate.role != "peer"

    def now(self, candidate: str) -> None:
        """This candidate runs from here on."""
        if self.progress is not None:
            self.progress.write_text(candidate, encoding="utf-8")

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """TimeoutError if the block takes longer; a compiler or an autotuner may. Main thread of a Unix process only."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s to start")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
