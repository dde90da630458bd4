"""Weights of log-probabilities from the costs of sampled responses, and a window's statistics."""

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, INTEGERS, NUMBERS, check_choice, check_tensor
from .._dispatch import IMPLEMENTATIONS, choose
from . import op
from .reference import NUM_COLUMNS
from .results import ConstraintWeights

_NUMBERS = FLOATS + INTEGERS
_EXTENSIONS = ("linear", "quadratic", "polynomial", "exponential")


def constraint_weights(
    costs: Tensor,
    center: Tensor,
    *,
    coefficients: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    scale: Tensor | None = None,
    mu: Tensor | float | None = None,
    s: Tensor | float | None = None,
    extension: str = "linear",
    order: int = 4,
    statistics: Tensor | None = None,
    groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    baselines: Tensor | None = None,
    ratios: Tensor | None = None,
    num_samples: Tensor | int | None = None,
    impl: str = "auto",
) -> ConstraintWeights:
    r"""Weights whose sum with log-probabilities has the gradient of a barrier of the costs' means.

        weights_i = sum_k coefficient_k advantage_ki / n_k         advantage_ki = r_i (c_ki - baseline_ki)
        coefficient_k = (B'((m_k - upper_k) / scale_k) - B'((lower_k - m_k) / scale_k)) / scale_k

    so that the gradient of sum_i weights_i log p(y_i) estimates that of sum_k coefficient_k E[c_k] (score
    function). B is the relaxed log barrier, B' = mu / (-z) for z <= -s and (mu / s) V'(z / s) beyond, with V'(r) = 1
    (linear), r + 2 (quadratic), ((r + order) / (order - 1))^(order - 1) (polynomial) or e^(1 + r) (exponential). m is
    `center`, or with `statistics` the mean that those say.

    The baseline of a response is `center`; with `groups` the mean of the others in its group, where there are
    any. The costs of a token are credited to it and to those before (reward-to-go), less `baselines` at its position.

    A NaN or an infinity (or a magnitude of 1e70) anywhere in a constraint's numbers drops that constraint as a whole:
    it adds nothing to the weights, its row of statistics is 0 but for the column that counts such numbers. A
    coefficient that is not finite adds nothing either. Sums are in fp64. Nothing waits for the device.

    Args:
        costs: [K, B], one cost per response, or [K, N], one per token, when `cu_seqlens` is given; any float dtype,
            without gradient, in the constraint's unit. Need not be contiguous.
        center: [K], cost units: committed means, the origin of the statistics.
        coefficients: [K], penalty per cost unit, from a rule of one's own; instead of everything up to `statistics`.
        lower: [K], cost units; -inf where there is no bound. None: none at all.
        upper: [K], cost units; inf where there is no bound. None: none at all.
        scale: [K], cost units: what one unit of violation stands for; default 1.
        mu: the barrier parameter, > 0: a number, 0-d or [K]. A tensor, where changing it must not compile anew.
        s: the relaxation width, > 0, in units of the scale: likewise; default mu^2.
        extension: "linear", "quadratic", "polynomial" or "exponential".
        order: of the polynomial: even, >= 2.
        statistics: [K, 8 or more], those of the whole window, already summed over ranks: the barrier is then
            differentiated at their mean and not at `center`. What they count as not finite is dropped.
        groups: [B], int32 or int64, any prompt ids in any order; each group whole within the call. For costs per token
            only the statistics use them.
        cu_seqlens: [B+1], int32 or int64: response b is tokens cu_seqlens[b] to cu_seqlens[b+1] - 1. Tokens before
            the first and after the last response weigh 0 and may hold anything. Values are checked on the CPU only.
        baselines: [K, P], cost units: mean reward-to-go by position bucket: exact below P / 2, then eight buckets an
            octave. For costs per token; None: zero, and no position sums.
        ratios: [B], importance ratios r = p / p_old of whole responses, clipped already, without gradient; default 1.
        num_samples: an int, 0-d or [K]: number of samples n of the whole window, over all ranks; default B.
        impl: "auto", "triton" or "reference".

    Returns:
        `ConstraintWeights(weights, statistics, coefficients)`, without gradient.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value, or requires gradient.
        RuntimeError: impl="triton" cannot run here.

    Example:
        >>> import torch
        >>> costs = torch.tensor([[0.1, 0.9, 0.4, 0.6]])  # one constraint, four responses
        >>> out = constraint_weights(costs, torch.tensor([0.5]), upper=torch.tensor([0.6]), mu=0.1)
        >>> out.coefficients  # mu / slack
        tensor([1.0000], dtype=torch.float64)
        >>> out.weights
        tensor([-0.1000,  0.1000, -0.0250,  0.0250])

        On several ranks the barrier of the window's own mean takes two calls around one reduction:

        >>> first = constraint_weights(costs, torch.tensor([0.5]), coefficients=torch.zeros(1))
        >>> reduced = first.statistics  # torch.distributed.all_reduce(first.statistics)
        >>> second = constraint_weights(
        ...     costs, torch.tensor([0.5]), upper=torch.tensor([0.6]), mu=0.1, statistics=reduced, num_samples=4
        ... )

    Source: Williams 1992 (REINFORCE); Kool et al. 2019 (leave-one-out); L3Ms, arXiv 2410.21533 (the barrier).
    """
    check_tensor("costs", costs, ("K", "B" if cu_seqlens is None else "N"), FLOATS, None)
    if costs.requires_grad:
        raise ValueError("costs must not require gradient: none flows to them; detach() them")
    constraints, responses = costs.shape
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, ("B+1",), INTEGERS, costs.device)
        responses = cu_seqlens.shape[0] - 1
        if responses < 0:
            raise ValueError("cu_seqlens must have B+1 entries, so at least one, got none")
    _check_rule(coefficients, lower, upper, scale, mu, s, statistics)
    check_choice("extension", extension, _EXTENSIONS)
    if isinstance(order, bool) or not isinstance(order, int) or order < 2 or order % 2:
        raise ValueError(f"order must be an even int >= 2, got {order!r}")
    check_choice("impl", impl, IMPLEMENTATIONS)

    mu, s = _parameter("mu", mu, costs), _parameter("s", s, costs)
    samples = responses
    if num_samples is not None and not isinstance(num_samples, Tensor):
        samples, num_samples = _count(num_samples), None
    for name, vector in (
        ("center", center),
        ("coefficients", coefficients),
        ("lower", lower),
        ("upper", upper),
        ("scale", scale),
    ):
        if vector is not None or name == "center":
            _check(name, vector, ("K",), constraints, costs)
    for name, vector in (("mu", mu), ("s", s), ("num_samples", num_samples)):
        if vector is not None:
            _check(name, vector, ("K",) if vector.dim() else (), constraints, costs, _NUMBERS)
    if statistics is not None:
        _check("statistics", statistics, ("K", "S"), constraints, costs)
        if statistics.shape[1] < NUM_COLUMNS:
            raise ValueError(f"statistics must have at least {NUM_COLUMNS} columns, got {list(statistics.shape)}")
    if groups is not None:
        _check("groups", groups, ("B",), responses, costs, INTEGERS)
    if ratios is not None:
        _check("ratios", ratios, ("B",), responses, costs)
    if baselines is not None:
        _check("baselines", baselines, ("K", "P"), constraints, costs)
        if cu_seqlens is None:
            raise ValueError("baselines are for costs per token (with cu_seqlens), got costs per response")

    weights, own, derivative = op.constraint_weights(
        costs,
        center,
        coefficients,
        lower,
        upper,
        scale,
        mu,
        s,
        statistics,
        groups,
        cu_seqlens,
        baselines,
        ratios,
        num_samples,
        samples,
        extension,
        order,
        choose(impl, costs.device, torch.float32),  # fp64 costs are no obstacle: everything is done in fp64
    )
    return ConstraintWeights(weights, own, derivative)


