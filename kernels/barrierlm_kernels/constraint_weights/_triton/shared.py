"""What the programs of both kernels have in common. Vectors [KP] hold the K constraints, padded to a power of two."""

import triton
import triton.language as tl

#: How many responses at a time a block of responses is compared with, to find those of one group.
_OTHERS = tl.constexpr(32)


@triton.jit
def is_finite(x):
    """As in the reference, a magnitude of 1e70 is as good as infinite: squares of sums stay finite in fp64."""
    return tl.abs(x) < 1e70 if x.dtype == tl.float64 else tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def barrier_slope(slack, mu, width, EXTENSION: tl.constexpr, ORDER: tl.constexpr):
    """mu / slack down to a slack of `width`, then mu / width times the extension's V', which is 1 there."""
    # A NaN in either must come through, whichever way the hardware orders it.
    slope = mu / tl.where((slack > width) | (slack != slack), slack, width)
    if EXTENSION != "linear":
        r = -slack / width
        r = tl.where(r < -1.0, -1.0, r)
        if EXTENSION == "quadratic":
            slope *= r + 2.0
        elif EXTENSION == "polynomial":
            base = (r + ORDER) / (ORDER - 1)
            for _ in tl.static_range(ORDER - 1):
                slope *= base
        else:
            slope *= tl.exp(1.0 + r)
    return slope


