"""Every row of the table of solved problems, primal and dual, through the public API with an exact inner solver."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch

from barrierlm import (
    AugmentedLagrangian,
    BarrierObjective,
    BatchMean,
    ConstantSchedule,
    DualAscent,
    ModifiedBarrier,
    RelaxedLogBarrier,
)
from tests.problems import PAIRS, PROBLEMS, feasible_pair, infeasible_pair, violations

F64 = torch.float64
CONVEX = [problem for problem in PROBLEMS if problem.convex]
ids = {"ids": lambda p: p.name}


def derivatives(f, x):
    """f(x), its gradient [n] and its Hessian [n, n]."""
    point = x.clone().requires_grad_()
    value = f(point)
    (gradient,) = torch.autograd.grad(value, point, create_graph=True)
    hessian = torch.zeros(x.numel(), *x.shape, dtype=F64)
    if gradient.requires_grad:  # else f is linear
        rows = torch.eye(x.numel(), dtype=F64).reshape(-1, *x.shape)
        (hessian,) = torch.autograd.grad(gradient, point, rows, is_grads_batched=True)
    return value.item(), gradient.detach().reshape(-1), hessian.reshape(x.numel(), x.numel())


def minimise(f, x, *, tolerance=1e-6, steps=200):
    """Newton's method: positive eigenvalues, steps no longer than |x| + 1, backtracking; ends after a tiny step."""
    for _ in range(steps):
        value, gradient, hessian = derivatives(f, x)
        assert hessian.isfinite().all(), f"the inner problem has no solution; gone to {x}"
        curvature, basis = torch.linalg.eigh(hessian)
        floor = 1e-9 * max(1.0, curvature.abs().max().item())
        step = -(basis @ ((basis.T @ gradient) / curvature.abs().clamp(min=floor))).reshape(x.shape)
        if step.norm() <= tolerance * (1 + x.norm()):
            return x + step  # what is left is the square of this
        step *= min(1.0, ((1 + x.norm()) / step.norm()).item())
        slope, size = (gradient @ step.reshape(-1)).item(), 1.0
        with torch.no_grad():
            while f(x + size * step).item() > value + 1e-4 * size * slope + 1e-13 * (1 + abs(value)):
                size /= 2
                if size < 1e-12:
                    return x
        x = x + size * step
    return x


def solve_exactly(problem, rule, *, start=None, schedule=None, rounds=300):
    """Minimise L + B(z) at frozen multipliers, let the rule learn, and again until nothing moves.

    Returns the point, the multipliers by bound, the objective and the number of rounds.
    """
    objective = BarrierObjective(
        problem.loss,
        problem.constraints,
        rule=rule,
        schedule=schedule,
        estimator=BatchMean(),
        multiplier="current",
    )

    def penalised(x):
        out = objective(x, measurements=problem.measure(x))
        objective.discard_window()  # a window is one call, and the rule learns only from solved problems
        return out.loss

    x = problem.start if start is None else start
    before = torch.full((x.numel() + problem.violations(x).numel(),), math.inf)
    for done in range(1, rounds + 1):  # noqa: B007
        x = minimise(penalised, x)
        point = x.clone().requires_grad_()
        objective(point, measurements=problem.measure(point))
        objective.step()
        multipliers = torch.tensor([row.multiplier for row in objective.report()], dtype=F64)
        now = torch.cat([x.reshape(-1), multipliers])
        if ((now - before).abs() <= 2e-7).all():
            break
        before = now
    return x, multipliers, objective, done


def off(problem, x, multipliers):
    """Largest errors of the point and of the multipliers."""
    errors = (x - problem.solution()).abs().max(), (multipliers - problem.multipliers()).abs().max()
    return tuple(error.item() for error in errors)


# ---- the table is right -----------------------------------------------------------------------------------------


def test_the_table_is_large_enough():
    assert len(PROBLEMS) >= 25
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS)


@pytest.mark.parametrize("problem", PROBLEMS, **ids)
def test_rows_satisfy_the_kkt_conditions(problem):
    """Stationarity, feasibility, complementarity; multipliers that are unique; a minimum, not a saddle."""
    x, multipliers = problem.solution(), problem.multipliers()
    z = problem.violations(x)

    def lagrangian(x):
        return problem.loss(x) + multipliers @ problem.violations(x)

    assert torch.func.grad(lagrangian)(x).abs().max() <= 1e-8
    assert z.max() <= 1e-8
    assert multipliers.min() >= 0
    assert (multipliers * z).abs().max() <= 1e-8
    assert (torch.maximum(multipliers, -z) > 0.01).all()  # nothing is a tie
    rows = torch.func.jacrev(problem.violations)(x).reshape(len(z), -1)[multipliers > 0]
    assert torch.linalg.matrix_rank(rows) == len(rows)
    hessian = torch.func.jacrev(torch.func.grad(lagrangian))(x).reshape(x.numel(), -1)
    along = torch.linalg.svd(rows).Vh[len(rows) :]  # the directions in which the active bounds do not move
    if len(along):
        assert torch.linalg.eigvalsh(along @ hessian @ along.T).min() >= -1e-9
    assert problem.violations(problem.start).max() > 0.01
    assert problem.violations(problem.inside).max() < -0.01


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.cvxpy], **ids)
def test_cvxpy_finds_the_same(problem):
    x, multipliers = problem.cvxpy()
    assert max(off(problem, x, multipliers)) <= 1e-5


