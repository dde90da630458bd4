"""Every error of the contract: its message, and that nothing has changed."""

import math

import pytest
import torch

from barrierlm import (
    AdaptiveBarrier,
    BarrierObjective,
    ConstantSchedule,
    Constraint,
    ExponentialSchedule,
    LogBarrier,
    RelaxedLogBarrier,
    Sampled,
)

from .helpers import C, exact, relaxed, same, state_of


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


@pytest.mark.parametrize("rule", [RelaxedLogBarrier(), AdaptiveBarrier()])
def test_a_mu_whose_square_is_zero_says_so(rule):
    objective = relaxed([Constraint("c", upper=1.0)], 1e-200, rule=rule, noise_floor=0)
    objective(measurements={"c": exact(2.0)})
    with pytest.raises(ValueError, match="no finite multiplier"):
        objective.step()


def test_an_overflowing_multiplier_says_so_and_changes_nothing():
    objective = relaxed([Constraint("c", upper=1.0)], 1e-3, rule=RelaxedLogBarrier("exponential"))
    objective.calibrate({"c": torch.tensor(0.0)})
    before = state_of(objective)
    objective(measurements={"c": exact(2.0)})
    with pytest.raises(ValueError, match="no finite multiplier"):
        objective.step()
    assert same(before, state_of(objective))


@pytest.mark.parametrize(("extension", "scale"), [("exponential", 1.0), ("linear", 1e-38)])
def test_a_multiplier_that_fp32_cannot_hold_says_so(extension, scale):
    """7e44, and 10 per 1e-38: numbers in fp64, and infinite gradients as weights in a loss."""
    objective = relaxed([Constraint("c", upper=scale, scale=scale)], rule=RelaxedLogBarrier(extension))
    objective(measurements={"c": exact(2 * scale)})
    with pytest.raises(ValueError, match="no finite multiplier"):
        objective.step()


def test_a_violation_that_is_no_number_says_so_and_changes_nothing():
    objective = BarrierObjective(None, [Constraint("c", upper=0.0, scale=1e-308)])
    before = state_of(objective)
    objective(measurements={"c": torch.tensor([10.0, 12.0], dtype=torch.float64, requires_grad=True)})
    with pytest.raises(ValueError, match=r"'c': estimate 11 is too many scales of 1e-308 .*allowed: a larger scale"):
        objective.step()
    assert same(before, state_of(objective))


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
        (lambda: relaxed(C), TypeError, "constraints is a Constraint; allowed: a list of Constraint objects"),
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
