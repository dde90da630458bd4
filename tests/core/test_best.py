"""The best state is the one that a look over the whole history would choose."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barrierlm import BarrierObjective, BestFeasible, BoundState, Constraint, Report

from .helpers import exact

NAN = math.nan


def bound(estimate, stderr=0.0, bound=1.0, side="upper", scale=1.0, name="c"):
    slack = (bound - estimate) if side == "upper" else (estimate - bound)
    return BoundState(name, side, bound, estimate, stderr, slack, 0.0, 0.0, 0.0, scale, "")


def brute_force(history, confidence, smoothing):
    """(step, met, violation, loss) of the best, by sorting all states; explicit weights, all bounds in a loop."""
    states = []
    for t, (rows, _) in enumerate(history):
        weights = np.array([smoothing * (1 - smoothing) ** (t - i) for i in range(t + 1)])
        loss = (weights * [loss for _, loss in history[: t + 1]]).sum() / weights.sum()
        outside = []
        for row in rows:
            sign = 1 if row.side == "upper" else -1
            margin = confidence * row.stderr if confidence > 0 else 0
            outside.append((sign * (row.estimate - row.bound) + margin) / row.scale)
        if np.isnan(outside).any():
            continue
        met = all(z <= 0 for z in outside)
        states.append((not met, 0 if met else max(outside), loss, t + 1, max(outside)))
    if not states:
        return None
    unmet, _, loss, step, violation = min(states)
    return step, not unmet, violation, loss


# Multiples of a quarter and halves: exact in floats, so that ties are ties in both.
quarters = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def histories(draw):
    sides = draw(st.lists(st.sampled_from(["upper", "lower"]), min_size=1, max_size=3))
    scales = [draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in sides]
    history = []
    for _ in range(draw(st.integers(0, 12))):
        rows = [
            bound(
                draw(quarters | st.just(NAN)) if draw(st.booleans()) else draw(quarters),
                draw(st.sampled_from([0.0, 0.25, 0.5, NAN])),
                0.5,
                side,
                scale,
                f"c{i}",
            )
            for i, (side, scale) in enumerate(zip(sides, scales, strict=True))
        ]
        history.append((Report(rows), draw(st.integers(-3, 3))))
    return history


@given(histories(), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.5, 1.0]))
def test_it_is_the_choice_over_the_whole_history(history, confidence, smoothing):
    best = BestFeasible(confidence, smoothing)
    for t, (report, loss) in enumerate(history):
        before = brute_force(history[:t], confidence, smoothing)
        after = brute_force(history[: t + 1], confidence, smoothing)
        # A copy made whenever it says so is the best state at any time.
        assert best.update(report, loss) == (after != before)
        if t == len(history) // 2:
            saved = best.state_dict()
            best = BestFeasible(confidence, smoothing)
            best.load_state_dict(saved)
    expected = brute_force(history, confidence, smoothing)
    if expected is None:
        assert (best.step, best.feasible) == (None, False)
        assert math.isnan(best.task_loss)
        assert math.isnan(best.violation)
        assert str(best).startswith(f"no state yet: none of {len(history)} window(s)")
    else:
        assert (best.step, best.feasible, best.violation, best.task_loss) == expected


def test_what_it_says():
    best = BestFeasible(smoothing=1.0)
    assert best.update(Report([bound(1.8, name="length"), bound(0.0, name="kl")]), torch.tensor(2.0))
    assert str(best) == ("step 1: no state met all bounds with confidence; least violated: length (upper) by 0.8 scale")
    # Within, but not by two standard errors: least violated is the confidence limit.
    assert best.update(Report([bound(0.9, 0.1, name="length"), bound(0.0, name="kl")]), 2.0)
    assert (best.feasible, best.violation) == (False, pytest.approx(0.1))
    assert best.update(Report([bound(0.7, 0.1, name="length"), bound(0.0, name="kl")]), 9.0)
    assert str(best) == "step 3: all 2 bounds met with confidence, task loss 9"
    assert not best.update(Report([bound(1.1), bound(0.0)]), -5.0)
    assert best.update(Report([bound(1.5, bound=1.0, side="lower")]), 1.2345678)
    assert str(best) == "step 5: the bound met with confidence, task loss 1.235"
    assert best.violation == -0.5


def test_one_noisy_loss_does_not_decide():
    best = BestFeasible()
    inside = Report([bound(0.0)])
    for loss in (2.0, 1.0):
        assert best.update(inside, loss)
    assert best.task_loss == pytest.approx((0.9 * 2 + 1) / 1.9)  # weights 0.09 and 0.1 over their sum
    for _ in range(30):
        best.update(inside, 1.0)
    step, loss = best.step, best.task_loss
    assert not best.update(inside, 1.5)
    assert not best.update(inside, 0.8)  # alone it would be the best of all
    assert (best.step, best.task_loss) == (step, loss)


def test_mistakes_change_nothing():
    for arguments in ({"confidence": -1.0}, {"confidence": NAN}, {"confidence": "2"}, {"confidence": math.inf}):
        with pytest.raises(ValueError, match=r"confidence=.*; allowed: a finite number >= 0"):
            BestFeasible(**arguments)
    for smoothing in (0, 1.5, NAN):
        with pytest.raises(ValueError, match=r"smoothing=.*; allowed: 0 < smoothing <= 1"):
            BestFeasible(smoothing=smoothing)
    best = BestFeasible()
    best.update(Report([bound(0.0)]), 1.0)
    before = best.state_dict()
    inside = Report([bound(-1.0)])
    for report, loss, error, message in (
        (inside, NAN, ValueError, "task_loss=nan; allowed: a finite number"),
        (inside, torch.tensor(math.inf), ValueError, "task_loss=inf; allowed"),
        (inside, torch.ones(2), ValueError, r"task_loss has shape \(2,\); allowed"),
        (Report(), 1.0, ValueError, "report has no rows; allowed"),
        ([bound(0.0)], 1.0, TypeError, "report is a list; allowed: a Report"),
    ):
        with pytest.raises(error, match=message):
            best.update(report, loss)
    assert best.state_dict() == before
    for state, message in (
        (None, "state is NoneType; allowed: version 1"),
        ({"version": 2}, "state is version 2; allowed: version 1"),
        ({"version": 1}, "state lacks 'best'; allowed"),
        (before | {"confidence": 1.0}, "state was saved for confidence=1.0; allowed: 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            best.load_state_dict(state)
    assert best.state_dict() == before


def test_with_an_objective_and_a_file():
    """x rises until the bound holds; the best state is a late one, and the state is safe to load."""
    x = exact(-1.0)
    objective = BarrierObjective(None, [Constraint("x", lower=0.5, scale=1.0)])
    optimizer, best = torch.optim.SGD([x], lr=0.1), BestFeasible()
    verdicts = []
    for _ in range(80):
        out = objective.combine(0.1 * x**2, {"x": x * 1.0})
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.step()
        if best.update(objective.report(), out.task_loss):
            verdicts.append(best.feasible)
    assert best.feasible
    assert verdicts == sorted(verdicts)  # once a state is feasible, only feasible ones beat it
    file = io.BytesIO()
    torch.save(best.state_dict(), file)
    file.seek(0)
    again = BestFeasible()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.state_dict() == best.state_dict()
    assert str(again) == str(best)
