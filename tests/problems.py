"""The table of solved problems: minimise f(x) subject to bounds, with the solution and its multipliers.

A row enrols a problem in `test_known_answers.py` for every rule. Rows of math.md also know the log barrier's point for
mu > 0 (`BARRIER_POINTS`). Every row is held against the KKT conditions there, so a wrong one cannot enter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from barrierlm import BarrierObjective, Constraint, Sampled

F64 = torch.float64
Measure = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Problem:
    """``answer(mu)`` is the log barrier's point, primal and dual (by bound, in the report's order).

    At mu = 0, all that most rows know, it is the constrained optimum. ``start`` is infeasible, ``inside`` strictly
    feasible. ``convex``: loss and constraints are, at least on a convex set that holds the feasible points.
    """

    name: str
    start: Tensor
    inside: Tensor
    loss: Callable[[Tensor], Tensor]
    constraints: list[Constraint]
    measure: Measure
    answer: Callable[[float], tuple[Tensor, Tensor]]
    convex: bool = True
    curvature: float = 0.0  # of the loss, for the step size
    cvxpy: Callable[[], tuple[Tensor, Tensor]] | None = None  # CVXPY's own primal and dual, where the row has them

    def solution(self, mu: float = 0.0) -> Tensor:
        return (self._optimum if mu == 0 else self.answer(mu))[0]

    def multipliers(self, mu: float = 0.0) -> Tensor:
        return (self._optimum if mu == 0 else self.answer(mu))[1]

    @cached_property
    def _optimum(self) -> tuple[Tensor, Tensor]:
        return self.answer(0.0)

    @property
    def optimum(self) -> float:
        return self.loss(self.solution()).item()

    def violations(self, x: Tensor) -> Tensor:
        return violations(self.constraints, self.measure(x))


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def violations(constraints: Sequence[Constraint], measured: dict[str, Tensor]) -> Tensor:
    """z [m] in units of the scales."""
    z = []
    for c in constraints:
        if c.lower is not None:
            z.append((c.lower - measured[c.name]) / c.scale)
        if c.upper is not None:
            z.append((measured[c.name] - c.upper) / c.scale)
    return torch.stack(z)


# ---- math.md ---------------------------------------------------------------------------------------------------


def linear() -> Problem:
    """1. min x, x >= 0."""
    return Problem(
        "linear",
        tensor(-0.2),
        tensor(0.7),
        lambda x: x.sum(),
        [Constraint("x", lower=0.0, scale=1.0)],
        lambda x: {"x": x.sum()},
        lambda mu: (tensor(mu), tensor(1.0)),
    )


def projection() -> Problem:
    """2. min 1/2 ||x - a||^2, x <= 0."""
    a = tensor(0.5, 1.0, 2.0)

    def answer(mu):
        x = (a - (a**2 + 4 * mu).sqrt()) / 2
        return x, a - x

    return Problem(
        "projection",
        tensor(0.3, -0.4, 0.1),
        tensor(-0.3, -0.4, -0.1),
        lambda x: ((x - a) ** 2).sum() / 2,
        [Constraint(f"x{i}", upper=0.0, scale=1.0) for i in range(3)],
        lambda x: {f"x{i}": x[i] for i in range(3)},
        answer,
        curvature=1.0,
    )


def half_space() -> Problem:
    """3. min 1/2 ||x||^2, a.x >= b > 0."""
    a, b = tensor(1.0, 2.0), 0.8
    norm = a.norm()

    def answer(mu):
        distance = (b + (b**2 + 4 * norm**2 * mu).sqrt()) / (2 * norm)
        return a / norm * distance, (distance / norm).reshape(1)

    return Problem(
        "half space",
        tensor(0.0, 0.0),
        tensor(1.0, 1.0),
        lambda x: (x**2).sum() / 2,
        [Constraint("ax", lower=b, scale=1.0)],
        lambda x: {"ax": x @ a},
        answer,
        curvature=1.0,
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

    def problem(self, lower: float | None = None) -> Problem:
        """Convex in p, not in its logits. With ``lower``, a window whose lower side does not bind (mu = 0 only)."""

        def answer(mu):
            lam = self.barrier_multiplier(mu)
            multipliers = tensor(lam) if lower is None else tensor(0.0, lam)
            return centred(self.tilted(lam)), multipliers

        return Problem(
            f"categorical {len(self.log_q)}" + ("" if lower is None else " window"),
            centred(self.log_q),
            centred(self.tilted(self.multiplier + 0.1)),
            self.kl,
            [Constraint("c", lower=lower, upper=0.0, scale=1.0)],
            lambda theta: {"c": self.expected(theta.log_softmax(0))},
            answer,
        )


def centred(log_p: Tensor) -> Tensor:
    """The logits that a method ends at when it starts from centred ones: no gradient moves their mean."""
    return log_p - log_p.mean()


def two_costs(size: int = 12, seed: int = 3) -> Problem:
    """4 with two costs that both bind: p is q exp(-lambda1 c1 - lambda2 c2); bounds such that lambda is as asked."""
    generator = torch.Generator().manual_seed(seed)
    log_q = torch.randn(size, generator=generator, dtype=F64).log_softmax(0)
    costs = torch.randn(2, size, generator=generator, dtype=F64)
    multipliers = tensor(0.5, 1.2)
    bounds = costs @ (log_q - multipliers @ costs).softmax(0)

    def loss(theta):
        log_p = theta.log_softmax(0)
        return (log_p.exp() * (log_p - log_q)).sum()

    return Problem(
        "categorical, two costs",
        centred(log_q),
        centred(log_q - (multipliers + 0.3) @ costs),
        loss,
        [Constraint(f"c{i}", upper=bounds[i].item(), scale=1.0) for i in range(2)],
        lambda theta: dict(zip(("c0", "c1"), costs @ theta.softmax(0), strict=True)),
        lambda mu: (centred(log_q - multipliers @ costs), multipliers),
    )


def maratos() -> Problem:
    """5. min 2 (x^2 + y^2 - 1) - x on the unit circle as a narrow window: its inner edge, since f grows outwards."""
    radius = math.sqrt(0.98)
    return Problem(
        "Maratos",
        tensor(0.8, 0.3),
        tensor(0.8, 0.6),
        lambda x: 2 * ((x**2).sum() - 1) - x[0],
        [Constraint("circle", lower=0.98, upper=1.02, scale=1.0)],
        lambda x: {"circle": (x**2).sum()},
        lambda mu: (tensor(radius, 0.0), tensor(2 - 1 / (2 * radius), 0.0)),
        convex=False,
    )


# ---- answers known in rounded numbers, or from CVXPY -------------------------------------------------------------


def refined(
    loss: Callable[[Tensor], Tensor],
    constraints: Sequence[Constraint],
    measure: Measure,
    guess: Callable[[], Tensor],
) -> Callable[[float], tuple[Tensor, Tensor]]:
    """The KKT point next to ``guess()``: Newton's method on the equations of the bounds active there."""

    def answer(mu):
        if mu != 0:
            raise ValueError(f"mu={mu}; allowed: 0, since this row has no barrier points")
        x = guess()
        z = lambda x: violations(constraints, measure(x))  # noqa: E731
        active = z(x) > -1e-4
        k = int(active.sum())
        jacobian = torch.func.jacrev(z)(x)[active]
        lam = torch.linalg.lstsq(jacobian.T, -torch.func.grad(loss)(x)[:, None]).solution[:, 0] if k else tensor()

        def residual(point):
            x, lam = point[: len(point) - k], point[len(point) - k :]
            gradient = torch.func.grad(lambda x: loss(x) + lam @ z(x)[active])(x)
            return torch.cat([gradient, z(x)[active]])

        point = torch.cat([x, lam])
        for _ in range(5):
            point = point - torch.linalg.solve(torch.func.jacrev(residual)(point), residual(point))
        if not (point[: len(x)] - x).abs().max() <= 1e-5:
            raise ValueError(f"{x.tolist()} is rounded from no KKT point; the nearest is {point.tolist()}")
        multipliers = torch.zeros(len(active), dtype=F64)
        multipliers[active] = point[len(x) :]
        return point[: len(x)], multipliers

    return answer


