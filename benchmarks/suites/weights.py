"""`constraint_weights` against the torch calls that a user would write: microseconds and launches."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..candidate import NAIVE, Candidate, Case, Outputs
from ..clock import captured, first_line, host_microseconds, launches
from ..costs import WeightsProblem
from ..measure import compare
from ..peers.weights import PEERS, Forward, naive_forward
from ..settings import Settings

#: Constraints, responses, and whether costs are per token.
CASES = [(8, 64, False), (1, 64, False), (32, 512, False), (8, 64, True)]
QUICK = [(3, 8, False), (2, 4, True)]


def constraint_weights(**options: Any) -> Callable[[WeightsProblem], Forward]:
    """The fused operation."""

    def build(p: WeightsProblem) -> Forward:
        from barrierlm_kernels import constraint_weights as operation

        bounds: dict[str, Any] = {"lower": p.lower, "upper": p.upper, "scale": p.scale, "mu": p.mu}
        credit: dict[str, Any] = {"groups": p.groups}
        if p.per_token:
            credit = {"cu_seqlens": p.cu_seqlens, "baselines": p.baselines}

        def forward() -> Outputs:
            out = operation(p.costs, p.center, **bounds, **credit, **options)
            return {"weights": out.weights, "statistics": out.statistics, "coefficients": out.coefficients}

        return forward

    return build


def as_graph(build: Callable[[WeightsProblem], Forward]) -> Callable[[WeightsProblem], Forward]:
    """The same, captured once as a CUDA graph and replayed."""
    return lambda p: captured(torch.no_grad()(build(p)), p.device)


def candidates(device: torch.device) -> list[Candidate]:
    """On a GPU also as CUDA graphs, and with the torch reference."""
    own: dict[str, Any] = {"role": "ours", "gives": ""}
    found = [
        Candidate(NAIVE, naive_forward, role="naive", gives=""),
        Candidate("constraint_weights", constraint_weights(), **own),
        *PEERS,
    ]
    if device.type == "cuda":
        found += [
            Candidate("constraint_weights, CUDA graph", as_graph(constraint_weights()), **own),
            Candidate("constraint_weights, reference", constraint_weights(impl="reference"), **own),
            Candidate("naive PyTorch, CUDA graph", as_graph(naive_forward), gives="", package="torch"),
        ]
    return found


def measure(size: tuple[int, int, bool], settings: Settings, left: int, which: list[Candidate]) -> list[dict[str, Any]]:
    """Rows of one problem, with launches and the host's time per call."""
    constraints, responses, per_token = size
    problem = WeightsProblem(constraints, responses, settings.device, per_token=per_token)

    def inspect(candidate: Candidate, step: Callable[[], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"host_us": host_microseconds(step, problem.device, 10 if settings.quick else 200)}
        if candidate.compiled and problem.device.type == "cpu":
            return found  # compiled code calls few operators or none: nothing to compare
        try:
            found["launches"] = launches(step, problem.device)
        except Exception as error:  # a profiler that does not work here is not the candidate's fault
            found["launches"] = {"error": first_line(error)}
        return found

    # On a CPU a call takes microseconds, so a sample is many; on a GPU events time each call behind a cache flush.
    inner = 1 if problem.device.type == "cuda" or settings.quick else 50
    seconds = min(5.0, settings.share(left))
    return compare(which, problem, settings, seconds=seconds, inner=inner, memory=False, inspect=inspect)


def cases(settings: Settings) -> Iterator[Case]:
    """Few and many constraints, per response and per token."""
    every = QUICK if settings.quick else CASES
    for index, (constraints, responses, per_token) in enumerate(every):
        fields = {"K": constraints, "B": responses, "costs": "per token" if per_token else "per response"}
        which, left = candidates(settings.device), len(every) - index
        yield Case(fields, partial(measure, (constraints, responses, per_token), settings, left, which))


def table(rows: list[dict[str, Any]]) -> str:
    """One table for each case."""
    from ..tables import weights_tables

    return weights_tables(rows)


def plot(rows: list[dict[str, Any]], figure: Any) -> None:
    """Microseconds, as bars."""
    from ..plots import bars

    bars(rows, figure, shape=("K", "B", "costs"), divisor=NAIVE, unit="us")
