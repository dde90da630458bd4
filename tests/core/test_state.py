"""Saving and resuming, bit for bit; refusing what does not fit."""

import copy

import pytest
import torch

from barrierlm import (
    AdaptiveBarrier,
    AugmentedLagrangian,
    BarrierObjective,
    Constraint,
    DualAscent,
    ModifiedBarrier,
    RelaxedLogBarrier,
    Sampled,
)

from .helpers import F64, C, exact, relaxed, same, state_of

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
        (lambda: {"version": 4}, "version 4; allowed: version 5"),
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
    del damaged["watch"]["level"]
    damaged["estimator"]["mean"] += 1
    with pytest.raises(ValueError, match="state of the watch does not fit: it lacks 'level'"):
        objective.load_state_dict(damaged)
    assert same(before, state_of(objective))
