"""One cost per response: K programs of statistics, then one for each block of responses."""

import triton
import triton.language as tl

from .shared import (
    coefficients_at,
    count_nonfinite,
    finite_ratio,
    group_sums_at,
    samples_at,
    shares_of,
    write_row,
)


# Not specialised on numbers that change from call to call: that would compile anew.
@triton.jit(do_not_specialize=["num_constraints", "num_responses", "samples"])
def per_response_kernel(
    costs, center, coefficients, lower, upper, scale, mu, s, reduced, groups, ratios, num_samples,
    weights, statistics, derivatives,
    num_constraints, num_responses, samples,
    stride_k, stride_b, mu_stride, s_stride, reduced_stride, samples_stride,
    EXTENSION: tl.constexpr, ORDER: tl.constexpr, KP: tl.constexpr, SCAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    ks = tl.arange(0, KP).to(tl.int64)
    valid = ks < num_constraints
    slopes = coefficients_at(
        ks, valid, center, coefficients, lower, upper, scale, mu, s, reduced, mu_stride, s_stride, reduced_stride,
        EXTENSION, ORDER,
    )  # fmt: skip
    nonfinite = count_nonfinite(
        ks, valid, costs, stride_k, stride_b, 0, num_responses, num_responses, center, ratios, KP, SCAN
    )
    if pid == 0:
        tl.store(derivatives + ks, slopes, mask=valid)
    if pid < num_constraints:
        k = pid.to(tl.int64)
        middle = tl.load(center + k).to(tl.float64)
        own = tl.sum(tl.where(ks == k, nonfinite, 0))
        seen = tl.where(own == 0, num_responses, 0)  # a constraint that is dropped has no samples
        write_row(statistics + k * 8, costs + k * stride_k, stride_b, seen, middle, ratios, groups, own, BLOCK)
    else:
        share = shares_of(ks, valid, slopes, nonfinite, reduced, reduced_stride, num_samples, samples_stride, samples)
        at = (pid - num_constraints).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_responses
        result = tl.zeros([BLOCK], dtype=tl.float64)
        for i in range(num_constraints):
            unit = tl.sum(tl.where(ks == i, share, 0.0))
            if unit != 0.0:  # a constraint that is dropped may hold NaN
                values = costs + tl.cast(i, tl.int64) * stride_k
                middle = tl.load(center + i).to(tl.float64)
                d = samples_at(at, inside, values, stride_b, middle, None)
                if groups is not None:
                    sums, sizes = group_sums_at(
                        at, inside, values, stride_b, num_responses, middle, None, groups, BLOCK
                    )
                    # Alone in its group: nothing is subtracted, and the center is the baseline.
                    d -= (sums - d) / tl.where(sizes > 1.5, sizes - 1.0, 1.0)
                result += unit * d
        if ratios is not None:
            result *= finite_ratio(tl.load(ratios + at, mask=inside, other=0.0))
        tl.store(weights + at, result.to(weights.dtype.element_ty), mask=inside)
