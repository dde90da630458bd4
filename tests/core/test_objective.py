"""The contract of `BarrierObjective`: what a call returns, what a step commits, and every error."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barrierlm import (
    EMA,
    AdaptiveBarrier,
    AugmentedLagrangian,
    BarrierObjective,
    BatchMean,
    ConstantSchedule,
    Constraint,
    DualAscent,
    ExponentialSchedule,
    LogBarrier,
    ModifiedBarrier,
    RelaxedLogBarrier,
    Sampled,
)

from . import oracle

F64 = torch.float64


def exact(x):
    return torch.tensor(x, dtype=F64, requires_grad=True)


def relaxed(constraints, mu=0.1, **kwargs):
    defaults = {"rule": RelaxedLogBarrier(), "schedule": ConstantSchedule(mu), "estimator": BatchMean()}
    return BarrierObjective(None, constraints, **(defaults | kwargs))


def state_of(objective):
    return copy.deepcopy(objective.state_dict())


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(-7e77), b.nan_to_num(-7e77))
    return a == b


# ---- value and gradient


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


# ---- windows


def test_a_missing_measurement_leaves_that_estimate_as_it_was():
    objective = relaxed([Constraint("a", upper=1.0), Constraint("b", upper=1.0)], estimator=EMA(0.5))
    objective(measurements={"a": exact(2.0), "b": exact(3.0)})
    objective.step()
    objective(measurements={"a": exact(4.0)})
    objective.step()
    metrics = objective.metrics()
    assert metrics["constraints/a/value"] > 2
    assert metrics["constraints/b/value"] == 3
    assert metrics["constraints/b/upper/multiplier"] == pytest.approx(10)


def test_nothing_is_measured_without_gradients():
    objective = relaxed([Constraint("c", upper=1.0)])
    objective(measurements={"c": exact(2.0)})
    objective.step()
    before = state_of(objective)
    with torch.no_grad():
        out = objective(measurements={"c": torch.tensor(9.0)})
        objective.step()
    assert out.loss.item() == pytest.approx(90)  # still evaluated, at the committed multiplier
    assert same(before, state_of(objective))


def test_evaluation_within_a_window_does_not_touch_it():
    objective = relaxed([Constraint("c", upper=1.0)])
    objective(measurements={"c": exact(2.0)})
    with torch.no_grad():
        objective(measurements={"c": torch.tensor(1e9)})
    objective.step()
    assert objective.metrics()["constraints/c/value"] == 2


def test_calibrate_within_a_window_is_refused():
    objective = relaxed([Constraint("c", upper=1.0)])
    objective(measurements={"c": exact(2.0)})
    with pytest.raises(RuntimeError, match=r"calibrate\(\) after 1 call\(s\) of an unfinished window"):
        objective.calibrate({"c": torch.tensor(100.0)})
    objective.step()
    assert objective.metrics()["constraints/c/value"] == 2


def test_an_empty_rank_may_have_nothing_to_differentiate():
    objective = relaxed([Constraint("a", upper=1.0), Constraint("b", upper=1.0)])
    for _ in range(2):
        out = objective(
            measurements={"a": torch.zeros(0), "b": Sampled(torch.zeros(0), torch.zeros(0))},
            num_samples_in_window={"a": torch.tensor(0), "b": 0},
        )
        out.loss.backward()
    nothing = objective(measurements={})
    nothing.loss.backward()
    assert nothing.loss.item() == out.loss.item() == 0


def test_the_output_unpacks_into_its_four_fields():
    objective = relaxed([Constraint("c", upper=1.0)])
    loss, task_loss, penalty, bounds = objective.combine(exact(3.0), {"c": exact(2.0)})
    assert (loss.item(), task_loss.item(), penalty.item()) == (3.0, 3.0, 0.0)
    assert bounds == objective.report()


def test_parts_belong_to_one_objective():
    rule = RelaxedLogBarrier()
    relaxed([C], rule=rule)
    with pytest.raises(ValueError, match="rule already belongs to another objective; allowed: a new RelaxedLogBarrier"):
        relaxed([C], rule=rule)


def test_current_mode_takes_no_window_options():
    objective = relaxed([C], multiplier="current")
    for options in ({"num_samples_in_window": {"c": 4}}, {"loss_divisor": 2}):
        with pytest.raises(ValueError, match="with multiplier='current'"):
            objective(measurements={"c": exact(2.0)}, **options)


def test_bounds_measured_at_different_times_do_not_stop_the_schedule():
    objective = BarrierObjective(None, [Constraint("a", upper=1.0), Constraint("b", upper=1.0)], estimator=BatchMean())
    for step in range(60):
        objective(measurements={"ab"[step % 2]: exact(-3.0)})
        objective.step()
    assert objective.schedule.mu < 0.1
    violated = BarrierObjective(None, [Constraint("a", upper=1.0), Constraint("b", upper=1.0)], estimator=BatchMean())
    for step in range(60):
        violated(measurements={"a": exact(-3.0), "b": exact(3.0)} if step % 4 == 0 else {"a": exact(-3.0)})
        violated.step()
    assert violated.schedule.mu == 1.0


def test_a_call_copies_nothing_from_the_device():
    """On the meta device there are no numbers to look at: any hidden synchronisation would raise."""
    objective = BarrierObjective(
        None, [Constraint("a", upper=1.0), Constraint("b", lower=1, upper=2), Constraint("c", upper=1.0)]
    )
    logps = torch.zeros(6, device="meta", requires_grad=True)
    values = torch.zeros(6, device="meta")
    groups = torch.zeros(6, dtype=torch.long, device="meta")
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="meta")
    for _ in range(2):
        out = objective.combine(
            logps.sum(),
            {
                "a": Sampled(values, logps, groups, old_logps=values),
                "b": Sampled.per_token(values, logps, cu_seqlens),
                "c": logps * 2,
            },
            num_samples_in_window={"a": 12},
        )
        out.loss.backward()
    assert out.loss.device.type == "meta"


def test_discard_window():
    objective = relaxed([Constraint("c", upper=1.0)])
    objective(measurements={"c": exact(100.0)})
    objective.discard_window()
    objective(measurements={"c": exact(2.0)})
    objective.step()
    assert objective.metrics()["constraints/c/value"] == 2


def test_a_window_with_no_samples_changes_nothing_and_says_so_once():
    objective = relaxed([Constraint("c", upper=1.0)])
    objective.calibrate({"c": torch.tensor(2.0)})
    before = state_of(objective)
    empty = torch.zeros(0, requires_grad=True)
    objective(measurements={"c": Sampled(empty.detach(), empty)})
    with pytest.warns(RuntimeWarning, match="window without a single sample"):
        objective.step()
    assert same(before, state_of(objective))
    objective(measurements={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.step()


def test_a_loop_that_never_steps_is_told_once():
    objective = relaxed([Constraint("c", upper=1.0)])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(200):
            objective(measurements={"c": exact(2.0)})
    assert len(record) == 1
    assert "without objective.step" in str(record[0].message)


def test_a_wrong_number_of_samples_is_told():
    objective = relaxed([Constraint("c", upper=1.0)])
    x = torch.zeros(3, requires_grad=True)
    objective(measurements={"c": x}, num_samples_in_window={"c": 6})
    with pytest.warns(RuntimeWarning, match=r"\['c'\]=6, but the window had 3 samples.* 0.5 times"):
        objective.step()


# ---- faults


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["values", "logps", "pathwise", "per_token"])
def test_nonfinite_never_enters(bad, where):
    def measure(bad):
        poisoned = torch.tensor([0.5, bad, 1.5])
        clean = torch.tensor([0.5, 1.0, 1.5])
        if where == "pathwise":
            return poisoned.requires_grad_()
        logps = (poisoned if where == "logps" else clean.clone()).requires_grad_()
        values = clean if where == "logps" else poisoned
        if where == "per_token":
            return Sampled.per_token(values, logps, torch.tensor([0, 1, 3]))
        return Sampled(values, logps)

    for policy in ("raise", "skip"):
        objective = relaxed([Constraint("c", upper=1.0), Constraint("d", upper=1.0)], nonfinite=policy)
        objective.calibrate({"c": torch.tensor([1.0, 2.0, 4.0]), "d": torch.tensor([1.0, 2.0, 4.0])})
        before = state_of(objective)
        task, d = exact(2.0), torch.tensor([3.0, 5.0], requires_grad=True)
        out = objective.combine(task, {"c": measure(bad), "d": d})
        assert math.isfinite(out.loss.item())
        out.loss.backward()
        assert torch.isfinite(task.grad)
        if policy == "raise":
            with pytest.raises(FloatingPointError, match=r"NaN or infinite value\(s\) measured for 'c'"):
                objective.step()
            assert same(before, state_of(objective))
            objective.discard_window()
            objective(measurements={"d": d})
            objective.step()
        else:
            objective.step()
            metrics = objective.metrics()
            assert metrics["constraints/c/nonfinite"] == 1
            assert metrics["constraints/d/nonfinite"] == 0
            assert metrics["constraints/c/value"] == pytest.approx(7 / 3)  # as calibrated
            assert metrics["constraints/d/value"] == 4


def test_a_bad_micro_batch_drops_its_constraints_whole_window():
    objective = relaxed([Constraint("c", upper=1.0)], nonfinite="skip")
    objective.calibrate({"c": torch.tensor([1.0, 3.0])})
    objective(measurements={"c": torch.tensor([50.0, 60.0], requires_grad=True)})
    objective(measurements={"c": torch.tensor([math.nan], requires_grad=True)})
    objective.step()
    assert objective.metrics()["constraints/c/value"] == 2


def test_an_infeasible_log_barrier_says_so_and_changes_nothing():
    objective = relaxed([Constraint("c", upper=1.0)], rule=LogBarrier())
    objective.calibrate({"c": torch.tensor(0.0)})
    before = state_of(objective)
    objective(measurements={"c": exact(2.0)})
    with pytest.raises(ValueError, match=r"LogBarrier has no finite multiplier for c \(upper\) at violation z=1"):
        objective.step()
    assert same(before, state_of(objective))


def test_an_overflowing_multiplier_says_so_and_changes_nothing():
    objective = relaxed([Constraint("c", upper=1.0)], 1e-3, rule=RelaxedLogBarrier("exponential"))
    objective.calibrate({"c": torch.tensor(0.0)})
    before = state_of(objective)
    objective(measurements={"c": exact(2.0)})
    with pytest.raises(ValueError, match="no finite multiplier"):
        objective.step()
    assert same(before, state_of(objective))


C = Constraint("c", upper=1.0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Constraint("c"), ValueError, "lower=None, upper=None; allowed: at least one finite bound"),
        (lambda: Constraint("c", lower=2, upper=1), ValueError, "lower=2.0, upper=1.0; allowed: lower < upper"),
        (lambda: Constraint("c", lower=1, upper=1), ValueError, "allowed: lower < upper"),
        (lambda: Constraint("c", upper=math.inf), ValueError, "upper=inf; allowed: a finite number or None"),
        (lambda: Constraint("c", upper=math.nan), ValueError, "upper=nan"),
        (lambda: Constraint("c", upper="1"), ValueError, "upper='1'"),
        (lambda: Constraint("c", upper=1, scale=0), ValueError, "scale=0.0; allowed: scale > 0"),
        (lambda: Constraint("c", upper=1, scale=-1), ValueError, "scale=-1.0; allowed: scale > 0"),
        (lambda: Constraint("", upper=1), ValueError, "name=''; allowed: a non-empty string"),
        (lambda: relaxed([C, C]), ValueError, "duplicate name 'c'"),
        (lambda: relaxed([]), ValueError, "constraints is empty; allowed: at least one Constraint"),
        (lambda: relaxed(["c"]), TypeError, "constraints holds a str; allowed: Constraint objects"),
        (lambda: BarrierObjective(3, [C]), TypeError, "loss_fn is a int; allowed: a callable or None"),
        (lambda: relaxed([C], noise_floor=-1), ValueError, "noise_floor=-1; allowed"),
        (
            lambda: relaxed([C], multiplier="latest"),
            ValueError,
            "multiplier='latest'; allowed: 'committed' or 'current'",
        ),
        (lambda: relaxed([C], nonfinite="drop"), ValueError, "nonfinite='drop'; allowed: 'raise' or 'skip'"),
        (
            lambda: relaxed([C], gradient_reduction="max"),
            ValueError,
            "gradient_reduction='max'; allowed: 'mean' or 'sum'",
        ),
        (lambda: relaxed([C], rule=RelaxedLogBarrier), TypeError, "rule is <class .*; allowed: an instance of a Rule"),
        (lambda: relaxed([C], schedule=0.1), TypeError, "schedule is 0.1; allowed: an instance of a Schedule"),
        (lambda: relaxed([C], estimator=0.1), TypeError, "estimator is 0.1; allowed: an instance of a EMA"),
        (lambda: ConstantSchedule(0), ValueError, "mu=0; allowed: a finite number > 0"),
        (lambda: ExponentialSchedule(1, 0, 5), ValueError, "end=0; allowed"),
        (lambda: ExponentialSchedule(1, 0.1, 0), ValueError, "steps=0; allowed: an integer >= 1"),
    ],
)
def test_construction_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()


LOGPS = torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"measurements": {"x": exact(1.0)}}, ValueError, "measurements has 'x'; allowed: the constraints 'c'"),
        ({"measurements": [1.0]}, TypeError, "measurements is a list; allowed: a mapping"),
        ({"measurements": {"c": 1.0}}, TypeError, r"measurements\['c'\] is a float; allowed: Sampled"),
        ({"measurements": {"c": torch.tensor(1.0)}}, ValueError, "without gradient.*Did you mean Sampled"),
        ({"measurements": {"c": torch.tensor([1, 2])}}, TypeError, "dtype torch.int64; allowed: a floating dtype"),
        ({"measurements": {"c": torch.zeros(2, 2, requires_grad=True)}}, ValueError, r"shape \(2, 2\); allowed: \[n\]"),
        (
            {"measurements": {"c": Sampled(torch.zeros(2), torch.zeros(2))}},
            ValueError,
            "logps do not require grad; allowed",
        ),
        ({"num_samples_in_window": {"x": 1}}, ValueError, "num_samples_in_window has 'x'"),
        ({"num_samples_in_window": {"c": -1}}, ValueError, r"\['c'\]=-1; allowed: an integer >= 0"),
        ({"num_samples_in_window": {"c": torch.zeros(2)}}, ValueError, r"shape \(2,\); allowed: 0-d"),
        ({"loss_divisor": 0}, ValueError, "loss_divisor=0; allowed: a finite number > 0"),
        ({"loss_divisor": math.inf}, ValueError, "loss_divisor=inf; allowed: a finite number > 0"),
    ],
)
def test_call_errors_change_nothing(call, error, message):
    calls = []
    objective = BarrierObjective(lambda: calls.append(1) or exact(1.0), [C])
    objective(measurements={"c": exact(2.0)})
    before = state_of(objective)
    with pytest.raises(error, match=message):
        objective(**call)
    assert calls == [1]  # checked before the user's loss runs
    assert same(before, state_of(objective))
    objective.step()
    assert objective.metrics()["constraints/c/value"] == 2


def test_task_loss_errors():
    objective = relaxed([C])
    for bad in (torch.zeros(3), 1.0, torch.tensor(1)):
        with pytest.raises(ValueError, match=r"task_loss is .*; allowed: a 0-d floating"):
            objective.combine(bad, {})
    with pytest.raises(TypeError, match="loss_fn is None, so it takes no arguments"):
        objective(torch.zeros(3), measurements={})
    with pytest.raises(RuntimeError, match=r"step\(\) with nothing measured"):
        objective.step()


# ---- reading it


def test_metrics_and_report():
    objective = BarrierObjective(None, [Constraint("len", lower=5, upper=9), Constraint("tox", upper=0.1)])
    names = {"barrier/mu", "barrier/penalty"}
    for c, sides in (("len", ("lower", "upper")), ("tox", ("upper",))):
        names |= {f"constraints/{c}/{key}" for key in ("value", "stderr", "nonfinite")}
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


# ---- state

RULES = [RelaxedLogBarrier, ModifiedBarrier, AdaptiveBarrier, DualAscent, AugmentedLagrangian]


def train(objective, theta, optimizer, generator, steps, log=None):
    for _ in range(steps):
        logp = theta.log_softmax(0)
        y = torch.multinomial(logp.exp().detach(), 6, replacement=True, generator=generator)
        costs = torch.ones(12, dtype=F64)
        out = objective.combine(
            (theta**2).mean(),
            {
                "a": Sampled(y.to(F64), logp[y]),
                "b": Sampled.per_token(costs, logp[y].repeat(2), torch.tensor([0, 3, 5, 12])),
            },
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
        if log is not None:
            log.append((out.loss.item(), *out.metrics().values()))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_a_resumed_run_is_bit_equal(rule, tmp_path):
    def fresh():
        torch.manual_seed(3)
        theta = torch.randn(8, dtype=F64, requires_grad=True)
        objective = BarrierObjective(None, [Constraint("a", upper=2.0), Constraint("b", lower=1, upper=3)], rule=rule())
        return objective, theta, torch.optim.Adam([theta], 0.05), torch.Generator().manual_seed(5)

    whole, expected = fresh(), []
    train(*whole, 40, expected)
    first, log = fresh(), []
    train(*first, 17, log)
    torch.save(
        {
            "objective": first[0].state_dict(),
            "theta": first[1].detach(),
            "adam": first[2].state_dict(),
            "generator": first[3].get_state(),
        },
        tmp_path / "state.pt",
    )
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    objective, theta, adam, generator = fresh()
    objective.load_state_dict(saved["objective"])
    with torch.no_grad():
        theta.copy_(saved["theta"])
    adam.load_state_dict(saved["adam"])
    generator.set_state(saved["generator"])
    train(objective, theta, adam, generator, 23, log)
    assert log == expected
    assert same(objective.state_dict(), whole[0].state_dict())
    assert torch.equal(theta, whole[1])


def test_state_is_a_copy():
    objective = relaxed([C])
    objective(measurements={"c": exact(2.0)})
    objective.step()
    state = objective.state_dict()
    frozen = copy.deepcopy(state)
    objective(measurements={"c": exact(7.0)})
    objective.step()
    assert same(state, frozen)
    objective.load_state_dict(state)
    state["estimator"]["mean"].fill_(1e9)
    assert objective.metrics()["constraints/c/value"] == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: relaxed([Constraint("d", upper=1.0)]).state_dict(), "saved for constraints"),
        (lambda: relaxed([Constraint("c", upper=1.5)]).state_dict(), "saved for constraints"),
        (lambda: relaxed([C, Constraint("d", upper=1.0)]).state_dict(), "saved for constraints"),
        (lambda: relaxed([C], rule=DualAscent()).state_dict(), "saved for methods"),
        (lambda: {"version": 2}, "version 2; allowed: version 1"),
        (dict, "version None"),
        (lambda: 5, "state is int"),
    ],
)
def test_foreign_states_are_refused(other, message):
    objective = relaxed([C])
    objective(measurements={"c": exact(2.0)})
    objective.step()
    before = state_of(objective)
    with pytest.raises(ValueError, match=message):
        objective.load_state_dict(other())
    assert same(before, state_of(objective))


def test_a_damaged_state_changes_nothing():
    objective = relaxed([C])
    objective(measurements={"c": exact(2.0)})
    objective.step()
    before = state_of(objective)
    damaged = state_of(objective)
    del damaged["watch"]["best"]
    damaged["estimator"]["mean"] += 1
    with pytest.raises(KeyError):
        objective.load_state_dict(damaged)
    assert same(before, state_of(objective))
