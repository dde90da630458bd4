"""The exact answer of a problem: found by SLSQP, polished by Newton's method on the KKT equations, and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .problems import Problem

_NEWTON_STEPS = 20
#: A bound this close to 0 after SLSQP is active; Newton decides the rest by the sign of its multiplier.
_ACTIVE = 1e-5


class Solution(NamedTuple):
    """The optimum: point [n], loss, and multipliers [m] (units of the loss per unit of the constraint)."""

    x: Tensor
    loss: float
    multipliers: Tensor


class Residuals(NamedTuple):
    """What must be 0 at the optimum of a convex problem; the largest of each."""

    stationarity: float
    violation: float
    complementarity: float
    negative_multiplier: float


def _gradients(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the loss [n] and of the violations [m, n]."""
    jacobian = torch.autograd.functional.jacobian
    return jacobian(problem.loss, x), jacobian(problem.violations, x)


def residuals(problem: Problem, solution: Solution) -> Residuals:
    """The KKT conditions at a solution, from the problem's loss and constraints alone."""
    gradient, slopes = _gradients(problem, solution.x)
    violations = problem.violations(solution.x)
    return Residuals(
        (gradient + solution.multipliers @ slopes).abs().max().item(),
        violations.clamp(min=0).max().item(),
        (solution.multipliers * violations).abs().max().item(),
        (-solution.multipliers).clamp(min=0).max().item(),
    )


def solve(problem: Problem) -> Solution:
    """Minimise the exact loss under the exact constraints, to about 1e-10."""
    from scipy.optimize import minimize

    def tensor(x: Any) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64)

    found = minimize(
        lambda x: problem.loss(tensor(x)).item(),
        problem.guess.numpy(),
        jac=lambda x: _gradients(problem, tensor(x))[0].numpy(),
        constraints={
            "type": "ineq",
            "fun": lambda x: -problem.violations(tensor(x)).numpy(),
            "jac": lambda x: -_gradients(problem, tensor(x))[1].numpy(),
        },
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    x = tensor(found.x)
    active = problem.violations(x) > -_ACTIVE * problem.unit_of_bounds
    x, multipliers = _polish(problem, x, active)
    return Solution(x, problem.loss(x).item(), multipliers)


def _hessian(problem: Problem, x: Tensor, multipliers: Tensor) -> Tensor:
    """Of the Lagrangian [n, n]."""

    def lagrangian(y: Tensor) -> Tensor:
        return problem.loss(y) + multipliers @ problem.violations(y)

    return torch.autograd.functional.hessian(lagrangian, x)


def _polish(problem: Problem, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Newton on the stationarity of the Lagrangian and on the active bounds' equations."""
    gradient, slopes = _gradients(problem, x)
    multipliers = torch.zeros(len(active), dtype=torch.float64)
    multipliers[active] = torch.linalg.lstsq(slopes[active].T, -gradient[:, None]).solution.flatten()
    size, count = len(x), int(active.sum())
    for _ in range(_NEWTON_STEPS):
        hessian = _hessian(problem, x, multipliers.clone())
        gradient, slopes = _gradients(problem, x)
        matrix = torch.zeros(size + count, size + count, dtype=torch.float64)
        matrix[:size, :size] = hessian
        matrix[:size, size:], matrix[size:, :size] = slopes[active].T, slopes[active]
        right = -torch.cat([gradient + multipliers @ slopes, problem.violations(x)[active]])
        # The shortest step: logits have a direction in which nothing changes.
        step = torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True) @ right
        x = x + step[:size]
        multipliers[active] += step[size:]
    return x, multipliers
