"""torch.compile of a step: the gradients of the eager one, without a recompilation per window."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from barrierlm import EMA, BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier
from barrierlm.integrations.logits import entropy

from .examples import added_lines, run_both
from .tiny import collate, make_model, make_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad:UserWarning"
)


def make_step(model, backend=None, *, disable=True):
    objective = BarrierObjective(
        None,
        [Constraint("entropy", lower=6.0, scale=1.0)],
        rule=RelaxedLogBarrier(),
        schedule=ConstantSchedule(0.5),
        estimator=EMA(0.5),
    )
    combine = torch.compiler.disable(objective.combine) if disable else objective.combine

    def loss_of(batch):
        outputs = model(**batch)
        return combine(outputs.loss, {"entropy": entropy(outputs.logits, batch["labels"])}).loss

    return objective, torch.compile(loss_of, backend=backend) if backend else loss_of


@pytest.mark.parametrize("disable", [True, False])
def test_compiled_gradients_are_those_of_eager(disable):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, twin, batch = make_model(), make_model(), collate(make_rows(4))
    objective, compiled = make_step(model, counter, disable=disable)
    other, eager = make_step(twin)
    frames = []
    for _ in range(4):
        compiled(batch).backward()
        eager(batch).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 2e-6 * q.grad.norm() + 1e-9
            with torch.no_grad():
                p -= 0.05 * q.grad
                q -= 0.05 * q.grad
            p.grad = q.grad = None
        objective.step()
        other.step()
        frames.append(counter.frame_count)
    assert objective.report()[0].multiplier > 0.1
    assert objective.report()[0].estimate == pytest.approx(other.report()[0].estimate, rel=1e-6)
    if disable:
        assert frames[-1] == frames[1]
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_example_meets_its_bound(tmp_path):
    constrained, plain = run_both("compiled_step.py", tmp_path)
    assert constrained["entropy"] >= 1.2 > plain["entropy"]
    assert len(added_lines("compiled_step.py")) <= 12
