"""`import barrierlm` is light, and imports inside the packages go one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ("transformers", "triton", "accelerate", "peft", "numpy.testing", "matplotlib", "omegaconf", "rich")

#: What each module of the core may import from the core.
LAYERS = {
    "constraints": {"saved"},
    "distributed": set(),
    "diagnostics": {"saved"},
    "saved": set(),
    "files": set(),
    "barriers": {"saved"},
    "estimators": {"constraints", "saved"},
    "learning": {"barriers", "saved"},
    "intervals": set(),
    "schedules": {"barriers", "saved"},
    "baselines": {"barriers", "saved"},
    "positions": {"estimators", "saved"},
    "sampling": {"estimators", "positions"},
    "packing": {"sampling"},
    "window": {"distributed", "estimators"},
    "checks": {"estimators", "sampling"},
    "committed": {"barriers", "constraints", "diagnostics", "estimators", "positions", "saved", "schedules"},
    "current": {"committed", "estimators", "sampling", "saved"},
    "linear": {"committed", "estimators", "packing", "sampling"},
    "output": {"diagnostics"},
    "probe": {"distributed", "estimators", "output"},
    "certificate": {"barriers", "committed", "diagnostics", "intervals", "learning", "probe"},
    "best": {"diagnostics"},
    "balance": {"distributed", "output"},
    "objective": {
        "barriers",
        "certificate",
        "checks",
        "committed",
        "constraints",
        "current",
        "diagnostics",
        "distributed",
        "estimators",
        "learning",
        "linear",
        "output",
        "packing",
        "probe",
        "sampling",
        "schedules",
        "window",
    },
}


def imports(path):
    """(module, level) of every import in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def test_core_layers():
    files = {p.stem: p for p in (ROOT / "barrierlm").glob("*.py") if p.stem not in ("__init__", "cli")}
    assert files.keys() == LAYERS.keys()
    for name, path in files.items():
        for module, level in imports(path):
            if level:
                assert module in LAYERS[name], f"{name} imports {module}"
            elif (name, module) != ("linear", "barrierlm_kernels"):  # its public names, and nothing below
                assert module.split(".")[0] in {*sys.stdlib_module_names, "torch", "__future__"}, f"{name}: {module}"


def test_kernels_import_torch_alone():
    for path in (ROOT / "kernels" / "barrierlm_kernels").rglob("*.py"):
        for module, level in imports(path):
            top = module.split(".")[0]
            in_triton = path.stem == "triton" or "_triton" in path.parts
            allowed = {*sys.stdlib_module_names, "torch"} | ({"triton"} if in_triton else set())
            assert level or top in allowed, f"{path.name}: {module}"
            if path.stem == "reference":
                assert "triton" not in module


def test_kernels_folder_shadows_nothing():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_loads_nothing_heavy():
    code = f"import sys, barrierlm, barrierlm_kernels; print([m for m in {HEAVY!r} if m in sys.modules])"
    before = f"import sys, torch; print([m for m in {HEAVY!r} if m in sys.modules])"
    loaded, torch_loads = (subprocess.check_output([sys.executable, "-c", c], text=True) for c in (code, before))
    assert loaded == torch_loads


def test_import_time():
    """torch's own import plus at most 0.2 s, best of three."""
    extra = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-c", "import barrierlm"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        times = {m[2]: int(m[1]) for m in re.finditer(r"\|\s+(\d+) \|\s*(\S+)$", log, re.MULTILINE)}
        extra.append((times["barrierlm"] - times["torch"]) / 1e6)
    assert min(extra) < 0.2
