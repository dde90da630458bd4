"""Estimates against the NumPy twin: any split, any order, groups, windows of one sample, exact values."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barrierlm import EMA, BarrierObjective, BatchMean, Constraint, Sampled

from . import oracle

F64 = torch.float64
values = st.floats(-10, 10)
window = st.lists(values, min_size=1, max_size=12)


def run(windows, estimator, splits=None, constraint=None, groups=None):
    """Commit the windows through the public API, each split into micro-batches, and return the objective."""
    objective = BarrierObjective(None, [constraint or Constraint("c", upper=1.0, scale=1.0)], estimator=estimator)
    for i, samples in enumerate(windows):
        cuts = [0, *(splits[i] if splits else []), len(samples)]
        for a, b in itertools.pairwise(cuts):
            x = torch.tensor(samples[a:b], dtype=F64)
            g = None if groups is None else torch.tensor(groups[i][a:b])
            objective(measurements={"c": Sampled(x, torch.zeros_like(x, requires_grad=True), g)})
        objective.step()
    return objective


def close(objective, mean, stderr):
    metrics = objective.metrics()
    assert metrics["constraints/c/value"] == pytest.approx(mean, abs=1e-12)
    # Sums of squares keep fp64's digits of the variance, not of its root.
    assert metrics["constraints/c/stderr"] ** 2 == pytest.approx(stderr**2, rel=1e-9, abs=1e-12, nan_ok=True)


#: Just below 1 the spread between windows is a ratio of rounding errors, in the twin as well.
smoothings = st.floats(0.05, 0.99) | st.just(1.0)


@given(windows=st.lists(window, min_size=1, max_size=6), smoothing=smoothings, data=st.data())
def test_any_split_gives_the_twins_estimate(windows, smoothing, data):
    splits = [sorted(data.draw(st.lists(st.integers(0, len(w)), max_size=3))) for w in windows]
    close(run(windows, EMA(smoothing), splits), *oracle.ema(windows, smoothing))


@given(samples=st.lists(values, min_size=2, max_size=12), seed=st.integers(0, 99))
def test_permuting_samples_changes_nothing(samples, seed):
    shuffled = np.random.default_rng(seed).permutation(samples).tolist()
    a, b = run([samples], BatchMean()), run([shuffled], BatchMean())
    mean, stderr = a.metrics()["constraints/c/value"], a.metrics()["constraints/c/stderr"]
    close(b, mean, stderr)


@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    num_windows=st.integers(1, 3),
    smoothing=smoothings,
    seed=st.integers(0, 999),
)
def test_groups_are_the_unit_of_the_standard_error(sizes, num_windows, smoothing, seed):
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    windows = [
        (rng.normal(size=len(sizes))[group] + 0.1 * rng.normal(size=len(group))).tolist() for _ in range(num_windows)
    ]
    groups = [group.tolist()] * num_windows
    close(run(windows, EMA(smoothing), groups=groups), *oracle.ema(windows, smoothing, groups))


def test_identical_responses_of_a_group_count_once():
    """Four copies of each value say no more about the mean than one: the naive standard error would halve."""
    values = [0.0, 1.0, 2.0, 3.0]
    once = run([values], BatchMean()).metrics()["constraints/c/stderr"]
    four = run([[v for v in values for _ in range(4)]], BatchMean(), groups=[[i for i in range(4) for _ in range(4)]])
    assert four.metrics()["constraints/c/stderr"] == pytest.approx(once)


def test_single_sample_windows_take_the_spread_between_windows():
    rng = np.random.default_rng(0)
    windows = [[x] for x in rng.normal(size=400).tolist()]
    stderr = run(windows, EMA(0.1)).metrics()["constraints/c/stderr"]
    assert stderr == pytest.approx(oracle.ema(windows, 0.1)[1], rel=1e-9)
    assert stderr == pytest.approx(math.sqrt(0.1 / 1.9), rel=0.5)  # the truth for unit variance


def test_standard_error_covers_the_truth():
    """The 2-sigma interval of an EMA over small windows holds the true mean about 95 times in 100."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        windows = rng.exponential(size=(30, 8)).tolist()
        metrics = run(windows, EMA(0.1)).metrics()
        hits += abs(metrics["constraints/c/value"] - 1) < 1.96 * metrics["constraints/c/stderr"]
    assert 0.89 <= hits / 200 <= 0.99


