"""The lowest and the newest versions that pyproject.toml allows, each in its own environment: `make test-versions`.

    python tests/versions.py lowest newest

``lowest`` pins every dependency of the library and its extras to its lower bound, ``newest`` takes what the index has
now. An environment lies in .venv-versions/, may take several GB (a CUDA build of torch, unless PIP_INDEX_URL points at
PyTorch's CPU wheels), and is removed by `make clean`. The tests are the core subset below.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("triton", "recipes", "transformers", "trl", "lightning")
TOOLS = (
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis>=6.100",
    "numpy>=2",
    "cvxpy",
    "scipy",
    "sybil>=9",
    "tensorboard",
)
#: Beside the lowest Triton, whose interpreter breaks with what newer ones no longer convert.
OLD_TOOLS = ("numpy<2.4",)
#: What depends on other packages' versions: the losses, the registered operations, and the trainers.
TESTS = (
    "tests/test_imports.py",
    "tests/core/test_objective.py",
    "tests/core/test_linear.py",
    "tests/core/test_sampling.py",
    "tests/core/test_balance.py",
    "tests/kernels/test_kernel_gradients.py",
    "tests/kernels/test_registered_ops.py",
    "tests/recipes",
    "tests/integrations",
)


def requirements(which: str) -> list[str]:
    """Of the library and its extras, as they are or at their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    if which == "newest":
        return found
    bounds: dict[str, str] = {}
    for requirement in found:
        name, lowest = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement).groups()
        if bounds.setdefault(name, lowest) != lowest:
            raise SystemExit(f"{name} has two lower bounds in pyproject.toml: {bounds[name]} and {lowest}")
    return [f"{name}=={lowest}" for name, lowest in bounds.items()]


def run(*command: str, **options: object) -> int:
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, **options).returncode


def check(which: str) -> bool:
    """Make the environment, if it is not there, and run the subset; True if it passed."""
    folder = ROOT / ".venv-versions" / which
    python = str(folder / "bin" / "python")
    if not folder.exists():
        venv.create(folder, with_pip=True)
    if run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        *requirements(which),
        *TOOLS,
        *(OLD_TOOLS if which == "lowest" else ()),
    ):
        return False
    names = ("torch", "transformers", "trl")
    run(python, "-c", "; ".join(f"import {name}; print({name!r}, {name}.__version__)" for name in names))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    present = [test for test in TESTS if (ROOT / test).exists()]
    # Warnings of other versions are not ours; the suite's own rule, warnings are errors, is for the pinned set.
    # torch 2.7 and 2.8 cannot trace the kernels' argument checks, so compiling a step whole needs a newer one.
    chosen = "not import_time" + (" and not compile" if which == "lowest" else "")
    command = [
        python,
        "-m",
        "pytest",
        "-k",
        chosen,
        "-q",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        *present,
    ]
    return run(*command, cwd=ROOT, env=env) == 0


if __name__ == "__main__":
    chosen = sys.argv[1:]
    if not chosen or set(chosen) - {"lowest", "newest"}:
        raise SystemExit(__doc__)
    results = {which: check(which) for which in chosen}
    for which, passed in results.items():
        print(f"{which}: {'passed' if passed else 'failed'}")
    sys.exit(not all(results.values()))
