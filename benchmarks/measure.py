"""Check, then time: the same procedure for every suite.

A candidate is timed only if its result is right. Times are taken in rounds, one sample of each candidate per round,
so that a busy machine disturbs all of them alike; a ratio is the median of the ratios within rounds.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .candidate import Candidate, Outputs, Problem
from .clock import first_line, free_memory, host_wait, milliseconds, peak_memory, synchronize
from .environment import slug
from .profiling import profiled
from .settings import Settings, time_limit

#: A result may be this much further from the fp64 one than plain PyTorch's in the same dtype.
ERROR_FACTOR = 8
#: As many rounds as fit the time, within these limits. What takes many times as long as naive PyTorch is slow without
#: doubt: its warm-up is its only sample, so that it does not take the time of all others.
MIN_ROUNDS, MAX_ROUNDS = 3, 50
SLOW = 4.0

_CHUNK = 2**24
_ORDER = {"naive": 0, "floor": 1, "ours": 2, "peer": 3}


class Refused(Exception):
    """A candidate's result is wrong."""


class DeviceLost(Exception):
    """A candidate left the device unusable for this process."""


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """||result - oracle|| / ||oracle|| (Frobenius), in fp64, without large copies."""
    if result.shape != oracle.shape:
        raise ValueError(f"returned shape {tuple(result.shape)}; right is {tuple(oracle.shape)}")
    difference = size = 0.0
    flat, right = result.detach().reshape(-1), oracle.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = right[start : start + _CHUNK].double()
        size += float(part.square().sum())
        difference += float((flat[start : start + _CHUNK].double() - part).square_().sum())
    return math.sqrt(difference) / (math.sqrt(size) or 1.0)


def errors_of(outputs: Outputs, oracle: Outputs) -> dict[str, float]:
    """Relative error of each output; at least one must be there, and none that the oracle lacks."""
    if not outputs or not outputs.keys() <= oracle.keys():
        raise ValueError(f"returned {sorted(outputs)}; right is at least one of {sorted(oracle)}")
    return {name: relative_error(value, oracle[name]) for name, value in outputs.items()}


def refuse_if_wrong(errors: dict[str, float], naive: dict[str, float], dtype: torch.dtype) -> None:
    """Raise `Refused` for an error beyond the naive one's. Rounding a result to its dtype is always allowed."""
    for name, error in errors.items():
        limit = max(ERROR_FACTOR * naive.get(name, 0.0), 2 * torch.finfo(dtype).eps)
        if not error <= limit:  # NaN too
            raise Refused(f"wrong result: relative error of {name} {error:.1e}, allowed {limit:.1e}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and count."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "runs": len(values)}