def test_exact_values_have_no_noise_and_scale_one():
    objective = BarrierObjective(None, [Constraint("c", upper=1.0)])
    for x in (3.0, 5.0):
        objective(measurements={"c": torch.tensor(x, requires_grad=True)})
        objective.step()
    metrics = objective.metrics()
    assert metrics["constraints/c/stderr"] == 0.0
    assert objective.report()[0].scale == 1.0
    mean = (3 * 0.9 + 5) / 1.9  # bias-corrected EMA(0.1)
    assert metrics["constraints/c/value"] == pytest.approx(mean)


def test_large_offsets_do_not_cancel():
    rng = np.random.default_rng(0)
    windows = (1e8 + 0.1 * rng.normal(size=(5, 64))).tolist()
    objective = run(windows, EMA(0.5), constraint=Constraint("c", upper=1e8 + 5))
    stderr = objective.metrics()["constraints/c/stderr"]
    assert objective.report()[0].scale == pytest.approx(np.std(windows[0], ddof=1), rel=1e-3)
    assert stderr == pytest.approx(oracle.ema(windows, 0.5)[1], rel=1e-3)


def test_exact_values_that_differ_within_a_window_are_samples():
    objective = BarrierObjective(None, [Constraint("c", upper=1.0)])
    for x in (0.0, 10.0):
        objective(measurements={"c": torch.tensor(x, requires_grad=True)})
    objective.step()
    assert objective.metrics()["constraints/c/stderr"] == pytest.approx(5.0)


@pytest.mark.parametrize("spread", [1e-9, 1e-7, 6e-5])
def test_round_off_is_no_scale(spread):
    """A KL before the first step, where both passes are the same but for their rounding."""
    objective = run([[0.0, spread, 2 * spread, spread]], EMA(), constraint=Constraint("c", upper=0.1))
    assert objective.report()[0].scale == pytest.approx(0.1, rel=1e-2)
    below = run([[0.0, -spread, -2 * spread, -spread]], EMA(), constraint=Constraint("c", lower=-0.1))
    assert below.report()[0].scale == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_far_start_has_its_own_scale(sign):
    samples = [3.0, 5.0, 4.0, 6.0]
    bound = {"upper": 0.0} if sign > 0 else {"lower": 0.0}
    for distance in (1e2, 1e4):
        outside = run([[sign * (distance + x) for x in samples]], EMA(), constraint=Constraint("c", **bound))
        assert outside.report()[0].scale == pytest.approx(np.std(samples, ddof=1), rel=1e-4)
    within = run([[-sign * (1e2 + x) for x in samples]], EMA(), constraint=Constraint("c", **bound))
    assert within.report()[0].scale == pytest.approx(np.std(samples, ddof=1))


def test_default_scales():
    samples = [1.0, 2.0, 4.0, 9.0]
    cases = [
        (Constraint("c", lower=1, upper=5), 4.0),
        (Constraint("c", upper=5, scale=0.3), 0.3),
        (Constraint("c", upper=5), np.std(samples, ddof=1)),
    ]
    for constraint, scale in cases:
        assert run([samples], EMA(), constraint=constraint).report()[0].scale == pytest.approx(scale)
    frozen = run([samples, [100.0, 900.0]], EMA(), constraint=Constraint("c", upper=5))
    assert frozen.report()[0].scale == pytest.approx(np.std(samples, ddof=1))
    same = run([[48.0] * 4], EMA(), constraint=Constraint("c", upper=24))  # all alike: the distance to the bound
    assert same.report()[0].scale == pytest.approx(24)
    singles = run([[1.0], [3.0]], EMA(), constraint=Constraint("c", upper=24))  # waits for two samples
    assert singles.report()[0].scale == pytest.approx(np.std([1, 3], ddof=1))
    waiting = run([[1.0]], EMA(), constraint=Constraint("c", upper=0))
    assert math.isnan(waiting.report()[0].scale)
    assert waiting.report()[0].multiplier == 0.0


@pytest.mark.parametrize("smoothing", [0, -0.1, 1.1])
def test_errors(smoothing):
    with pytest.raises(ValueError, match=f"smoothing={smoothing}; allowed: 0 < smoothing <= 1"):
        EMA(smoothing)
