"""A process of its own for each suite: one that dies or hangs is started again without the candidate that did it."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .environment import ROOT

#: Candidates that may be left out before a suite is given up.
RETRIES = 3
#: A process may take this much longer than its budget: it looks at the clock between candidates only.
GRACE_SECONDS = 20.0
#: Exit code of a process that found its device unusable.
DEVICE_LOST = 3


def without(argv: list[str], options: tuple[str, ...]) -> list[str]:
    """The command line less some options and their values."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{name}=" for name in options)):
            kept.append(word)
    return kept


def run_isolated(name: str, argv: list[str], budget: float | None) -> bool:
    """Run one suite with the same options; whether it came to its end."""
    common = [
        sys.executable,
        "-m",
        "benchmarks.run",
        *without(argv, ("--suite", "--budget")),
        "--suite",
        name,
        "--here",
    ]
    excluded: list[str] = []
    started = time.monotonic()
    for _ in range(1 + RETRIES):
        left = None if budget is None else budget - (time.monotonic() - started)
        if left is not None and left < 0:
            return False
        limit = [] if left is None else ["--budget", f"{left:.0f}"]
        with tempfile.TemporaryDirectory() as folder:
            progress = Path(folder) / "progress"
            exclude = [word for text in excluded for word in ("--exclude", text)]
            try:
                code: int | None = subprocess.run(
                    [*common, *limit, *exclude, "--progress", str(progress)],
                    cwd=ROOT,
                    check=False,
                    timeout=None if left is None else left + GRACE_SECONDS,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
            culprit = progress.read_text(encoding="utf-8") if progress.exists() else ""
        if code == 0:
            return True
        if not culprit:
            return False
        why = {None: "did not come to an end", DEVICE_LOST: ""}.get(code, f"ended its process with code {code}")
        excluded.append(culprit if "=" in culprit else f"{culprit}={why}")
        print(f"  {name}: again without {excluded[-1]}", file=sys.stderr, flush=True)
    return False
