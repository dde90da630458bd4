"""verl's modules, without what only its trainer needs."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


def verl_module(name: str) -> Any:
    """Import `verl.<name>`.

    The package imports ray when it is imported. Its kernels do not use ray, so where that is missing the packages
    above the module are entered without running their `__init__`; the module itself is verl's, unchanged.
    """
    try:
        return importlib.import_module(f"verl.{name}")
    except ImportError:
        found = importlib.util.find_spec("verl")
        if found is None or found.origin is None:
            raise
        for depth in range(name.count(".") + 1):
            parent = ".".join(["verl", *name.split(".")[:depth]])
            if parent not in sys.modules:
                package = types.ModuleType(parent)
                package.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[:depth]))]
                sys.modules[parent] = package
        return importlib.import_module(f"verl.{name}")
