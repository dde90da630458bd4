"""Constraint weights and window statistics in torch, in fp64. The specification.

Vectorised over the constraints, with no wait for the device and no shape that depends on values. A NaN stays in the
row of its own constraint until the end, where that constraint is dropped as a whole.
"""

import torch
from torch import Tensor

from .._segments import rows_to_sequences

#: From this magnitude on a number counts as infinite, so that squares of sums stay finite in fp64.
HUGE = 1e70

#: Columns of the statistics before the position sums. The last one counts the inputs that are not finite.
NUM_COLUMNS = 8
_COUNT, _SUM, _NONFINITE = 0, 1, 7

#: Up to how many responses groups are found by comparing all pairs.
_FEW = 128


def weights_and_statistics(
    costs: Tensor,
    center: Tensor,
    coefficients: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    scale: Tensor | None,
    mu: Tensor | None,
    s: Tensor | None,
    statistics: Tensor | None,
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    baselines: Tensor | None,
    ratios: Tensor | None,
    num_samples: Tensor | None,
    samples: int,
    extension: str,
    order: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, statistics, coefficients) as in `ConstraintWeights`. Arguments as in the API, already checked;
    `samples` counts where `num_samples` is None.
    """
    dtype = torch.float64 if costs.dtype == torch.float64 else torch.float32
    center = center.double()
    positions = None
    if cu_seqlens is None:
        d, advantages, nonfinite, grouped = _per_response(costs, center, groups, ratios)
    else:
        d, advantages, nonfinite, positions = _per_token(costs, center, cu_seqlens, baselines, ratios)
        grouped = None if groups is None else _group_sums(d, groups)
    dropped = nonfinite > 0
    own = _statistics(d, dropped, nonfinite, grouped, positions)

    if coefficients is None:
        at = center
        if statistics is not None:
            # Where another rank's numbers were not finite, the term is dropped here as well.
            elsewhere = statistics.select(1, _NONFINITE).ne(0)
            at = center + _reduced_mean(statistics).masked_fill_(elsewhere, 0)
            dropped = dropped | elsewhere
        coefficients = _coefficients(at, lower, upper, scale, mu, s, extension, order)
    else:
        coefficients = coefficients.to(torch.float64, copy=True)
    share = coefficients / (max(samples, 1) if num_samples is None else num_samples.double().clamp(min=1))
    # A share that is not finite makes all terms of its constraint so, and those become 0.
    terms = share.masked_fill_(dropped, torch.nan)[:, None] * advantages
    return terms.nan_to_num_(0, 0, 0).sum(0).to(dtype), own, coefficients


def _per_response(
    costs: Tensor, center: Tensor, groups: Tensor | None, ratios: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Samples d and advantages [K, B], numbers of inputs that are not finite [K], d's group sums and sizes."""
    d = centered = costs - center[:, None]
    nonfinite = _count_nonfinite(centered)
    if ratios is not None:
        nonfinite = nonfinite + _count_nonfinite(ratios)
        d = ratios * centered
    if groups is None:
        return d, d, nonfinite, None
    grouped = sums, sizes = _group_sums(d, groups)
    if ratios is not None:
        sums, _ = _group_sums(centered, groups)
    # A cost and its baseline are both relative to the center, which cancels. Where a response is alone in its
    # group nothing is subtracted, and the center is its baseline.
    advantages = torch.addcdiv(centered, sums - centered, (sizes - 1).clamp_(min=1), value=-1)
    return d, advantages if ratios is None else ratios * advantages, nonfinite, grouped


