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


def verdicts(pair, noise, seed, steps=2000, lr=0.02, seen=None):
    """Of the default rule with everything else at its default, while the loss pulls back to an infeasible start."""
    start = pair.start / 2
    x = start.clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    estimator = EMA() if noise else BatchMean()
    objective = BarrierObjective(lambda x: ((x - start) ** 2).sum() / 2, pair.constraints, estimator=estimator)
    optimizer = torch.optim.Adam([x], lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 20)
    for _ in range(steps):
        measured = pair.noisy(x, noise, 16, generator) if noise else pair.exact(x)
        out = objective(x, measurements=measured)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        decay.step()
        objective.step()
        if seen is not None:
            seen |= {row.verdict.split()[0] for row in objective.report()}
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


@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["exact", "noisy"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_slow_approach_is_infeasible_at_no_step(case, noise):
    kind, seed, dimension = case
    seen = set()
    verdicts(feasible_pair(kind, seed, dimension), noise, seed, lr=0.004, seen=seen)
    assert "infeasible" not in seen


def steps(watch, z, multiplier, times=1, stderr=0.0):
    """Windows with violations ``z(k)`` under multipliers ``multiplier(k)``; at how many of them bounds were named."""
    named = 0
    for k in range(times):
        watch.update(z(k), [stderr] * len(z(k)), multiplier(k))
        named += bool(watch.together())
    return named


def swings(k):
    return ([0.8, -0.3, -9.0], [-0.3, 0.8, -9.0])[k % 2]


def growing(k):
    return [1.02**k, 1.02**k, 0.01]


def test_the_watch_names_bounds_that_take_turns():
    watch = FeasibilityWatch(3)
    assert steps(watch, swings, growing, watch.PATIENCE - 1) == 0
    assert steps(watch, swings, lambda k: growing(k + watch.PATIENCE - 1)) == 1
    assert watch.together() == [0, 1]
    steps(watch, lambda k: [0.1, -0.05, -9.0], lambda k: growing(watch.PATIENCE))
    assert watch.together() == []  # their average came down
    steps(watch, lambda k: [-0.1, -0.5, -9.0], growing)
    assert watch.stuck == 0


def test_multipliers_that_do_not_grow_take_longer():
    watch = FeasibilityWatch(3)
    assert steps(watch, swings, lambda k: [1.0, 1.0, 0.0], watch.PATIENCE_WITHOUT_GROWTH - 1) == 0
    assert steps(watch, swings, lambda k: [1.0, 1.0, 0.0]) == 1


def test_a_balance_within_one_bounds_tolerance_is_named():
    """z stands at (0, 0.5) once the multipliers have reached their cap, as for a ball and a half-space."""
    watch = FeasibilityWatch(2)
    ring = [0.9**k for k in range(3000)]
    z = lambda k: [-0.3 * ring[k], 0.5 + 0.1 * ring[k]]  # noqa: E731
    steps(watch, z, lambda k: [min(6e3, 1.05**k), min(2e4, 3.3 * 1.05**k)], 3000)
    assert watch.together() == [0, 1]


@pytest.mark.parametrize("speed", [1e-2, 1e-3, 1e-4, 1e-5])
def test_one_that_is_merely_slow_is_not_named(speed):
    """However slow, and though its multiplier grows: alone, next to a bound that it slides along, or both at once."""
    for slide in (-5.0, 0.0, 2.0):
        watch = FeasibilityWatch(2)
        z = lambda k, slide=slide: [4 - speed * k, slide if slide < 1 else slide - speed * k]  # noqa: E731
        assert steps(watch, z, lambda k: [min(1e4, 1.05**k), 1.0], 2000) == 0


def test_the_watch_is_saved():
    watch, other = FeasibilityWatch(3), FeasibilityWatch(3)
    steps(watch, swings, growing, watch.PATIENCE - 1)
    other.load_state_dict(watch.state_dict())
    assert watch.together() == other.together() == []
    for w in (watch, other):
        steps(w, swings, lambda k: growing(k + watch.PATIENCE - 1))
    assert other.together() == watch.together() == [0, 1]
