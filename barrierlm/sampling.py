"""Measurements: costs of sampled responses (score function), pathwise values, exact values.

A measurement becomes two things: a scalar whose value is the sum of the samples and whose gradient is the
gradient of that sum's expectation, and a row of sums for the estimator. Neither needs a host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .estimators import NUM_POSITIONS, wide_dtype, window_row
from .positions import position_bucket

_M = TypeVar("_M")

#: From this magnitude on a cost or value counts as infinite, and from the second one on a log-probability: sums of
#: their products stay finite in fp32, and sums of squares in fp64.
_HUGE, _HUGE_LOGP = 1e25, 1e10


@dataclass(frozen=True, slots=True)
class Measured:
    """One micro-batch of one constraint, or of a stack [S] of them.

    ``total`` ([S]) is the differentiable sum over its ``count`` samples, ``row`` ([S, ]C) its sums: the first C columns
    of a window's row, the others being 0.
    """

    total: Tensor
    count: int
    row: Tensor


def _check_float(argument: str, value: Any, *, dims: int = 1) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} is a {type(value).__name__}; allowed: a torch.Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{argument} has dtype {value.dtype}; allowed: a floating dtype (use {argument}.float())")
    if value.dim() != dims:
        raise ValueError(f"{argument} has shape {tuple(value.shape)}; allowed: {dims} dimension(s)")
    return value


def _check_like(argument: str, value: Any, shape: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{argument} has shape {tuple(value.shape)}; allowed: {shape}, {why}")


class Sampled:
    r"""Costs of responses that the policy sampled; the gradient comes through their log-probabilities.

    The surrogate's gradient is the score-function estimate of the expected cost's gradient,

    .. math:: \nabla \mathbb{E}[c] \approx \frac1n \sum_i r_i (c_i - b_i) \nabla \log p(y_i)

    with the baseline b the committed mean (the same for any split into micro-batches), or with ``groups`` the
    mean of the other responses to the same prompt. Advantages are never divided by a standard deviation:
    the multiplier's unit must survive. r = 1 unless ``old_logps`` says that another policy sampled.

    Args:
        values: Costs [B], floating, no gradient, in the constraint's unit.
        logps: Log-probabilities [B] of the whole responses under the policy, in nats, with gradient. Never
            divided by the length. They must be those of the distribution that was sampled from.
            `BarrierObjective.linear` makes them itself: there they are left out, or numbers without gradient
            that save it a forward-only pass where ``old_logps`` is given.
        groups: Prompt ids [B], integer; each group whole within the micro-batch and of at least 2 responses.
        old_logps: Log-probabilities [B] under the policy that sampled, for off-policy responses. Samples
            then count with the importance ratio :math:`r = p / p_\text{old}`, in estimate and gradient.
        clip: Truncates r at ``1 + clip``; bounded variance for some bias. Needs ``old_logps``.

    Raises:
        TypeError: A tensor of the wrong kind, integer costs.
        ValueError: Shapes that do not agree, values with gradient, a group of one (on a GPU that is found
            at ``objective.step()``), ``clip`` without ``old_logps``.

    Example:
        >>> logps = torch.tensor([-3.0, -5.0], requires_grad=True)
        >>> Sampled(values=torch.tensor([0.1, 0.7]), logps=logps)
        Sampled(2 responses)

    Source: Williams 1992 (REINFORCE); Kool et al. 2019 (leave-one-out baseline).
    """

    def __init__(
        self,
        values: Tensor,
        logps: Tensor | None = None,
        groups: Tensor | None = None,
        *,
        old_logps: Tensor | None = None,
        clip: float | None = None,
    ) -> None:
        self._set(values, logps, groups, old_logps, clip, argument="values")
        self._check_groups(values.shape[0], alone=False)

    @classmethod
    def per_token(
        cls,
        costs: Tensor,
        logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        groups: Tensor | None = None,
        old_logps: Tensor | None = None,
        clip: float | None = None,
    ) -> Sampled:
        r"""Costs that add up over a response's tokens, credited by reward-to-go.

        .. math:: \nabla \mathbb{E}\Big[\sum_t c_t\Big] \approx \frac1B \sum_i r_i \sum_t
                  \Big(\sum_{u \ge t} c_{iu} - b_t\Big) \nabla \log p(y_{it})

        b is the committed mean of the reward-to-go at that position. A token's own cost may depend on the
        token (per-token KL) or not (length: one per token); both are credited to it and to those before.

        Args:
            costs: Costs [T] of the packed response tokens, floating, no gradient.
            logps: Token log-probabilities [T] in nats, with gradient; for `BarrierObjective.linear` as in `Sampled`.
            cu_seqlens: Offsets [B+1], integer: response i is ``costs[cu_seqlens[i]:cu_seqlens[i+1]]``. Left out
                for `BarrierObjective.linear`, which has them from its batch.
            groups: Prompt ids [B]; here they only make the standard error right, which is taken over groups.
            old_logps: Token log-probabilities [T] under the policy that sampled.
            clip: Truncates each response's importance ratio at ``1 + clip``. Needs ``old_logps``.

        Returns:
            A measurement of B samples, each the sum of a response's costs.

        Raises:
            TypeError: As for `Sampled`.
            ValueError: As for `Sampled`, and ``cu_seqlens`` that do not fit.

        Example:
            >>> logps = torch.randn(5, requires_grad=True)
            >>> Sampled.per_token(torch.ones(5), logps, torch.tensor([0, 2, 5]))
            Sampled(2 responses, 5 tokens)

        Source: Sutton et al. 1999 (policy gradient theorem).
        """
        return cls._of_tokens(costs, None, logps, cu_seqlens, groups, old_logps, clip)

    @classmethod
    def reference_kl(
        cls,
        ref_logps: Tensor,
        logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        groups: Tensor | None = None,
        old_logps: Tensor | None = None,
        clip: float | None = None,
    ) -> Sampled:
        r"""The KL to a reference model: `per_token` with the costs log p - log ref, detached.

        .. math:: \operatorname{KL}(p \,\|\, \text{ref}) = \mathbb{E}_{y \sim p} \Big[\sum_t \log p(y_t) -
                  \log \text{ref}(y_t)\Big]

        Its gradient is that of the score function alone: the expectation of the cost's own gradient is 0.

        Args:
            ref_logps: Token log-probabilities [T] under the reference, in nats, no gradient; 0 where a token
                does not count.
            logps: Token log-probabilities [T] under the policy: with gradient for `combine`. For
                `BarrierObjective.linear` numbers (those that the rollout recorded, where it sampled from this
                very policy), or left out: it then computes them in a forward-only pass.
            cu_seqlens: See `per_token`.
            groups: See `per_token`.
            old_logps: See `per_token`; only for responses that another policy sampled.
            clip: See `per_token`.

        Returns:
            A measurement of B samples in nats, each the sum of a response's costs.

        Raises:
            TypeError, ValueError: As for `per_token`.

        Example:
            >>> logps, ref_logps = torch.randn(5, requires_grad=True), torch.randn(5)
            >>> Sampled.reference_kl(ref_logps, logps, torch.tensor([0, 2, 5]))
            Sampled(2 responses, 5 tokens)

        Source: Schulman 2020, "Approximating KL divergence" (k1); its gradient in ARCHITECTURE.md.
        """
        _check_float("ref_logps", ref_logps)
        if ref_logps.requires_grad:
            raise ValueError("ref_logps requires grad; allowed: the numbers of a reference that is not trained")
        costs = None
        if logps is not None:
            _check_float("logps", logps)
            _check_like("logps", logps, tuple(ref_logps.shape), "the shape of ref_logps")
            costs = logps.detach().to(torch.promote_types(logps.dtype, torch.float32)) - ref_logps
        return cls._of_tokens(costs, ref_logps, logps, cu_seqlens, groups, old_logps, clip)

    @classmethod
    def _of_tokens(
        cls,
        costs: Tensor | None,
        ref_logps: Tensor | None,
        logps: Tensor | None,
        cu_seqlens: Tensor | None,
        groups: Tensor | None,
        old_logps: Tensor | None,
        clip: float | None,
    ) -> Sampled:
        self = cls.__new__(cls)
        argument = "costs" if ref_logps is None else "ref_logps"
        self._set(costs, logps, groups, old_logps, clip, argument=argument, ref_logps=ref_logps, per_token=True)
        if cu_seqlens is None:
            return self
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point():
            raise TypeError("cu_seqlens must be an integer torch.Tensor")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; allowed: [B+1]")
        self.cu_seqlens = cu_seqlens
        if cu_seqlens.device.type == "cpu":  # elsewhere looking at the numbers would stall the device
            ends = [0, *cu_seqlens.tolist()]
            if any(a > b for a, b in pairwise(ends)) or ends[1] != 0:
                raise ValueError("cu_seqlens decreases or does not start at 0; allowed: 0 = first <= ... <= last")
            if ends[-1] != self.size:
                raise ValueError(f"cu_seqlens ends at {ends[-1]}; allowed: the number of {argument}, {self.size}")
        self._check_groups(cu_seqlens.shape[0] - 1, alone=True)
        return self

    def _set(
        self,
        values: Tensor | None,
        logps: Tensor | None,
        groups: Tensor | None,
        old_logps: Tensor | None,
        clip: float | None,
        *,
        argument: str,
        ref_logps: Tensor | None = None,
        per_token: bool = False,
    ) -> None:
        given = _check_float(argument, values if ref_logps is None else ref_logps)
        if given.requires_grad:
            raise ValueError(
                f"{argument} requires grad; allowed: detached costs (a differentiable value is given as a plain "
                "tensor, not as Sampled)"
            )
        for other, tensor in (("logps", logps), ("old_logps", old_logps)):
            if tensor is not None:
                _check_float(other, tensor)
                _check_like(other, tensor, tuple(given.shape), f"the shape of {argument}")
        if clip is not None and (old_logps is None or not clip >= 0):
            raise ValueError(
                f"clip={clip!r}, old_logps {'given' if old_logps is not None else 'missing'}; "
                "allowed: clip >= 0 together with old_logps"
            )
        for other, tensor in (("logps", logps), ("groups", groups), ("old_logps", old_logps)):
            if isinstance(tensor, Tensor) and tensor.device != given.device:
                raise ValueError(f"{other} is on {tensor.device}, {argument} on {given.device}; allowed: one device")
        if groups is not None and (not isinstance(groups, Tensor) or groups.is_floating_point()):
            raise TypeError("groups must be an integer torch.Tensor of prompt ids")
        self.values, self.logps, self.groups = values, logps, groups
        self.old_logps, self.clip = old_logps, clip
        self.ref_logps, self.credited_per_token = ref_logps, per_token
        self.cu_seqlens: Tensor | None = None

    def _check_groups(self, size: int, *, alone: bool) -> None:
        g = self.groups
        if g is None:
            return
        _check_like("groups", g, (size,), "one prompt id per response")
        if not alone and g.device.type == "cpu":
            ids, counts = torch.unique(g, return_counts=True)
            if (counts < 2).any():
                raise ValueError(
                    f"groups: prompt {ids[counts < 2][0].item()} has one response; allowed: at least 2 per group "
                    "(leave groups out to use the committed mean as baseline)"
                )

    @property
    def size(self) -> int:
        """Number of costs: B, or T for costs per token."""
        given = self.values if self.ref_logps is None else self.ref_logps
        assert given is not None
        return given.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the costs are."""
        given = self.values if self.ref_logps is None else self.ref_logps
        assert given is not None
        return given.device

    @property
    def needs_logps(self) -> bool:
        """Whether costs or importance ratios cannot be told without log-probabilities that are not here."""
        return self.logps is None and (self.values is None or self.old_logps is not None)

    def __len__(self) -> int:
        if not self.credited_per_token:
            return self.size
        if self.cu_seqlens is None:
            raise TypeError("cu_seqlens was left out, so only the batch knows how many responses there are")
        return self.cu_seqlens.shape[0] - 1

    def __repr__(self) -> str:
        tokens = f"{self.size} tokens"
        if self.credited_per_token and self.cu_seqlens is None:
            return f"Sampled({tokens})"
        return f"Sampled({len(self)} responses{', ' + tokens if self.credited_per_token else ''})"

    def measure(self, center: Tensor, positions: Tensor) -> Measured:
        """The micro-batch's differentiable total and its row of sums.

        Args:
            center: Committed mean, 0-d, on the device of the values.
            positions: Committed baselines by position bucket [NUM_POSITIONS], likewise.
        """
        stack = measure([self], center[None], positions[None])
        return Measured(stack.total[0], stack.count, stack.row[0])


