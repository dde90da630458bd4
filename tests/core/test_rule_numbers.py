"""A step asks rules for numbers: the same as their formulas on vectors, also where these have been replaced."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barrierlm import (
    AdaptiveBarrier,
    AugmentedLagrangian,
    BarrierObjective,
    ConstantSchedule,
    Constraint,
    DualAscent,
    LogBarrier,
    ModifiedBarrier,
    RelaxedLogBarrier,
    Sampled,
)

from .test_barriers import ALL, F64, mus, ratios


@pytest.mark.parametrize(
    "rule",
    [
        *(RelaxedLogBarrier(extension, order=order) for extension, order in ALL),
        LogBarrier(),
        DualAscent(start_at=0.3),
        AugmentedLagrangian(),
        ModifiedBarrier(unit=0.2),
        AdaptiveBarrier(unit=0.2),
    ],
    ids=lambda rule: getattr(rule, "extension", rule.kind),
)
@given(data=st.data(), mu=mus, s=mus)
def test_a_step_asks_for_the_same_as_numbers(rule, data, mu, s):
    z = [data.draw(ratios) * s for _ in range(4)]
    rule.start(4)
    if hasattr(rule, "age"):
        rule.age, rule.learned = torch.tensor([0.0, 3, 50, 1e4]), torch.tensor([0.0, 0.5, 1, 1e4])
        rule.noisy = torch.tensor([1.0, 0.0, 1.0, 0.0])
        rule.ahead = torch.tensor([0.0, -0.7, 2.0, 1.5])
    if hasattr(rule, "frozen_mu"):
        rule.frozen_mu = torch.tensor([0.0, 0.0, 0.5, mu])
    at, mu, s = torch.tensor(z, dtype=F64), torch.full((4,), mu, dtype=F64), torch.full((4,), s, dtype=F64)
    forces = rule._forces(z, mu.tolist(), s.tolist())
    assert [f.multiplier for f in forces] == pytest.approx(rule.multiplier(at, mu, s).tolist(), rel=1e-14)
    size = (mu * (1 + s.log().abs())).max().item()
    assert [f.value for f in forces] == pytest.approx(rule.value(at, mu, s).tolist(), rel=1e-12, abs=1e-14 * size)
    in_force = [x.tolist() for x in rule.in_force(mu, s)]
    assert [(f.mu, f.s) for f in forces] == [pytest.approx(pair, rel=1e-14) for pair in zip(*in_force, strict=True)]


def _asked(rule):
    """The multiplier after three windows in which the value is half its bound."""
    objective = BarrierObjective(None, [Constraint("c", upper=1.0, scale=1.0)], rule=rule)
    for _ in range(3):
        objective.measure({"c": torch.tensor(0.5)})
        objective.step()
    return objective.report()[0].multiplier


def _twice(parent):
    """A class that doubles the multiplier and counts the windows."""

    class Twice(parent):
        windows = 0

        def multiplier(self, z, mu, s):
            return 2 * super().multiplier(z, mu, s)

        def update(self, readings, mu, s):
            self.windows += 1
            super().update(readings, mu, s)

    return Twice


@pytest.mark.parametrize("base", [RelaxedLogBarrier, ModifiedBarrier, AdaptiveBarrier])
def test_whatever_replaces_a_formula_is_asked(base, monkeypatch):
    class Mixed(_twice(object), base):
        pass

    class Deeper(Mixed):
        pass

    plain = _asked(base())
    for kind in (Mixed, Deeper, _twice(base)):
        rule = kind()
        assert _asked(rule) == pytest.approx(2 * plain)
        assert rule.windows == 3
    rule = base()
    rule.multiplier = lambda z, mu, s: 2 * base.multiplier(rule, z, mu, s)
    assert _asked(rule) == pytest.approx(2 * plain)
    before = base.multiplier
    monkeypatch.setattr(base, "multiplier", lambda self, z, mu, s: 2 * before(self, z, mu, s))
    assert _asked(base()) == pytest.approx(2 * plain)


def test_a_rule_of_two_rules():
    class Both(RelaxedLogBarrier, AdaptiveBarrier):
        def __init__(self):
            RelaxedLogBarrier.__init__(self)
            AdaptiveBarrier.__init__(self)

    assert _asked(Both()) == pytest.approx(_asked(RelaxedLogBarrier()))


def test_a_ratio_of_z_to_mu_that_is_no_number_is_told():
    limits = [Constraint("c", upper=1e300, scale=1.0)]
    objective = BarrierObjective(None, limits, rule=AdaptiveBarrier(smallest_mu=1.0), schedule=ConstantSchedule(1e-10))
    objective.measure({"c": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"no finite multiplier for c \(upper\) .* a larger mu"):
        objective.step()


def test_a_call_in_inference_mode_leaves_nothing_that_training_cannot_use():
    objective = BarrierObjective(None, [Constraint("c", upper=1.0, scale=1.0)], multiplier="current")
    costs = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    with torch.inference_mode():
        objective.combine(None, {"c": Sampled(costs, torch.zeros(3, dtype=F64))})
    logps = torch.zeros(3, dtype=F64, requires_grad=True)
    objective.combine(None, {"c": Sampled(costs, logps)}).loss.backward()
    assert logps.grad.isfinite().all()
    assert logps.grad.abs().sum() > 0
