"""Compile every kernel without a GPU and read what it uses from the binary.

    python -m benchmarks.resources [--targets sm_80 sm_90] [--json FILE] [--write]

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
MODULES = ("_rows", "_segments", "_scale", "constraint_weights")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


#: Where the table is kept, and between which lines.
README = Path(__file__).parent.parent / "kernels" / "README.md"
MARKERS = ("<!-- resources -->", "<!-- end of resources -->")


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


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table: a line for each configuration, the targets beside each other."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["target"]] = row
    lines = [
        f"(Triton {triton.__version__}; targets: {', '.join(targets)})",
        "",
        "| kernel, dtype, block | warps | registers | shared bytes | spills | loads by bits | stores by bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in by_name.items():
        builds = [found[target] for target in targets]
        errors = [f"{row['target']}: {row['error']}" for row in builds if "error" in row]
        if errors:
            lines.append(f"| {name} | {builds[0]['warps']} | {'; '.join(errors)} | | | | |")
            continue
        cells = [str(builds[0]["warps"])]
        cells += [", ".join(str(row[key]) for row in builds) for key in ("registers", "shared", "spills")]
        for key in ("loads", "stores"):
            widths = [" + ".join(f"{n} x {bits}" for bits, n in row[key].items()) or "-" for row in builds]
            cells.append(", ".join(dict.fromkeys(widths)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_80", "sm_90"])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    options = parser.parse_args()
    rows = report(options.targets)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.write:
        text = README.read_text(encoding="utf-8")
        before, after = text.split(MARKERS[0])[0], text.split(MARKERS[1])[1]
        README.write_text(f"{before}{MARKERS[0]}\n{table(rows)}\n{MARKERS[1]}{after}", encoding="utf-8")
    print(table(rows))
    return int(any(row.get("error") or row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
