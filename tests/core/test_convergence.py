"""Solved problems, primal and dual, through the public API with an ordinary torch optimizer."""

import math

import numpy as np
import pytest
import torch

from barrierlm import (
    EMA,
    AdaptiveBarrier,
    BarrierObjective,
    BatchMean,
    ConstantSchedule,
    Constraint,
    DualAscent,
    ExponentialSchedule,
    ModifiedBarrier,
    RelaxedLogBarrier,
    Sampled,
)
from barrierlm.diagnostics import FeasibilityWatch
from tests.problems import BARRIER_POINTS, linear, sampled_run

F64 = torch.float64
ids = {"ids": lambda p: p.name}


def solve(problem, steps, lr, *, rule=None, schedule=None, start=None, estimator=None, **kwargs):
    """Gradient descent on the objective; returns the point, the objective and the multipliers by bound."""
    x = (problem.start if start is None else start).clone().requires_grad_()
    objective = BarrierObjective(
        problem.loss, problem.constraints, rule=rule, schedule=schedule, estimator=estimator or BatchMean(), **kwargs
    )
    optimizer = torch.optim.SGD([x], lr=lr)
    for _ in range(steps):
        out = objective(x, measurements=problem.measure(x))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
    objective(x, measurements=problem.measure(x))
    objective.step()
    rows = objective.report()
    return x.detach(), objective, torch.tensor([row.multiplier for row in rows], dtype=F64)


def step_size(problem, mu):
    """A third of what the barrier's curvature lambda^2 |a|^2 / mu allows, delay by one step included."""
    if problem.name == "categorical 6":
        return 0.5
    rows = 5.0 if problem.name == "half space" else 1.0
    return 0.3 / (problem.curvature + rows * problem.multipliers(mu).max().item() ** 2 / mu)


def gap(objective):
    """The duality gap that the certificate states: -sum lambda z."""
    return sum(row.multiplier * row.slack / row.scale for row in objective.report())


@pytest.mark.parametrize("mode", ["committed", "current"])
@pytest.mark.parametrize("problem", BARRIER_POINTS, **ids)
def test_barrier_point_from_an_infeasible_start(problem, mode):
    """The relaxed barrier ends at the log barrier's point, primal and dual; the gap is m mu."""
    mu = 0.1
    x, objective, multipliers = solve(
        problem, 1200, step_size(problem, mu), rule=RelaxedLogBarrier(), schedule=ConstantSchedule(mu), multiplier=mode
    )
    solution = problem.solution(mu)
    if problem.name == "categorical 6":  # logits of tiny probabilities hardly move: compare the distributions
        x_p, solution_p = x.softmax(0), solution.softmax(0)
        torch.testing.assert_close(x_p, solution_p, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(x, solution, rtol=0, atol=1e-6)
    torch.testing.assert_close(multipliers, problem.multipliers(mu), rtol=1e-4, atol=1e-5)
    assert gap(objective) == pytest.approx(len(multipliers) * mu, rel=1e-6)
    # The certificate bounds the primal gap, since these problems are convex in x (or in p).
    assert problem.loss(x).item() - problem.optimum <= gap(objective) + 1e-6


@pytest.mark.parametrize("extension", ["linear", "quadratic", "polynomial", "exponential"])
def test_every_extension_finds_the_same_point(extension):
    """The quadratic relaxation (and so the stiffer ones) is exact for lambda* < mu/s; the linear one too."""
    problem, mu = BARRIER_POINTS[1], 0.3
    x, _, _ = solve(problem, 600, 0.02, rule=RelaxedLogBarrier(extension), schedule=ConstantSchedule(mu))
    torch.testing.assert_close(x, problem.solution(mu), rtol=0, atol=1e-6)


def test_gaps_fall_with_slope_one():
    """log-log slope against mu: the duality gap's within 0.05 of 1, and the primal gap's too at small mu."""
    problem = BARRIER_POINTS[1]
    mus = [1e-2, 3e-3, 1e-3, 3e-4]
    duality, primal, x = [], [], problem.start
    for mu in mus:
        x, objective, _ = solve(
            problem, 800, step_size(problem, mu), rule=RelaxedLogBarrier(), schedule=ConstantSchedule(mu), start=x
        )
        duality.append(gap(objective))
        primal.append(problem.loss(x).item() - problem.optimum)
    for gaps in (duality, primal):
        slope = np.polyfit(np.log(mus), np.log(gaps), 1)[0]
        assert slope == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.1), (torch.optim.Adam, 0.01)])