def hs(
    number: int,
    start: Sequence[float],
    inside: Sequence[float],
    loss: Callable[..., Tensor],
    guess: Sequence[float],
    *,
    at_least_0: Callable[..., Sequence[Tensor]] = lambda *x: (),
    box: dict[int, tuple[float | None, float | None]] | None = None,
    convex: bool = True,
    scale: float = 1.0,
) -> Problem:
    """A problem of Hock and Schittkowski 1981, as printed there: variables x1, x2, ..., g(x) >= 0 and bounds."""
    box = box or {}
    num_rows = len(at_least_0(*tensor(*start)))

    def measure(x):
        rows = {f"g{i + 1}": g for i, g in enumerate(at_least_0(*x))}
        return rows | {f"x{i}": x[i - 1] for i in box}

    def value(x):
        return loss(*x)

    constraints = [Constraint(f"g{i + 1}", lower=0.0, scale=scale) for i in range(num_rows)]
    constraints += [Constraint(f"x{i}", lower=low, upper=high, scale=scale) for i, (low, high) in box.items()]
    return Problem(
        f"HS{number}",
        tensor(*start),
        tensor(*inside),
        value,
        constraints,
        measure,
        refined(value, constraints, measure, lambda: tensor(*guess)),
        convex,
    )


def boxes(count: int, low: float | None, high: float | None = None) -> dict[int, tuple[float | None, float | None]]:
    return {i: (low, high) for i in range(1, count + 1)}


