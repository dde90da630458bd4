"""Eight noisy problems with known answers.

Each has an exact loss and exact constraints, which score a run, and a stream of noisy ones, which is all that a method
sees. One seed gives every method the same random numbers, initial point, optimizer and learning rate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from barrierlm import Constraint, Sampled
from barrierlm.constraints import Bounds
from tests.problems import Categorical

from .solution import Solution, solve

F64 = torch.float64
#: A step's noisy loss, and its measurements by the constraint's name.
Draw = Callable[[Tensor], tuple[Tensor, dict[str, Tensor | Sampled]]]


class Problem(ABC):
    """Minimise a convex loss (of the logits: of the distribution) with averages within bounds.

    ``unit`` [K] is what a constraint's single sample typically varies by. It sets what counts as above a bound, and
    is told to those settings of other packages that are named "in units"; the library does not see it.
    """

    def __init__(
        self, name: str, about: str, constraints: Sequence[Constraint], start: Tensor, unit: Sequence[float], lr: float
    ) -> None:
        self.name, self.about, self.constraints, self.start, self.lr = name, about, tuple(constraints), start, lr
        self.bounds = Bounds(constraints)
        self.unit = torch.tensor(unit, dtype=F64)
        self.unit_of_bounds = self.unit[self.bounds.index]

    @property
    def guess(self) -> Tensor:
        """Where the exact solver starts."""
        return self.start

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """The exact loss."""

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """The exact averages [K] that are constrained."""

    @abstractmethod
    def stream(self, generator: torch.Generator) -> Draw:
        """A source of noisy losses and measurements, one call a step."""

    def violations(self, x: Tensor) -> Tensor:
        """How far each bound [m] is exceeded, in the constraints' own units; feasible is <= 0."""
        return self.bounds.sign * (self.values(x)[self.bounds.index] - self.bounds.value)

    @cached_property
    def solution(self) -> Solution:
        """The constrained optimum."""
        return solve(self)


class Gibbs(Problem):
    """KL(p || q) over a categorical p (the logits are the variables), costs from 16 samples of p by score function."""

    def __init__(
        self,
        name: str,
        about: str,
        log_q: Tensor,
        costs: Tensor,
        constraints: Sequence[Constraint],
        *,
        start: Tensor | None = None,
        unit: Sequence[float] = (1.0,),
        lr: float = 0.02,
        samples: int = 16,
    ) -> None:
        super().__init__(name, about, constraints, log_q.clone() if start is None else start, unit, lr)
        self.log_q, self.costs, self.samples = log_q, costs, samples

    @property
    def guess(self) -> Tensor:
        """The minimum of the convex dual, log of the sum of q exp(-multipliers x violations), where p is that tilt."""
        from scipy.optimize import minimize

        bounds = self.bounds
        violations = bounds.sign[:, None] * (self.costs[bounds.index] - bounds.value[:, None])

        def dual(multipliers: Any) -> tuple[float, Any]:
            logits = self.log_q - torch.from_numpy(multipliers) @ violations
            return logits.logsumexp(0).item(), -(violations @ logits.softmax(0)).numpy()

        found = minimize(dual, [0.0] * len(bounds), jac=True, bounds=[(0, None)] * len(bounds), method="L-BFGS-B")
        return (self.log_q - torch.from_numpy(found.x) @ violations).log_softmax(0)

    def loss(self, x: Tensor) -> Tensor:
        log_p = x.log_softmax(0)
        return (log_p.exp() * (log_p - self.log_q)).sum()

    def values(self, x: Tensor) -> Tensor:
        return self.costs @ x.softmax(0)

    def stream(self, generator: torch.Generator) -> Draw:
        def draw(x: Tensor) -> tuple[Tensor, dict[str, Tensor | Sampled]]:
            log_p = x.log_softmax(0)
            y = torch.multinomial(log_p.exp().detach(), self.samples, replacement=True, generator=generator)
            return self.loss(x), {
                c.name: Sampled(cost[y], log_p[y]) for c, cost in zip(self.constraints, self.costs, strict=True)
            }

        return draw


