"""Time, memory, launches and waits of one step, on a CPU or a CUDA device."""

import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], Any]

#: Written before each sample, so that none finds its input in the cache. More than the cache of any GPU.
_FLUSH_BYTES = 256 * 2**20
#: Cycles that the device waits before a sample, some 10 ms: launches of short kernels are queued by then. Without it a
#: step of many launches was timed at the speed of the host (on an H100: 4.7 ms where its kernels take 2.2).
_HEAD_START = 20_000_000
_flush: dict[torch.device, torch.Tensor] = {}
_inside: list[None] = []  # one for each `quick_collection` that is open


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what dead objects hold."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def quick_collection() -> Iterator[None]:
    """Inside, `free_memory` looks at new objects only: the many that imports left take half a second each time."""
    import_module("torch._dynamo")  # would be imported by the first operation
    _inside.append(None)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        _inside.pop()
        if not _inside:
            gc.unfreeze()


def milliseconds(step: Step, device: torch.device, inner: int = 1) -> float:
    """Time of one step, averaged over `inner` runs of it in a row.

    On CUDA the two events are recorded behind a cache flush, so the host can run ahead: what counts is the
    device's time, unless the host is slower than the device.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(inner):
            result = step()
        took = time.perf_counter() - start
        del result  # freeing gradients is no part of the step
        return took * 1e3 / inner
    if device not in _flush:
        _flush[device] = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    _flush[device].zero_()
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    for _ in range(inner):
        result = step()
    end.record()
    torch.cuda.synchronize(device)
    del result
    return float(begin.elapsed_time(end)) / inner


def peak_memory(step: Step, device: torch.device) -> dict[str, int | None]:
    """Most bytes alive at a time during the step, beyond those alive before it.

    CUDA: the caching allocator's own peak. CPU: the profiler sees every allocation of torch's CPU allocator with
    its size, those inside operators included; their running sum has a maximum. What a matrix library takes from
    the system on its own is not seen there, so the growth of the process's peak resident size is given as well.
    """
    if device.type == "cuda":
        free_memory(device)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        torch.cuda.synchronize(device)
        del result
        return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before, "resident_bytes": None}
    with _resident_growth() as resident, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = step()
    del result
    live = peak = 0
    for event in sorted((e for e in _events(trace) if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"peak_bytes": peak, "resident_bytes": resident.get("bytes")}


@contextmanager
def _resident_growth() -> Iterator[dict[str, int]]:
    """Fills in "bytes": by how much the block raised the resident size at its peak. Linux alone tells."""
    found: dict[str, int] = {}
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        clear.write_text("5")  # resets the peak
        before = read("VmRSS")
    except (OSError, StopIteration):
        yield found
        return
    yield found
    found["bytes"] = max(0, read("VmHWM") - before)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(step: Step, device: torch.device, runs: int = 10) -> dict[str, float]:
    """CUDA: kernels and memory copies that a step starts, and how long they run. CPU: calls of torch operators."""
    if device.type != "cuda":
        with _Calls() as calls:
            step()
        return {"operators": calls.count}
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(runs):
            step()
        torch.cuda.synchronize(device)
    events = [e for e in _events(trace) if e.device_type() == torch.autograd.DeviceType.CUDA]
    copies = sum(e.name().startswith(("Memcpy", "Memset")) for e in events)
    microseconds = sum(e.duration_ns() for e in events) / 1e3
    return {
        "kernels": (len(events) - copies) / runs,
        "copies": copies / runs,
        "device_us": microseconds / runs,
    }


def _events(trace: profile) -> list[Any]:
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    return list(trace.profiler.kineto_results.events())


def host_microseconds(step: Step, device: torch.device, runs: int = 100) -> float:
    """Wall time per run of many in a row: what the host needs, where it is slower than the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(runs):
        step()
    synchronize(device)
    return (time.perf_counter() - start) * 1e6 / runs


def host_wait(step: Step, device: torch.device) -> str | None:
    """Why a step waits for the device, or None if it does not (on a CPU: always None)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize(device)
    return None


def captured(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph: calling what is returned replays it. Raises where it cannot be captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def copy_gigabytes_per_second(device: torch.device, *, quick: bool = False) -> float:
    """Bytes read plus bytes written per second of a large copy; the median of several."""
    size = 2**24 if quick else (2**30 if device.type == "cuda" else 2**28)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = sorted(milliseconds(lambda: target.copy_(source), device) for _ in range(9))
    return 2 * size / times[4] / 1e6


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, for a table; without folders, which differ from machine to machine."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", lines[0].strip() if lines else "")
    return f"{type(error).__name__}: {text}"[:200]
