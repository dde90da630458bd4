"""1 to 256 ranks in one process: each has an objective of its own, and only the sums pass between them.

Ranks have unequal numbers of samples, those with the longest (dearest) responses have the fewest, and in every window
some drop out, dear ones more often. That is what makes a mean of the ranks' means wrong.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from barrierlm import BarrierObjective, Constraint, RelaxedLogBarrier, Sampled

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WINDOWS, SAMPLES, DROPOUT = 60, 2048, 0.1


def make() -> BarrierObjective:
    """Relaxed barrier, so that a multiplier is a function of the estimate; the schedule and the average adapt."""
    return BarrierObjective(None, [Constraint("cost", upper=1.2, scale=0.5)], rule=RelaxedLogBarrier())


def draw(ranks: int, generator: torch.Generator) -> list[Tensor]:
    """Every rank's samples of one window."""
    position = torch.arange(ranks) / max(1, ranks - 1)
    shares = (1.5 - position) * torch.rand(ranks, generator=generator)
    assigned = torch.multinomial(shares, SAMPLES, replacement=True, generator=generator)
    sizes = torch.bincount(assigned, minlength=ranks)
    dropped = torch.rand(ranks, generator=generator) < DROPOUT * (0.5 + position)
    dropped[0] = False
    values = []
    for rank in range(ranks):
        size = 0 if dropped[rank] else int(sizes[rank])
        values.append(0.7 + 0.6 * position[rank] + 0.5 * torch.randn(size, generator=generator, dtype=torch.float64))
    return values


def add_up(rows: list[Tensor], rank: int, how: str) -> Tensor:
    """The sum as a rank gets it: in the same order on all of them (ring, tree), or beginning with its own."""
    order = rows if how == "same order" else rows[rank:] + rows[:rank]
    total = torch.zeros_like(rows[0])
    for row in order:
        total = total + row
    return total


def _reduced(calls: int, rows: Tensor, group: Any) -> tuple[int, Tensor]:
    """In place of `Window.reduce`: what the all-reduce has given this rank."""
    return calls, rows


def simulate(ranks: int, how: str = "same order", seed: int = 0) -> dict[str, Any]:
    """Errors against one process that has all samples, and how far the ranks' multipliers lie apart."""
    generator = torch.Generator().manual_seed(seed)
    objectives, whole = [make() for _ in range(ranks)], make()
    logps = torch.zeros(SAMPLES, dtype=torch.float64, requires_grad=True)
    error = spread = ratio = 0.0
    local_spread, mean_of_means, sampling = [], [], []
    for _ in range(WINDOWS):
        values = draw(ranks, generator)
        for objective, mine in zip([*objectives, whole], [*values, torch.cat(values)], strict=True):
            objective.combine(None, {"cost": Sampled(mine, logps[: len(mine)])})
        sums = [objective._window.reduce(None) for objective in objectives]
        calls, rows = sum(c for c, _ in sums), [r for _, r in sums]
        same = add_up(rows, 0, how) if how == "same order" else None
        for rank, objective in enumerate(objectives):
            total = same if same is not None else add_up(rows, rank, how)
            objective._window.reduce = functools.partial(_reduced, calls, total.clone())  # type: ignore[method-assign]
            objective.step()
            del objective._window.reduce  # type: ignore[misc]
        whole.step()
        exact = whole.report()[0]
        reports = [objective.report()[0] for objective in objectives]
        multipliers = torch.tensor([r.multiplier for r in reports], dtype=torch.float64)
        error = max(error, *(abs(r.estimate - exact.estimate) / abs(exact.estimate) for r in reports))
        spread = max(spread, float((multipliers.max() - multipliers.min()) / multipliers.mean()))
        ratio = max(ratio, float((multipliers / exact.multiplier - 1).abs().max()))
        # What the others do: a mean of the ranks' means; a multiplier from each rank's own mean.
        have = [v for v in values if len(v)]
        means = torch.stack([v.mean() for v in have])
        mean_of_means.append(float(means.mean() - torch.cat(have).mean()))
        sampling.append(float(torch.cat(have).std() / math.sqrt(sum(map(len, have)))))
        z = (means - 1.2) / 0.5
        own = whole.rule.multiplier(z, torch.full_like(z, exact.mu), torch.full_like(z, exact.s))
        local_spread.append(float(own.max() / own.min().clamp(min=1e-12)))
    return {
        "ranks": ranks,
        "order": how,
        "estimate's relative error": error,
        "multipliers' relative spread": spread,
        "multipliers' relative error": ratio,
        "error of a mean of means": sum(map(abs, mean_of_means)) / len(mean_of_means),
        "standard error of a window": sum(sampling) / len(sampling),
        "largest / smallest multiplier from own means": sum(local_spread) / len(local_spread),
    }