def test_the_default_does_not_swing(optimizer, lr):
    """The averaged estimate lags ten windows behind; the default's gain is low enough for that."""
    x = torch.tensor([2.0], dtype=F64, requires_grad=True)
    objective = BarrierObjective(torch.sum, [Constraint("x", lower=0.0, scale=1.0)])
    steps, path = optimizer([x], lr=lr), []
    for _ in range(1000):
        out = objective(x, measurements={"x": x.sum()})
        steps.zero_grad()
        out.loss.backward()
        steps.step()
        objective.step()
        path.append(x.item())
    assert max(map(abs, path[750:])) < 5e-3


@pytest.mark.parametrize("problem", BARRIER_POINTS[:3], **ids)
def test_modified_barrier_is_exact_at_a_fixed_mu(problem):
    x, _, multipliers = solve(problem, 2000, 0.02, rule=ModifiedBarrier(0.5, step=0.1))
    assert (x - problem.solution(0.0)).abs().max() <= 1e-5
    torch.testing.assert_close(multipliers, problem.multipliers(0.0), rtol=1e-4, atol=1e-4)


def test_modified_barrier_contracts_linearly():
    problem = linear()
    errors = []
    for steps in (600, 900, 1200):
        _, _, multipliers = solve(problem, steps, 0.02, rule=ModifiedBarrier(0.5, step=0.1))
        errors.append(abs(multipliers.item() - 1))
    assert errors[2] < errors[0] * 1e-3 or errors[2] < 1e-9
    assert errors[1] < errors[0]


@pytest.mark.parametrize("estimator", [EMA, BatchMean], ids=lambda e: e.__name__)
@pytest.mark.parametrize("problem", BARRIER_POINTS[:3], **ids)
def test_the_default_solves_from_an_infeasible_start(problem, estimator):
    """Nothing chosen but constraints: primal and dual to a thousandth, no horizon given."""
    x, objective, multipliers = solve(problem, 1500, 0.01, estimator=estimator())
    assert (x - problem.solution(0.0)).abs().max() <= 1e-3
    torch.testing.assert_close(multipliers, problem.multipliers(0.0), rtol=1e-3, atol=1e-3)
    assert {row.verdict for row in objective.report()} == {"active"}


def test_the_schedule_takes_the_papers_path():
    problem = BARRIER_POINTS[2]
    x, objective, _ = solve(problem, 1500, 2e-3, rule=RelaxedLogBarrier(), schedule=ExponentialSchedule(1.0, 1e-2, 800))
    assert objective.schedule.mu == pytest.approx(1e-2)
    torch.testing.assert_close(x, problem.solution(1e-2), rtol=0, atol=1e-5)


def test_maratos_as_a_narrow_window():
    """5. min 2(x^2 + y^2 - 1) - x on the unit circle: (1, 0), f = -1."""
    theta = torch.tensor([0.3, 0.8], dtype=F64, requires_grad=True)
    objective = BarrierObjective(
        lambda v: 2 * ((v**2).sum() - 1) - v[0],
        [Constraint("circle", lower=0.98, upper=1.02, scale=1.0)],
        rule=ModifiedBarrier(0.5),
        estimator=BatchMean(),
    )
    optimizer = torch.optim.SGD([theta], lr=0.02)
    for _ in range(2000):
        out = objective(theta, measurements={"circle": (theta**2).sum()})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
    # The lower side of the window is the binding one: radius sqrt(0.98).
    torch.testing.assert_close(theta.detach(), torch.tensor([math.sqrt(0.98), 0.0], dtype=F64), rtol=0, atol=1e-4)
    assert out.task_loss.item() == pytest.approx(2 * (0.98 - 1) - math.sqrt(0.98), abs=1e-4)