def compare(
    candidates: Sequence[Candidate],
    problem: Problem,
    settings: Settings,
    *,
    seconds: float = 30.0,
    inner: int = 1,
    memory: bool = True,
    inspect: Callable[[Candidate, Callable[[], Any]], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row for each candidate: its errors, time, ratios and memory, or why it has none.

    Args:
        candidates: the naive one among them; its errors bound those of the others.
        problem: what they all compute.
        settings: whom to leave out, how often to repeat.
        seconds: how long to take samples for.
        inner: runs in a row that make one sample, for what takes microseconds.
        memory: whether to measure it.
        inspect: more fields of a row, from a candidate's step.
    """
    rows: list[dict[str, Any]] = []
    ready: dict[str, tuple[Candidate, Callable[[], Any]]] = {}
    oracle = problem.oracle() if settings.left() > 0 else {}
    naive: dict[str, float] = {}
    wanted = [c for c in candidates if settings.wants(c)]
    # Naive first, because it sets the limit; what is compiled last, because it may use up the time.
    for candidate in sorted(wanted, key=lambda c: (_ORDER[c.role], c.compiled)):
        settings.say(f"    {candidate.name}")
        settings.now(candidate.name)
        row: dict[str, Any] = candidate.describe() | {"status": "ok", "error": None}
        rows.append(row)
        try:
            if candidate.name in settings.exclude:
                raise RuntimeError(settings.exclude[candidate.name])
            if settings.left() <= 0:
                raise TimeoutError("no time was left in the budget")
            with time_limit(None if settings.budget is None else max(10.0, settings.left() / 4)):
                forward = candidate.build(problem)
                step = forward if candidate.role == "floor" else problem.step(forward)
                problem.reset(candidate.writes_input)
                if candidate.role == "floor":
                    step()
                else:
                    row["relative_error"] = errors_of(step(), oracle)
                    naive = row["relative_error"] if candidate.role == "naive" else naive
                    refuse_if_wrong(row["relative_error"], naive, problem.dtype)
                _measure_once(row, candidate, problem, step, memory, inspect)
            ready[candidate.name] = (candidate, step)
            if settings.profile is not None and candidate.role == "ours":
                problem.reset(candidate.writes_input)
                trace = settings.profile / f"{slug(f'{settings.title} {candidate.name}')}.json.gz"
                settings.say(f"{profiled(step, problem.device, trace)}    {trace}")
        except Refused as error:
            row.update(status="refused", error=str(error))
        except Exception as error:  # whatever it is, it is this candidate's, and belongs in the table
            row.update(status="failed", error=first_line(error))
            _check_device(problem.device, candidate, error)
        problem.reset(candidate.writes_input)
        free_memory(problem.device)
    _time(rows, ready, problem, settings, seconds, inner)
    return rows


def _measure_once(
    row: dict[str, Any],
    candidate: Candidate,
    problem: Problem,
    step: Callable[[], Any],
    memory: bool,
    inspect: Callable[[Candidate, Callable[[], Any]], dict[str, Any]] | None,
) -> None:
    """Memory, waits for the device, and what the suite looks at."""
    if memory:
        problem.reset(candidate.writes_input)
        found: dict[str, Any] = dict(peak_memory(step, problem.device))
        for name, kept in problem.kept_bytes().items():
            found[f"beyond_{name}_bytes"] = max(0, found["peak_bytes"] - kept)
        row["memory"] = found
    if problem.device.type == "cuda":
        problem.reset(candidate.writes_input)
        row["host_wait"] = host_wait(step, problem.device)
    if inspect is not None:
        problem.reset(candidate.writes_input)
        row.update(inspect(candidate, step))


def _time(
    rows: list[dict[str, Any]],
    ready: dict[str, tuple[Candidate, Callable[[], Any]]],
    problem: Problem,
    settings: Settings,
    seconds: float,
    inner: int,
) -> None:
    """Fill in "time_ms" and "ratio" of the rows that are ready."""
    samples: dict[str, list[float]] = {name: [] for name in ready}

    def one_round(names: Sequence[str]) -> None:
        for name in names:
            candidate, step = ready[name]
            settings.now(name)
            problem.reset(candidate.writes_input)
            try:
                samples[name].append(milliseconds(step, problem.device, inner))
            except Exception as error:
                ready.pop(name)
                next(r for r in rows if r["candidate"] == name).update(status="failed", error=first_line(error))
                _check_device(problem.device, candidate, error)

    one_round(list(ready))  # warm-up
    naive = min((samples[n][0] for n, (c, _) in ready.items() if c.role == "naive"), default=math.inf)
    slow = {name for name in ready if samples[name][0] > SLOW * naive}
    length = sum(samples[name][0] for name in ready if name not in slow) * inner / 1e3
    rounds = settings.repeats or int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / max(length, 1e-9))))
    settings.say(f"    {rounds} rounds of {length:.2f} s")
    for name, values in samples.items():
        if name not in slow:
            values.clear()
    for done in range(rounds):
        if done >= MIN_ROUNDS and settings.left() <= 0:
            break
        one_round([name for name in ready if name not in slow])
    problem.reset(any(c.writes_input for c, _ in ready.values()))
    divisors = [name for name, (c, _) in ready.items() if c.role in ("naive", "floor")]
    for row in rows:
        if row["status"] == "ok":
            mine = samples[row["candidate"]]
            row["time_ms"] = spread(mine)
            row["ratio"] = {n: spread([a / b for a, b in zip(mine, samples[n], strict=False)]) for n in divisors}


def _check_device(device: torch.device, candidate: Candidate, error: Exception) -> None:
    """After an error: an illegal access ends everything in this process, an ordinary exception nothing."""
    try:
        synchronize(device)
    except RuntimeError:
        raise DeviceLost(f"{candidate.name}={first_line(error)}") from error
