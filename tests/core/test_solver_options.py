"""Options that every rule shares: confidence and normalize; and when the adaptive schedule moves."""

import pytest
import torch

from barrierlm import (
    AdaptiveBarrier,
    AdaptiveSchedule,
    AugmentedLagrangian,
    BarrierObjective,
    BatchMean,
    ConstantSchedule,
    Constraint,
    DualAscent,
    GradientProbe,
    ModifiedBarrier,
    PackedBatch,
    RelaxedLogBarrier,
    Sampled,
)
from barrierlm.barriers import Readings

F64 = torch.float64


def measured(values):
    return {"c": Sampled(torch.tensor(values, dtype=F64), torch.zeros(len(values), dtype=F64, requires_grad=True))}


# ---- confidence -----------------------------------------------------------------------------------------------------


def test_confidence_draws_the_bound_in_for_the_rule_and_not_for_the_report():
    values = [0.2, -0.4, 0.1, -0.7]
    states = []
    for confidence in (0.0, 2.0):
        objective = BarrierObjective(
            None,
            [Constraint("c", lower=-2.0, upper=0.5, scale=0.5)],
            rule=RelaxedLogBarrier(),
            schedule=ConstantSchedule(0.1),
            estimator=BatchMean(),
            noise_floor=0.0,
            confidence=confidence,
        )
        objective.combine(None, measured(values))
        objective.step()
        states.append(objective.report())
    shift = 2.0 * torch.tensor(values, dtype=F64).std().item() / (4**0.5 * 200**0.5)
    mean = sum(values) / 4
    for plain, drawn_in, distance in zip(*states, (mean + 2.0, 0.5 - mean), strict=True):
        assert drawn_in[:6] == plain[:6]  # the bound, the estimate and the slack are the user's
        assert plain.slack == pytest.approx(distance)
        assert plain.multiplier == pytest.approx(0.1 / (distance / 0.5))
        assert drawn_in.multiplier == pytest.approx(0.1 / ((distance - shift) / 0.5))


def test_half_of_a_window_is_left():
    """Noise wider than the window would draw its bounds past each other; a single bound has no such limit."""
    multipliers = []
    for bounds in ({"lower": -1.0, "upper": 1.0}, {"upper": 1.0}):
        objective = BarrierObjective(
            None,
            [Constraint("c", **bounds, scale=2.0)],
            rule=RelaxedLogBarrier(),
            schedule=ConstantSchedule(0.1),
            estimator=BatchMean(),
            noise_floor=0.0,
            confidence=10.0,
        )
        objective.combine(None, measured([-5.0, 5.0, -5.0, 5.0]))
        objective.step()
        multipliers.append([row.multiplier for row in objective.report()])
    margin = 10.0 * torch.tensor([-5.0, 5.0, -5.0, 5.0], dtype=F64).std().item() / (4**0.5 * 200**0.5)
    assert margin > 1
    assert multipliers[0] == pytest.approx([0.1 / ((1.0 - 2.0 / 4) / 2)] * 2)
    z, s = (margin - 1) / 2, 0.1**2
    assert z > -s
    assert multipliers[1] == pytest.approx(
        [RelaxedLogBarrier().multiplier(*torch.tensor([[z], [0.1], [s]], dtype=F64)).item()]
    )


@pytest.mark.parametrize("rule", [ModifiedBarrier, AdaptiveBarrier])
def test_an_adaptive_bound_is_drawn_in_once_it_learns(rule):
    """A relaxed barrier keeps a distance from its bound; a learned multiplier, saved and loaded or not, ends on it."""

    def run(confidence, windows, state=None):
        objective = BarrierObjective(
            None, [Constraint("c", upper=-0.15, scale=1.0)], rule=rule(), estimator=BatchMean(), confidence=confidence
        )
        if state is not None:
            objective.load_state_dict(state)
        for _ in range(windows):
            objective.combine(None, measured([0.2, -0.4, 0.1, -0.7]))
            objective.step()
        return objective, objective.report()[0].multiplier

    early = [run(confidence, 2)[1] for confidence in (0.0, 6.0)]
    assert (early[0] == early[1]) == (rule is AdaptiveBarrier)
    late = run(6.0, 60)[1]
    assert late > 1.05 * run(0.0, 60)[1]
    for windows in (20, 21, 22, 23, 30):  # around the hand-over
        before, multiplier = run(6.0, windows)
        resumed, after = run(6.0, 0, before.state_dict())
        assert after == multiplier
        assert run(6.0, 60 - windows, resumed.state_dict())[1] == late


@pytest.mark.parametrize("rule", [RelaxedLogBarrier, ModifiedBarrier, DualAscent, AugmentedLagrangian, AdaptiveBarrier])
def test_exact_values_are_not_drawn_in(rule):
    multipliers = []
    for confidence in (0.0, 5.0):
        objective = BarrierObjective(None, [Constraint("c", upper=1.0)], rule=rule(), confidence=confidence)
        for _ in range(3):
            objective.combine(None, {"c": torch.tensor(0.7, requires_grad=True)})
            objective.step()
        multipliers.append(objective.report()[0].multiplier)
    assert multipliers[0] == multipliers[1]


