"""What is compared, as options of the recipe: every method runs in the same loop, and differs in these lines alone."""

from __future__ import annotations

#: An ordinary multiplier, in nats per token and unit of violation: the recipe's `objective.unit`; and that for rewards,
#: whose bounds were not reached in 44 steps with the recipe's.
UNIT, REWARD_UNIT = 0.06, 0.6
#: A hinge is a relaxed barrier whose s is this narrow (in units of violation), with mu = weight * s.
_HINGE = 1e-6

SFT, PENALTY, MM, AUGMENTED, L3M, DEFAULT, MODIFIED = (
    "SFT",
    "penalty",
    "MM",
    "AugmentedLagrangian",
    "L3M plain",
    "default",
    "ModifiedBarrier",
)
#: Those that run once a seed; the penalty runs once a weight.
METHODS = (DEFAULT, MM, L3M, AUGMENTED, MODIFIED)

#: Method: what it is.
ABOUT = {
    SFT: "plain supervised fine-tuning, no constraint and no sampling",
    PENALTY: "loss + weight max(0, violation), the weight fixed and found by trying",
    MM: "min-max Lagrangian training, `DualAscent`: its default step of 0.05, times the unit",
    AUGMENTED: "`AugmentedLagrangian`: its default penalty of 1, times the unit",
    L3M: "the paper's formula, `RelaxedLogBarrier` with s = μ², μ from 1 to 0.01 over the run, no noise floor",
    DEFAULT: "`AdaptiveBarrier`, the recipe's default with the unit; bounds drawn in once it learns",
    MODIFIED: "`ModifiedBarrier` with the unit; bounds drawn in as well",
}


def recipe_options(method: str, steps: int, weight: float | None = None, unit: float = UNIT) -> list[str]:
    """The overrides of the recipe that make the method.

    Args:
        method: One of `ABOUT`.
        steps: Of the run; the paper's schedule has a horizon.
        weight: The penalty's, in nats per token and unit of violation; only there.
        unit: An ordinary multiplier, in the same.

    Raises:
        ValueError: An unknown method, or a weight where there is none, or none where there is one.
    """
    if method not in ABOUT:
        raise ValueError(f"method={method!r}; allowed: {', '.join(ABOUT)}")
    if (method == PENALTY) != (weight is not None):
        raise ValueError(f"weight={weight!r} for {method}; allowed: a number for {PENALTY}, None for the others")
    if weight is not None:
        # mu / max(-z, s): the weight wherever the bound is violated, and a hundredth of a percent of it and less from
        # a hundredth of a unit inside.
        return [
            "objective.rule=RelaxedLogBarrier",
            f"objective.rule_options.s={_HINGE:.12f}",
            "objective.schedule=ConstantSchedule",
            f"objective.schedule_options.mu={weight * _HINGE:.12f}",
            "objective.noise_floor=0",
        ]
    own = f"objective.unit={unit:g}"
    return {
        SFT: [],
        DEFAULT: [own],
        MM: ["objective.rule=DualAscent", f"objective.rule_options.step={0.05 * unit:g}"],
        AUGMENTED: ["objective.rule=AugmentedLagrangian", f"objective.rule_options.penalty={unit:g}"],
        MODIFIED: ["objective.rule=ModifiedBarrier", own],
        L3M: [
            "objective.rule=RelaxedLogBarrier",
            "objective.schedule=ExponentialSchedule",
            "objective.schedule_options.start=1.0",
            "objective.schedule_options.end=0.01",
            f"objective.schedule_options.steps={steps}",
            "objective.noise_floor=0",
        ],
    }[method]