def measure_value(value: Tensor, center: Tensor) -> Measured:
    """The same for a differentiable measurement: [n] samples, or 0-d for a value without sampling noise."""
    stack = _measure_values([value], center[None])
    return Measured(stack.total[0], stack.count, stack.row[0])


def structure(measurement: Tensor | Sampled) -> Hashable:
    """Measurements of one structure are measured together, as a stack [S, n]: a call is mostly its many small steps."""
    m = measurement
    if isinstance(m, Tensor):
        return m.shape, m.dtype, m.device
    values, logps, old = m.values, m.logps, m.old_logps
    assert values is not None
    dtypes = values.dtype, None if logps is None else logps.dtype, None if old is None else old.dtype
    return m.credited_per_token, values.shape, values.device, dtypes, m.clip, id(m.groups), id(m.cu_seqlens)


def stacks(given: Mapping[int, _M], structure: Callable[[_M], Hashable]) -> list[dict[int, _M]]:
    """What is given, by constraint, apart by structure."""
    found: dict[Hashable, dict[int, _M]] = {}
    for k, m in given.items():
        found.setdefault(structure(m), {})[k] = m
    return list(found.values())


def measure(stack: Sequence[Tensor | Sampled], center: Tensor, positions: Tensor) -> Measured:
    """Measurements of one structure [S], with committed means [S] and position baselines [S, NUM_POSITIONS]."""
    sampled = [m for m in stack if isinstance(m, Sampled)]
    if sampled:
        return _measure_sampled(sampled, center, positions)
    return _measure_values([m for m in stack if isinstance(m, Tensor)], center)


