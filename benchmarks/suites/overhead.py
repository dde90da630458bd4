"""`BarrierObjective` itself against penalty terms written by hand: microseconds of a window, a call and a step."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..candidate import NAIVE, Candidate, Case, Outputs
from ..measure import compare
from ..settings import Settings

#: Constraints, and whether costs are per token.
CASES = [(k, per_token) for per_token in (False, True) for k in (1, 2, 8, 32)]
QUICK = [(2, False), (2, True)]
RESPONSES, TOKENS = 16, 20
#: Windows before anything is measured: enough for the default rule to have handed over to learned multipliers.
WARM = 60


class OverheadProblem:
    """K upper bounds, whose costs share log-probabilities; a window is one call, its backward pass and a step."""

    dtype = torch.float32

    def __init__(self, constraints: int, device: torch.device, *, per_token: bool):
        from barrierlm import Sampled

        self.device, self.per_token, self.constraints = device, per_token, constraints
        random = torch.Generator(device).manual_seed(0)
        size = RESPONSES * (TOKENS if per_token else 1)
        share = 1 / TOKENS if per_token else 1.0
        self.costs = 0.95 * share * torch.rand(constraints, size, generator=random, device=device)
        self.logps = -torch.rand(size, generator=random, device=device).requires_grad_()
        self.cu_seqlens = TOKENS * torch.arange(RESPONSES + 1, device=device)
        self.place = torch.arange(size, device=device) % TOKENS
        self.response = torch.arange(size, device=device) // TOKENS
        self.task = torch.zeros((), device=device, requires_grad=True)
        tokens = partial(Sampled.per_token, logps=self.logps, cu_seqlens=self.cu_seqlens)
        self.measurements = {
            f"c{k}": tokens(c) if per_token else Sampled(c, self.logps) for k, c in enumerate(self.costs)
        }
        objective = self.objective()
        # What is handed to all candidates: weights and baselines of one and the same committed state.
        view = objective._committed.view(device)
        self.state, self.weights = objective.state_dict(), view.weights.tolist()
        self.centers, self.baselines = view.center.tolist(), view.baselines[:, :TOKENS].clone()

    def objective(self) -> Any:
        """One with the default rule, schedule and estimator that has seen `WARM` windows."""
        from barrierlm import BarrierObjective, Constraint

        made = BarrierObjective(None, [Constraint(f"c{k}", upper=0.5) for k in range(self.constraints)])
        for _ in range(WARM):
            made.combine(self.task, self.measurements)
            made.step()
        return made

    def step(self, forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A whole window: the backward pass is part of what a candidate runs."""
        return forward

    def reset(self, restore: bool) -> None:
        """Nothing is written into."""

    def kept_bytes(self) -> dict[str, int]:
        """Not measured."""
        return {}

    def gradient(self, loss: Tensor) -> Outputs:
        """The backward pass down to the log-probabilities."""
        (found,) = torch.autograd.grad(loss, self.logps)
        return {"gradient": found}

    def oracle(self) -> Outputs:
        """Sum of w_k (reward-to-go - baseline) / B in fp64."""
        to_go = self.costs.double()
        centers = torch.tensor(self.centers, dtype=torch.float64, device=self.device)[:, None]
        if self.per_token:
            to_go = to_go.view(self.constraints, RESPONSES, TOKENS).flip(2).cumsum(2).flip(2).flatten(1)
            centers = self.baselines[:, self.place]
        weights = torch.tensor(self.weights, dtype=torch.float64, device=self.device)[:, None]
        return {"gradient": (weights * (to_go - centers)).sum(0) / RESPONSES}


def by_hand(p: OverheadProblem) -> Callable[[], Outputs]:
    """What a user would write with fixed weights: mean((c - b) log p) * weight for each constraint, no more."""

    def forward() -> Outputs:
        loss = p.task
        for k, weight in enumerate(p.weights):
            costs = p.costs[k]
            if p.per_token:
                ends = costs.cumsum(0)
                to_go = ends[p.cu_seqlens[1:] - 1][p.response] - ends + costs
                loss = loss + weight * ((to_go - p.baselines[k, p.place]) * p.logps).sum() / RESPONSES
            else:
                loss = loss + weight * ((costs - p.centers[k]) * p.logps).mean()
        return p.gradient(loss)

    return forward


def barrier_objective(p: OverheadProblem) -> Callable[[], Outputs]:
    """Call, backward pass and step: estimates, multipliers and report as well."""
    objective = p.objective()
    objective.load_state_dict(p.state)

    def forward() -> Outputs:
        out = p.gradient(objective.combine(p.task, p.measurements).loss)
        objective.step()
        return out

    return forward


class _Reads(TorchDispatchMode):
    """Counts reads of a tensor's number by the host: .item(), float(), bool()."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def parts(p: OverheadProblem, *, windows: int) -> dict[str, float]:
    """Medians of call and step, reads of tensors in each, and the Python objects that a window leaves behind."""
    objective = p.objective()
    calls, steps = [], []
    for _ in range(windows):
        begin = time.perf_counter()
        out = objective.combine(p.task, p.measurements)
        middle = time.perf_counter()
        p.gradient(out.loss)
        before = time.perf_counter()
        objective.step()
        steps.append(time.perf_counter() - before)
        calls.append(middle - begin)
    with _Reads() as in_call:
        objective.combine(p.task, p.measurements)
    with _Reads() as in_step:
        objective.step()
    blocks = []
    for _ in range(2):
        for _ in range(windows):
            objective.combine(p.task, p.measurements)
            objective.step()
        gc.collect()
        # Not tracemalloc: what it has not seen made and sees replaced would count as new.
        blocks.append(sys.getallocatedblocks())
    return {
        "call_us": statistics.median(calls) * 1e6,
        "step_us": statistics.median(steps) * 1e6,
        "reads_in_call": in_call.count,
        "reads_in_step": in_step.count,
        "kept_objects_per_window": (blocks[1] - blocks[0]) / windows,
    }


def measure(constraints: int, per_token: bool, settings: Settings, left: int) -> list[dict[str, Any]]:
    """Rows of one problem."""
    problem = OverheadProblem(constraints, settings.device, per_token=per_token)
    which = [
        Candidate(NAIVE, by_hand, role="naive", gives=""),
        Candidate("BarrierObjective", barrier_objective, role="ours", gives=""),
    ]

    def inspect(candidate: Candidate, step: Callable[[], Any]) -> dict[str, Any]:
        return parts(problem, windows=5 if settings.quick else 1000) if candidate.role == "ours" else {}

    inner = 1 if settings.quick else 20
    seconds = min(5.0, settings.share(left))
    return compare(which, problem, settings, seconds=seconds, inner=inner, memory=False, inspect=inspect)


def cases(settings: Settings) -> Iterator[Case]:
    """Few and many constraints, per response and per token."""
    every = QUICK if settings.quick else CASES
    for index, (constraints, per_token) in enumerate(every):
        fields = {"K": constraints, "B": RESPONSES, "costs": "per token" if per_token else "per response"}
        yield Case(fields, partial(measure, constraints, per_token, settings, len(every) - index))


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each case."""
    from ..tables import overhead_table

    return overhead_table(rows)


def plot(rows: list[dict[str, Any]], figure: Any) -> None:
    """Microseconds of a window, as bars."""
    from ..plots import bars

    bars(rows, figure, shape=("K", "B", "costs"), divisor=NAIVE, unit="us")
