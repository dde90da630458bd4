"""Calls while gradients are off, as trainers evaluate: nothing is committed, nothing fails, and training goes on.

Under `torch.inference_mode` (Lightning's validation) tensors are made that training may not differentiate through.
"""

import pytest
import torch

from barrierlm import (
    AdaptiveBarrier,
    AugmentedLagrangian,
    BarrierObjective,
    Constraint,
    DualAscent,
    ModifiedBarrier,
    PackedBatch,
    RelaxedLogBarrier,
    Sampled,
)

OFF = [torch.no_grad, torch.inference_mode]
RULES = [AdaptiveBarrier, AugmentedLagrangian, DualAscent, ModifiedBarrier, RelaxedLogBarrier]
BATCH = PackedBatch(torch.tensor([4, 2, 1, 7, 1]), torch.tensor([0, 3, 5]), torch.tensor([0.3, 0.0]), num_sampled=1)


class Run:
    """A head, an objective, and a call of it in one of two ways."""

    def __init__(self, rule, call):
        generator = torch.Generator().manual_seed(0)
        # In fp64, the committed numbers' own dtype, nothing is copied on its way into the loss.
        self.head = torch.nn.Parameter(torch.randn(8, 4, generator=generator, dtype=torch.float64))
        self.hidden = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        constraints = [Constraint("path", upper=0.2), Constraint("tokens", lower=2.5, upper=4.0)]
        self.objective = BarrierObjective(None, constraints, rule=rule(), normalize=True)
        self.call = getattr(self, call)

    def combine(self):
        logps = torch.log_softmax(self.hidden @ self.head.T, -1)[:, 0]
        tokens = Sampled.per_token(torch.ones(5), logps=logps, cu_seqlens=torch.tensor([0, 3, 5]))
        return self.objective.combine(-logps.sum(), {"path": logps.exp() * 10, "tokens": tokens})

    def linear(self):
        measurements = {"tokens": Sampled.per_token(torch.ones(2)), "path": self.head.sum().reshape(1)}
        return self.objective.linear(self.hidden, self.head, BATCH, measurements)


@pytest.fixture(params=["same device", "another device"])
def device(request, monkeypatch):
    """On another device a call reads a copy of the committed numbers; here, one in another dtype."""
    if request.param == "another device":
        monkeypatch.setattr("barrierlm.committed.wide_dtype", lambda device: torch.float32)


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("call", ["combine", "linear"])
def test_evaluation_changes_nothing_at_any_point_of_a_window(off, rule, call, device):
    evaluated, plain = Run(rule, call), Run(rule, call)
    for _ in range(4):
        for run in (evaluated, plain):
            for _ in range(2):
                if run is evaluated:
                    with off():
                        out = run.call()
                        assert not out.loss.requires_grad
                        run.objective.report()
                run.call().loss.backward()
            run.objective.step()
        assert torch.equal(evaluated.head.grad, plain.head.grad)
        assert repr(evaluated.objective.metrics()) == repr(plain.objective.metrics())
    assert evaluated.objective.windows == 4
    assert max(row.multiplier for row in evaluated.objective.report()) > 0


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("what", ["calibrate", "measure", "load_state_dict", "step"])
def test_what_is_taken_in_while_gradients_are_off_can_be_trained_with(off, what, device):
    runs = Run(RelaxedLogBarrier, "combine"), Run(RelaxedLogBarrier, "combine")
    for run, mode in zip(runs, (off, torch.enable_grad), strict=True):
        with mode():
            measured = {"path": torch.full((3,), 9.0), "tokens": Sampled(torch.tensor([3.0, 9.0]))}
            if what == "load_state_dict":
                run.objective.load_state_dict(run.objective.state_dict())
            else:
                getattr(run.objective, "calibrate" if what == "calibrate" else "measure")(measured)
            if what == "step":
                run.objective.step()
        for _ in range(3):
            run.call().loss.backward()
            run.objective.step()
    assert torch.equal(runs[0].head.grad, runs[1].head.grad)
    assert repr(runs[0].objective.metrics()) == repr(runs[1].objective.metrics())
