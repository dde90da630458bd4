"""States that were tampered with: a ValueError that names what is wrong and no change, or a state that works."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barrierlm import (
    AdaptiveBarrier,
    AugmentedLagrangian,
    BarrierObjective,
    Constraint,
    DualAscent,
    ExponentialSchedule,
    ModifiedBarrier,
    RelaxedLogBarrier,
)

from .helpers import F64, same, state_of

RULES = [RelaxedLogBarrier, ModifiedBarrier, AdaptiveBarrier, DualAscent, AugmentedLagrangian]
#: What a value is replaced by.
FOREIGN = [None, "x", b"x", 3, -1, True, 2.5, math.nan, math.inf, -math.inf, [], {}, [1.0], {"a": 1}]
FOREIGN += [torch.zeros(0, dtype=F64), torch.zeros(7, dtype=F64), torch.zeros(2), torch.zeros(2, dtype=torch.int64)]
FOREIGN += [torch.full((2,), math.nan, dtype=F64), torch.zeros(2, dtype=torch.bfloat16), torch.zeros((), dtype=F64)]


def trained(rule, schedule=None, windows=4):
    objective = BarrierObjective(
        None, [Constraint("a", upper=1.0), Constraint("b", lower=0.0, upper=2.0)], rule=rule(), schedule=schedule
    )
    for i in range(windows):
        x = torch.tensor([0.5 + i, 1.5 * i, 2.0], dtype=F64, requires_grad=True)
        objective(measurements={"a": x, "b": x.mean()})
        objective.step()
    return objective


def places(state, prefix=()):
    """The path of every value within nested mappings."""
    for key, value in state.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


def only(state, like):
    """The values that ``like`` has, too."""
    return {key: only(state[key], own) if isinstance(own, dict) else state[key] for key, own in like.items()}


def parent(state, path):
    for key in path[:-1]:
        state = state[key]
    return state


@pytest.mark.parametrize("key", ["version", "constraints", "methods"])
def test_tensors_in_place_of_names(key):
    objective = trained(AdaptiveBarrier)
    with pytest.raises(ValueError, match="allowed"):
        objective.load_state_dict({**objective.state_dict(), key: torch.zeros(0)})


@given(data=st.data(), rule=st.sampled_from(RULES), exponential=st.booleans(), windows=st.integers(0, 4))
def test_tampered_states(data, rule, exponential, windows):
    def make(windows):
        return trained(rule, ExponentialSchedule(1.0, 0.1, 5) if exponential else None, windows)

    state = state_of(make(windows))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(places(state))))
        holder, key = parent(state, path), path[-1]
        how = data.draw(st.sampled_from(["drop", "foreign", "shape", "dtype", "element"]))
        value = holder[key]
        if how == "drop":
            del holder[key]
        elif how == "foreign" or not isinstance(value, torch.Tensor):
            holder[key] = copy.deepcopy(data.draw(st.sampled_from(FOREIGN)))
        elif how == "shape":
            holder[key] = value[..., None] if data.draw(st.booleans()) else torch.cat([value.flatten()] * 2)
        elif how == "dtype":
            holder[key] = value.to(data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool])))
        elif value.numel():
            place = data.draw(st.integers(0, value.numel() - 1))
            holder[key] = value.clone()
            # An integer or bool, which "dtype" may have made of it before, holds no infinities.
            odd = [math.nan, math.inf, -math.inf, 1e300] if value.is_floating_point() else []
            holder[key].view(-1)[place] = data.draw(st.sampled_from([-1.0, 0.0, *odd]))
    objective = make(3)
    before = state_of(objective)
    metrics = objective.metrics()
    try:
        objective.load_state_dict(state)
    except ValueError as error:
        assert "allowed" in str(error)  # noqa: PT017
        assert same(state_of(objective), before)
        assert all(a == b or a != a for a, b in zip(objective.metrics().values(), metrics.values(), strict=True))
        return
    # What passed is a state: it gives itself back, and numbers that can be worked with.
    assert same(state_of(objective), only(state, before))
    assert all(math.isfinite(row.multiplier) and row.multiplier >= 0 for row in objective.report())
    x = torch.tensor([0.5, 1.0], dtype=F64, requires_grad=True)
    out = objective(measurements={"a": x, "b": x.mean()})
    assert out.loss.isfinite()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "estimator.mean",
            torch.zeros(3, dtype=F64),
            r"estimator does not fit: 'mean' has shape \(3,\); allowed: \(2,\)",
        ),
        (
            "estimator.mean",
            torch.zeros(2),
            "'mean' is a torch.float32 tensor on cpu; allowed: a dense torch.float64 one",
        ),
        ("estimator.weight", torch.full((2,), math.nan, dtype=F64), "'weight' holds nan; allowed: finite numbers >= 0"),
        ("scales.value", torch.tensor([1.0, -1.0], dtype=F64), "'value' holds -1.0; allowed"),
        ("rule.learned", "x", "rule does not fit: 'learned' is a str; allowed: a tensor"),
        ("schedule.mu", -1.0, "'mu' is -1.0; allowed: a finite number"),
        ("positions", 3, "state of the positions does not fit: 'sums' is a int; allowed: a tensor"),
        ("watch", None, "state of the watch does not fit: it is a NoneType; allowed: a mapping"),
        ("windows", 2.5, "'windows' is 2.5; allowed: an integer >= 0"),
    ],
)
def test_the_error_names_the_value(path, value, message):
    objective = trained(AdaptiveBarrier)
    state = state_of(objective)
    keys = path.split(".")
    parent(state, keys)[keys[-1]] = value
    before = state_of(objective)
    with pytest.raises(ValueError, match=message):
        objective.load_state_dict(state)
    assert same(state_of(objective), before)