def _per_token(
    costs: Tensor, center: Tensor, cu_seqlens: Tensor, baselines: Tensor | None, ratios: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Samples d [K, B], advantages [K, N], numbers of inputs that are not finite [K], position sums [K, 2 P]."""
    cu_seqlens, length = cu_seqlens.long(), costs.shape[1]
    place = torch.arange(length, device=costs.device)
    seq = rows_to_sequences(cu_seqlens, length)
    start, stop = cu_seqlens[seq.clamp(max=len(cu_seqlens) - 1)], cu_seqlens[(seq + 1).clamp(max=len(cu_seqlens) - 1)]
    inside = (place >= start) & (place < stop)
    costs = torch.where(inside, costs, 0)
    before = torch.nn.functional.pad(costs.cumsum(1, dtype=torch.float64), (1, 0))
    advantages = torch.where(inside, before[:, stop] - before[:, :-1], 0)  # the reward-to-go
    d = before[:, cu_seqlens[1:]] - before[:, cu_seqlens[:-1]] - center[:, None]
    # A center that is not finite counts for all responses, as it does with costs per response.
    nonfinite = torch.where(center.abs() < HUGE, _count_nonfinite(costs), d.shape[1])
    positions = None
    if baselines is not None and baselines.shape[1]:
        nonfinite = nonfinite + _count_nonfinite(baselines)
        bucket = position_bucket((place - start).clamp(min=0), baselines.shape[1])
        positions = _position_sums(advantages, inside, bucket, baselines.shape[1])
        advantages = torch.where(inside, advantages - baselines[:, bucket], 0)
    if ratios is not None and d.shape[1]:
        nonfinite = nonfinite + _count_nonfinite(ratios)
        d, advantages = ratios * d, ratios[seq.clamp(max=d.shape[1] - 1)] * advantages
    return d, advantages, nonfinite, positions


def _count_nonfinite(values: Tensor) -> Tensor:
    """How many entries along the last dimension are NaN, infinite or as good as infinite."""
    return (~(values.abs() < HUGE)).sum(-1, dtype=torch.float64)


def position_bucket(position: Tensor, num_buckets: int) -> Tensor:
    """The bucket of a token position: exact below half the buckets, then eight buckets per octave."""
    half = max(num_buckets // 2, 1)
    eighths = 8 * torch.log2(position.clamp(min=half).double() / half)
    return torch.where(position < half, position, half + eighths.long()).clamp(max=num_buckets - 1)


def _position_sums(to_go: Tensor, inside: Tensor, bucket: Tensor, num_buckets: int) -> Tensor:
    """Sums of the reward-to-go [K, N] by position bucket, and numbers of tokens inside responses: [K, 2 P]."""
    sums = _add_up(torch.cat([to_go, inside.expand_as(to_go).to(to_go)]), bucket, num_buckets)
    return torch.cat(sums.chunk(2), 1)


def _group_sums(d: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of d [K, B] over each response's group, itself included, [K, B]; and the groups' sizes [B]."""
    if len(groups) <= _FEW:  # fewer calls, but B^2 comparisons
        same = (groups[:, None] == groups).double()
        return d @ same, same.sum(1)
    # A group's slot is where its id first occurs in sorted order. Unlike torch.unique this waits for nothing.
    groups = groups.contiguous()
    order = groups.sort().values
    slot = torch.searchsorted(order, groups)
    sizes = torch.searchsorted(order, groups, right=True) - slot
    return _add_up(d, slot, len(groups)).index_select(1, slot), sizes.double()


def _add_up(values: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Sums of the columns of `values` [K, n] in each slot: [K, slots]."""
    if values.is_cpu:  # where it adds one after the other
        return values.new_zeros(values.shape[0], slots).index_add_(1, slot, values)
    return _sort_and_add_up(values, slot, slots)


def _sort_and_add_up(values: Tensor, slot: Tensor, slots: int) -> Tensor:
    """The same where index_add adds in any order: index_put sorts first."""
    rows = torch.arange(values.shape[0], device=values.device)[:, None]
    return values.new_zeros(values.shape[0], slots).index_put_((rows, slot), values, accumulate=True)


def _statistics(
    d: Tensor, dropped: Tensor, nonfinite: Tensor, grouped: tuple[Tensor, Tensor] | None, positions: Tensor | None
) -> Tensor:
    """The columns that `ConstraintWeights` lists; those of dropped constraints are 0 but for the last one."""
    squares, ones = d * d, torch.ones_like(d)
    if grouped is None:  # each sample is a group of its own
        parts = [ones, d, squares, ones, squares, d, ones]
    else:
        sums, sizes = grouped
        # Each group is seen once per member: sum_i d_i T_i = sum_g T_g^2, and likewise for the other columns.
        parts = [ones, d, squares, ones / sizes, d * sums, sums, ones * sizes]
    columns = [torch.stack(parts, 1).sum(2).masked_fill_(dropped[:, None], 0), nonfinite[:, None]]
    if positions is not None:
        columns.append(positions.masked_fill_(dropped[:, None], 0))
    return torch.cat(columns, 1)


def _reduced_mean(statistics: Tensor) -> Tensor:
    """A window's mean relative to the center, [K]; 0 where nothing was measured."""
    return statistics.select(1, _SUM).double() / statistics.select(1, _COUNT).double().clamp(min=1)


def _coefficients(
    at: Tensor,
    lower: Tensor | None,
    upper: Tensor | None,
    scale: Tensor | None,
    mu: Tensor | None,
    s: Tensor | None,
    extension: str,
    order: int,
) -> Tensor:
    """Derivative of the relaxed log barriers of both bounds at the means `at` [K], per cost unit."""
    assert mu is not None
    mu = mu.double()
    width = mu * mu if s is None else s.double()
    if scale is not None:
        width = width * scale.double()
    above = None if upper is None else _slope(upper.double() - at, mu, width, extension, order)
    below = None if lower is None else _slope(at - lower.double(), mu, width, extension, order)
    if above is None:
        assert below is not None
        return -below
    return above if below is None else above - below


def _slope(slack: Tensor, mu: Tensor, width: Tensor, extension: str, order: int) -> Tensor:
    """mu / slack down to a slack of `width`, then mu / width times the extension's V', which is 1 there."""
    slope = mu / torch.maximum(slack, width)
    if extension == "linear":
        return slope
    r = (-slack / width).clamp(min=-1)
    if extension == "quadratic":
        return slope * (r + 2)
    if extension == "polynomial":
        return slope * ((r + order) / (order - 1)) ** (order - 1)
    return slope * torch.exp(1 + r)
