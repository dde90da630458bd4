"""GRPO and RLOO whose rewards carry bounds instead of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from barrierlm import BarrierObjective, Constraint, Sampled

from .base import Commit, ConstrainedTrainer, make_objective

#: GRPO losses in which each token weighs the same whatever response it is in.
_UNBIASED_LOSSES = ("dapo", "dr_grpo", "cispo", "luspo", "vespo")


def _check_settings(args: Any) -> None:
    """Settings of a `GRPOConfig` or `RLOOConfig` under which a bound would not hold, or its gradient be another one."""
    refused = [
        (
            getattr(args, "scale_rewards", "none") not in ("none", False),
            "scale_rewards",
            "'none' (divided by its standard deviation, a reward's scale is lost, and the multipliers with it)",
        ),
        (
            getattr(args, "loss_type", "dapo") not in _UNBIASED_LOSSES,
            "loss_type",
            f"one of {', '.join(map(repr, _UNBIASED_LOSSES))} (a loss divided by each response's own length, or its "
            "micro-batch's, makes long responses count less: a bound on anything that goes with length would miss)",
        ),
        (
            getattr(args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize",
            "multi_objective_aggregation",
            "'sum_then_normalize' with scale_rewards='none' (normalizing each cost divides its multiplier away)",
        ),
        (
            getattr(args, "normalize_advantages", False),
            "normalize_advantages",
            "False (divided by their standard deviation, the multipliers do not count)",
        ),
        (
            getattr(args, "reward_clip_range", None) is not None,
            "reward_clip_range",
            "None (it clips rewards with the costs in them: what is far above a bound would not be pulled down; clip "
            "within your reward function)",
        ),
        (
            getattr(args, "mask_truncated_completions", False),
            "mask_truncated_completions",
            "False (the longest responses would count in the averages, but have no gradient)",
        ),
    ]
    for wrong, name, allowed in refused:
        if wrong:
            raise ValueError(f"{name}={getattr(args, name)!r} with constraints; allowed: {allowed}")
    other = {name: getattr(args, name, None) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    neutral = {"top_p": (1.0, None), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
    changed = [f"{name}={value}" for name, value in other.items() if value not in neutral[name]]
    if changed:
        warnings.warn(
            f"{', '.join(changed)}: responses are not samples of the model itself, whose log-probabilities make the "
            "gradient. Costs are averages over the responses as sampled; their gradients are approximate.",
            RuntimeWarning,
            stacklevel=3,
        )


class ConstrainedRewards(ConstrainedTrainer):
    r"""Mixin before GRPOTrainer, RLOOTrainer or a subclass: maximise the reward, keep average costs within bounds.

    .. math:: r_i = \text{reward}_i - \sum_k w_k \, \text{cost}_{ki}

    Costs are computed like rewards: TRL calls them, gathers them over the ranks and logs them, and their reward
    weights are -w_k, from the estimates committed before the responses were sampled. All responses of an optimizer
    step are one window. Responses that are used in several steps (``steps_per_generation``, ``num_iterations``) keep
    the weights they were scored with, and count once. Evaluation changes nothing.

    A cost of None is not measured: that response counts neither in the average nor, for this cost, in the gradient
    (it takes the average of its group).

    Args:
        model: As for the trainer.
        reward_funcs: As for the trainer.
        args: As for the trainer; some settings are refused, with the reason.
        *rest: Further arguments of the trainer.
        constraints: Bounds on averages over responses; or a `BarrierObjective` of them, for another rule.
        costs: By constraint name, what TRL takes as a reward: a function (also async) ``(prompts, completions,
            completion_ids, **columns) -> list of floats``, in the unit of the bounds, or a reward model.
        **kwargs: Further arguments of the trainer.

    Raises:
        ValueError: Costs that are not those of the constraints, or settings under which bounds would not hold.

    Example:
        >>> class MyTrainer(ConstrainedRewards, GRPOTrainer): ...

    Source: L3Ms (arXiv 2410.21533); GRPO (arXiv 2402.03300); Dr. GRPO (arXiv 2503.20783) on division by length.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *rest: Any,
        constraints: Sequence[Constraint] | BarrierObjective,
        costs: Mapping[str, str | Callable[..., Any]],
        **kwargs: Any,
    ) -> None:
        self.objective = make_objective(constraints, "costs", costs)
        if self.objective.normalize:
            raise ValueError("constraints is a BarrierObjective with normalize=True; allowed: normalize=False")
        if args is not None:
            _check_settings(args)
        rewards = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        names = [c.name for c in self.objective.constraints]
        columns = self._cost_columns = slice(len(rewards), len(rewards) + len(names))
        classes = kwargs.get("reward_processing_classes")
        if classes is not None:
            kwargs["reward_processing_classes"] = [
                *(classes if isinstance(classes, list) else [classes]),
                *[None] * len(names),
            ]
        user_weights = getattr(args, "reward_weights", None)
        if user_weights is not None:
            args.reward_weights = [*user_weights, *[0.0] * len(names)]
        try:
            super().__init__(model, [*rewards, *(costs[name] for name in names)], args, *rest, **kwargs)
        finally:
            if user_weights is not None:
                args.reward_weights = user_weights
        self._check_ranks()
        if args is None:
            _check_settings(self.args)
        self.reward_func_names[columns] = [f"costs/{name}" for name in names]
        self.add_callback(Commit(self))

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # [all ranks' responses, functions]
        training = self.model.training
        costs = rewards[:, self._cost_columns]
        for name, values in zip(self.objective.weights, costs.T, strict=True):
            if values.isinf().any():
                raise FloatingPointError(f"costs[{name!r}] returned an infinite number; allowed: finite ones, or None")
        if training:
            self._measure(costs)
        self.reward_weights[self._cost_columns] = -torch.tensor(list(self.objective.weights.values())).float()
        # A response without a cost, or without any reward, is an average one of its group in that respect: TRL's sum
        # would take it for 0, which next to the others' costs is a reward.
        size = self.num_generations if training else self.num_generations_eval
        grouped = rewards.unflatten(0, (-1, size))
        mean = grouped.nanmean(1, keepdim=True).expand_as(grouped).flatten(0, 1)
        is_cost = torch.zeros(rewards.shape[1], dtype=torch.bool, device=rewards.device)
        is_cost[self._cost_columns] = True
        no_reward = (rewards.isnan() | is_cost).all(1, keepdim=True)
        return torch.where(rewards.isnan() & (is_cost | no_reward), mean, rewards)

    def _measure(self, costs: Tensor) -> None:
        """Costs [all ranks' responses, K], NaN where there is none; every rank holds all, so one of them is enough."""
        self._measured = True
        if not self.accelerator.is_main_process:
            return
        groups = torch.arange(len(costs)) // self.num_generations
        measurements = {}
        for name, values in zip(self.objective.weights, costs.T.cpu(), strict=True):
            known = ~values.isnan()
            if known.any():
                # One "token" each: groups are for the standard error alone then, and may have one response.
                ends = torch.arange(int(known.sum()) + 1)
                measurements[name] = Sampled.per_token(values[known], cu_seqlens=ends, groups=groups[known])
        self.objective.measure(measurements)


class BarrierGRPOTrainer(ConstrainedRewards, GRPOTrainer):
    """TRL's GRPOTrainer with constraints.

    Args:
        model: As for GRPOTrainer, as are ``reward_funcs``, ``args``, ``rest`` and ``kwargs``.
        constraints: See `ConstrainedRewards`.
        costs: See `ConstrainedRewards`.

    Raises:
        ValueError: See `ConstrainedRewards`.

    Example:
        >>> issubclass(BarrierGRPOTrainer, GRPOTrainer)
        True
    """


class BarrierRLOOTrainer(ConstrainedRewards, RLOOTrainer):
    """TRL's RLOOTrainer with constraints.

    Args:
        model: As for RLOOTrainer, as are ``reward_funcs``, ``args``, ``rest`` and ``kwargs``.
        constraints: See `ConstrainedRewards`.
        costs: See `ConstrainedRewards`.

    Raises:
        ValueError: See `ConstrainedRewards`.

    Example:
        >>> issubclass(BarrierRLOOTrainer, RLOOTrainer)
        True
    """