def _measure_sampled(stack: list[Sampled], center: Tensor, positions: Tensor) -> Measured:
    # Whatever is not finite stays in the row of its own constraint, which is then dropped as a whole.
    one, count = stack[0], len(stack[0])
    wide = wide_dtype(one.device)
    values = probe = _stacked([m.values for m in stack])
    logps, old_logps = one.logps, None
    if logps is not None:  # several costs of the same responses share one tensor
        shared = all(m.logps is logps for m in stack)
        logps = _at_least(torch.float32, logps if shared else _stacked([m.logps for m in stack]))
        probe = torch.add(probe, logps.detach(), alpha=_HUGE / _HUGE_LOGP)
    if one.old_logps is not None:
        old_logps = _stacked([m.old_logps for m in stack]).detach()
        probe = torch.add(probe, old_logps, alpha=_HUGE / _HUGE_LOGP)
    good = _count_good(probe)
    bad = torch.rsub(good, probe.shape[1])

    seq: Tensor | None = None
    sums_of_positions: list[Tensor] = []
    # 1 where two responses answer one prompt [B, B]: a comparison needs no host sync, unlike torch.unique.
    same = None if one.groups is None else (one.groups[:, None] == one.groups[None, :]).to(wide)
    alone = None
    if not one.credited_per_token:
        d, n = values - center.unsqueeze(1), good
        advantage = d
        if same is not None:
            others = same.sum(1) - 1
            alone = (others < 1).sum()
            given = values.to(wide)  # not d: a center far off would cost digits
            advantage = given - (given @ same - given) / others.clamp(min=1)
    else:
        assert one.cu_seqlens is not None
        cu = one.cu_seqlens.to(values.device, torch.long).contiguous()
        place = torch.arange(values.shape[1], device=values.device)
        after = torch.searchsorted(cu, place, right=True)  # of each token: its response's number, and 1
        seq = after - 1
        before = pad(values, (1, 0)).cumsum(1, dtype=wide)
        ends = before.index_select(1, cu)
        d = ends.diff() - center.unsqueeze(1)
        n = torch.full_like(bad, count)
        to_go = ends.index_select(1, after) - before.narrow(1, 0, len(place))
        bucket = position_bucket(place - cu.index_select(0, seq))
        advantage = to_go - positions.index_select(1, bucket)
        empty = to_go.new_zeros(len(stack), NUM_POSITIONS)
        sums_of_positions = [empty.index_add(1, bucket, x) for x in (to_go, torch.ones_like(to_go))]

    if old_logps is not None:
        assert logps is not None
        ratio = logps.detach().to(wide) - old_logps.to(wide)
        if seq is not None:
            ratio = torch.zeros_like(d).index_add_(1, seq, ratio)
        ratio = ratio.exp()
        if one.clip is not None:
            ratio = ratio.clamp(max=1 + one.clip)
        d = ratio * d
        advantage = advantage * (ratio if seq is None else ratio.index_select(1, seq))
        # A ratio can make good numbers too large; what was bad before has spread, and counts once.
        late = torch.maximum(*(x.shape[1] - _count_good(x) for x in (d, advantage)))
        bad = torch.where(bad > 0, bad, late)

    total_d = d.sum(1)
    row = window_row(d, n, total_d, bad, same, alone=alone, more=sums_of_positions)
    dtype = torch.float32 if logps is None else logps.dtype
    total = (total_d + count * center).to(dtype) if old_logps is not None else values.sum(1, dtype=dtype)
    if logps is not None:
        # Of a dropped constraint the gradient is 0 times the advantage, so that has to be finite.
        surrogate = (advantage.to(dtype).nan_to_num(0, 0, 0) * logps).sum(1)
        total = total + (surrogate - surrogate.detach())
    return _measured(total, count, row, bad)