def hock_schittkowski() -> list[Problem]:
    root3 = math.sqrt(3)
    return [
        hs(
            2,
            (1.0, 1.0),
            (1.0, 2.0),
            lambda x1, x2: 100 * (x2 - x1**2) ** 2 + (1 - x1) ** 2,
            (1.2243707, 1.5),
            box={2: (1.5, None)},
            convex=False,
        ),
        hs(
            3,
            (1.0, -0.5),
            (1.0, 1.0),
            lambda x1, x2: x2 + 1e-5 * (x2 - x1) ** 2,
            (0.0, 0.0),
            box={2: (0.0, None)},
        ),
        hs(
            4,
            (0.8, -0.1),
            (1.125, 0.125),
            lambda x1, x2: (x1 + 1) ** 3 / 3 + x2,
            (1.0, 0.0),
            box={1: (1.0, None), 2: (0.0, None)},
        ),
        hs(
            5,
            (-2.0, -1.0),
            (0.0, 0.0),
            lambda x1, x2: torch.sin(x1 + x2) + (x1 - x2) ** 2 - 1.5 * x1 + 2.5 * x2 + 1,
            (0.5 - math.pi / 3, -0.5 - math.pi / 3),
            box={1: (-1.5, 4.0), 2: (-3.0, 3.0)},
            convex=False,
        ),
        hs(
            10,
            (-1.0, 1.0),
            (0.0, 0.5),
            lambda x1, x2: x1 - x2,
            (0.0, 1.0),
            at_least_0=lambda x1, x2: (-3 * x1**2 + 2 * x1 * x2 - x2**2 + 1,),
        ),
        hs(
            11,
            (4.9, 0.1),
            (0.0, 1.0),
            lambda x1, x2: (x1 - 5) ** 2 + x2**2 - 25,
            (1.234771, 1.524660),
            at_least_0=lambda x1, x2: (-(x1**2) + x2,),
        ),
        hs(
            12,
            (3.0, 3.0),
            (0.0, 0.0),
            lambda x1, x2: x1**2 / 2 + x2**2 - x1 * x2 - 7 * x1 - 7 * x2,
            (2.0, 3.0),
            at_least_0=lambda x1, x2: (25 - 4 * x1**2 - x2**2,),
        ),
        hs(
            18,
            (2.0, 2.0),
            (16.0, 2.0),
            lambda x1, x2: x1**2 / 100 + x2**2,
            (15.811388, 1.5811388),
            at_least_0=lambda x1, x2: (x1 * x2 - 25, x1**2 + x2**2 - 25),
            box={1: (2.0, 50.0), 2: (0.0, 50.0)},
            convex=False,
        ),
        hs(
            21,
            (-1.0, -1.0),
            (3.0, 1.0),
            lambda x1, x2: x1**2 / 100 + x2**2 - 100,
            (2.0, 0.0),
            at_least_0=lambda x1, x2: (10 * x1 - x2 - 10,),
            box={1: (2.0, 50.0), 2: (-50.0, 50.0)},
        ),
        hs(
            22,
            (2.0, 2.0),
            (0.5, 0.5),
            lambda x1, x2: (x1 - 2) ** 2 + (x2 - 1) ** 2,
            (1.0, 1.0),
            at_least_0=lambda x1, x2: (-x1 - x2 + 2, -(x1**2) + x2),
        ),
        hs(
            24,
            (2.0, 2.0),
            (2.5, 1.0),
            lambda x1, x2: ((x1 - 3) ** 2 - 9) * x2**3 / (27 * root3),
            (3.0, root3),
            at_least_0=lambda x1, x2: (x1 / root3 - x2, x1 + root3 * x2, 6 - x1 - root3 * x2),
            box=boxes(2, 0.0),
            convex=False,
        ),
        hs(
            29,
            (5.0, 3.0, 2.0),
            (3.0, 2.0, 1.0),
            lambda x1, x2, x3: -x1 * x2 * x3,
            (4.0, 2 * math.sqrt(2), 2.0),
            at_least_0=lambda x1, x2, x3: (48 - x1**2 - 2 * x2**2 - 4 * x3**2,),
            convex=False,
        ),
        hs(
            31,
            (0.5, 0.5, 0.5),
            (1.0, 2.0, 0.0),
            lambda x1, x2, x3: 9 * x1**2 + x2**2 + 9 * x3**2,
            (1 / root3, root3, 0.0),
            at_least_0=lambda x1, x2, x3: (x1 * x2 - 1,),
            box={1: (-10.0, 10.0), 2: (1.0, 10.0), 3: (-10.0, 1.0)},
            convex=False,
        ),
        hs(
            33,
            (0.1, 1.0, 1.5),
            (0.1, 1.5, 2.0),
            lambda x1, x2, x3: (x1 - 1) * (x1 - 2) * (x1 - 3) + x3,
            (0.0, math.sqrt(2), math.sqrt(2)),
            at_least_0=lambda x1, x2, x3: (x3**2 - x2**2 - x1**2, x1**2 + x2**2 + x3**2 - 4),
            box={1: (0.0, None), 2: (0.0, None), 3: (0.0, 5.0)},
            convex=False,
        ),
        hs(
            34,
            (1.0, 2.0, 9.0),
            (0.1, 1.5, 8.0),
            lambda x1, x2, x3: -x1,
            (math.log(math.log(10)), math.log(10), 10.0),
            at_least_0=lambda x1, x2, x3: (x2 - torch.exp(x1), x3 - torch.exp(x2)),
            box={1: (0.0, 100.0), 2: (0.0, 100.0), 3: (0.0, 10.0)},
        ),
        hs(
            35,
            (2.0, 1.0, 1.0),
            (0.5, 0.5, 0.5),
            lambda x1, x2, x3: 9 - 8 * x1 - 6 * x2 - 4 * x3 + 2 * x1**2 + 2 * x2**2 + x3**2 + 2 * x1 * x2 + 2 * x1 * x3,
            (4 / 3, 7 / 9, 4 / 9),
            at_least_0=lambda x1, x2, x3: (3 - x1 - x2 - 2 * x3,),
            box=boxes(3, 0.0),
        ),
        hs(
            36,
            (19.0, 12.0, 16.0),
            (10.0, 10.0, 10.0),
            lambda x1, x2, x3: -x1 * x2 * x3,
            (20.0, 11.0, 15.0),
            at_least_0=lambda x1, x2, x3: (72 - x1 - 2 * x2 - 2 * x3,),
            box={1: (0.0, 20.0), 2: (0.0, 11.0), 3: (0.0, 42.0)},
            convex=False,
        ),
        hs(
            37,
            (25.0, 13.0, 12.0),
            (10.0, 10.0, 10.0),
            lambda x1, x2, x3: -x1 * x2 * x3,
            (24.0, 12.0, 12.0),
            at_least_0=lambda x1, x2, x3: (72 - x1 - 2 * x2 - 2 * x3, x1 + 2 * x2 + 2 * x3),
            box=boxes(3, 0.0, 42.0),
            convex=False,
        ),
        hs(
            43,
            (1.0, 2.0, 2.0, -1.0),
            (0.0, 0.0, 0.0, 0.0),
            lambda x1, x2, x3, x4: x1**2 + x2**2 + 2 * x3**2 + x4**2 - 5 * x1 - 5 * x2 - 21 * x3 + 7 * x4,
            (0.0, 1.0, 2.0, -1.0),
            at_least_0=lambda x1, x2, x3, x4: (
                8 - x1**2 - x2**2 - x3**2 - x4**2 - x1 + x2 - x3 + x4,
                10 - x1**2 - 2 * x2**2 - x3**2 - 2 * x4**2 + x1 + x4,
                5 - 2 * x1**2 - x2**2 - x3**2 - 2 * x1 + x2 + x4,
            ),
        ),
        hs(
            44,
            (-0.1, 3.1, 0.1, 4.1),
            (0.2, 2.0, 0.2, 3.0),
            lambda x1, x2, x3, x4: x1 - x2 - x3 - x1 * x3 + x1 * x4 + x2 * x3 - x2 * x4,
            (0.0, 3.0, 0.0, 4.0),
            at_least_0=lambda x1, x2, x3, x4: (
                8 - x1 - 2 * x2,
                12 - 4 * x1 - x2,
                12 - 3 * x1 - 4 * x2,
                8 - 2 * x3 - x4,
                8 - x3 - 2 * x4,
                5 - x3 - x4,
            ),
            box=boxes(4, 0.0),
            convex=False,
        ),
        hs(
            45,
            (1.1, 2.0, 3.0, 4.0, 5.1),
            (0.9, 1.8, 2.7, 3.6, 4.5),
            lambda x1, x2, x3, x4, x5: 2 - x1 * x2 * x3 * x4 * x5 / 120,
            (1.0, 2.0, 3.0, 4.0, 5.0),
            box={i: (0.0, float(i)) for i in range(1, 6)},
            convex=False,
        ),
        hs(
            65,
            (4.0, 4.0, 5.0),
            (1.0, 1.0, 1.0),
            lambda x1, x2, x3: (x1 - x2) ** 2 + (x1 + x2 - 10) ** 2 / 9 + (x3 - 5) ** 2,
            (3.650461821, 3.650461821, 4.6204170507),
            at_least_0=lambda x1, x2, x3: (48 - x1**2 - x2**2 - x3**2,),
            box={1: (-4.5, 4.5), 2: (-4.5, 4.5), 3: (-5.0, 5.0)},
        ),
        hs(
            66,
            (0.5, 1.2, 3.0),
            (0.1, 1.5, 6.0),
            lambda x1, x2, x3: 0.2 * x3 - 0.8 * x1,
            (0.1841264879, 1.202167873, 3.327322322),
            at_least_0=lambda x1, x2, x3: (x2 - torch.exp(x1), x3 - torch.exp(x2)),
            box={1: (0.0, 100.0), 2: (0.0, 100.0), 3: (0.0, 10.0)},
        ),
        hs(
            76,
            (1.0, 2.0, 0.5, 0.5),
            (0.1, 1.0, 0.5, 0.5),
            lambda x1, x2, x3, x4: x1**2 + x2**2 / 2 + x3**2 + x4**2 / 2 - x1 * x3 + x3 * x4 - x1 - 3 * x2 + x3 - x4,
            (3 / 11, 23 / 11, 0.0, 6 / 11),
            at_least_0=lambda x1, x2, x3, x4: (
                5 - x1 - 2 * x2 - x3 - x4,
                4 - 3 * x1 - x2 - 2 * x3 + x4,
                x2 + 4 * x3 - 1.5,
            ),
            box=boxes(4, 0.0),
        ),
        hs(
            100,
            (3.0, 2.0, 0.0, 5.0, 0.0, 1.0, 1.0),
            (1.0, 1.5, 0.0, 4.0, 0.0, 1.0, 1.5),
            lambda x1, x2, x3, x4, x5, x6, x7: (
                (x1 - 10) ** 2
                + 5 * (x2 - 12) ** 2
                + x3**4
                + 3 * (x4 - 11) ** 2
                + 10 * x5**6
                + 7 * x6**2
                + x7**4
                - 4 * x6 * x7
                - 10 * x6
                - 8 * x7
            ),
            (2.330499, 1.951372, -0.4775414, 4.365726, -0.6244870, 1.038131, 1.594227),
            at_least_0=lambda x1, x2, x3, x4, x5, x6, x7: (
                127 - 2 * x1**2 - 3 * x2**4 - x3 - 4 * x4**2 - 5 * x5,
                282 - 7 * x1 - 3 * x2 - 10 * x3**2 - x4 + x5,
                196 - 23 * x1 - x2**2 - 6 * x6**2 + 8 * x7,
                -4 * x1**2 - x2**2 + 3 * x1 * x2 - 2 * x3**2 - 5 * x6 + 11 * x7,
            ),
            convex=False,  # 7 x6^2 - 4 x6 x7 + x7^4 is not for |x7| < 0.31
        ),
        hs(
            113,
            (5.0,) * 10,
            (2.0, 3.0, 5.0, 5.0, 1.0, 2.0, 7.0, 3.0, 6.0, 10.0),
            lambda x1, x2, x3, x4, x5, x6, x7, x8, x9, x10: (
                x1**2
                + x2**2
                + x1 * x2
                - 14 * x1
                - 16 * x2
                + (x3 - 10) ** 2
                + 4 * (x4 - 5) ** 2
                + (x5 - 3) ** 2
                + 2 * (x6 - 1) ** 2
                + 5 * x7**2
                + 7 * (x8 - 11) ** 2
                + 2 * (x9 - 10) ** 2
                + (x10 - 7) ** 2
                + 45
            ),
            (2.171996, 2.363683, 8.773926, 5.095984, 0.9906548, 1.430574, 1.321644, 9.828726, 8.280092, 8.375927),
            at_least_0=lambda x1, x2, x3, x4, x5, x6, x7, x8, x9, x10: (
                105 - 4 * x1 - 5 * x2 + 3 * x7 - 9 * x8,
                -10 * x1 + 8 * x2 + 17 * x7 - 2 * x8,
                8 * x1 - 2 * x2 - 5 * x9 + 2 * x10 + 12,
                -3 * (x1 - 2) ** 2 - 4 * (x2 - 3) ** 2 - 2 * x3**2 + 7 * x4 + 120,
                -5 * x1**2 - 8 * x2 - (x3 - 6) ** 2 + 2 * x4 + 40,
                -((x1 - 8) ** 2) / 2 - 2 * (x2 - 4) ** 2 - 3 * x5**2 + x6 + 30,
                -(x1**2) - 2 * (x2 - 2) ** 2 + 2 * x1 * x2 - 14 * x5 + 6 * x6,
                3 * x1 - 6 * x2 - 12 * (x9 - 8) ** 2 + 7 * x10,
            ),
        ),
    ]


