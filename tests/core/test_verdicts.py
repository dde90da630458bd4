"""Verdicts: feasible and infeasible pairs, exact and with noise, and the watch behind them."""

import pytest
import torch

from barrierlm import EMA, BarrierObjective, BatchMean
from barrierlm.diagnostics import FeasibilityWatch
from tests.problems import PAIRS, feasible_pair, infeasible_pair

F64 = torch.float64
#: All of the 20 are run by `make test-slow`.
CASES = [
    pytest.param((PAIRS[seed % 3], seed, 2 + seed % 4), marks=[pytest.mark.slow] if seed >= 1 else [])
    for seed in range(20)
]


def verdicts(pair, noise, seed, steps=2000):
    """Of the default rule with everything else at its default, while the loss pulls back to an infeasible start."""
    start = pair.start / 2
    x = start.clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    estimator = EMA() if noise else BatchMean()
    objective = BarrierObjective(lambda x: ((x - start) ** 2).sum() / 2, pair.constraints, estimator=estimator)
    optimizer = torch.optim.Adam([x], lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-3)
    for _ in range(steps):
        measured = pair.noisy(x, noise, 16, generator) if noise else pair.exact(x)
        out = objective(x, measurements=measured)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        decay.step()
        objective.step()
    return [row.verdict for row in objective.report()]


@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["exact", "noisy"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_infeasible_pairs_are_named(case, noise):
    kind, seed, dimension = case
    found = verdicts(infeasible_pair(kind, seed, dimension), noise, seed)
    assert all(v.startswith("infeasible together with") for v in found), found


@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["exact", "noisy"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_feasible_pairs_are_not(case, noise):
    kind, seed, dimension = case
    found = verdicts(feasible_pair(kind, seed, dimension), noise, seed)
    assert set(found) <= {"met", "active"}, found


def test_the_watch_needs_two_bounds_and_time():
    watch, tolerance = FeasibilityWatch(3), torch.full((3,), 0.01, dtype=F64)
    swings = [torch.tensor(z, dtype=F64) for z in ([0.8, -0.5, -9.0], [-0.4, 0.9, -9.0])]
    for k in range(watch.PATIENCE):
        assert watch.together() == []
        watch.update(swings[k % 2], tolerance)
    assert watch.together() == [0, 1]  # they take turns
    watch.update(torch.tensor([0.5, -0.5, -9.0], dtype=F64), tolerance)
    assert watch.together() == []  # the largest violation came down
    for _ in range(2 * watch.PATIENCE):
        watch.update(torch.tensor([0.5, -0.5, -9.0], dtype=F64), tolerance)
    assert watch.together() == []  # one bound alone: not a conflict
    watch.update(torch.tensor([-0.1, -0.5, -9.0], dtype=F64), tolerance)
    assert watch.stuck == 0


def test_the_watch_is_saved():
    watch, other = FeasibilityWatch(2), FeasibilityWatch(2)
    for _ in range(60):
        watch.update(torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64))
    other.load_state_dict(watch.state_dict())
    assert other.together() == watch.together() == [0, 1]