def _measure_values(stack: list[Tensor], center: Tensor) -> Measured:
    exact = stack[0].dim() == 0
    value = _at_least(torch.float32, torch.stack(stack).reshape(len(stack), -1))
    d = value.detach().to(center.dtype) - center.unsqueeze(1)
    good = _count_good(value.detach())
    bad = value.shape[1] - good
    return _measured(value.sum(1), value.shape[1], window_row(d, good, d.sum(1), bad, exact=exact), bad)


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.stack(tensors)  # type: ignore[arg-type]


def _at_least(dtype: torch.dtype, x: Tensor) -> Tensor:
    """In ``dtype``, or what is wider."""
    return x if x.dtype == dtype else x.to(torch.promote_types(x.dtype, dtype))


def _count_good(x: Tensor) -> Tensor:
    """How many of each row of [S, n] are neither NaN nor infinite, nor as good as infinite."""
    return (x.abs() < _HUGE).sum(1, dtype=wide_dtype(x.device))


def _measured(total: Tensor, count: int, row: Tensor, bad: Tensor) -> Measured:
    """Drops the whole term if anything in it is ``bad`` [S]: a partial sum would silently mean another average.

    The row holds that number, and a window that has one is not committed.
    """
    return Measured(total.masked_fill(bad > 0, 0), count, row)
