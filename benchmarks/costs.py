"""The numbers of the weights suite: costs of responses or tokens, and the right weights for them."""

import math
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .candidate import Outputs

#: As in `barrierlm.estimators`: exact below half of them, then eight per octave.
POSITIONS = 128
MU = 0.1


class WeightsProblem:
    """K constraints on B responses: two-sided ones, upper bounds and lower bounds in turn.

    Per response they come in groups of 4 with a leave-one-out baseline; per token, with reward-to-go and a baseline
    by position. The barrier is the relaxed log barrier with the linear extension, s = mu^2.
    """

    dtype = torch.float32

    def __init__(self, constraints: int, responses: int, device: torch.device, *, per_token: bool = False):
        self.device, self.per_token = device, per_token
        self.constraints, self.responses = constraints, responses
        random: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        lengths = [16 + 7 * i % 64 for i in range(responses)]
        self.cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
        self.costs = torch.rand(constraints, sum(lengths) if per_token else responses, **random)
        per_response = sum(lengths) / responses / 2 if per_token else 0.5
        self.center = per_response * (0.8 + 0.4 * torch.rand(constraints, dtype=torch.float64, **random))
        kind = torch.arange(constraints, device=device) % 3
        self.lower = torch.where(kind == 1, -math.inf, 0.9 * per_response).double()
        self.upper = torch.where(kind == 2, math.inf, 1.1 * per_response).double()
        self.scale = torch.full_like(self.center, 0.2 * per_response)
        self.mu = torch.tensor(MU, dtype=torch.float64, device=device)
        self.groups = torch.arange(responses, device=device) // 4
        self.baselines = self.center[:, None] * torch.linspace(1, 0, POSITIONS, dtype=torch.float64, device=device)

    def step(self, forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Nothing here carries a gradient."""
        return torch.no_grad()(forward)

    def reset(self, restore: bool) -> None:
        """Nothing is kept from run to run."""

    def kept_bytes(self) -> dict[str, int]:
        """Not measured."""
        return {}

    def oracle(self) -> Outputs:
        return self._answers

    @cached_property
    def _answers(self) -> Outputs:
        """By loops over Python floats, from the definitions."""
        weights, rows = [0.0] * self.costs.shape[1], []
        coefficients = [self._coefficient(k) for k in range(self.constraints)]
        for k, values in enumerate(self.costs.double().tolist()):
            advantages, row = self._of_tokens(k, values) if self.per_token else self._of_responses(k, values)
            for i, advantage in enumerate(advantages):
                weights[i] += coefficients[k] * advantage / self.responses
            rows.append(row)
        made = {"weights": weights, "statistics": rows, "coefficients": coefficients}
        return {k: torch.tensor(v, dtype=torch.float64, device=self.device) for k, v in made.items()}

    def _of_responses(self, k: int, values: list[float]) -> tuple[list[float], list[float]]:
        """Each cost less the mean of the others in its group, and the statistics."""
        groups = self.groups.tolist()
        members = [[i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))]
        advantages = [0.0] * len(values)
        for group in members:
            for i in group:
                others = math.fsum(values[j] for j in group if j != i) / (len(group) - 1)
                advantages[i] = values[i] - others
        d = [value - self.center[k].item() for value in values]
        return advantages, _statistics(d, members)

    def _of_tokens(self, k: int, values: list[float]) -> tuple[list[float], list[float]]:
        """Reward-to-go less the baseline of its position, and the statistics with sums and counts by position."""
        baseline, positions = self.baselines[k].tolist(), [0.0] * (2 * POSITIONS)
        advantages, d = [], []
        for start, end in pairwise(self.cu_seqlens.tolist()):
            d.append(math.fsum(values[start:end]) - self.center[k].item())
            for i in range(start, end):
                to_go, bucket = math.fsum(values[i:end]), _bucket(i - start)
                positions[bucket] += to_go
                positions[POSITIONS + bucket] += 1
                advantages.append(to_go - baseline[bucket])
        # No groups are given, so every response is one of its own.
        return advantages, _statistics(d, [[i] for i in range(len(d))]) + positions

    def _coefficient(self, k: int) -> float:
        center, lower, upper, scale = (x[k].item() for x in (self.center, self.lower, self.upper, self.scale))

        def slope(z: float) -> float:
            return MU / -z if z <= -(MU**2) else MU / MU**2

        return (slope((center - upper) / scale) - slope((lower - center) / scale)) / scale


def _statistics(d: list[float], members: list[list[int]]) -> list[float]:
    """Count, sum, squares; number of groups, and over groups T^2, T n and n^2; numbers that are not finite."""
    totals, sizes = [math.fsum(d[i] for i in group) for group in members], [float(len(group)) for group in members]
    return [
        float(len(d)),
        math.fsum(d),
        math.fsum(x * x for x in d),
        float(len(members)),
        math.fsum(t * t for t in totals),
        math.fsum(t * n for t, n in zip(totals, sizes, strict=True)),
        math.fsum(n * n for n in sizes),
        0.0,
    ]


def _bucket(position: int) -> int:
    half = POSITIONS // 2
    return position if position < half else min(POSITIONS - 1, half + int(8 * math.log2(position / half)))


def position_buckets(position: Tensor) -> Tensor:
    """The same for a tensor of positions."""
    half = POSITIONS // 2
    octaves = torch.log2(position.clamp(min=half).double() / half)
    return torch.where(position < half, position, (half + (8 * octaves).long()).clamp(max=POSITIONS - 1))
