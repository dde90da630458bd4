"""Costs per token: K programs of statistics, some of position sums, and some that share the responses."""

import triton
import triton.language as tl

from .shared import coefficients_at, count_nonfinite, finite_ratio, is_finite, shares_of, write_row


@triton.jit
def bucket_at(position, num_buckets, OCTAVES: tl.constexpr):
    """The bucket of a token position: exact below half the buckets, then eight buckets per octave."""
    # By comparisons: a logarithm need not be exact at the powers of two, where octaves begin.
    half = tl.maximum(num_buckets // 2, 1).to(tl.int64)
    octave = tl.zeros_like(position)
    for i in tl.static_range(1, OCTAVES + 1):
        octave += tl.where(position >= (half << i), 1, 0)
    # Eighths of an octave: (position / its start)^8 against powers of two.
    x, unit = position.to(tl.float64), (half << octave).to(tl.float64)
    x, unit = x * x, unit * unit
    x, unit = x * x, unit * unit
    x, unit = x * x, unit * unit
    eighth = tl.zeros_like(position)
    for i in tl.static_range(1, 8):
        eighth += tl.where(x >= unit * 2**i, 1, 0)
    return tl.minimum(tl.where(position < half, position, half + 8 * octave + eighth), num_buckets - 1)


@triton.jit
def responses_at(at, cu_seqlens, num_responses):
    """Where the responses `at` start and how long they are; empty beyond the last one."""
    inside = at < num_responses
    start = tl.load(cu_seqlens + at, mask=inside, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens + at + 1, mask=inside, other=0).to(tl.int64)
    return start, stop - start


@triton.jit
def write_samples(
    out, values, stride, cu_seqlens, num_responses, center, ratios, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """d = ratio (sum of the response's costs - center) of every response, fp64."""
    for first in range(0, num_responses, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        start, length = responses_at(at, cu_seqlens, num_responses)
        sums = tl.zeros([BLOCK, TILE], dtype=tl.float64)
        for position in range(0, tl.max(length), TILE):
            t = position + tl.arange(0, TILE).to(tl.int64)
            token = start[:, None] + t[None, :]
            sums += tl.load(values + token * stride, mask=t[None, :] < length[:, None], other=0.0).to(tl.float64)
        d = tl.sum(sums, 1) - center
        if ratios is not None:
            d *= tl.load(ratios + at, mask=at < num_responses, other=0.0).to(tl.float64)
        tl.store(out + at, d, mask=at < num_responses)


@triton.jit
def write_positions(
    row, values, stride, cu_seqlens, num_responses, first_bucket, num_buckets,
    BLOCK: tl.constexpr, TILE: tl.constexpr, BUCKETS: tl.constexpr, OCTAVES: tl.constexpr,
):  # fmt: skip
    """Sums of the reward-to-go, and numbers of tokens, of one block of position buckets."""
    longest = tl.zeros([BLOCK], dtype=tl.int64)
    for first in range(0, num_responses, BLOCK):
        _, length = responses_at(first + tl.arange(0, BLOCK).to(tl.int64), cu_seqlens, num_responses)
        longest = tl.maximum(longest, length)
    buckets = first_bucket + tl.arange(0, BUCKETS)
    sums = tl.zeros([BUCKETS], dtype=tl.float64)
    tokens = tl.zeros([BUCKETS], dtype=tl.int64)
    later = tl.sum(tl.zeros([TILE], dtype=tl.float64))  # what all responses together cost after this tile
    tiles = tl.cdiv(tl.max(longest), TILE)
    for i in range(tiles):  # from the last positions to the first
        t = (tiles - 1 - i) * TILE + tl.arange(0, TILE).to(tl.int64)
        costs = tl.zeros([BLOCK, TILE], dtype=tl.float64)
        reached = tl.zeros([BLOCK, TILE], dtype=tl.int32)
        for first in range(0, num_responses, BLOCK):
            at = first + tl.arange(0, BLOCK).to(tl.int64)
            start, length = responses_at(at, cu_seqlens, num_responses)
            token = start[:, None] + t[None, :]
            inside = t[None, :] < length[:, None]
            costs += tl.load(values + token * stride, mask=inside, other=0.0).to(tl.float64)
            reached += tl.where(inside, 1, 0)
        cost = tl.sum(costs, 0)
        to_go = tl.cumsum(cost, 0, reverse=True) + later
        later += tl.sum(cost)
        here = bucket_at(t, num_buckets, OCTAVES)[:, None] == buckets[None, :]
        sums += tl.sum(tl.where(here, to_go[:, None], 0.0), 0)
        tokens += tl.sum(tl.where(here, tl.sum(reached, 0)[:, None], 0), 0)
    inside = buckets < num_buckets
    tl.store(row + buckets, sums, mask=inside)
    tl.store(row + num_buckets + buckets, tokens.to(tl.float64), mask=inside)


@triton.jit
def write_weights(
    weights, ks, valid, share, costs, stride_k, stride_n, b, cu_seqlens, ratios, baselines, num_buckets,
    KP: tl.constexpr, SPAN: tl.constexpr, OCTAVES: tl.constexpr,
):  # fmt: skip
    """The weights of the tokens of response b."""
    start = tl.load(cu_seqlens + b).to(tl.int64)
    length = tl.load(cu_seqlens + b + 1).to(tl.int64) - start
    used = (share != 0.0)[:, None]  # a constraint that is dropped may hold NaN
    later = tl.zeros([KP], dtype=tl.float64)  # the costs after this tile
    tiles = tl.cdiv(length, SPAN)
    for i in range(tiles):  # from the last token to the first
        t = (tiles - 1 - i) * SPAN + tl.arange(0, SPAN).to(tl.int64)
        inside = (t < length)[None, :] & valid[:, None] & used
        at = costs + ks[:, None] * stride_k + (start + t)[None, :] * stride_n
        cost = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        advantage = tl.cumsum(cost, 1, reverse=True) + later[:, None]
        later += tl.sum(cost, 1)
        if baselines is not None:
            bucket = bucket_at(t, num_buckets, OCTAVES)
            at = baselines + ks[:, None] * num_buckets + bucket[None, :]
            advantage -= tl.load(at, mask=inside, other=0.0).to(tl.float64)
        weight = tl.sum(tl.where(used, share[:, None] * advantage, 0.0), 0)
        if ratios is not None:
            weight *= finite_ratio(tl.load(ratios + b))
        tl.store(weights + start + t, weight.to(weights.dtype.element_ty), mask=t < length)


# Not specialised on numbers that change from call to call: that would compile anew.
@triton.jit(do_not_specialize=["num_constraints", "length", "num_responses", "num_buckets", "samples", "num_workers"])
def per_token_kernel(
    costs, center, coefficients, lower, upper, scale, mu, s, reduced, groups, cu_seqlens, baselines, ratios,
    num_samples, weights, statistics, derivatives, work,
    num_constraints, length, num_responses, num_buckets, samples, num_workers,
    stride_k, stride_n, mu_stride, s_stride, reduced_stride, samples_stride,
    EXTENSION: tl.constexpr, ORDER: tl.constexpr, KP: tl.constexpr, SCAN: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, BUCKETS: tl.constexpr, OCTAVES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    ks = tl.arange(0, KP).to(tl.int64)
    valid = ks < num_constraints
    slopes = coefficients_at(
        ks, valid, center, coefficients, lower, upper, scale, mu, s, reduced, mu_stride, s_stride, reduced_stride,
        EXTENSION, ORDER,
    )  # fmt: skip
    start = tl.load(cu_seqlens).to(tl.int64)
    stop = tl.load(cu_seqlens + num_responses).to(tl.int64)
    nonfinite = count_nonfinite(
        ks, valid, costs, stride_k, stride_n, start, stop, num_responses, center, ratios, KP, SCAN
    )
    if baselines is not None:
        bad = tl.zeros([KP, SCAN], dtype=tl.int32)
        for first in range(0, num_buckets, SCAN):
            at = first + tl.arange(0, SCAN)
            inside = valid[:, None] & (at < num_buckets)[None, :]
            x = tl.load(baselines + ks[:, None] * num_buckets + at[None, :], mask=inside, other=0.0)
            bad += tl.where(is_finite(x), 0, 1)
        nonfinite += tl.sum(bad, 1)
    if pid == 0:
        tl.store(derivatives + ks, slopes, mask=valid)

    row_length = 8 + 2 * num_buckets
    bucket_blocks = tl.cdiv(num_buckets, BUCKETS)
    first_worker = num_constraints * (1 + bucket_blocks)
    k = (pid % num_constraints).to(tl.int64)
    own = tl.sum(tl.where(ks == k, nonfinite, 0))
    seen = tl.where(own == 0, num_responses, 0)  # a constraint that is dropped has no samples
    values = costs + k * stride_k
    if pid < num_constraints:
        middle = tl.load(center + k).to(tl.float64)
        sums = work + k * num_responses
        write_samples(sums, values, stride_n, cu_seqlens, seen, middle, ratios, BLOCK, TILE)
        tl.debug_barrier()  # every thread's sums are there before any thread reads them
        write_row(statistics + k * row_length, sums, 1, seen, 0.0, None, groups, own, BLOCK)
    elif pid < first_worker:
        first_bucket = (pid // num_constraints - 1) * BUCKETS
        write_positions(
            statistics + k * row_length + 8, values, stride_n, cu_seqlens, seen, first_bucket, num_buckets,
            BLOCK, TILE, BUCKETS, OCTAVES,
        )  # fmt: skip
    else:
        share = shares_of(ks, valid, slopes, nonfinite, reduced, reduced_stride, num_samples, samples_stride, samples)
        worker = pid - first_worker
        if worker == 0:  # tokens of no response
            for first in range(0, length, SPAN):
                at = first + tl.arange(0, SPAN).to(tl.int64)
                outside = (at < start) | (at >= stop)
                tl.store(weights + at, tl.zeros([SPAN], dtype=tl.float32), mask=outside & (at < length))
        for b in range(worker, num_responses, num_workers):
            write_weights(
                weights, ks, valid, share, costs, stride_k, stride_n, b, cu_seqlens, ratios, baselines, num_buckets,
                KP, SPAN, OCTAVES,
            )  # fmt: skip