def quadratic(name: str, p: Tensor, q: Tensor, a: Tensor, b: Tensor, start: Tensor, inside: Tensor) -> Problem:
    """min 1/2 x.P x + q.x subject to A x <= b, solved by CVXPY when it is first asked for."""
    constraints = [Constraint(f"a{i}", upper=b[i].item(), scale=1.0) for i in range(len(b))]

    def loss(x):
        return x @ p @ x / 2 + q @ x

    def measure(x):
        return {f"a{i}": v for i, v in enumerate((a @ x).unbind())}

    @cache
    def solved():
        import cvxpy as cp  # benchmarks.solvers uses this module without it

        x = cp.Variable(len(q))
        row = a.numpy() @ x <= b.numpy()
        cp.Problem(cp.Minimize(cp.quad_form(x, cp.psd_wrap(p.numpy())) / 2 + q.numpy() @ x), [row]).solve(cp.CLARABEL)
        return torch.from_numpy(x.value), torch.from_numpy(row.dual_value)

    answer = refined(loss, constraints, measure, lambda: solved()[0])
    return Problem(name, start, inside, loss, constraints, measure, answer, cvxpy=solved)


def random_quadratic(seed: int) -> Problem:
    """Strictly convex, n of 3 to 8 and m of 3 to 10, with a minimum outside; some of the bounds bind."""
    generator = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(3, high, (), generator=generator)) for high in (9, 11))
    root, a = (torch.randn(rows, n, generator=generator, dtype=F64) for rows in (n, m))
    p = root @ root.T / n + torch.eye(n, dtype=F64) / 2
    inside, free = (torch.randn(n, generator=generator, dtype=F64) for _ in range(2))
    b = a @ inside + 0.1 + torch.rand(m, generator=generator, dtype=F64)
    free = inside + 3 * (free - inside)  # the minimum without bounds, and the start: violates some of them
    return quadratic(f"QP {seed}", p, -p @ free, a, b, free, inside)


