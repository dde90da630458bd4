"""Constraint weights and window statistics in one Triton launch.

Every program finds the coefficients and the constraints to drop by itself: a look at all costs each, which saves a
second launch. Sums are in fp64 and in a fixed order, with no atomics, so that the same call gives the same bits.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._triton.responses import per_response_kernel
from ._triton.tokens import per_token_kernel

_WARPS = 8
_BUCKETS = 64
#: More programs would only repeat the look at all costs; each takes several responses then.
_MAX_WORKERS = 256


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _response_shape(constraints: int, grouped: bool) -> dict[str, int]:
    """Sizes that the kernel for costs per response is compiled for."""
    padded = _power_of_two(constraints)
    # Comparing pairs needs registers, so with groups fewer costs are looked at at a time.
    scan, block = (512, 64) if grouped else (2048, 256)
    return {"KP": padded, "SCAN": max(4, scan // padded), "BLOCK": block}


def _token_shape(constraints: int, buckets: int) -> dict[str, int]:
    """Sizes that the kernel for costs per token is compiled for."""
    padded = _power_of_two(constraints)
    # Octaves that positions can reach: nothing has 2^40 tokens.
    octaves = min(40, -(-(buckets - max(buckets // 2, 1)) // 8)) if buckets else 0
    return {
        "KP": padded,
        "SCAN": max(4, 2048 // padded),
        "SPAN": max(4, min(256, 2048 // padded)),
        "TILE": 64,
        "BLOCK": 32,
        "BUCKETS": _BUCKETS,
        "OCTAVES": octaves,
    }


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
    constraints, length = costs.shape
    buckets = 0 if baselines is None else baselines.shape[1]
    weights = costs.new_empty(length, dtype=torch.float64 if costs.dtype == torch.float64 else torch.float32)
    own = costs.new_empty(constraints, 8 + 2 * buckets, dtype=torch.float64)
    derivatives = costs.new_empty(constraints, dtype=torch.float64)
    if constraints == 0:
        return weights.zero_(), own, derivatives
    if buckets == 0:
        baselines = None
    vectors = [None if x is None else x.contiguous() for x in (center, coefficients, lower, upper, scale)]
    reduced = None if statistics is None else statistics.contiguous()
    groups, cu_seqlens, baselines, ratios = (
        None if x is None else x.contiguous() for x in (groups, cu_seqlens, baselines, ratios)
    )
    strides = {
        "stride_k": costs.stride(0),
        "mu_stride": _stride(mu),
        "s_stride": _stride(s),
        "samples_stride": _stride(num_samples),
        "reduced_stride": 0 if reduced is None else reduced.shape[1],
    }
    options: dict[str, Any] = {"EXTENSION": extension, "ORDER": order}
    with torch.cuda.device(costs.device) if costs.is_cuda else nullcontext():
        if cu_seqlens is None:
            shape = _response_shape(constraints, groups is not None)
            per_response_kernel[(constraints + -(-length // shape["BLOCK"]),)](
                costs, *vectors, mu, s, reduced, groups, ratios, num_samples, weights, own, derivatives,
                constraints, length, samples, stride_b=costs.stride(1), **strides, **shape, **options,
                num_warps=_WARPS,
            )  # fmt: skip
        else:
            responses = cu_seqlens.shape[0] - 1
            shape = _token_shape(constraints, buckets)
            workers = max(1, min(responses, _MAX_WORKERS))
            work = costs.new_empty(constraints, responses, dtype=torch.float64)
            per_token_kernel[(constraints * (1 + -(-buckets // _BUCKETS)) + workers,)](
                costs, *vectors, mu, s, reduced, groups, cu_seqlens, baselines, ratios, num_samples,
                weights, own, derivatives, work, constraints, length, responses, buckets, samples, workers,
                stride_n=costs.stride(1), **strides, **shape, **options, num_warps=_WARPS,
            )  # fmt: skip
    return weights, own, derivatives


def _stride(vector: Tensor | None) -> int:
    """Between the entries of constraints: 0 for one number for all."""
    return 0 if vector is None or vector.dim() == 0 else vector.stride(0)


def _config(name: str, constraints: int, dtype: str, *given: str, **options: Any) -> dict[str, Any]:
    """A compile-time configuration: `given` are the optional arguments that are not None."""
    tokens = "cu_seqlens" in given
    kernel = per_token_kernel if tokens else per_response_kernel
    buckets = 128 if "baselines" in given else 0
    shape = _token_shape(constraints, buckets) if tokens else _response_shape(constraints, "groups" in given)
    types = {"costs": f"*{dtype}", "ratios": "*fp32", "baselines": "*fp64", "weights": "*fp32", "num_samples": "*i64"}
    types |= {"groups": "*i64", "cu_seqlens": "*i32"}
    always = ("costs", "center", "weights", "statistics", "derivatives", "work")
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = shape | {"EXTENSION": "linear", "ORDER": 4} | options
    pointers = []
    for argument in kernel.arg_names:
        if argument in constexprs:
            continue
        if argument in always or argument in given:
            signature[argument] = types.get(argument, "*fp64")
            pointers.append(argument)
        elif argument in _NUMBERS:
            signature[argument] = "i32"
        elif argument in ("stride_b", "stride_n"):
            constexprs[argument] = 1
        else:
            constexprs[argument] = None
    return {
        "kernel": kernel,
        "name": f"constraint_weights {name}",
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": _WARPS,
        "divisible": pointers,
    }


_NUMBERS = (
    *("num_constraints", "length", "num_responses", "num_buckets", "samples", "num_workers"),
    *("stride_k", "mu_stride", "s_stride", "reduced_stride", "samples_stride"),
)
_BOUNDS = ("lower", "upper", "scale", "mu", "s", "reduced")

#: Every kind of compile-time configuration, for the resource report.
CONFIGS: list[dict[str, Any]] = [
    _config("K=8", 8, "fp32", "coefficients"),
    _config("K=8 bf16 groups", 8, "bf16", "coefficients", "groups"),
    _config("K=3 fp64 all", 3, "fp64", "groups", "ratios", "num_samples", *_BOUNDS),
    _config("K=1 quadratic", 1, "fp32", "upper", "mu", EXTENSION="quadratic"),
    _config("K=8 polynomial", 8, "fp32", *_BOUNDS, EXTENSION="polynomial", ORDER=6),
    _config("K=64 exponential", 64, "fp32", "groups", *_BOUNDS, EXTENSION="exponential"),
    _config("tokens K=8", 8, "fp32", "coefficients", "cu_seqlens"),
    _config("tokens K=8 bf16 positions", 8, "bf16", "coefficients", "cu_seqlens", "baselines"),
    _config("tokens K=3 fp64 all", 3, "fp64", "cu_seqlens", "baselines", "groups", "ratios", "num_samples", *_BOUNDS),
    _config("tokens K=64 positions", 64, "fp32", "cu_seqlens", "baselines", *_BOUNDS, EXTENSION="exponential"),
]
