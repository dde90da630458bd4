"""Other packages, called as their documentation says, on the same samples.

They take one number for each constraint and step: the mean of the step's samples, minus the bound. Where the samples
come from the policy, its gradient is the score function's, with the same moving average as baseline that the library
uses. They have no notion of a unit: a default setting gets the constraint as it is, and one that is told the problem's
unit (``in_units``) gets it divided by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from barrierlm import Sampled

from .problems import F64, Problem

#: Weight of the newest step in the baseline of the score function, the library's default.
_SMOOTHING = 0.1


class Violations:
    """The bounds' violations [m] of a step, each with a gradient, from its measurements."""

    def __init__(self, problem: Problem, in_units: bool) -> None:
        self.problem = problem
        self.divisor = problem.unit_of_bounds if in_units else torch.ones_like(problem.unit_of_bounds)
        first = [c.lower if c.upper is None else c.upper for c in problem.constraints]
        self.baseline, self.weight = torch.tensor(first, dtype=F64), 0.0

    def __call__(self, measurements: Mapping[str, Tensor | Sampled]) -> Tensor:
        means = []
        for k, constraint in enumerate(self.problem.constraints):
            measured = measurements[constraint.name]
            if isinstance(measured, Sampled):
                assert measured.values is not None
                assert measured.logps is not None
                score = ((measured.values - self.baseline[k]) * measured.logps).mean()
                means.append(measured.values.mean() + score - score.detach())
            else:
                means.append(measured.mean())
        mean = torch.stack(means)
        self.weight = (1 - _SMOOTHING) * self.weight + _SMOOTHING
        self.baseline = self.baseline + _SMOOTHING / self.weight * (mean.detach() - self.baseline)
        bounds = self.problem.bounds
        return bounds.sign * (mean[bounds.index] - bounds.value) / self.divisor


class _Cooper:
    """cooper-optim: a problem that returns the step's state, rolled by its `SimultaneousOptimizer` (as in its README).

    The violation with a gradient is for the variables, ``strict_violation`` (the plain mean) for the multipliers.
    """

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer, in_units: bool, **constraint: Any) -> None:
        import cooper

        self.violations = Violations(problem, in_units)
        self.multiplier = cooper.multipliers.DenseMultiplier(num_constraints=len(problem.bounds), dtype=F64)

        class Task(cooper.ConstrainedMinimizationProblem):
            def __init__(task) -> None:
                super().__init__()
                task.constraint = cooper.Constraint(
                    constraint_type=cooper.ConstraintType.INEQUALITY, multiplier=self.multiplier, **constraint
                )

            def compute_cmp_state(task, loss: Tensor, violation: Tensor) -> Any:
                state = cooper.ConstraintState(violation=violation, strict_violation=violation.detach())
                return cooper.CMPState(loss=loss, observed_constraints={task.constraint: state})

        self.task, self.primal = Task(), optimizer

    def _optimize_with(self, dual: torch.optim.Optimizer) -> None:
        import cooper

        self.optimizer = cooper.optim.SimultaneousOptimizer(
            cmp=self.task, primal_optimizers=self.primal, dual_optimizers=dual
        )

    def step(self, loss: Tensor, measurements: Mapping[str, Tensor | Sampled]) -> None:
        state = {"loss": loss, "violation": self.violations(measurements)}
        self.optimizer.roll(compute_cmp_state_kwargs=state)

    def multipliers(self) -> Tensor:
        return self.multiplier.weight.detach().clone() / self.violations.divisor


class CooperLagrangian(_Cooper):
    """The Lagrangian, its multipliers raised by SGD."""

    def __init__(
        self, problem: Problem, optimizer: torch.optim.Optimizer, steps: int, *, lr: float, in_units: bool = False
    ) -> None:
        super().__init__(problem, optimizer, in_units)
        self._optimize_with(torch.optim.SGD(self.task.dual_parameters(), lr=lr, maximize=True))


class CooperNuPI(_Cooper):
    """The Lagrangian, its multipliers raised by cooper's PI controller."""

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        lr: float,
        gain: float,
        smoothing: float = 0.0,
        in_units: bool = False,
    ) -> None:
        import cooper

        super().__init__(problem, optimizer, in_units)
        self._optimize_with(
            cooper.optim.nuPI(self.task.dual_parameters(), lr=lr, Kp=gain, Ki=1.0, ema_nu=smoothing, maximize=True)
        )


class CooperAugmented(_Cooper):
    """The augmented Lagrangian with a fixed penalty coefficient, its multipliers raised by SGD."""

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        lr: float,
        penalty: float,
        in_units: bool = False,
    ) -> None:
        import cooper

        coefficient = cooper.penalty_coefficients.DensePenaltyCoefficient(
            torch.full((len(problem.bounds),), penalty, dtype=F64)
        )
        formulation = cooper.formulations.AugmentedLagrangian
        super().__init__(problem, optimizer, in_units, formulation_type=formulation, penalty_coefficient=coefficient)
        self._optimize_with(torch.optim.SGD(self.task.dual_parameters(), lr=lr, maximize=True))


class _HumanCompatible:
    """humancompatible-train: `forward_update` gives the Lagrangian to differentiate, as in its README."""

    dual: Any

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer, in_units: bool) -> None:
        self.violations, self.optimizer = Violations(problem, in_units), optimizer

    def step(self, loss: Tensor, measurements: Mapping[str, Tensor | Sampled]) -> None:
        lagrangian = self.dual.forward_update(loss, self.violations(measurements))
        self.optimizer.zero_grad()
        lagrangian.backward()
        self.optimizer.step()

    def multipliers(self) -> Tensor:
        return self.dual.duals.detach().clone() / self.violations.divisor


class HumanCompatibleALM(_HumanCompatible):
    """Its `ALM`: dual ascent, and with a penalty the augmented Lagrangian."""

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        in_units: bool = False,
        **options: Any,
    ) -> None:
        from humancompatible.train.dual_optim import ALM

        super().__init__(problem, optimizer, in_units)
        self.dual = ALM(init_duals=torch.zeros(len(problem.bounds), dtype=F64), is_ineq=True, **options)


class HumanCompatiblePBM(_HumanCompatible):
    """Its `PBM`, the stochastic penalty-barrier method; the streams have no epochs, so one is called 100 steps."""

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        in_units: bool = False,
        **options: Any,
    ) -> None:
        from humancompatible.train.dual_optim import PBM

        super().__init__(problem, optimizer, in_units)
        # 1e-9, the lower end of its range, is its default start; given as a tensor only for the sake of fp64.
        start = torch.full((len(problem.bounds),), 1e-9, dtype=F64)
        self.dual = PBM(m=len(problem.bounds), init_duals=start, epoch_length=100, **options)