# ---- the rules find it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", CONVEX, **ids)
def test_modified_barrier(problem):
    """Exact at a fixed mu, one setting for all, no m mu bias."""
    x, multipliers, objective, _ = solve_exactly(problem, ModifiedBarrier(mu=0.5, step=1.0))
    primal, dual = off(problem, x, multipliers)
    assert primal <= 1e-5
    assert dual <= 1e-4
    assert problem.loss(x).item() - problem.optimum <= objective.certificate().gap_bound + 1e-9


@pytest.mark.parametrize(
    ("problem", "start"),
    [(p, "start") for p in PROBLEMS] + [(p, "inside") for p in PROBLEMS if not p.convex],
    ids=lambda value: getattr(value, "name", value),
)
def test_augmented_lagrangian(problem, start):
    """The same accuracy for every row, the non-convex ones (as local minima) included."""
    if problem.name == "HS33":
        pytest.skip("its cubic loss has no lower bound outside, whatever a quadratic penalty adds")
    x, multipliers, _, _ = solve_exactly(problem, AugmentedLagrangian(10.0, step=1.0), start=getattr(problem, start))
    primal, dual = off(problem, x, multipliers)
    assert primal <= 1e-5
    assert dual <= 1e-4


#: Strongly convex losses whose dual is not too badly conditioned for a plain gradient method.
DUAL = ("projection", "half space", "HS12", "HS22", "HS35", "HS65", "QP 3")


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name in DUAL], **ids)
def test_dual_ascent(problem):
    """With the step that the dual's curvature A H^-1 A^T allows, all bounds taken as active."""
    x, multipliers = problem.solution(), problem.multipliers()
    rows = torch.func.jacrev(problem.violations)(x)
    hessian = torch.func.jacrev(torch.func.grad(lambda x: problem.loss(x) + multipliers @ problem.violations(x)))(x)
    curvature = torch.linalg.eigvalsh(rows @ torch.linalg.solve(hessian, rows.T)).max().item()
    x, multipliers, _, _ = solve_exactly(problem, DualAscent(1 / curvature))
    primal, dual = off(problem, x, multipliers)
    assert primal <= 1e-5
    assert dual <= 1e-4


@pytest.mark.parametrize("start", ["start", "inside"])
@pytest.mark.parametrize("problem", CONVEX, **ids)
def test_relaxed_barrier(problem, start):
    """At a small mu the certificate -sum lambda z is m mu, it bounds the task's gap, and both shrink with mu."""
    x, mus, certificates = getattr(problem, start), (1e-2, 3e-3, 1e-3), []
    for mu in mus:
        x, multipliers, objective, _ = solve_exactly(
            problem, RelaxedLogBarrier(), start=x, schedule=ConstantSchedule(mu), rounds=1
        )
        m = len(multipliers)
        certificate = objective.certificate()
        certificates.append(certificate.complementarity.value)
        assert certificates[-1] == pytest.approx(m * mu, rel=0.02)
        assert problem.violations(x).max() < 0
        assert -1e-9 <= problem.loss(x).item() - problem.optimum <= certificate.gap_bound * (1 + 1e-6)
    assert np.polyfit(np.log(mus), np.log(certificates), 1)[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("problem", CONVEX, **ids)
def test_an_inner_solution_does_not_depend_on_the_start(problem):
    """So the modified barrier, which learns from solved inner problems alone, ends at the same from anywhere."""
    ends = []
    for start in (problem.start, problem.inside):
        x, multipliers, _, _ = solve_exactly(problem, ModifiedBarrier(mu=0.5), start=start, rounds=1)
        ends.append(torch.cat([x.reshape(-1), multipliers]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


# ---- pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dimension", [2, 3, 5])
@pytest.mark.parametrize("make", [infeasible_pair, feasible_pair], ids=lambda f: f.__name__)
def test_pairs_are_what_they_say(kind, dimension, make):
    """CVXPY minimises the largest violation: above 0 where no point meets both, else below."""
    for seed in range(3):
        pair = make(kind, seed, dimension)
        x, worst = cp.Variable(dimension), cp.Variable()
        values = {
            name: cp.sum_squares(x - vector.numpy()) if form == "center" else vector.numpy() @ x
            for name, (form, vector) in pair.sets.items()
        }
        rows = [values[c.name] - c.upper <= worst for c in pair.constraints if c.upper is not None]
        rows += [c.lower - values[c.name] <= worst for c in pair.constraints if c.lower is not None]
        cp.Problem(cp.Minimize(worst), rows).solve(cp.CLARABEL)
        found = violations(pair.constraints, pair.exact(torch.from_numpy(x.value))).max().item()
        assert found == pytest.approx(worst.value.item(), abs=1e-6)
        if kind == "half-spaces":
            assert abs(found) == pytest.approx(0.25, abs=1e-6)
        if make is infeasible_pair:
            assert worst.value > 0.1
            assert pair.inside is None
        else:
            assert worst.value < -0.1
            assert violations(pair.constraints, pair.exact(pair.inside)).max() < -0.1


def test_noisy_pairs_are_the_exact_ones_on_average():
    pair = infeasible_pair("balls", 0)
    x = pair.start.clone().requires_grad_()
    drawn = pair.noisy(x, 0.5, 10_000, torch.Generator().manual_seed(0))
    again = pair.noisy(x, 0.5, 10_000, torch.Generator().manual_seed(0))
    for name, value in pair.exact(x).items():
        assert torch.equal(drawn[name], again[name])
        assert drawn[name].mean().item() == pytest.approx(value.item(), abs=4 * 0.5 / 100)
        assert drawn[name].std().item() == pytest.approx(0.5, rel=0.05)
        (expected,) = torch.autograd.grad(value, x, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(drawn[name].mean(), x)[0], expected)