def smallest_norm(seed: int, n: int = 5, m: int = 8) -> Problem:
    """min ||x||^2 subject to A x <= b, with 0 outside."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=generator, dtype=F64)
    inside = torch.randn(n, generator=generator, dtype=F64) * 2
    b = a @ inside + 0.1 + torch.rand(m, generator=generator, dtype=F64)
    zero = torch.zeros(n, dtype=F64)
    return quadratic(f"smallest norm {seed}", 2 * torch.eye(n, dtype=F64), zero, a, b, zero, inside)


class Classifier:
    """Logistic regression on 60 fixed points in the plane (and an offset), whose labels depend on a group as well."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        group = torch.arange(60) % 2
        points = torch.randn(60, 2, generator=generator, dtype=F64) + torch.stack([group, 0 * group], 1)
        self.x = torch.cat([points, torch.ones(60, 1, dtype=F64)], 1)
        noise = torch.randn(60, generator=generator, dtype=F64)
        self.y = torch.where(points.sum(1) - 0.5 + noise > 0, 1.0, -1.0).to(F64)
        self.covariance = (group - 0.5).to(F64) @ self.x / 60  # of the group with the score x.w

    def loss(self, w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-self.y * (self.x @ w)).mean()

    def problem(self, name: str, constraint: Constraint, value: Callable, start: Tensor) -> Problem:
        """``value(w)`` for tensors and for CVXPY's variables; w = 0 is strictly inside."""

        @cache
        def solved():
            import cvxpy as cp

            w = cp.Variable(3)
            margins = cp.multiply(self.y.numpy(), self.x.numpy() @ w)
            rows = [] if constraint.lower is None else [value(w) >= constraint.lower]
            rows += [value(w) <= constraint.upper]
            cp.Problem(cp.Minimize(cp.sum(cp.logistic(-margins)) / 60), rows).solve(cp.CLARABEL)
            return torch.from_numpy(w.value), tensor(*(float(row.dual_value) for row in rows))

        def measure(w):
            return {constraint.name: value(w)}

        answer = refined(self.loss, [constraint], measure, lambda: solved()[0])
        inside = torch.zeros(3, dtype=F64)
        return Problem(f"classifier, {name}", start, inside, self.loss, [constraint], measure, answer, cvxpy=solved)

    def small(self) -> Problem:
        norm = Constraint("norm", upper=1.0, scale=1.0)
        return self.problem("norm", norm, lambda w: (w**2).sum(), tensor(2.0, -1.0, 0.5))

    def fair(self) -> Problem:
        def covariance(w):
            return (self.covariance if isinstance(w, Tensor) else self.covariance.numpy()) @ w

        window = Constraint("covariance", lower=-0.1, upper=0.1, scale=1.0)
        return self.problem("covariance", window, covariance, tensor(2.0, 0.5, 0.5))


