"""Where a step's time goes, by operation: a trace, and the costliest ones as a table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .clock import synchronize

#: Lines of the table.
COSTLIEST = 10


def profiled(step: Callable[[], Any], device: torch.device, trace: Path) -> str:
    """Run the step under torch.profiler; writes the trace (for chrome://tracing or perfetto), returns the table."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        step()
        synchronize(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    by = f"self_{device.type}_time_total"
    return found.key_averages().table(sort_by=by, row_limit=COSTLIEST, max_name_column_width=50)
