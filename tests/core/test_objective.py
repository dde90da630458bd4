"""What a call returns, and what the report and the metrics say."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from barrierlm import (
    EMA,
    AdaptiveBarrier,
    AugmentedLagrangian,
    BarrierObjective,
    ConstantSchedule,
    Constraint,
    DualAscent,
    ExponentialSchedule,
    GradientProbe,
    ModifiedBarrier,
    RelaxedLogBarrier,
    Sampled,
    SplitGradients,
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


@pytest.mark.parametrize("rule", [AdaptiveBarrier, ModifiedBarrier, DualAscent, AugmentedLagrangian])
def test_what_is_committed_is_on_the_cpu_whatever_the_default_device(rule):
    cpu = torch.device("cpu")
    with torch.device("meta"):  # stands for an accelerator: nothing that is made on it can be read
        limits = [Constraint("c", upper=0.0), Constraint("t", upper=1.0), Constraint("bad", upper=0.0)]
        objective = BarrierObjective(None, limits, rule=rule(), nonfinite="skip")
        for _ in range(3):
            x = torch.ones(4, device=cpu, requires_grad=True)
            tokens = Sampled.per_token(torch.ones(4, device=cpu), x * 1, torch.tensor([0, 2, 4], device=cpu))
            objective.combine(x.sum(), {"c": x * 1, "t": tokens, "bad": x * torch.nan}).loss.backward()
            objective.step()
        objective.load_state_dict(objective.state_dict())
        assert objective.report()[0].multiplier > 0


def test_a_constraint_that_is_measured_no_more_is_told_of():
    objective = relaxed([Constraint("c", upper=1.0), Constraint("gone", upper=1.0)])
    objective.combine(None, {"c": exact(0.5), "gone": exact(0.5)})
    objective.step()
    for _ in range(99):
        objective.combine(None, {"c": exact(0.5)})
        objective.step()
    objective.combine(None, {"c": exact(0.5)})
    with pytest.warns(RuntimeWarning, match="'gone' was not measured in the last 100 windows") as told:
        objective.step()
    assert told[0].filename == __file__
    assert objective.report()[1].verdict == "met"


class _Wrapped(torch.nn.Module):
    """A model that calls the objective within its forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.objective = BarrierObjective(None, [Constraint("d", upper=0.0)])

    def forward(self, x):
        y = self.linear(x)[:, 0]
        return self.objective.combine((y**2).mean(), {"d": y})


def _accelerated(model, x):
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before this one
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)(x)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _flattened(model, x):
    """As DDP does where it looks for unused parameters."""
    return tree_map(lambda leaf: leaf, model(x))


@pytest.mark.parametrize("call", [_accelerated, _flattened])
def test_an_output_that_a_wrapper_puts_together_again_still_knows_the_metrics(call):
    model = _Wrapped()
    out = call(model, torch.randn(4, 3))
    out.loss.backward()
    model.objective.step()
    assert {k: v for k, v in out.metrics().items() if k[:4] != "loss"} == pytest.approx(
        model.objective.metrics(), nan_ok=True
    )
    assert out.metrics()["constraints/d/value"] == pytest.approx(model.objective.report()[0].estimate)
    for use in (GradientProbe(model.parameters()).add, SplitGradients(model.parameters()).backward):
        with pytest.raises(ValueError, match="out was taken apart and put together again"):
            use(out)


def test_a_report_reads_like_a_tuple():
    objective = relaxed([Constraint("c", lower=0.0, upper=1.0)])
    objective.calibrate({"c": torch.tensor(0.5)})
    report = objective.report()
    low, high = report
    assert (len(report), report[0], report[-1], report[:1]) == (2, low, high, (low,))
    assert report == (low, high)
    assert report == copy.deepcopy(report) == pickle.loads(pickle.dumps(report))
    assert (report.index(high), high in report) == (1, True)
    match report:
        case [first, *_]:
            assert first is low
    assert hash(report) == hash((low, high))
    assert repr(low) in repr(report)


def test_the_output_of_a_copy_is_of_the_copy():
    objective = relaxed([Constraint("c", upper=1.0)])
    other = copy.deepcopy(objective)
    out = other.combine(None, {"c": exact(3.0)})
    other.step()
    assert out.metrics()["constraints/c/value"] == 3.0
    assert np.isnan(objective.metrics()["constraints/c/value"])
    assert len(pickle.dumps(out.bounds)) < 1000  # rows, and not all that they come from