@pytest.mark.parametrize("start", [0.3, 5.0])
@pytest.mark.parametrize(
    "rule",
    [AdaptiveBarrier, lambda: RelaxedLogBarrier("quadratic"), ModifiedBarrier],
    ids=["adaptive", "relaxed", "modified"],
)
def test_an_infeasible_pair_is_called_infeasible(rule, start):
    """6. x <= -1 and x >= 1: a verdict, finite numbers, and no NaN."""
    x = torch.tensor([start], dtype=F64, requires_grad=True)
    constraints = [Constraint("a", upper=-1.0), Constraint("b", lower=1.0), Constraint("c", upper=100.0)]
    objective = BarrierObjective(None, constraints, rule=rule())
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(700):
        out = objective(measurements=dict.fromkeys("abc", x.sum()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
    verdicts = [row.verdict for row in objective.report()]
    assert verdicts == ["infeasible together with b (lower)", "infeasible together with a (upper)", "met"]
    assert all(math.isfinite(v) for v in out.metrics().values())


def test_a_hard_but_feasible_pair_is_not_called_infeasible():
    x = torch.tensor([4.0], dtype=F64, requires_grad=True)
    constraints = [Constraint("a", upper=-1.0), Constraint("b", lower=-1.2)]
    objective = BarrierObjective(None, constraints)
    optimizer = torch.optim.SGD([x], lr=0.002)
    seen = set()
    for _ in range(12 * FeasibilityWatch.PATIENCE):
        out = objective(measurements=dict.fromkeys("ab", x.sum()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
        seen |= {row.verdict.split()[0] for row in objective.report()}
    assert "infeasible" not in seen
    assert -1.2 <= x.item() <= -1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_holds_under_sampling_noise(seed):
    """Score-function path end to end: on the bound, near the true multiplier 0.69, and without oscillation."""
    costs, gaps, multipliers = sampled_run(1500, seed, rule=AdaptiveBarrier())
    assert abs(costs.mean()) < 0.06
    assert gaps.mean() < 0.05
    assert multipliers.mean().item() == pytest.approx(0.69, abs=0.1)
    assert multipliers.std() < 0.15


@pytest.mark.parametrize("estimator", [EMA, BatchMean])
def test_a_skewed_cost_ends_on_its_bound(estimator):
    """Windows with a large mean have a large spread as well: a step divided by its own window's would be biased."""
    spread, theta = 1.2, torch.tensor(0.5, dtype=F64, requires_grad=True)
    objective = BarrierObjective(None, [Constraint("c", upper=1.0)], estimator=estimator(), confidence=0.0)
    optimizer, generator, means = torch.optim.Adam([theta], lr=0.02), torch.Generator().manual_seed(0), []
    for step in range(1500):
        x = theta.detach() + spread * torch.randn(16, generator=generator, dtype=F64)
        logps = -((x - theta) ** 2) / (2 * spread**2)
        cost = (x - spread**2 / 2).exp()  # log-normal with the mean exp(theta)
        out = objective.combine(-2 * (theta / 2).exp(), {"c": Sampled(cost, logps)})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
        means += [theta.exp().item()] * (step >= 750)
    assert np.mean(means) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("loss_scale", [0.05, 20.0])
def test_the_unit_is_found_whatever_the_loss_is_measured_in(loss_scale):
    """Asked of the default above with a multiplier of 0.69; here it is 0.035 and 14."""
    costs, gaps, multipliers = sampled_run(1000, 0, loss_scale, rule=AdaptiveBarrier(unit="auto"))
    assert abs(costs.mean()) < 0.06
    assert gaps.mean() < 0.05
    assert multipliers.mean().item() == pytest.approx(0.69, abs=0.1)
    assert multipliers.std() < 0.15


@pytest.mark.slow
def test_methods_under_noise_in_order():
    """The plain relaxed barrier keeps its bias and jumps; the default and dual ascent do not."""
    results = {}
    for name, rule in (("default", AdaptiveBarrier), ("relaxed", RelaxedLogBarrier), ("dual", DualAscent)):
        runs = [sampled_run(2000, seed, rule=rule()) for seed in range(4)]
        results[name] = np.mean([gaps.mean() for _, gaps, _ in runs]), np.mean([lam.std() for *_, lam in runs])
    assert results["default"][0] < 0.25 * results["relaxed"][0]
    assert results["default"][1] < results["relaxed"][1]
    assert results["dual"][0] < 0.02


@pytest.mark.parametrize("rule", [ModifiedBarrier, AdaptiveBarrier])
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_a_large_true_multiplier_does_not_run_away_while_it_is_learned(rule, adam):
    """min -10 x, E[x + noise] <= 0: without any curvature x comes to 3.6 to 11 before the multiplier is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    objective = BarrierObjective(None, [Constraint("c", upper=0.0, scale=1.0)], rule=rule())
    optimizer = torch.optim.Adam([x], lr=0.02) if adam else torch.optim.SGD([x], lr=0.01)
    path = []
    for _ in range(600):
        out = objective.combine(-10 * x.sum(), {"c": x + torch.randn(16, generator=generator, dtype=F64)})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
        path.append(x.item())
    assert max(path) < 2
    assert abs(sum(path[-150:]) / 150) < 0.5
