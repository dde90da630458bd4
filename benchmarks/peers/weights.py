"""What a user writes instead of `constraint_weights`: torch calls, one constraint after the other or all at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..candidate import Candidate, Outputs
from ..costs import POSITIONS, WeightsProblem, position_buckets

Forward = Callable[[], Outputs]


def naive_forward(p: WeightsProblem) -> Forward:
    """A loop over the constraints. What they share is computed once, before it."""

    def forward() -> Outputs:
        shared = _tokens(p) if p.per_token else _groups(p)
        weights, rows, coefficients = torch.zeros_like(p.costs[0], dtype=torch.float64), [], []
        for k in range(p.constraints):
            coefficient = _coefficient(p.center[k], p.lower[k], p.upper[k], p.scale[k], p.mu)
            measure = _per_token if p.per_token else _per_response
            advantage, row, finite = measure(p.costs[k : k + 1].double(), p.center[k : k + 1], p.baselines[k], *shared)
            weights = weights + torch.where(finite, coefficient * advantage[0] / p.responses, 0)
            rows.append(row[0])
            coefficients.append(coefficient)
        return {
            "weights": weights.float(),
            "statistics": torch.stack(rows),
            "coefficients": torch.stack(coefficients),
        }

    return forward


def batched_forward(p: WeightsProblem) -> Forward:
    """The same calls on all constraints at once."""

    def forward() -> Outputs:
        shared = _tokens(p) if p.per_token else _groups(p)
        coefficients = _coefficient(p.center, p.lower, p.upper, p.scale, p.mu)
        measure = _per_token if p.per_token else _per_response
        advantage, rows, finite = measure(p.costs.double(), p.center, p.baselines, *shared)
        weighted = torch.where(finite[:, None], coefficients[:, None] * advantage / p.responses, 0)
        return {"weights": weighted.sum(0).float(), "statistics": rows, "coefficients": coefficients}

    return forward


def _coefficient(center: Tensor, lower: Tensor, upper: Tensor, scale: Tensor, mu: Tensor) -> Tensor:
    """Derivative of the relaxed log barrier with the linear extension: mu / max(-z, s)."""
    above, below = (center - upper) / scale, (lower - center) / scale
    return (mu / torch.maximum(-above, mu**2) - mu / torch.maximum(-below, mu**2)) / scale


def _groups(p: WeightsProblem) -> tuple[Tensor, ...]:
    same = (p.groups[:, None] == p.groups[None, :]).double()
    return same, same.sum(1)


def _per_response(
    costs: Tensor, center: Tensor, _: Tensor, same: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [K, B], statistics [K, 8], and which constraints are finite [K]."""
    finite = torch.isfinite(costs).all(1)
    d = costs - center[:, None]
    total = d @ same
    others = (total - d) / (size - 1).clamp(min=1)
    count = torch.full_like(finite, costs.shape[1], dtype=torch.float64)
    row = [
        count,
        d.sum(1),
        (d * d).sum(1),
        (1 / size).sum().expand_as(count),
        (total * total / size).sum(1),
        total.sum(1),
        size.sum().expand_as(count),
        (~torch.isfinite(costs)).sum(1),
    ]
    return d - others, torch.where(finite[:, None], torch.stack(row, 1), 0), finite


def _tokens(p: WeightsProblem) -> tuple[Tensor, ...]:
    place = torch.arange(p.costs.shape[1], device=p.device)
    sequence = torch.searchsorted(p.cu_seqlens[1:], place, right=True)
    return p.cu_seqlens, sequence, position_buckets(place - p.cu_seqlens[sequence])


def _per_token(
    costs: Tensor, center: Tensor, baselines: Tensor, ends: Tensor, sequence: Tensor, bucket: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [K, N], statistics [K, 8 + 2P], and which constraints are finite [K]."""
    finite = torch.isfinite(costs).all(1)
    before = torch.cat([costs.new_zeros(len(costs), 1), costs.cumsum(1)], 1)
    to_go = before[:, ends[1:]][:, sequence] - before[:, :-1]
    d = before[:, ends[1:]] - before[:, ends[:-1]] - center[:, None]
    count = torch.full_like(finite, d.shape[1], dtype=torch.float64)
    squares = (d * d).sum(1)
    row = [count, d.sum(1), squares, count, squares, d.sum(1), count, (~torch.isfinite(costs)).sum(1)]
    sums = costs.new_zeros(len(costs), POSITIONS).index_add(1, bucket, to_go)
    counts = torch.zeros_like(sums).index_add(1, bucket, torch.ones_like(to_go))
    row_of_sums = torch.cat([torch.stack(row, 1), sums, counts], 1)
    return to_go - baselines.reshape(-1, POSITIONS)[:, bucket], torch.where(finite[:, None], row_of_sums, 0), finite


def _compiled(p: WeightsProblem) -> Forward:
    torch.compiler.reset()
    return torch.compile(batched_forward(p), dynamic=False)  # type: ignore[no-any-return]


PEERS = [
    Candidate("torch, all at once", batched_forward, gives="", package="torch"),
    Candidate("torch.compile of all at once", _compiled, gives="", package="torch", compiled=True),
]
