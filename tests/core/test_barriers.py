"""Rules against the NumPy twin, and the laws of barriers as properties."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from barrierlm import (
    AdaptiveBarrier,
    AugmentedLagrangian,
    DualAscent,
    LogBarrier,
    ModifiedBarrier,
    RelaxedLogBarrier,
)
from barrierlm.barriers import Readings

from . import oracle

F64 = torch.float64
EXTENSIONS = [("linear", None), ("quadratic", None), ("polynomial", 2), ("polynomial", 4), ("polynomial", 6)]
ALL = [*EXTENSIONS, ("exponential", None)]
mus = st.floats(-6, 3).map(lambda e: 10.0**e)
ratios = st.floats(-50, 20)  # z / s


def make(extension, order):
    return RelaxedLogBarrier(extension, order=order)


def at(rule, z, mu, s):
    z = torch.tensor([z], dtype=F64, requires_grad=True)
    mu, s = torch.tensor([mu], dtype=F64), torch.tensor([s], dtype=F64)
    value = rule.value(z, mu, s)
    (slope,) = torch.autograd.grad(value.sum(), z)
    return value.item(), slope.item(), rule.multiplier(z.detach(), mu, s).item()


def readings(z, noise=0.0):
    z, noise = torch.tensor([z], dtype=F64), torch.tensor([noise], dtype=F64)
    return Readings(z, z, noise, noise, torch.tensor([True]))


@pytest.mark.parametrize(("extension", "order"), ALL)
@given(r=ratios, mu=mus, s=mus)
def test_relaxed_is_the_formula(extension, order, r, mu, s):
    z = r * s
    value, slope, multiplier = at(make(extension, order), z, mu, s)
    expected, expected_slope = oracle.relaxed(extension, z, mu, s, order)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12 * mu * (1 + abs(math.log(s))))
    assert slope == pytest.approx(expected_slope, rel=1e-9)
    assert multiplier == pytest.approx(expected_slope, rel=1e-9)


@pytest.mark.parametrize(("extension", "order"), ALL)
@given(mu=mus)
def test_relaxed_joins_smoothly(extension, order, mu):
    s = mu**2
    eps = 1e-7
    rule = make(extension, order)
    below, above = (at(rule, -s * (1 + side * eps), mu, s) for side in (1, -1))
    assert above[0] - below[0] == pytest.approx(mu / s * 2 * eps * s, rel=1e-4, abs=1e-12 * mu * (1 + abs(math.log(s))))
    assert above[2] == pytest.approx(below[2], rel=1e-5)
    if extension != "linear":  # C2: B'' = mu/s^2 on both sides
        second = (at(rule, -s * (1 - 1e-4), mu, s)[2] - at(rule, -s, mu, s)[2]) / (1e-4 * s)
        assert second == pytest.approx(mu / s**2, rel=1e-3)


@pytest.mark.parametrize(
    "rule",
    [*(make(*x) for x in ALL), ModifiedBarrier(), AdaptiveBarrier(), AugmentedLagrangian()],
    ids=lambda r: type(r).__name__ + getattr(r, "extension", ""),
)
@given(a=ratios, b=ratios, mu=mus)
def test_monotone_and_convex(rule, a, b, mu):
    assume(a < b)
    rule.start(1)
    s = mu**2
    at_a, at_b, middle = (at(rule, r * s, mu, s) for r in (a, b, (a + b) / 2))
    slack = 1e-9 * (abs(at_a[0]) + abs(at_b[0])) + 1e-300
    assert at_a[0] <= at_b[0] + slack
    assert middle[0] <= (at_a[0] + at_b[0]) / 2 + slack
    assert 0 <= at_a[2] <= at_b[2] * (1 + 1e-12)


@given(mu=mus, z=st.floats(1e-6, 1e6))
def test_log_barrier(mu, z):
    assert at(LogBarrier(), -z, mu, 1.0)[::2] == pytest.approx(oracle.log_barrier(-z, mu))
    one = torch.ones(1, dtype=F64)
    assert LogBarrier().multiplier(z * one, mu * one, one).item() == math.inf
    assert LogBarrier().value(0 * one, mu * one, one).item() == math.inf


@given(mu=mus, u=st.floats(-50, 50), learned=st.floats(1e-3, 1e3))
def test_modified_is_the_formula(mu, u, learned):
    rule = ModifiedBarrier()
    rule.start(1)
    rule.learned = torch.tensor([learned], dtype=F64)
    value, slope, multiplier = at(rule, u * mu, mu, 1.0)
    expected, expected_slope = oracle.modified(u * mu, mu, learned)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12 * mu * learned)
    assert slope == pytest.approx(expected_slope, rel=1e-9)
    assert multiplier == pytest.approx(expected_slope, rel=1e-9)


@pytest.mark.parametrize("make_rule", [ModifiedBarrier, AdaptiveBarrier])
@given(mu=mus, u=st.floats(-50, 50), learned=st.floats(1e-3, 1e3), lasts=st.integers(0, 30))
def test_noisy_bounds_go_on_along_the_tangent_and_bend_while_a_violation_lasts(make_rule, mu, u, learned, lasts):
    """Beyond half of mu, between the tangent there and the parabola; samples that are all equal change nothing."""
    rule, one, z = make_rule(), torch.ones(1, dtype=F64), u * mu
    parabola, (at_half, tangent) = oracle.modified(z, mu, learned), oracle.modified(mu / 2, mu, learned)
    line = (at_half + tangent * (z - mu / 2), tangent) if u > 0.5 else parabola
    rule.start(1)
    rule.update(readings(-0.2, noise=0.01), one, one)
    for k in range(lasts):
        rule.update(readings(0.2, noise=0.01 * (k % 2)), one, one)
    rule.learned, rule.age = torch.tensor([learned], dtype=F64), torch.zeros(1, dtype=F64)
    if isinstance(rule, AdaptiveBarrier):
        rule.frozen_mu = torch.tensor([mu], dtype=F64)
    share = min(lasts / rule.patience, 1)
    value, slope = (a + share * (b - a) for a, b in zip(line, parabola, strict=True))
    found = at(rule, z, mu, 1.0)
    assert found[0] == pytest.approx(value, rel=1e-9, abs=1e-11 * mu * learned)
    assert found[1:] == pytest.approx((slope, slope), rel=1e-9)


def test_relaxed_has_finite_gradients_everywhere():
    for extension, order in ALL:
        z = torch.tensor([-1e4, -1.0, -0.01, 0.0, 0.01, 1.0], dtype=torch.float32, requires_grad=True)
        mu = torch.full_like(z, 0.1).detach()
        value = make(extension, order).value(z, mu, mu * 5)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(z.grad).all()


def test_gradcheck():
    z = torch.linspace(-3, 1.5, 10, dtype=F64, requires_grad=True)
    mu = torch.full_like(z, 0.3).detach()
    for rule in (*(make(*x) for x in ALL), ModifiedBarrier(), AdaptiveBarrier(), AugmentedLagrangian(), DualAscent()):
        rule.start(10)
        assert torch.autograd.gradcheck(lambda z, rule=rule: rule.value(z, mu, mu**2), z)


# ---- learning


def test_exact_bounds_learn_at_full_step():
    rule, one = ModifiedBarrier(step=0.1, decay=1.0, patience=3), torch.ones(1, dtype=F64)
    rule.start(1)
    for _ in range(2):
        rule.update(readings(0.5), one, one)
    assert rule.learned.item() == pytest.approx(1.05 * 1.05)  # times max(1, lambda)
    assert rule.age.item() == 0


def test_a_step_of_one_is_the_classical_update():
    rule, mu = ModifiedBarrier(0.5, step=1.0), torch.tensor([0.5], dtype=F64)
    rule.start(1)
    for z in (0.1, -0.4, 0.2):
        learned = rule.learned.item()
        rule.update(readings(z), mu, mu**2)
        assert rule.learned.item() == pytest.approx(oracle.modified(z, 0.5, learned)[1])


def test_age_counts_the_windows_up_to_the_last_crossing():
    """What stays on one side of its bound still learns at full step; what crosses it has something to average."""
    rule, one = ModifiedBarrier(step=0.1, decay=10.0), torch.ones(1, dtype=F64)
    rule.start(1)
    for _ in range(5):
        rule.update(readings(-0.05, noise=0.1), one, one)
    assert rule.age.item() == 0
    assert rule.learned.item() == pytest.approx(1 - 5 * 0.1 * 0.05)
    rule.update(readings(0.05, noise=0.1), one, one)
    assert rule.age.item() == 6
    before = rule.learned.item()
    rule.update(readings(0.05, noise=0.1), one, one)
    assert rule.learned.item() == pytest.approx(before + 0.1 / (1 + 6 / 10) * 0.05)
    assert rule.in_force(one, one)[0].item() == pytest.approx(math.sqrt(1 + 6 / 10))


def test_a_violation_that_comes_down_waits_and_one_that_lasts_starts_over():
    rule, one = ModifiedBarrier(step=0.1, patience=3), torch.ones(1, dtype=F64)
    rule.start(1)
    rule.age = torch.full((1,), 50.0, dtype=F64)
    rule.update(readings(4.0, noise=1e-3), one, one)
    first = rule.learned.item()
    assert first == pytest.approx(1 + 0.1 / 1.5 * 0.3)  # a step counts 0.3 of it at most
    for k in range(1, 12):
        rule.update(readings(4.0 * 0.8**k, noise=1e-3), one, one)
    assert rule.learned.item() == first
    assert rule.age.item() == 50
    for _ in range(40):
        rule.update(readings(0.4, noise=1e-3), one, one)
    assert rule.age.item() == 0
    before = rule.learned.item()
    assert before > 1.5
    rule.update(readings(-0.5, noise=1e-3), one, one)
    assert rule.learned.item() == pytest.approx(before - 0.1 * before * 0.5)


@pytest.mark.parametrize("rule", [ModifiedBarrier, AdaptiveBarrier])
@pytest.mark.parametrize("distance", [3.2, 4.5, 8.0])
def test_noisy_windows_do_not_pull_a_violated_bounds_multiplier_down(rule, distance):
    """Few samples a window: its mean is often below the bound while the estimate is far above it."""
    rule, one = rule(), torch.ones(1, dtype=F64)
    rule.start(1)
    if isinstance(rule, AdaptiveBarrier):
        rule.frozen_mu = one.clone()
    rule.learned = torch.full((1,), 100.0, dtype=F64)
    stderr = torch.tensor([0.23], dtype=F64)  # of EMA(0.1) over windows with a standard deviation of 1
    z, generator = distance * stderr, torch.Generator().manual_seed(0)
    for _ in range(300):
        window = z + torch.randn(1, generator=generator, dtype=F64)
        rule.update(Readings(z, window, stderr, stderr, torch.tensor([True])), one, one)
    assert rule.learned.item() > 100


@pytest.mark.parametrize("rule", [ModifiedBarrier, AdaptiveBarrier])
def test_a_learning_step_counts_standard_deviations_of_samples(rule):
    """The same window in a narrower unit is a larger z with as much more noise; the step does not grow with it."""
    one = torch.ones(1, dtype=F64)
    moves = []
    for narrower in (0.5, 1.0, 5.0, 100.0):
        learner = rule()
        learner.start(1)
        if isinstance(learner, AdaptiveBarrier):
            learner.frozen_mu = one.clone()
        z, stderr = torch.tensor([0.01], dtype=F64) * narrower, torch.tensor([0.25], dtype=F64) * narrower
        learner.update(Readings(z, z, stderr, stderr, torch.tensor([True]), one * narrower), one, one)
        moves.append(learner.learned.item() - 1)
    assert moves[:3] == pytest.approx([0.05 * 0.01] * 3)
    assert moves[3] == pytest.approx(0.05 * 0.01 * 10)  # divided by 10 at most


@given(data=st.data(), unit=st.sampled_from([1e-3, 1.0, 50.0, "auto"]))
def test_learned_multipliers_stay_finite_and_bounded(data, unit):
    """Whatever is read, and whatever is missing: 0 <= lambda <= the cap, and nothing is ever NaN."""
    for rule in (ModifiedBarrier(unit=unit), AdaptiveBarrier(unit=unit)):
        rule.start(2)
        mu = torch.ones(2, dtype=F64)
        for _ in range(data.draw(st.integers(1, 30))):
            z, w = (torch.tensor(data.draw(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2))) for _ in "zw")
            noise = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1e-6, 0.1, 1.0]), min_size=2, max_size=2)))
            known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2, max_size=2)))
            parts = (torch.where(known, x.double(), 0.0) for x in (z, w, noise, noise, noise))
            before = rule.learned.clone()
            *parts, typical = parts
            rule.update(Readings(*parts, known, typical), mu, mu**2)
            assert ((rule.learned >= 0) & (rule.learned <= 1e4)).all()
            assert torch.equal(rule.learned[~known], before[~known])
            multiplier = rule.multiplier(z.double(), mu, mu**2)
            assert (multiplier.isfinite() & (multiplier >= 0)).all()
            mu = mu * data.draw(st.sampled_from([0.5, 0.9, 1.0]))


@pytest.mark.parametrize("make_rule", [ModifiedBarrier, AdaptiveBarrier])
def test_a_unit_is_looked_for_while_a_bound_is_violated(make_rule):
    """It grows by a tenth a window, waits for what comes down, and is found when the bound is first met."""
    rule, one = make_rule(unit="auto", patience=3), torch.ones(2, dtype=F64)
    rule.start(2)

    def read(*z):
        z, noise, known = torch.tensor(z, dtype=F64), torch.full((2,), 0.1, dtype=F64), torch.tensor([True, True])
        rule.update(Readings(z, z, noise, noise, known), one, one)
        return rule.units.tolist()

    assert read(1.0, -1.0) == [0.01 * 1.1, 0.01]
    assert read(1.0, -1.0) == [0.01 * 1.1 * 1.1, 0.01]
    assert read(0.15, -1.0)[0] == 0.01 * 1.1 * 1.1  # coming down, and within two standard errors
    first, second = read(1.0, 1.0)
    assert (first, second) == (pytest.approx(0.01 * 1.1**3), 0.01 * 1.1)
    for _ in range(40):
        first, second = read(2.0, -1.0)
    assert second == 0.01 * 1.1  # met after it had grown: found
    assert read(-0.01, 1.0) == [first, second]
    assert read(5.0, 5.0) == [first, second]
    rule.start(2)
    for _ in range(200):
        read(2.0, -1.0)
    assert rule.units.tolist() == [1e3, 0.01]
    assert read(2.0, 1.0)[1] == pytest.approx(0.3 * 1e3 * 1.1)  # begins near what another bound needed


def test_a_given_unit_stays():
    rule, one = AdaptiveBarrier(unit=0.2), torch.ones(1, dtype=F64)
    rule.start(1)
    for _ in range(50):
        rule.update(readings(3.0, noise=0.1), one, one)
    assert rule.units.item() == 0.2


@given(mu=mus, z=st.floats(-3, 3), unit=st.floats(1e-3, 1e3))
def test_the_unit_multiplies_the_barrier(mu, z, unit):
    for make_rule in (ModifiedBarrier, AdaptiveBarrier):
        plain, scaled = make_rule(), make_rule(unit=unit)
        plain.start(1)
        scaled.start(1)
        for a, b in zip(at(plain, z, mu, mu**2), at(scaled, z, mu, mu**2), strict=True):
            assert b == pytest.approx(unit * a, rel=1e-9, abs=1e-12 * unit)


@given(z=st.floats(-3, 3), mu=st.floats(0.2, 1.0))
def test_hand_over_keeps_the_multiplier(z, mu):
    rule = AdaptiveBarrier()
    rule.start(1)
    mu_t = torch.tensor([mu], dtype=F64)
    before = rule.multiplier(torch.tensor([z], dtype=F64), mu_t, mu_t**2)
    rule.update(readings(z, noise=mu**2), mu_t, mu_t**2)
    assert rule.learning.all()
    assert rule.multiplier(torch.tensor([z], dtype=F64), mu_t, mu_t**2).item() == pytest.approx(before.item())


@given(before=st.floats(-3, 3), z=st.floats(-3, 3), mu=st.floats(0.2, 0.5))
def test_hand_over_of_a_moving_estimate_keeps_the_multiplier(before, z, mu):
    """It stands at where the estimate is going, in both halves."""
    rule, one, mu_t = AdaptiveBarrier(), torch.ones(1, dtype=F64), torch.tensor([mu], dtype=F64)
    rule.start(1)
    rule.update(readings(before, noise=0.01), one, one)
    assert not rule.learning.any()
    rule.update(readings(z, noise=0.01), mu_t, mu_t**2)
    assert rule.learning.all()
    there = torch.tensor([z + ahead_of(before, z, 0.01)], dtype=F64)
    wanted = RelaxedLogBarrier().multiplier(there, mu_t, mu_t**2)
    assert rule.multiplier(torch.tensor([z], dtype=F64), mu_t, mu_t**2).item() == pytest.approx(wanted.item())


def ahead_of(before, now, stderr):
    """What is added to z: four times the last change, less a standard error, and 4 at most."""
    return math.copysign(min(4 * max(abs(now - before) - stderr, 0), 4), now - before)


@pytest.mark.parametrize("make_rule", [ModifiedBarrier, AdaptiveBarrier])
@given(before=st.floats(-5, 5), now=st.floats(-5, 5), stderr=st.floats(1e-3, 1.0), mu=st.floats(0.2, 5.0))
def test_multipliers_of_a_moving_estimate_are_those_of_where_it_goes(make_rule, before, now, stderr, mu):
    """In both halves of the default: it hands over where mu is at most 0.5, and tightens above."""
    rule, mu = make_rule(), torch.tensor([mu], dtype=F64)
    rule.start(1)
    for z in (before, before, now) if mu > 0.5 else (before, now):  # what is handed over has nothing to compare with
        rule.update(readings(z, noise=stderr), mu, mu**2)
    expected = 0.0 if mu <= 0.5 and isinstance(rule, AdaptiveBarrier) else ahead_of(before, now, stderr)
    assert rule.ahead.item() == pytest.approx(expected)
    there, z = deepcopy(rule), torch.tensor([now], dtype=F64)
    there.ahead = torch.zeros(1)
    for what in (rule.multiplier, rule.value):
        found, wanted = what(z, mu, mu**2), getattr(there, what.__name__)(z + expected, mu, mu**2)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("make_rule", [ModifiedBarrier, AdaptiveBarrier])
def test_neither_noise_nor_exact_values_are_looked_ahead_of(make_rule):
    one = torch.ones(1, dtype=F64)
    for values, noise in (((0.1, -0.1, 0.15, 0.0), 0.3), ((-3.0, 2.0, -1.0), 0.0), ((2.0,), 0.1)):
        rule = make_rule()
        rule.start(1)
        for z in values:
            rule.update(readings(z, noise=noise), one, one)
            assert rule.ahead.item() == 0


def test_the_margin_of_the_hand_over_is_no_change_of_the_estimate():
    """In the window after it z is that of a bound that has been drawn in."""
    rule, mu = AdaptiveBarrier(), torch.full((1,), 0.5, dtype=F64)
    rule.start(1)
    rule.update(readings(-0.2, noise=0.01), mu, mu**2)
    assert rule.draws_in(0)
    rule.update(readings(0.05, noise=0.01), mu, mu**2)
    assert rule.ahead.item() == 0
    rule.update(readings(0.3, noise=0.01), mu, mu**2)
    assert rule.ahead.item() == pytest.approx(4 * 0.24)


def test_a_late_noisy_bound_does_not_inherit_a_small_mu():
    """mu may have come down with exact bounds before a noisy one is measured at all."""
    rule = AdaptiveBarrier()
    rule.start(1)
    small = torch.full((1,), 1e-3, dtype=F64)
    rule.update(readings(-0.05, noise=0.04), small, small**2)
    assert rule.frozen_mu.item() == pytest.approx(0.2)
    assert rule.in_force(small, small**2)[0].item() == pytest.approx(0.2)


def test_no_hand_over_while_mu_falls_and_then_when_it_has_come_down():
    rule = AdaptiveBarrier()
    rule.start(1)
    mu = torch.ones(1, dtype=F64)
    for _ in range(100):
        mu = mu * 0.995
        rule.update(readings(-0.3, noise=0.1), mu, mu**2)
    assert not rule.learning.any()
    rule.update(readings(-0.3, noise=0.1), mu * 0 + rule.smallest_mu, mu**2)
    assert rule.learning.all()


@pytest.mark.parametrize("noise", [0.1, 0.0])
def test_a_mu_that_has_stopped_hands_sampled_bounds_over(noise):
    """Exact ones keep the relaxed barrier while they are met: their multiplier is not noisy."""
    rule, mu = AdaptiveBarrier(patience=5), torch.ones(1, dtype=F64)
    rule.start(1)
    for _ in range(20):
        rule.update(readings(-0.3, noise=noise), mu, mu**2)
    assert bool(rule.learning.all()) == (noise > 0)


def swinging(*values, mu=1.0, stderr=0.1, rule=None):
    """The default after these estimates of one bound, at one mu."""
    if rule is None:
        rule = AdaptiveBarrier()
        rule.start(1)
    mu = torch.tensor([mu], dtype=F64)
    for z in values:
        rule.update(readings(z, noise=stderr), mu, mu**2)
    return rule


def test_a_bound_that_swings_is_handed_over_from_its_mean_at_twice_the_mu():
    """Met at -0.2 and at -3, violated again at 2, each as it is ahead; the 2 of before is not counted."""
    still = swinging(2.0, -0.2, -3.0)
    assert not still.learning.any()
    told = [-0.2, -3.0, 2.0]
    at = [z + ahead_of(before, z, 0.1) for before, z in zip([2.0, *told], told, strict=False)]
    mean = sum(1 / max(-z, 1.0) for z in at) / 3  # mu = s = 1
    assert 0.3 < mean < 0.6
    assert still.met.item() == 2
    rule = swinging(2.0, rule=still)
    assert rule.learning.all()
    assert rule.learned.item() == pytest.approx(mean)
    assert rule.frozen_mu.item() == 2.0


def test_what_is_no_swing():
    assert not swinging(2.0, 1.9, 2.0, 1.9).learning.any()  # not met yet
    assert not swinging(-0.5, -0.6, 0.0, -0.5).learning.any()  # met all the time
    assert not swinging(-0.5, 0.5, -0.5, 0.5, stderr=0.0).learning.any()  # exact: nothing is late
    fell = swinging(0.7, mu=0.9, rule=swinging(-0.5))
    assert not fell.learning.any()  # at another mu than it was met at
    assert swinging(-0.5, 0.7, mu=0.9, rule=fell).learning.all()
    # Where mu has come down as far as it may, or noise stops it, the multiplier goes on as it is.
    end = swinging(0.2, mu=0.5, stderr=0.01, rule=swinging(-0.5))
    assert end.frozen_mu.item() == 0.5
    noisy = swinging(0.2, stderr=0.9, rule=swinging(-0.5))
    assert noisy.frozen_mu.item() == 1.0


def test_hand_over_when_the_cap_is_too_small():
    rule = AdaptiveBarrier(patience=5)
    rule.start(1)
    mu = torch.ones(1, dtype=F64)
    for _ in range(4):
        rule.update(readings(0.7), mu, mu)
    assert not rule.learning.any()
    for _ in range(30):
        rule.update(readings(0.7), mu, mu)
    assert rule.multiplier(torch.tensor([0.7], dtype=F64), mu, mu).item() > 1.5  # mu/s was 1


def test_multipliers_stay_bounded_when_a_bound_cannot_be_met():
    for rule in (ModifiedBarrier(), AdaptiveBarrier()):
        rule.start(1)
        mu = torch.ones(1, dtype=F64)
        for _ in range(2000):
            rule.update(readings(0.5), mu, mu)
        assert 1e3 < rule.multiplier(torch.tensor([0.5], dtype=F64), mu, mu).item() < 1e5


def test_log_dual_ascent_and_the_delay():
    one = torch.ones(1, dtype=F64)
    dual = DualAscent(0.5, parametrisation="log", delay=2, cap=3.0)
    dual.start(1)
    for _ in range(2):
        dual.update(readings(1.0), one, one)
    assert dual.learned.item() == 1.0
    dual.update(readings(1.0), one, one)
    assert dual.learned.item() == pytest.approx(math.exp(0.5))
    for _ in range(9):
        dual.update(readings(1e6), one, one)
    assert dual.learned.item() == 3.0
    dual.update(readings(-1.0), one, one)
    assert dual.learned.item() == pytest.approx(3.0 * math.exp(-0.5))


def test_dual_ascent_and_augmented_lagrangian_steps():
    one = torch.ones(1, dtype=F64)
    dual = DualAscent(0.1, cap=0.15)
    dual.start(1)
    dual.update(readings(1.0), one, one)
    assert dual.multiplier(one, one, one).item() == pytest.approx(0.1)
    dual.update(readings(1.0), one, one)
    assert dual.learned.item() == pytest.approx(0.15)
    dual.update(readings(-9.0), one, one)
    assert dual.learned.item() == 0.0
    phr = AugmentedLagrangian(2.0, step=0.5)
    phr.start(1)
    phr.update(readings(1.0), one, one)
    assert phr.learned.item() == pytest.approx(1.0)
    assert phr.multiplier(-one, one, one).item() == 0.0


@pytest.mark.parametrize(
    ("make_rule", "message"),
    [
        (lambda: RelaxedLogBarrier("cubic"), r"extension='cubic'; allowed: 'linear', 'quadratic'"),
        (lambda: RelaxedLogBarrier("polynomial", order=3), r"order=3; allowed: an even integer >= 2"),
        (lambda: RelaxedLogBarrier("linear", order=4), r"order=4 with extension='linear'"),
        (lambda: RelaxedLogBarrier(s=0.0), r"s=0.0; allowed: s > 0"),
        (lambda: ModifiedBarrier(mu=-1), r"mu=-1; allowed: mu > 0"),
        (lambda: ModifiedBarrier(step=0), r"step=0; allowed: 0 < step <= 1"),
        (lambda: ModifiedBarrier(decay=0), r"decay=0; allowed: decay > 0"),
        (lambda: AdaptiveBarrier(patience=0), r"patience=0; allowed: an integer >= 1"),
        (lambda: DualAscent(0), r"step=0; allowed: step > 0"),
        (lambda: DualAscent(cap=0), r"cap=0; allowed: cap > 0"),
        (lambda: DualAscent(start_at=-1), r"start_at=-1; allowed"),
        (lambda: DualAscent(start_at=0, parametrisation="log"), r"start_at=0 with parametrisation='log'; allowed"),
        (lambda: DualAscent(parametrisation="square"), r"parametrisation='square'; allowed: 'linear' or 'log'"),
        (lambda: DualAscent(delay=-1), r"delay=-1; allowed: an integer >= 0"),
        (lambda: ModifiedBarrier(unit=0), r"unit=0; allowed: unit > 0"),
        (lambda: AdaptiveBarrier(unit=math.nan), r"unit=nan; allowed: unit > 0"),
        (lambda: AdaptiveBarrier(unit="best"), r"unit='best'; allowed: unit > 0, or 'auto'"),
        (lambda: AugmentedLagrangian(0), r"penalty=0; allowed: penalty > 0"),
        (lambda: AugmentedLagrangian(step=2), r"step=2; allowed: 0 < step <= 1"),
    ],
)
def test_errors(make_rule, message):
    with pytest.raises(ValueError, match=message):
        make_rule()


def test_noise_bias_of_the_plug_in_multiplier():
    """In the log region the plug-in multiplier's bias is about mu sigma^2 / |z|^3 (math.md)."""
    rng = np.random.default_rng(0)
    mu, z, sigma = 0.1, -1.0, 0.05
    samples = torch.tensor(z + sigma * rng.standard_normal(400_000))
    mean = RelaxedLogBarrier().multiplier(samples, torch.tensor(mu), torch.tensor(mu**2)).mean().item()
    assert mean - mu / -z == pytest.approx(mu * sigma**2 / abs(z) ** 3, rel=0.15)