@triton.jit
def coefficients_at(
    ks, valid, center, coefficients, lower, upper, scale, mu, s, reduced, mu_stride, s_stride, reduced_stride,
    EXTENSION: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """The given coefficients, or the barrier's derivatives at the center or at the reduced mean: [KP], fp64."""
    if coefficients is not None:
        result = tl.load(coefficients + ks, mask=valid, other=0.0).to(tl.float64)
    else:
        at = tl.load(center + ks, mask=valid, other=0.0).to(tl.float64)
        if reduced is not None:
            row = reduced + ks * reduced_stride
            count = tl.load(row, mask=valid, other=1.0).to(tl.float64)
            total = tl.load(row + 1, mask=valid, other=0.0).to(tl.float64)
            bad = tl.load(row + 7, mask=valid, other=0.0).to(tl.float64)
            at += tl.where(bad == 0.0, total / tl.where(count < 1.0, 1.0, count), 0.0)
        barrier = tl.load(mu + ks * mu_stride, mask=valid, other=1.0).to(tl.float64)
        width = barrier * barrier
        if s is not None:
            width = tl.load(s + ks * s_stride, mask=valid, other=1.0).to(tl.float64)
        if scale is not None:
            width *= tl.load(scale + ks, mask=valid, other=1.0).to(tl.float64)
        result = tl.zeros_like(at)
        if upper is not None:
            bound = tl.load(upper + ks, mask=valid, other=0.0).to(tl.float64)
            result += barrier_slope(bound - at, barrier, width, EXTENSION, ORDER)
        if lower is not None:
            bound = tl.load(lower + ks, mask=valid, other=0.0).to(tl.float64)
            result -= barrier_slope(at - bound, barrier, width, EXTENSION, ORDER)
    return result


@triton.jit
def count_nonfinite(
    ks, valid, costs, stride_k, stride_n, start, stop, num_responses, center, ratios,
    KP: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """How many numbers of each constraint are not finite [KP]; a center that is not counts for all responses."""
    bad = tl.zeros([KP, SCAN], dtype=tl.int32)
    for first in range(start, stop, SCAN):
        at = first + tl.arange(0, SCAN).to(tl.int64)
        inside = valid[:, None] & (at < stop)[None, :]
        x = tl.load(costs + ks[:, None] * stride_k + at[None, :] * stride_n, mask=inside, other=0.0)
        bad += tl.where(is_finite(x), 0, 1)
    middle = tl.load(center + ks, mask=valid, other=0.0)
    count = tl.where(is_finite(middle), tl.sum(bad, 1), num_responses)
    if ratios is not None:
        bad_ratios = tl.zeros([SCAN], dtype=tl.int32)
        for first in range(0, num_responses, SCAN):
            at = first + tl.arange(0, SCAN).to(tl.int64)
            x = tl.load(ratios + at, mask=at < num_responses, other=0.0)
            bad_ratios += tl.where(is_finite(x), 0, 1)
        count += tl.sum(bad_ratios)
    return count


@triton.jit
def shares_of(ks, valid, coefficients, nonfinite, reduced, reduced_stride, num_samples, samples_stride, samples):
    """What a unit of advantage weighs, coefficient / n [KP]; 0 for constraints that are dropped."""
    if num_samples is not None:
        n = tl.load(num_samples + ks * samples_stride, mask=valid, other=1).to(tl.float64)
    else:
        n = tl.zeros_like(coefficients) + samples
    share = coefficients / tl.where(n < 1.0, 1.0, n)
    keep = valid & (nonfinite == 0) & (tl.abs(share) < float("inf"))
    if reduced is not None:
        keep &= tl.load(reduced + ks * reduced_stride + 7, mask=valid, other=0.0).to(tl.float64) == 0.0
    return tl.where(keep, share, 0.0)


@triton.jit
def finite_ratio(r):
    """r in fp64, 0 where it is not finite: everything is dropped then, and 0 times NaN would be NaN."""
    return tl.where(is_finite(r), r, 0.0).to(tl.float64)


@triton.jit
def samples_at(at, inside, values, stride, center, ratios):
    """d = ratio (value - center) of the responses `at`, fp64; 0 outside."""
    d = tl.load(values + at * stride, mask=inside, other=0.0).to(tl.float64) - center
    if ratios is not None:
        d *= tl.load(ratios + at, mask=inside, other=0.0).to(tl.float64)
    return tl.where(inside, d, 0.0)


@triton.jit
def group_sums_at(at, inside, values, stride, num_responses, center, ratios, groups, BLOCK: tl.constexpr):
    """Sums of d over the groups of the responses `at` [BLOCK], themselves included, and the groups' sizes, fp64."""
    group = tl.load(groups + at, mask=inside, other=0).to(tl.int64)
    sums = tl.zeros([BLOCK, _OTHERS], dtype=tl.float64)
    sizes = tl.zeros([BLOCK, _OTHERS], dtype=tl.int32)
    for first in range(0, num_responses, _OTHERS):
        other = first + tl.arange(0, _OTHERS).to(tl.int64)
        exists = other < num_responses
        d = samples_at(other, exists, values, stride, center, ratios)
        their = tl.load(groups + other, mask=exists, other=0).to(tl.int64)
        same = (group[:, None] == their[None, :]) & exists[None, :]
        sums += tl.where(same, d[None, :], 0.0)
        sizes += tl.where(same, 1, 0)
    return tl.sum(sums, 1), tl.sum(sizes, 1).to(tl.float64)


@triton.jit
def write_row(row, values, stride, num_responses, center, ratios, groups, nonfinite, BLOCK: tl.constexpr):
    """Columns 0 to 7 of a constraint's statistics."""
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    number = tl.zeros([BLOCK], dtype=tl.float64)
    group_squares = tl.zeros([BLOCK], dtype=tl.float64)
    group_cross = tl.zeros([BLOCK], dtype=tl.float64)
    group_sizes = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, num_responses, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < num_responses
        d = samples_at(at, inside, values, stride, center, ratios)
        sums += d
        squares += d * d
        if groups is not None:
            total, size = group_sums_at(at, inside, values, stride, num_responses, center, ratios, groups, BLOCK)
            # Each group is seen once per member: sum_i d_i T_i = sum_g T_g^2, and likewise for the others.
            number += tl.where(inside, 1.0 / tl.where(inside, size, 1.0), 0.0)
            group_squares += d * total
            group_cross += tl.where(inside, total, 0.0)
            group_sizes += tl.where(inside, size, 0.0)
    count = num_responses.to(tl.float64)
    tl.store(row, count)
    tl.store(row + 1, tl.sum(sums))
    tl.store(row + 2, tl.sum(squares))
    if groups is not None:
        tl.store(row + 3, tl.sum(number))
        tl.store(row + 4, tl.sum(group_squares))
        tl.store(row + 5, tl.sum(group_cross))
        tl.store(row + 6, tl.sum(group_sizes))
    else:  # each sample is a group of its own
        tl.store(row + 3, count)
        tl.store(row + 4, tl.sum(squares))
        tl.store(row + 5, tl.sum(sums))
        tl.store(row + 6, count)
    tl.store(row + 7, nonfinite.to(tl.float64))
