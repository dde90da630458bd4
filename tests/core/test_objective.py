"""What a call returns, and what the report and the metrics say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barrierlm import (
    EMA,
    BarrierObjective,
    ConstantSchedule,
    Constraint,
    ExponentialSchedule,
    RelaxedLogBarrier,
    Sampled,
)

from . import oracle
from .helpers import F64, exact, relaxed


def test_first_window_only_measures_then_the_surrogate_is_linear():
    objective = relaxed([Constraint("c", upper=1.0, scale=2.0)])
    x = exact(3.0)
    out = objective.combine(x * 0, {"c": x})
    assert out.loss.item() == 0
    out.loss.backward()
    assert x.grad.item() == 0  # connected, and worth nothing yet
    objective.step()
    out = objective.combine(5 * x, {"c": x})
    weight = (0.1 / 0.01) / 2.0  # violated: mu/s, per scale
    assert out.loss.item() == pytest.approx(5 * 3 + weight * 3)
    (gradient,) = torch.autograd.grad(out.loss, x)
    assert gradient.item() == pytest.approx(5 + weight)
    assert out.task_loss.item() == 15
    assert not out.task_loss.requires_grad
    assert not out.penalty.requires_grad
    assert out.penalty.item() == pytest.approx(oracle.relaxed("linear", 1.0, 0.1, 0.01)[0])
    assert out.bounds[0].multiplier == pytest.approx(10)


def test_calibrate_gives_the_first_window_multipliers():
    objective = relaxed([Constraint("c", upper=1.0)])
    objective.calibrate({"c": torch.tensor([1.0, 2.0, 3.0])})
    assert objective.report()[0].scale == pytest.approx(1.0)
    assert objective.report()[0].multiplier > 0
    assert objective.windows == 0
    assert objective.schedule.mu == 0.1
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    assert torch.autograd.grad(objective(measurements={"c": x}).loss, x)[0].norm() > 0


@given(mean=st.floats(-3, 3), width=st.floats(0.1, 4))
def test_two_sided_is_two_one_sided_with_the_same_scale(mean, width):
    two = relaxed([Constraint("c", lower=-width / 2, upper=width / 2)])
    one = relaxed([Constraint("a", lower=-width / 2, scale=width), Constraint("b", upper=width / 2, scale=width)])
    x = exact(mean)
    losses = []
    for objective, names in ((two, ["c"]), (one, ["a", "b"])):
        for _ in range(2):
            out = objective(measurements=dict.fromkeys(names, x))
            objective.step()
        losses.append((out.loss.item(), torch.autograd.grad(out.loss, x)[0].item(), out.penalty.item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9, abs=1e-12)


@given(
    unit=st.floats(-3, 3).map(lambda e: 10.0**e),
    samples=st.lists(st.floats(-2, 2), min_size=3, max_size=8, unique=True),
    bound=st.floats(-2, 2),
)
def test_rescaling_the_units_changes_nothing(unit, samples, bound):
    if np.std(samples) < 1e-3:
        return
    gradients = []
    for u in (1.0, unit):
        objective = BarrierObjective(None, [Constraint("c", upper=bound * u)], schedule=ConstantSchedule(0.3))
        for _ in range(3):
            x = torch.tensor(samples, dtype=F64, requires_grad=True)
            out = objective(measurements={"c": x * u})
            out.loss.backward()
            objective.step()
        gradients.append([*x.grad.tolist(), objective.report()[0].multiplier])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6)


@given(
    windows=st.lists(st.lists(st.floats(-2, 2), min_size=2, max_size=6), min_size=1, max_size=5),
    lower=st.one_of(st.none(), st.floats(-2, -0.5)),
    upper=st.one_of(st.none(), st.floats(0.5, 2)),
    floor=st.sampled_from([0.0, 1.0, 2.5]),
    extension=st.sampled_from(["linear", "quadratic", "polynomial"]),
    smoothing=st.floats(0.1, 1.0),
)
def test_multipliers_are_the_twins(windows, lower, upper, floor, extension, smoothing):
    if (lower is None and upper is None) or np.std(windows[0]) < 1e-3:
        return
    twin = oracle.Twin(lower, upper, 1.0, 0.1, 3, smoothing, floor, extension)
    objective = BarrierObjective(
        None,
        [Constraint("c", lower=lower, upper=upper)],
        rule=RelaxedLogBarrier(extension),
        schedule=ExponentialSchedule(1.0, 0.1, 3),
        estimator=EMA(smoothing),
        noise_floor=floor,
    )
    for window in windows:
        x = torch.tensor(window, dtype=F64)
        objective(measurements={"c": Sampled(x, torch.zeros_like(x, requires_grad=True))})
        objective.step()
        twin.commit(window)
        for row in objective.report():
            z, mu, s, multiplier = twin.multipliers()[row.side]
            assert row.slack == pytest.approx(-z * twin.scale, rel=1e-9, abs=1e-9)
            assert (row.mu, row.s) == pytest.approx((mu, s), rel=1e-6)
            assert row.multiplier == pytest.approx(multiplier, rel=1e-4)


def test_current_mode_is_the_barrier_itself():
    objective = relaxed([Constraint("c", lower=-1.0, upper=1.0), Constraint("d", upper=0.5)], 0.5, multiplier="current")

    def loss(x, y):
        return objective.combine((x**2).sum(), {"c": x.mean(), "d": y}).loss

    x, y = torch.randn(4, dtype=F64, requires_grad=True), exact(0.7)
    assert torch.autograd.gradcheck(loss, (x, y))
    z = [(-1 - x.mean().item()) / 2, (x.mean().item() - 1) / 2, 0.7 - 0.5]
    barrier = sum(oracle.relaxed("linear", v, 0.5, 0.25)[0] for v in z)
    assert loss(x, y).item() == pytest.approx((x**2).sum().item() + barrier)


def test_current_mode_needs_a_scale_before_it_bites():
    objective = relaxed([Constraint("c", upper=0.0)], multiplier="current")
    x = torch.randn(5, dtype=F64, requires_grad=True)
    assert torch.autograd.grad(objective(measurements={"c": x}).loss, x)[0].norm() == 0
    objective.step()
    assert torch.autograd.grad(objective(measurements={"c": x}).loss, x)[0].norm() > 0


def test_metrics_and_report():
    objective = BarrierObjective(None, [Constraint("len", lower=5, upper=9), Constraint("tox", upper=0.1)])
    names = {"barrier/mu", "barrier/penalty"}
    for c, sides in (("len", ("lower", "upper")), ("tox", ("upper",))):
        names |= {f"constraints/{c}/{key}" for key in ("value", "stderr", "scale", "nonfinite")}
        names |= {f"constraints/{c}/{s}/{key}" for s in sides for key in ("slack", "multiplier", "mu", "s")}
    assert set(objective.metrics()) == names
    assert [row.verdict for row in objective.report()] == ["unknown"] * 3
    logps = torch.zeros(4, requires_grad=True)
    out = objective(
        measurements={
            "len": Sampled(torch.tensor([20.0, 21.0, 22.0, 23.0]), logps),
            "tox": Sampled(torch.tensor([0.1, 0.0, 0.2, 0.1]), logps),
        }
    )
    before = out.metrics()
    objective.step()
    after = out.metrics()
    assert set(after) == names | {"loss/task", "loss/total"}
    assert all(type(v) is float for v in after.values())
    assert before["constraints/len/upper/multiplier"] == 0
    assert after["constraints/len/upper/multiplier"] > 0  # newly committed
    rows = {(row.constraint, row.side): row for row in objective.report()}
    assert rows["len", "lower"].verdict == "met"
    assert rows["len", "upper"].verdict == "violated"
    assert rows["len", "upper"].slack == 9 - 21.5
    assert rows["tox", "upper"].verdict == "active"
    text = str(objective.report())
    assert text.splitlines()[0].split() == ["constraint", "bound", "estimate", "+-", "slack", "multiplier", "verdict"]
    assert "violated" in text
    assert len(text.splitlines()) == 4
