"""The table of solved problems (math.md): minimise f(x) subject to bounds, with barrier points in closed form."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from barrierlm import BarrierObjective, Constraint, Sampled

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """``solution(mu)`` and ``multipliers(mu)`` are the log barrier's point; at mu = 0 the constrained optimum."""

    name: str
    start: Tensor
    loss: Callable[[Tensor], Tensor]
    constraints: list[Constraint]
    measure: Callable[[Tensor], dict[str, Tensor]]
    solution: Callable[[float], Tensor]
    multipliers: Callable[[float], Tensor]
    curvature: float = 0.0  # of the loss, for the step size

    @property
    def optimum(self) -> float:
        return self.loss(self.solution(0.0)).item()


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def linear() -> Problem:
    """1. min x, x >= 0."""
    return Problem(
        "linear",
        tensor(-0.2),
        lambda x: x.sum(),
        [Constraint("x", lower=0.0, scale=1.0)],
        lambda x: {"x": x.sum()},
        lambda mu: tensor(mu),
        lambda mu: tensor(1.0),
    )


def projection() -> Problem:
    """2. min 1/2 ||x - a||^2, x <= 0."""
    a = tensor(0.5, 1.0, 2.0)

    def solution(mu):
        return (a - (a**2 + 4 * mu).sqrt()) / 2

    return Problem(
        "projection",
        tensor(0.3, -0.4, 0.1),
        lambda x: ((x - a) ** 2).sum() / 2,
        [Constraint(f"x{i}", upper=0.0, scale=1.0) for i in range(3)],
        lambda x: {f"x{i}": x[i] for i in range(3)},
        solution,
        lambda mu: a - solution(mu),
        1.0,
    )


def half_space() -> Problem:
    """3. min 1/2 ||x||^2, a.x >= b > 0."""
    a, b = tensor(1.0, 2.0), 0.8
    norm = a.norm()

    def distance(mu):
        return (b + (b**2 + 4 * norm**2 * mu).sqrt()) / (2 * norm)

    return Problem(
        "half space",
        tensor(0.0, 0.0),
        lambda x: (x**2).sum() / 2,
        [Constraint("ax", lower=b, scale=1.0)],
        lambda x: {"ax": x @ a},
        lambda mu: a / norm * distance(mu),
        lambda mu: (distance(mu) / norm).reshape(1),
        1.0,
    )


class Categorical:
    """4. min KL(p || q) over a categorical p with E_p[c] <= 0: p is q exp(-lambda c), C(lambda) = -mu / lambda."""

    def __init__(self, multiplier: float = 0.69, size: int = 50, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.log_q = torch.randn(size, generator=generator, dtype=F64).log_softmax(0)
        c = torch.randn(size, generator=generator, dtype=F64)
        self.cost = c - ((self.log_q - multiplier * c).softmax(0) * c).sum()  # the optimum's multiplier is as asked
        self.multiplier = multiplier

    def tilted(self, lam: float) -> Tensor:
        return (self.log_q - lam * self.cost).log_softmax(0)

    def expected(self, log_p: Tensor) -> Tensor:
        return (log_p.exp() * self.cost).sum()

    def kl(self, theta: Tensor) -> Tensor:
        log_p = theta.log_softmax(0)
        return (log_p.exp() * (log_p - self.log_q)).sum()

    def barrier_multiplier(self, mu: float) -> float:
        if mu == 0:
            return self.multiplier
        low, high = self.multiplier, 100.0  # lambda C(lambda) + mu falls through 0
        for _ in range(200):
            middle = (low + high) / 2
            if middle * self.expected(self.tilted(middle)).item() + mu > 0:
                low = middle
            else:
                high = middle
        return low

    def problem(self) -> Problem:
        def centred(lam):
            log_p = self.tilted(lam)
            return log_p - log_p.mean()

        return Problem(
            "categorical",
            self.log_q - self.log_q.mean(),
            self.kl,
            [Constraint("c", upper=0.0, scale=1.0)],
            lambda theta: {"c": self.expected(theta.log_softmax(0))},
            lambda mu: centred(self.barrier_multiplier(mu)),
            lambda mu: tensor(self.barrier_multiplier(mu)),
            0.0,
        )


PROBLEMS = [linear(), projection(), half_space(), Categorical(size=6).problem()]


def sampled_run(steps: int, seed: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Problem 4 from 16 samples a step (Adam 0.02); E[c], task gap and multiplier of the last quarter's steps.

    ``options`` are the objective's: rule, schedule, noise_floor.
    """
    problem = Categorical()
    generator = torch.Generator().manual_seed(seed)
    theta = problem.log_q.clone().requires_grad_()
    objective = BarrierObjective(problem.kl, [Constraint("c", upper=0.0, scale=1.0)], **options)
    optimizer = torch.optim.Adam([theta], lr=0.02)
    optimum = problem.kl(problem.tilted(problem.multiplier)).item()
    rows = []
    for step in range(steps):
        log_p = theta.log_softmax(0)
        y = torch.multinomial(log_p.exp().detach(), 16, replacement=True, generator=generator)
        out = objective(theta, measurements={"c": Sampled(problem.cost[y], log_p[y])})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
        if step >= steps * 3 // 4:
            with torch.no_grad():
                cost, gap = problem.expected(theta.log_softmax(0)).item(), problem.kl(theta).item() - optimum
            rows.append((cost, gap, objective.report()[0].multiplier))
    costs, gaps, multipliers = torch.tensor(rows, dtype=F64).T
    return costs, gaps, multipliers
