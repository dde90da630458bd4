"""Random inputs of `constraint_weights`, and what barrierlm's `Sampled` makes of them, one constraint at a time."""

from dataclasses import dataclass, field
from typing import Any

import torch

from barrierlm import Sampled
from barrierlm.estimators import NUM_POSITIONS, Column

F64 = torch.float64
EXTENSIONS = ("linear", "quadratic", "polynomial", "exponential")


@dataclass
class Case:
    """K constraints of B responses, with one cost each or, with ``per_token``, one for each of their tokens."""

    constraints: int
    lengths: list[int]
    per_token: bool = False
    grouped: bool = False
    off_policy: bool = False
    seed: int = 0
    clip: float = 0.2
    costs: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        responses = len(self.lengths)
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0)
        size = sum(self.lengths) if self.per_token else responses
        self.costs = 1 + 3 * normal(self.constraints, size)
        self.center = normal(self.constraints)
        self.coefficients = normal(self.constraints)
        self.baselines = normal(self.constraints, NUM_POSITIONS)
        # Prompt ids in any order, 0 and negative ones too, at least two responses each.
        ids = (torch.arange(responses) // 2).clamp(max=max(responses // 2 - 1, 0)) * 7 - 7
        self.groups = ids[torch.randperm(responses, generator=generator)]
        self.logps = normal(size).requires_grad_()
        self.old_logps = self.logps.detach() + 0.3 * normal(size)

    @property
    def num_responses(self) -> int:
        return len(self.lengths)

    @property
    def ratios(self) -> torch.Tensor:
        """p / p_old of whole responses, clipped."""
        log_ratios = self.logps.detach() - self.old_logps
        if self.per_token:
            log_ratios = torch.stack([part.sum() for part in log_ratios.split(self.lengths)] or [log_ratios]).reshape(
                -1
            )
        return log_ratios.exp().clamp(max=1 + self.clip)

    def data(self, **changes: Any) -> dict[str, Any]:
        """The arguments of `constraint_weights` but for the barrier."""
        given = {"costs": self.costs, "center": self.center}
        if self.per_token:
            given |= {"cu_seqlens": self.cu_seqlens, "baselines": self.baselines}
        if self.grouped:
            given["groups"] = self.groups
        if self.off_policy:
            given["ratios"] = self.ratios
        return given | changes

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(advantages [K, B or N], statistics [K, 8 or 8 + 2 P]) by `Sampled.measure`."""
        advantages, rows = [], []
        for costs, center, baselines in zip(self.costs, self.center, self.baselines, strict=True):
            options: dict[str, Any] = {"groups": self.groups if self.grouped else None}
            if self.off_policy:
                options |= {"old_logps": self.old_logps, "clip": self.clip}
            if self.per_token:
                sampled = Sampled.per_token(costs, self.logps, self.cu_seqlens, **options)
            else:
                sampled = Sampled(costs, self.logps, **options)
            measured = sampled.measure(center, baselines)
            (advantage,) = torch.autograd.grad(measured.total, self.logps)
            row = [measured.row[: Column.EXACT], measured.row[[Column.NONFINITE]]]
            own = torch.cat([*row, measured.row[Column.POSITIONS :]] if self.per_token else row)
            bad = measured.row[Column.NONFINITE]
            if bad > 0:  # the rest of such a row counts for nothing: here it is 0, there it may be anything
                own = torch.zeros_like(own)
                own[len(row[0])] = bad
            advantages.append(advantage)
            rows.append(own)
        return torch.stack(advantages), torch.stack(rows)


def barrier(constraints: int, seed: int = 0, *, mu: float = 0.3) -> dict[str, torch.Tensor]:
    """Bounds about a center near 0, some of them missing, some violated."""
    generator = torch.Generator().manual_seed(seed)
    lower = torch.randn(constraints, generator=generator, dtype=F64) - 0.5
    upper = lower + 2 * torch.rand(constraints, generator=generator, dtype=F64)
    lower[1::3], upper[2::3] = -torch.inf, torch.inf
    scale = 0.5 + torch.rand(constraints, generator=generator, dtype=F64)
    return {"lower": lower, "upper": upper, "scale": scale, "mu": mu * scale}


def assert_same(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """All three results, to a tolerance relative to the largest weight and to the largest number of each row.

    Numbers in which larger ones cancel cannot be right to their own size.
    """
    for name, a, b in zip(("weights", "statistics", "coefficients"), got, expected, strict=True):
        assert a.shape == b.shape, name
        for row, own in zip(torch.atleast_2d(a), torch.atleast_2d(b), strict=True):
            largest = own[own.isfinite()].abs().max().item() if name != "coefficients" and own.isfinite().any() else 1.0
            options = {"rtol": tolerance, "atol": tolerance * max(largest, 1e-6), "equal_nan": True}
            torch.testing.assert_close(row, own, **options, msg=lambda m, n=name: f"{n}: {m}")