def _check(
    name: str,
    value: Any,
    shape: tuple[str, ...],
    length: int,
    costs: Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """A tensor whose first dimension has `length` entries, on the device of the costs, without gradient."""
    check_tensor(name, value, shape, dtypes, costs.device)
    if shape and value.shape[0] != length:
        raise ValueError(f"{name} must have {shape[0]} = {length} entries, got {list(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require gradient: none flows to it; detach() it")


def _check_rule(coefficients: Any, lower: Any, upper: Any, scale: Any, mu: Any, s: Any, statistics: Any) -> None:
    """Either coefficients or a barrier."""
    barrier = {"lower": lower, "upper": upper, "scale": scale, "mu": mu, "s": s, "statistics": statistics}
    given = [name for name, value in barrier.items() if value is not None]
    if coefficients is not None and given:
        raise ValueError(f"coefficients are given, so the barrier's arguments must not be; got {', '.join(given)}")
    if coefficients is None and (mu is None or (lower is None and upper is None)):
        raise ValueError(
            "without coefficients, mu and at least one of lower and upper must be given; "
            f"got {', '.join(given) or 'none of them'}"
        )


def _parameter(name: str, value: Any, costs: Tensor) -> Tensor | None:
    """A number as a 0-d tensor beside the costs."""
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} must be a number or a torch.Tensor, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return torch.full((), value, dtype=torch.float64, device=costs.device)


def _count(num_samples: Any) -> int:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"num_samples must be an int or a torch.Tensor, got {type(num_samples).__name__}")
    if num_samples < 0:
        raise ValueError(f"num_samples must be >= 0, got {num_samples}")
    return num_samples
