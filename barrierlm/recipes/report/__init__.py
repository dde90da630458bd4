"""``barrierlm report``: one HTML page about one or several runs, which needs no network and nothing beside it."""

from .page import write_report
from .runs import Run, load_runs

__all__ = ["Run", "load_runs", "write_report"]
