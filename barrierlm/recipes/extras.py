"""The error for a package that is not installed."""

from __future__ import annotations


def missing_extra(what: str, package: str) -> ModuleNotFoundError:
    """An error that says which package is missing and how to get it."""
    return ModuleNotFoundError(
        f"{what} needs the package {package!r}, which is not installed; get it with: pip install 'barrierlm[recipes]'"
    )