class Quadratic(Problem):
    """A strictly convex quadratic with linear constraints, noise in the loss's gradient and in the constraints' rows.

    Made backwards from its answer: a point, multipliers and slacks are drawn first, the rest is what fits them.
    """

    def __init__(self, size: int = 10, seed: int = 0, samples: int = 16) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.answer, self.multipliers = normal(size), torch.tensor([1.5, 0.8, 0.4, 0.0, 0.0], dtype=F64)
        slack = torch.tensor([0.0, 0.0, 0.0, 0.3, 1.0], dtype=F64)
        basis = torch.linalg.qr(normal(size, size)).Q
        self.matrix = basis @ torch.diag(torch.linspace(0.5, 5, size, dtype=F64)) @ basis.T
        self.rows = torch.nn.functional.normalize(normal(len(slack), size), dim=1)
        self.right = self.rows @ self.answer + slack
        self.linear = -(self.matrix @ self.answer + self.multipliers @ self.rows)
        self.samples = samples
        super().__init__(
            "quadratic",
            "10 variables, 5 linear constraints of which 3 are active; noise in the loss's gradient and, pathwise, in "
            "every constraint",
            [Constraint(f"row {k}", upper=0.0) for k in range(len(slack))],
            torch.zeros(size, dtype=F64),
            [1.0] * len(slack),
            0.02,
        )

    def loss(self, x: Tensor) -> Tensor:
        return x @ self.matrix @ x / 2 + self.linear @ x

    def values(self, x: Tensor) -> Tensor:
        return self.rows @ x - self.right

    def stream(self, generator: torch.Generator) -> Draw:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        def draw(x: Tensor) -> tuple[Tensor, dict[str, Tensor | Sampled]]:
            loss = self.loss(x) + 0.5 * normal(len(x)) @ x
            tilted = self.rows + 0.3 * normal(self.samples, *self.rows.shape)
            values = tilted @ x - self.right + normal(self.samples, len(self.right))
            return loss, {c.name: values[:, k] for k, c in enumerate(self.constraints)}

        return draw


