"""What a result was measured on and with."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "verl",
    "quack-kernels",
)


def device_name(device: torch.device) -> str:
    """The device's marketing name; a CPU's comes with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {os.cpu_count()} cores"


def slug(text: str) -> str:
    """Lower-case letters and digits with single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def hardware(device: torch.device) -> dict[str, Any]:
    """Name and size of the device, and the settings that change its speed."""
    found: dict[str, Any] = {"type": device.type, "name": device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    else:
        found["capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def versions() -> dict[str, str | None]:
    """Of Python and of every package that is compared; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    return found


def revision() -> dict[str, Any]:
    """The commit, and whether anything but results differs from it; None for both outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/performance.md")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": os.environ.get("BARRIERLM_REVISION"), "dirty": None}


def implementation(device: torch.device) -> str | None:
    """What impl="auto" of the operations runs here: "reference" or "triton"; None if they do not tell."""
    try:
        from barrierlm_kernels import which_impl
    except ImportError:
        return None
    return str(which_impl("auto", device=device, dtype=torch.bfloat16).impl)
