"""`measure` and `weights`: for a loop that makes the constraints' gradients itself."""

import pytest
import torch

from barrierlm import BarrierObjective, Constraint, Sampled


def make_objective():
    return BarrierObjective(
        None, [Constraint("cost", upper=1.0), Constraint("exact", lower=2.0), Constraint("unseen", upper=1.0)]
    )


def flat(state):
    if isinstance(state, dict):
        return {f"{k}/{path}": x for k, v in state.items() for path, x in flat(v).items()}
    return {"": state.tolist() if isinstance(state, torch.Tensor) else state}


def test_measures_what_combine_does():
    """Same state, whether the gradient is made here or elsewhere; and weights are the derivatives of that loss."""
    ours, theirs = make_objective(), make_objective()
    for window in range(4):
        for _ in range(2):
            costs, value = torch.rand(6) * 4, torch.tensor(float(window), requires_grad=True)
            logps = torch.randn(6, requires_grad=True)
            groups = torch.arange(6) // 2
            out = theirs.combine(None, {"cost": Sampled(costs, logps, groups), "exact": value})
            ours.measure({"cost": Sampled(costs, groups=groups), "exact": value.detach()})
            weights = ours.weights
            assert weights == theirs.weights
            by_logps, by_value = torch.autograd.grad(out.loss, (logps, value))
            advantage = costs - (costs.view(3, 2).flip(1)).flatten()
            torch.testing.assert_close(by_logps, weights["cost"] * advantage / 6)
            assert float(by_value) == pytest.approx(weights["exact"])
        ours.step()
        theirs.step()
    assert str(flat(ours.state_dict())) == str(flat(theirs.state_dict()))
    assert ours.weights["cost"] > 0 > ours.weights["exact"]
    assert ours.weights["unseen"] == 0


def test_needs_no_gradients_and_takes_them_off():
    objective = make_objective()
    with torch.no_grad():
        objective.measure({"cost": Sampled(torch.ones(3))})
    objective.measure({"exact": torch.tensor(1.0, requires_grad=True)})
    objective.step()
    assert objective.report()[0].estimate == 1


def test_errors_change_nothing():
    objective = make_objective()
    with pytest.raises(ValueError, match="measurements has 'other'"):
        objective.measure({"other": Sampled(torch.ones(3))})
    with pytest.raises(TypeError, match="is a list"):
        objective.measure({"cost": [1.0]})
    with pytest.raises(RuntimeError, match="nothing measured"):
        objective.step()


def test_a_loop_that_never_steps_is_told():
    objective = make_objective()
    for _ in range(31):
        objective.measure({"cost": Sampled(torch.ones(3))})
    with pytest.warns(RuntimeWarning, match=r"32 calls without objective.step\(\)"):
        objective.measure({"cost": Sampled(torch.ones(3))})