class Fairness(Problem):
    """Logistic regression whose scores may hardly covary with a group (Zafar et al. 2017), from minibatches of 32."""

    def __init__(self, rows: int = 1000, size: int = 8, seed: int = 0, batch: int = 32, bound: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(seed)
        group = (torch.rand(rows, generator=generator, dtype=F64) < 0.4).to(F64)
        features = torch.randn(rows, size, generator=generator, dtype=F64)
        weights = torch.randn(size, generator=generator, dtype=F64)
        # The first half of the features tells the group, so that accuracy and fairness disagree.
        features[:, : size // 2] += 0.8 * group[:, None] * weights[: size // 2].sign()
        self.features = torch.cat([features, torch.ones(rows, 1, dtype=F64)], 1)
        chance = (features @ weights - (features @ weights).mean()).sigmoid()
        self.label = (torch.rand(rows, generator=generator, dtype=F64) < chance).to(F64)
        self.centred = group - group.mean()
        self.batch = batch
        super().__init__(
            "fairness",
            f"logistic regression on {rows} rows, minibatches of {batch}, the covariance of score and group within "
            f"{bound} of 0",
            [Constraint("covariance", lower=-bound, upper=bound)],
            torch.zeros(size + 1, dtype=F64),
            [0.5],
            0.02,
        )

    def _loss(self, x: Tensor, rows: Tensor | slice) -> Tensor:
        scores = self.features[rows] @ x
        task = torch.nn.functional.binary_cross_entropy_with_logits(scores, self.label[rows])
        return task + 0.005 * x @ x

    def loss(self, x: Tensor) -> Tensor:
        return self._loss(x, slice(None))

    def values(self, x: Tensor) -> Tensor:
        return (self.centred @ (self.features @ x) / len(self.centred)).reshape(1)

    def stream(self, generator: torch.Generator) -> Draw:
        def batches() -> Iterator[Tensor]:
            while True:
                order = torch.randperm(len(self.label), generator=generator)
                yield from order[: len(order) // self.batch * self.batch].split(self.batch)

        source = batches()

        def draw(x: Tensor) -> tuple[Tensor, dict[str, Tensor | Sampled]]:
            rows = next(source)
            return self._loss(x, rows), {"covariance": self.centred[rows] * (self.features[rows] @ x)}

        return draw


def gibbs() -> Problem:
    c = Categorical(0.69)
    about = "50 outcomes, E[cost] <= 0, true multiplier 0.69: the setting of tests/problems.py `sampled_run`"
    return Gibbs("gibbs", about, c.log_q, c.cost[None], [Constraint("c", upper=0.0, scale=1.0)])


def window() -> Problem:
    c = Categorical(0.69)
    about = "the same with -0.2 <= E[cost] <= 0: the window is as wide as the standard error of a step"
    return Gibbs("window", about, c.log_q, c.cost[None], [Constraint("c", lower=-0.2, upper=0.0)])


def _two_costs(spread: tuple[float, float], multipliers: tuple[float, float], slack: float) -> tuple[Tensor, Tensor]:
    """log q [S], and two costs [2, S] whose optimum has these multipliers, the second with some slack."""
    c = Categorical(0.69)
    generator = torch.Generator().manual_seed(1)
    costs = torch.stack([c.cost, torch.randn(len(c.cost), generator=generator, dtype=F64)])
    costs = costs * torch.tensor(spread, dtype=F64)[:, None]
    optimum = (c.log_q - torch.tensor(multipliers, dtype=F64) @ costs).softmax(0)
    return c.log_q, costs - (costs @ optimum)[:, None] - torch.tensor([[0.0], [slack]], dtype=F64)


def two() -> Problem:
    log_q, costs = _two_costs((0.5, 3.0), (0.8, 0.15), 0.0)
    about = "two active constraints whose samples have standard deviations of about 0.5 and 3, scale 1 for both"
    constraints = [Constraint("quiet", upper=0.0, scale=1.0), Constraint("noisy", upper=0.0, scale=1.0)]
    return Gibbs("two", about, log_q, costs, constraints, unit=(1.0, 1.0))


def inactive() -> Problem:
    log_q, costs = _two_costs((1.0, 1.0), (0.69, 0.0), 0.3)
    about = (
        "an active constraint (0.69) beside one that has a slack of 0.3 at the optimum, little more than a step's noise"
    )
    constraints = [Constraint("active", upper=0.0, scale=1.0), Constraint("inactive", upper=0.0, scale=1.0)]
    return Gibbs("inactive", about, log_q, costs, constraints, unit=(1.0, 1.0))


def far() -> Problem:
    c = Categorical(2.0)  # q is tilted by 2 standard deviations of the cost: 5 of a cost that is 0.4 times as large
    about = "costs of standard deviation 0.4, true multiplier 5, start on the wrong side of q (tilted by -1); Adam 0.05"
    constraints = [Constraint("c", upper=0.0, scale=1.0)]
    return Gibbs("far", about, c.log_q, 0.4 * c.cost[None], constraints, start=c.tilted(-1.0), lr=0.05)


def scaled() -> Problem:
    c = Categorical(0.69)
    about = "costs 100 times as large (true multiplier 0.0069), no scale given, start tilted by -1: infeasible"
    constraints = [Constraint("c", upper=0.0)]
    return Gibbs("scaled", about, c.log_q, 100 * c.cost[None], constraints, start=c.tilted(-1.0), unit=(100.0,))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "gibbs": gibbs,
    "window": window,
    "two": two,
    "far": far,
    "quadratic": Quadratic,
    "fairness": Fairness,
    "inactive": inactive,
    "scaled": scaled,
}


@lru_cache
def problem(name: str) -> Problem:
    """The problem of this name, made (and solved) once per process."""
    return PROBLEMS[name]()
