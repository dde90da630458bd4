"""Everything that needs a GPU, inside ten minutes: `PYTHONPATH=.:kernels python -m benchmarks.gpu`.

The tests marked gpu, compute-sanitizer's memcheck and racecheck on small shapes where it is installed, and all
suites. Results and the steps' output go to the folder $OUT, or to benchmarks/results. A step that fails, or takes
longer than its share, does not keep the others from running; the summary tells.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .environment import RESULTS, ROOT


def steps(folder: Path) -> list[tuple[str, list[str], float]]:
    """(name, command, most seconds); 0 seconds: all that are left. Commands get --budget SECONDS if they end so."""
    python = sys.executable
    found = [
        ("device", ["nvidia-smi"], 10.0),
        ("tests", [python, "-m", "pytest", "-m", "gpu", "tests", "-q", "--continue-on-collection-errors"], 150.0),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        # Without --error-exitcode it would succeed whatever it finds.
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", python, "-m", "benchmarks.small"]
        found.append((tool, command if sanitizer else [], 60.0))
    suites = [python, "-m", "benchmarks.run", "--suite", "all", "--device", "cuda", "--out", str(folder), "--budget"]
    return [*found, ("suites", suites, 0.0)]


def run_step(name: str, command: list[str], seconds: float, folder: Path) -> dict[str, Any]:
    """Run one step with its output in <name>.txt; how it ended."""
    if not command:
        return {"step": name, "result": "not run: compute-sanitizer is not installed"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # Each allocation by itself, so that memcheck sees an access outside of one.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name in ("memcheck", "racecheck") else {}
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **alone}
    started = time.monotonic()
    with (folder / f"{name}.txt").open("w", encoding="utf-8") as log:
        try:
            # A session of its own, so that processes that the step has started can be ended with it.
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                code = process.wait(timeout=seconds)
                result = "ok" if code == 0 else f"ended with code {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                result = f"stopped after {seconds:.0f} s"
        except OSError as error:
            result = f"did not start: {error}"
    lines = (folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    took = round(time.monotonic() - started, 1)
    return {"step": name, "result": result, "seconds": took, "last_line": lines[-1] if lines else ""}


def main(argv: list[str] | None = None) -> int:
    """Run all steps; 1 if one of them failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together (default %(default).0f)")
    arguments = parser.parse_args(argv)
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    summary: list[dict[str, Any]] = []
    for name, command, most in steps(folder):
        left = max(5.0, end - time.monotonic())
        if command and command[-1] == "--budget":
            command = [*command, f"{max(10.0, left - 25):.0f}"]
        summary.append(run_step(name, command, min(most or left, left), folder))
        print(json.dumps(summary[-1]), flush=True)
        (folder / "gpu-summary.txt").write_text("\n".join(map(json.dumps, summary)) + "\n", encoding="utf-8")
    return int(any(not step["result"].startswith(("ok", "not run")) for step in summary))


if __name__ == "__main__":
    sys.exit(main())