def test_the_default_confidence_is_the_rules_own():
    for rule, expected in ((None, 0.5), (ModifiedBarrier(), 0.5), (DualAscent(), 0.0), (RelaxedLogBarrier(), 0.0)):
        assert BarrierObjective(None, [Constraint("c", upper=1.0)], rule=rule).confidence == expected
    assert BarrierObjective(None, [Constraint("c", upper=1.0)], rule=DualAscent(), confidence=1.5).confidence == 1.5


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "0.5"])
def test_confidence_errors(value):
    with pytest.raises(ValueError, match=r"confidence=.*allowed: a finite number >= 0"):
        BarrierObjective(None, [Constraint("c", upper=1.0)], confidence=value)


# ---- normalize ------------------------------------------------------------------------------------------------------


def gradients(normalize, linear):
    """Of a window with a committed multiplier, and that multiplier."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator, dtype=F64, requires_grad=True)
    head = torch.randn(7, 4, generator=generator, dtype=F64, requires_grad=True)
    batch = PackedBatch(
        torch.tensor([4, 2, 1, 6, 1]), torch.tensor([0, 3, 5]), torch.tensor([1 / 3, 0.0]), num_sampled=1
    )
    objective = BarrierObjective(
        None,
        [Constraint("c", upper=1.0, scale=0.5)],
        rule=RelaxedLogBarrier(),
        schedule=ConstantSchedule(0.2),
        normalize=normalize,
    )
    objective.combine(None, {"c": torch.tensor(1.5, requires_grad=True)})
    objective.step()
    if linear:
        out = objective.linear(hidden, head, batch, {"c": Sampled(torch.tensor([3.0], dtype=F64))})
    else:
        value = (hidden @ head.T).square().mean()
        out = objective.combine(hidden.sum(), {"c": value})
    out.loss.backward()
    return out, hidden.grad, head.grad, objective.report()[0].multiplier


@pytest.mark.parametrize("linear", [False, True], ids=["combine", "linear"])
def test_normalize_divides_by_one_plus_the_multipliers(linear):
    plain, hidden, head, multiplier = gradients(False, linear)
    divided, hidden_divided, head_divided, same = gradients(True, linear)
    assert multiplier == same > 1
    torch.testing.assert_close(hidden_divided, hidden / (1 + multiplier))
    torch.testing.assert_close(head_divided, head / (1 + multiplier))
    torch.testing.assert_close(divided.loss, plain.loss / (1 + multiplier))
    assert divided.task_loss == plain.task_loss  # as the user gave it


def test_normalize_errors():
    constraints = [Constraint("c", upper=1.0)]
    with pytest.raises(ValueError, match=r"normalize=True with multiplier='current'; allowed"):
        BarrierObjective(None, constraints, normalize=True, multiplier="current")
    with pytest.raises(ValueError, match=r"normalize=3; allowed: False or True"):
        BarrierObjective(None, constraints, normalize=3)


def test_the_certificates_norms_are_those_of_the_loss_as_given():
    found = []
    for normalize in (False, True):
        x = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
        constraints = [Constraint("c", upper=-1.0, scale=0.5)]
        objective = BarrierObjective(None, constraints, schedule=ConstantSchedule(0.2), normalize=normalize)
        objective.combine(None, {"c": torch.tensor(0.5, requires_grad=True)})
        objective.step()
        probe = GradientProbe([x])
        for _ in range(3):
            probe.add(objective.combine(x.square().sum(), {"c": x.sum()}))
        found.append(objective.certificate(probe).stationarity)
    assert found[1].task_norm == pytest.approx(found[0].task_norm)
    assert found[1].constraint_norm == pytest.approx(found[0].constraint_norm)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (lambda: ModifiedBarrier(), lambda: ModifiedBarrier(unit=0.1)),
        (lambda: DualAscent(), lambda: DualAscent(parametrisation="log")),
    ],
)
def test_a_state_in_another_unit_is_refused(saved, loaded):
    a, b = (BarrierObjective(None, [Constraint("c", upper=1.0)], rule=rule()) for rule in (saved, loaded))
    with pytest.raises(ValueError, match="state was saved for methods"):
        b.load_state_dict(a.state_dict())


def test_a_state_that_lacks_something_is_refused():
    objective = BarrierObjective(None, [Constraint("c", upper=1.0)])
    state = objective.state_dict()
    del state["watch"]["present"]
    with pytest.raises(ValueError, match="state of the watch does not fit: it lacks 'present'"):
        objective.load_state_dict(state)
    with pytest.raises(ValueError, match="state lacks 'constraints'"):
        objective.load_state_dict({"version": 5})


class Recorder(AdaptiveBarrier):
    """Keeps what it was told last."""

    def _update_numbers(self, readings, mu, s):
        self.told = readings.each()
        super()._update_numbers(readings, mu, s)


def test_each_bound_has_its_own_margin_and_a_rule_is_told_drawn_in_violations():
    """Of four bounds the second and the third are learned; margins are by constraint, a quarter of a width at most."""
    rule, values = Recorder(), torch.tensor([0.0, 2.0, 0.0, 2.0], dtype=F64)
    constraints = [
        Constraint("wide", lower=-9.0, upper=9.0, scale=2.0),
        Constraint("narrow", lower=0.5, upper=1.5, scale=2.0),
    ]
    objective = BarrierObjective(None, constraints, rule=rule, estimator=BatchMean(), confidence=6.5)
    for learned in ([0.0] * 4, [0.0, 0.5, 0.5, 0.0]):
        rule.frozen_mu = torch.tensor(learned, dtype=F64)
        objective.measure({"wide": Sampled(values), "narrow": Sampled(values)})
        objective.step()
    margin = 6.5 * values.std().item() / (4**0.5 * 200**0.5) / 2
    assert margin > 0.25 / 2
    shifts = [0.0, margin, 0.25 / 2, 0.0]
    z = [(-9.0 - 1) / 2, (1 - 9.0) / 2, (0.5 - 1) / 2, (1 - 1.5) / 2]
    drawn_in = [pytest.approx(a + b) for a, b in zip(z, shifts, strict=True)]
    assert [r.z for r in rule.told] == drawn_in
    assert [r.window_z for r in rule.told] == drawn_in


def test_the_barrier_of_a_call_is_drawn_in_as_the_committed_one_is():
    values = torch.tensor([0.0, 2.0, 0.0, 2.0], dtype=F64, requires_grad=True)
    penalties = {}
    for multiplier in ("committed", "current"):
        for confidence in (0.0, 3.0):
            objective = BarrierObjective(
                None,
                [Constraint("c", upper=1.2, scale=2.0)],
                rule=ModifiedBarrier(),
                estimator=BatchMean(),
                confidence=confidence,
                multiplier=multiplier,
            )
            for _ in range(2):
                penalties[multiplier, confidence] = objective(measurements={"c": values}).penalty.item()
                objective.step()
    # The second call's values are those of the window that the committed penalty is of.
    assert penalties["current", 3.0] == pytest.approx(penalties["committed", 3.0], rel=1e-6)
    assert penalties["current", 0.0] == pytest.approx(penalties["committed", 0.0], rel=1e-6)
    assert penalties["current", 3.0] > penalties["current", 0.0] + 0.01


# ---- the adaptive schedule ------------------------------------------------------------------------------------------


def ticks(schedule, z, stderr, times=1, known=True):
    z, stderr = torch.tensor([z], dtype=F64), torch.tensor([stderr], dtype=F64)
    for _ in range(times):
        schedule.tick(Readings(z, z, stderr, stderr, torch.tensor([known])))
    return schedule.mu


def test_mu_falls_only_for_bounds_met_with_confidence():
    schedule = AdaptiveSchedule(factor=0.5)
    assert ticks(schedule, -0.05, 0.1, 10) == 1.0  # half a standard error inside
    assert ticks(schedule, -0.2, 0.1, 1) == 0.5
    assert ticks(schedule, -0.2, 0.1, 10) == 0.5  # 0.25**2 would be below the noise
    assert ticks(schedule, -0.2, 0.01, 1) == 0.25


def test_mu_rises_after_a_sustained_violation_and_not_beyond_its_start():
    schedule = AdaptiveSchedule(factor=0.5, patience=4)
    ticks(schedule, -0.5, 0.001, 3)
    low = schedule.mu
    assert low < 0.5
    assert ticks(schedule, 0.3, 0.1, 3) == low
    assert ticks(schedule, 0.3, 0.1, 1) == 2 * low
    for k in range(20):  # while it comes down, mu holds
        ticks(schedule, 0.3 * 0.8**k, 1e-4)
    assert schedule.mu == 2 * low
    assert ticks(schedule, 0.3, 0.1, 100) == 1.0


def test_an_unmeasured_bound_neither_counts_nor_resets():
    schedule = AdaptiveSchedule(factor=0.5, patience=4)
    ticks(schedule, -0.5, 0.001, 3)
    low = schedule.mu
    ticks(schedule, 0.3, 0.1, 3)
    ticks(schedule, 0.0, 0.0, 5, known=False)
    assert schedule.mu == low
    assert ticks(schedule, 0.3, 0.1, 1) == 2 * low


def test_the_schedule_resumes():
    a, b = AdaptiveSchedule(patience=4), AdaptiveSchedule(patience=4)
    ticks(a, -0.5, 0.001, 6)
    ticks(a, 0.3, 0.1, 2)
    b.load_state_dict(a.state_dict())
    for _ in range(5):
        assert ticks(a, 0.3, 0.1) == ticks(b, 0.3, 0.1)
