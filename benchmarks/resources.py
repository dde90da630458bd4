"""Compile every kernel without a GPU and read what it uses from the binary.

    python -m benchmarks.resources [--targets sm_80 sm_90] [--json FILE] [--markdown]

Registers, shared memory, stack and spills come from cuobjdump, the widths of global loads and stores from the SASS;
for AMD targets from the assembly's metadata. The exit status is 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Modules with a list CONFIGS of all compile-time configurations of their kernels.
MODULES = ("_rows", "_segments")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def configurations() -> list[dict[str, Any]]:
    """Every configuration of every kernel."""
    found = []
    for name in MODULES:
        found += importlib.import_module(f"barrierlm_kernels.{name}.triton").CONFIGS
    return found


def build(config: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    """Compile one configuration for one target; what the binary says about it."""
    names = config["kernel"].arg_names
    signature = {name: config["signature"].get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in config["divisible"]}
    source = ASTSource(fn=config["kernel"], signature=signature, constexprs=config["constexprs"], attrs=aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": config["num_warps"]})
    read = _read_amd if target.backend == "hip" else _read_nvidia
    return {"name": config["name"], "warps": config["num_warps"], **read(compiled)}


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said: {usage.strip()[:200]!r}")
    registers, stack, shared, local = map(int, found.groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {
        "registers": registers,
        "shared": max(shared, compiled.metadata.shared),
        "stack": stack,
        "spills": spills + local,
        "loads": _widths(sass, "LDG"),
        "stores": _widths(sass, "STG"),
    }


def _widths(sass: str, instruction: str) -> dict[str, int]:
    """How many global accesses of each width, in bits, the code holds."""
    counts: dict[str, int] = {}
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        width = next((w for w in re.findall(r"\.(?:U|S)?(128|64|16|8)\b", modifiers)), "32")
        counts[width] = counts.get(width, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -int(item[0])))


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    return {
        "registers": number("vgpr_count"),
        "shared": compiled.metadata.shared,
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": {},
        "stores": {},
    }


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def report(targets: list[str]) -> list[dict[str, Any]]:
    """One row per configuration and target; an error message in place of numbers where it does not build."""
    rows = []
    for config in configurations():
        for name in targets:
            try:
                rows.append({"target": name, **build(config, TARGETS[name])})
            except Exception as error:  # one kernel that does not build must not hide the others
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                rows.append({"target": name, "name": config["name"], "warps": config["num_warps"], "error": message})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of kernels/README.md."""
    lines = [
        "| kernel | target | warps | registers | shared, bytes | spills | loads, bits x count | stores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['target']} | {row['warps']} | {row['error']} |||||")
            continue
        loads, stores = (", ".join(f"{w} x {n}" for w, n in row[k].items()) or "-" for k in ("loads", "stores"))
        numbers = f"{row['warps']} | {row['registers']} | {row['shared']} | {row['spills']}"
        lines.append(f"| {row['name']} | {row['target']} | {numbers} | {loads} | {stores} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_80", "sm_90"])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows = report(options.targets)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))
    return int(any(row.get("error") or row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
