"""The operation behind `constraint_weights`, registered: opaque to torch.compile, with shapes for fake tensors."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .reference import NUM_COLUMNS, weights_and_statistics

_library = torch.library.Library("barrierlm", "FRAGMENT")
_library.define(
    "constraint_weights(Tensor costs, Tensor center, Tensor? coefficients, Tensor? lower, Tensor? upper, "
    "Tensor? scale, Tensor? mu, Tensor? s, Tensor? statistics, Tensor? groups, Tensor? cu_seqlens, "
    "Tensor? baselines, Tensor? ratios, Tensor? num_samples, SymInt samples, str extension, int order, str impl) "
    "-> (Tensor weights, Tensor statistics, Tensor coefficients)"
)


def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, impl = arguments
    costs, cu_seqlens = inputs[0], inputs[10]
    if cu_seqlens is not None and costs.device.type == "cpu":
        _check_offsets(cu_seqlens, costs.shape[1])
    if impl == "reference":
        return weights_and_statistics(*inputs)
    from . import triton

    return triton.weights_and_statistics(*inputs)


def _shapes(costs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    constraints, length = costs.shape
    baselines = arguments[10]
    columns = NUM_COLUMNS + (0 if baselines is None else 2 * baselines.shape[1])
    wide = torch.float64
    return (
        costs.new_empty(length, dtype=wide if costs.dtype == wide else torch.float32),
        costs.new_empty(constraints, columns, dtype=wide),
        costs.new_empty(constraints, dtype=wide),
    )


def _check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    """The values, which on another device could not be seen without a wait. Here, so that compiled code looks too."""
    ends = cu_seqlens.tolist()
    if ends[0] < 0 or ends[-1] > tokens:
        raise ValueError(f"cu_seqlens must lie within the {tokens} tokens, got {ends[0]} to {ends[-1]}")
    if any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens must not decrease, got {ends}")


_library.impl("constraint_weights", run, "CompositeExplicitAutograd")
torch.library.register_fake("barrierlm::constraint_weights", _shapes, lib=_library)
_registered = torch.ops.barrierlm.constraint_weights.default


def constraint_weights(costs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, statistics, coefficients) of arguments in the order of the schema above."""
    # Plain tensors need no dispatcher, whose 20 microseconds would be a sixth of a small call on the CPU.
    if type(costs) is Tensor and not torch.compiler.is_compiling():
        return run(costs, *arguments)
    outputs: tuple[Tensor, Tensor, Tensor] = _registered(costs, *arguments)
    return outputs
