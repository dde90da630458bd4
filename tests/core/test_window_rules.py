"""What opens, closes, skips and empties a window."""

import math
import warnings

import pytest
import torch

from barrierlm import (
    EMA,
    BarrierObjective,
    BatchMean,
    Constraint,
    PackedBatch,
    RelaxedLogBarrier,
    Sampled,
)
from barrierlm.estimators import NUM_COLUMNS, Column
from barrierlm.window import Window

from .helpers import C, exact, relaxed, same, state_of


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


@pytest.mark.parametrize("known", [None, 4])
def test_a_call_of_linear_copies_nothing_from_the_device(known):
    """The same for the one pass, with and without the number of sampled rows beforehand."""
    objective = BarrierObjective(None, [Constraint(name, upper=1.0) for name in "abcdef"])
    hidden = torch.zeros(6, 8, device="meta", requires_grad=True)
    head = torch.zeros(16, 8, device="meta", requires_grad=True)
    targets = torch.zeros(6, dtype=torch.long, device="meta")
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="meta")
    batch = PackedBatch(targets, cu_seqlens, torch.zeros(3, device="meta"), num_sampled=2, num_sampled_tokens=known)
    costs, tokens = torch.zeros(2, device="meta"), torch.zeros(4, device="meta")
    groups = torch.zeros(2, dtype=torch.long, device="meta")
    whole = {
        "a": Sampled(costs, groups=groups, old_logps=costs, clip=0.2),
        "b": Sampled(costs),
        "c": hidden.sum(1),
    }
    by_token = {
        "d": Sampled.per_token(tokens, groups=groups),
        "e": Sampled.reference_kl(tokens),
        "f": Sampled.per_token(tokens, old_logps=tokens),
    }
    for measurements in (whole, whole | by_token):
        out = objective.linear(
            hidden, head, batch, measurements, bias=head[:, 0], num_samples_in_window={"a": 12, "b": torch.tensor(3)}
        )
        out.loss.backward()
    assert out.loss.device.type == "meta"
    assert hidden.grad.shape == hidden.shape


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


@pytest.mark.filterwarnings("ignore:a window without a single sample")
def test_a_window_is_one_collective_whatever_it_holds(monkeypatch):
    """Counted on a rank that has samples, one that has some, and one that has none."""
    calls = []
    monkeypatch.setattr("barrierlm.distributed.dist.is_initialized", lambda: True)
    monkeypatch.setattr("barrierlm.distributed.dist.get_world_size", lambda group=None: 2)
    monkeypatch.setattr("barrierlm.distributed.dist.get_rank", lambda group=None: 0)
    monkeypatch.setattr("barrierlm.distributed.dist.get_backend", lambda group=None: "gloo")

    def all_reduce(tensor, op=None, group=None):
        calls.append(tensor.numel())
        tensor.mul_(2)  # the other rank has the same

    monkeypatch.setattr("barrierlm.distributed.dist.all_reduce", all_reduce)
    for name in ("all_gather", "all_gather_object", "broadcast", "barrier", "reduce_scatter"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *args, name=name, **kwargs: calls.append(name))
    objective = BarrierObjective(None, [Constraint("a", upper=1.0), Constraint("b", lower=0.0)])
    theta = torch.zeros(4, requires_grad=True)
    for window in ({"a": theta + 2, "b": theta}, {"a": theta + 2}, {}):
        for _ in range(2):
            objective.combine(theta.sum(), window).loss.backward()
        assert calls == []
        objective.step()
        assert calls == [1 + 2 * NUM_COLUMNS]
        calls.clear()


def test_sums_that_overflow_are_nonfinite_where_there_is_no_fp64(monkeypatch):
    monkeypatch.setattr("barrierlm.window.wide_dtype", lambda device: torch.float32)
    window = Window(2)
    window.add({(1,): torch.tensor([[2.0, 3.0, math.inf, 2, math.inf, 3.0, 2, 0, 0, 0]])}, {})
    _, rows = window.reduce(None)
    assert rows[:, Column.NONFINITE].tolist() == [0, 1]
