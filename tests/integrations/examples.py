"""Runs the files under examples/, with constraints and without them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
_MARK = re.compile(r"^(\s*)(.*?)  # barrierlm(?:, instead of: (.*)|(, used below too))?$")


def added_lines(name: str) -> list[str]:
    """The lines that constraints add to, or change in, an example."""
    return [line for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines() if _MARK.match(line)]


def unconstrained(name: str) -> str:
    """The example without them."""
    lines = []
    for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines():
        mark = _MARK.match(line)
        if mark is None or mark[4]:
            lines.append(line)
        elif mark[3]:
            lines.append(mark[1] + mark[3])
    text = "\n".join(lines)
    assert not re.search(r"\bobjective\s*[.=,)]|Barrier(Objective|Callback|Trainer)|Constraint\(", text), (
        "an unmarked line"
    )
    return text


def run(file: Path, folder: Path) -> dict[str, float]:
    """Runs an example in its own process; the numbers that it prints as `name = value`."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return {m[1]: float(m[2]) for m in re.finditer(r"^(\w+) = (\S+)$", done.stdout, re.MULTILINE)}


def run_both(name: str, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """With constraints, and without."""
    plain = folder / f"plain_{name}"
    plain.write_text(unconstrained(name), encoding="utf-8")
    return run(EXAMPLES / name, folder / "with"), run(plain, folder / "without")
