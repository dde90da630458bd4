"""Benchmarks: `python -m benchmarks.run` measures, `python -m benchmarks.report` writes docs/performance.md."""

import os

# The profiler reports memory and launches here; its own log is noise. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
