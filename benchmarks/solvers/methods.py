"""What is compared: a method takes over a run's optimizer, and has a default and a few other settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from barrierlm import (
    AdaptiveBarrier,
    AugmentedLagrangian,
    BarrierObjective,
    DualAscent,
    ExponentialSchedule,
    ModifiedBarrier,
    RelaxedLogBarrier,
    Sampled,
)
from barrierlm.barriers import Rule

from . import peers
from .problems import Gibbs, Problem

Options = dict[str, Any]


class Runner(Protocol):
    """One run of a method."""

    def step(self, loss: Tensor, measurements: Mapping[str, Tensor | Sampled]) -> None:
        """Update the variables, and whatever the method learns, from one noisy loss and its measurements."""

    def multipliers(self) -> Tensor:
        """What the method says about each bound [m], in units of the loss per unit of the constraint."""


@dataclass(frozen=True)
class Method:
    """A way to solve a problem.

    Attributes:
        start: takes problem, optimizer, number of steps and a setting, and returns the run.
        settings: by name; the first is the default, the others are the grid of its most important parameter.
        role: "ours", "baseline" (another method on this library's machinery), or "peer".
    """

    name: str
    role: str
    start: Callable[..., Runner]
    settings: Mapping[str, Options]


class Ours:
    """A rule of the library, with everything else at its default."""

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.objective = BarrierObjective(None, problem.constraints, **options)
        self.optimizer = optimizer

    def step(self, loss: Tensor, measurements: Mapping[str, Tensor | Sampled]) -> None:
        out = self.objective.combine(loss, measurements)
        self.optimizer.zero_grad()
        out.loss.backward()
        self.optimizer.step()
        self.objective.step()

    def multipliers(self) -> Tensor:
        return torch.tensor([row.multiplier / row.scale for row in self.objective.report()], dtype=torch.float64)


def _rule(kind: Callable[..., Any]) -> Callable[..., Runner]:
    def start(problem: Problem, optimizer: torch.optim.Optimizer, steps: int, **options: Any) -> Runner:
        return Ours(problem, optimizer, rule=kind(**options))

    return start


def _paper(noise_floor: float) -> Callable[..., Runner]:
    def start(problem: Problem, optimizer: torch.optim.Optimizer, steps: int, end: float) -> Runner:
        schedule = ExponentialSchedule(1.0, end, steps)
        return Ours(problem, optimizer, rule=RelaxedLogBarrier(), schedule=schedule, noise_floor=noise_floor)

    return start


def _grid(argument: str, *values: float) -> dict[str, Options]:
    return {f"{argument}={value:g}": {argument: value} for value in values}


_ALL = (
    Method("AdaptiveBarrier", "ours", _rule(AdaptiveBarrier), _grid("step", 0.05, 0.02, 0.1, 0.2)),
    Method("ModifiedBarrier", "ours", _rule(ModifiedBarrier), _grid("step", 0.05, 0.02, 0.1, 0.2)),
    Method("RelaxedLogBarrier", "ours", _paper(1.0), _grid("end", 0.01, 0.001, 0.03, 0.1)),
    Method("RelaxedLogBarrier, no noise floor", "ours", _paper(0.0), _grid("end", 0.01, 0.001, 0.03, 0.1)),
    Method("DualAscent", "baseline", _rule(DualAscent), _grid("step", 0.05, 0.003, 0.01, 0.2)),
    Method("AugmentedLagrangian", "baseline", _rule(AugmentedLagrangian), _grid("penalty", 1.0, 0.3, 3.0, 10.0)),
    Method(
        "cooper Lagrangian",
        "peer",
        peers.CooperLagrangian,
        {
            "lr=0.01": {"lr": 0.01},
            "lr=0.003, in units": {"lr": 0.003, "in_units": True},
            "lr=0.05, in units": {"lr": 0.05, "in_units": True},
            "lr=0.2, in units": {"lr": 0.2, "in_units": True},
        },
    ),
    Method(
        "cooper nuPI",
        "peer",
        peers.CooperNuPI,
        {
            "lr=0.01, Kp=1": {"lr": 0.01, "gain": 1.0},
            "lr=0.01, Kp=10, nu=0.9, in units": {"lr": 0.01, "gain": 10.0, "smoothing": 0.9, "in_units": True},
            "lr=0.05, Kp=1, in units": {"lr": 0.05, "gain": 1.0, "in_units": True},
            "lr=0.05, Kp=10, nu=0.9, in units": {"lr": 0.05, "gain": 10.0, "smoothing": 0.9, "in_units": True},
        },
    ),
    Method(
        "cooper AugmentedLagrangian",
        "peer",
        peers.CooperAugmented,
        {
            "lr=0.01, penalty=1": {"lr": 0.01, "penalty": 1.0},
            "lr=0.05, penalty=0.3, in units": {"lr": 0.05, "penalty": 0.3, "in_units": True},
            "lr=0.05, penalty=1, in units": {"lr": 0.05, "penalty": 1.0, "in_units": True},
            "lr=0.05, penalty=5, in units": {"lr": 0.05, "penalty": 5.0, "in_units": True},
        },
    ),
    Method(
        "humancompatible ALM",
        "peer",
        peers.HumanCompatibleALM,
        {
            "lr=0.01": {},
            "lr=0.01, penalty=1, in units": {"lr": 0.01, "penalty": 1.0, "in_units": True},
            "lr=0.05, penalty=1, in units": {"lr": 0.05, "penalty": 1.0, "in_units": True},
            "lr=0.05, momentum=0.9, dampening=0.9, in units": {
                "lr": 0.05,
                "momentum": 0.9,
                "dampening": 0.9,
                "in_units": True,
            },
        },
    ),
    Method(
        "humancompatible PBM",
        "peer",
        peers.HumanCompatiblePBM,
        {
            "gamma=0.1": {},
            "gamma=0.9, in units": {"gamma": 0.9, "in_units": True},
            "gamma=0.97, in units": {"gamma": 0.97, "in_units": True},
            "gamma=0.99, in units": {"gamma": 0.99, "in_units": True},
        },
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}


class Constant(Rule):
    """A given multiplier, whatever is measured."""

    def __init__(self, given: float) -> None:
        self.given = given

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        return self.given * z

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        return torch.full_like(z, self.given)


def multiplier_of_shifted_bound(of: Gibbs, shift: float) -> float:
    """The multiplier with which E[cost] is ``shift`` below the bound: the root of a decreasing function."""
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        tilted = (of.log_q - middle * of.costs[0]).softmax(0)
        if of.costs[0] @ tilted > of.bounds.value[0] - shift:
            low = middle
        else:
            high = middle
    return low


def _start(of: Problem, optimizer: torch.optim.Optimizer, steps: int, shift: float) -> Runner:
    assert isinstance(of, Gibbs)
    return Ours(of, optimizer, rule=Constant(multiplier_of_shifted_bound(of, shift)))


#: Not compared with other methods: the same rule with other units, for losses in other units.
UNITS = Method(
    "units",
    "ours",
    _rule(AdaptiveBarrier),
    {'unit="auto"': {"unit": "auto"}, **_grid("unit", 0.05, 1.0, 20.0)},
)

#: Not compared: it is told the answer, for the bound or one that is stricter by d.
ORACLE = Method(
    "oracle",
    "oracle",
    _start,
    {f"d={shift:g}": {"shift": shift} for shift in (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)},
)