BARRIER_POINTS = [linear(), projection(), half_space(), Categorical(size=6).problem()]
PROBLEMS = [
    *BARRIER_POINTS,
    Categorical().problem(),
    Categorical(size=20, seed=1).problem(lower=-0.3),
    two_costs(),
    maratos(),
    *hock_schittkowski(),
    *(random_quadratic(seed) for seed in range(6)),
    *(smallest_norm(seed) for seed in range(2)),
    Classifier().small(),
    Classifier().fair(),
]


# ---- pairs of bounds that can, or cannot, be met at once --------------------------------------------------------

PAIRS = ("half-spaces", "balls", "ball and half-space")


@dataclass(frozen=True)
class Pair:
    """Two convex sets as constraints "a" and "b": of ``center`` a ball bounds ||x - center||^2, of ``normal`` a
    half-space bounds normal.x. ``inside`` lies in both, or is None where they are disjoint.
    """

    start: Tensor
    constraints: list[Constraint]
    sets: dict[str, tuple[str, Tensor]]
    inside: Tensor | None

    def exact(self, x: Tensor) -> dict[str, Tensor]:
        return {
            name: ((x - vector) ** 2).sum() if kind == "center" else x @ vector
            for name, (kind, vector) in self.sets.items()
        }

    def noisy(self, x: Tensor, noise: float, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Each value as ``samples`` pathwise values [n] with independent errors of standard deviation ``noise``."""
        return {
            name: value + noise * torch.randn(samples, generator=generator, dtype=F64)
            for name, value in self.exact(x).items()
        }


def _pair(kind: str, seed: int, dimension: int, overlap: float) -> Pair:
    """Two sets that share a length of ``overlap`` along a random direction (less than 0: that far apart)."""
    generator = torch.Generator().manual_seed(seed)
    start, center, direction = torch.randn(3, dimension, generator=generator, dtype=F64).unbind()
    direction = direction / direction.norm()
    radius, other = (1 + torch.rand(2, generator=generator, dtype=F64)).tolist()
    edge = center + radius * direction  # of the first set, which ends here
    sets = {"a": ("center", center), "b": ("normal", direction)}
    first = Constraint("a", upper=radius**2, scale=1.0)
    second = Constraint("b", lower=(edge @ direction).item() - overlap, scale=1.0)
    if kind == "half-spaces":
        sets["a"] = ("normal", direction)
        first = Constraint("a", upper=(edge @ direction).item(), scale=1.0)
    if kind == "balls":
        sets["b"] = ("center", edge + (other - overlap) * direction)
        second = Constraint("b", upper=other**2, scale=1.0)
    inside = edge - overlap / 2 * direction if overlap > 0 else None
    return Pair(3 * start, [first, second], sets, inside)


def infeasible_pair(kind: str, seed: int, dimension: int = 2, gap: float = 0.5) -> Pair:
    """6. Two sets of one of `PAIRS` with ``gap`` > 0 between them."""
    return _pair(kind, seed, dimension, -gap)


def feasible_pair(kind: str, seed: int, dimension: int = 2, overlap: float = 0.5) -> Pair:
    """The same with a common part that is ``overlap`` > 0 wide (at most the smallest diameter, 2)."""
    return _pair(kind, seed, dimension, overlap)


def sampled_run(steps: int, seed: int, loss_scale: float = 1.0, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Problem 4 from 16 samples a step (Adam 0.02); E[c], task gap and multiplier of the last quarter's steps.

    ``options`` are the objective's: rule, schedule, noise_floor. The loss is multiplied by ``loss_scale``; gap and
    multiplier are given in the old unit.
    """
    problem = Categorical()
    generator = torch.Generator().manual_seed(seed)
    theta = problem.log_q.clone().requires_grad_()
    objective = BarrierObjective(None, [Constraint("c", upper=0.0, scale=1.0)], **options)
    optimizer = torch.optim.Adam([theta], lr=0.02)
    optimum = problem.kl(problem.tilted(problem.multiplier)).item()
    rows = []
    for step in range(steps):
        log_p = theta.log_softmax(0)
        y = torch.multinomial(log_p.exp().detach(), 16, replacement=True, generator=generator)
        out = objective.combine(loss_scale * problem.kl(theta), {"c": Sampled(problem.cost[y], log_p[y])})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
        if step >= steps * 3 // 4:
            with torch.no_grad():
                cost, gap = problem.expected(theta.log_softmax(0)).item(), problem.kl(theta).item() - optimum
            rows.append((cost, gap, objective.report()[0].multiplier / loss_scale))
    costs, gaps, multipliers = torch.tensor(rows, dtype=F64).T
    return costs, gaps, multipliers
