"""Accelerate: the example meets its bound, and a run that goes on from its checkpoint is the run that never stopped."""

import copy

import pytest
import torch
from accelerate import Accelerator

from barrierlm import EMA, BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier
from barrierlm.integrations.logits import entropy

from .examples import EXAMPLES, added_lines, run, run_both
from .tiny import collate, make_model, make_rows


def make_objective():
    """With a multiplier that matters from the second window on."""
    limits = [Constraint("entropy", lower=6.0, scale=1.0)]
    return BarrierObjective(None, limits, rule=RelaxedLogBarrier(), schedule=ConstantSchedule(0.5), estimator=EMA(0.5))


def test_gradients_are_those_of_a_plain_loop():
    """Seven batches in windows of three: the last holds one. Accelerate divides by three throughout."""
    batches = [collate(make_rows(14)[i : i + 2]) for i in range(0, 14, 2)]
    model, objective, other, seen = make_model(), make_objective(), make_objective(), []
    plain = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(wrapped):
                outputs = wrapped(**batch)
                out = objective.combine(outputs.loss, {"entropy": entropy(outputs.logits, batch["labels"])})
                accelerator.backward(out.loss)
                if accelerator.sync_gradients:
                    seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    objective.step()
    own = iter(seen)
    for window in [batches[:3], batches[3:6], batches[6:]] * 2:
        for p in plain.parameters():
            p.grad = None
        for batch in window:
            outputs = plain(**batch)
            loss = other.combine(outputs.loss, {"entropy": entropy(outputs.logits, batch["labels"])}).loss
            (loss / 3).backward()
        expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
        assert (next(own) - expected).norm() < 2e-6 * expected.norm()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.05 * p.grad
        other.step()
    assert objective.windows == other.windows == len(seen) == 6
    assert other.report()[0].multiplier > 0.1
    assert objective.report()[0].multiplier == pytest.approx(other.report()[0].multiplier, rel=1e-5)


def test_the_example_meets_its_bound_and_resumes(tmp_path):
    constrained, plain = run_both("accelerate_loop.py", tmp_path)
    assert constrained["entropy"] >= 1.2 > plain["entropy"]
    assert len(added_lines("accelerate_loop.py")) <= 12
    stopped = tmp_path / "stopped.py"
    source = (EXAMPLES / "accelerate_loop.py").read_text(encoding="utf-8")
    stopped.write_text(source.replace("range(done, 40)", "range(done, 20)"), encoding="utf-8")
    run(stopped, tmp_path / "resumed")
    run(EXAMPLES / "accelerate_loop.py", tmp_path / "resumed")
    one, two = (
        torch.load(tmp_path / name / "state" / "custom_checkpoint_0.pkl", weights_only=True)
        for name in ("with", "resumed")
    )
    assert one["windows"] == two["windows"] == 320
    assert one["estimator"]["mean"].tolist() == pytest.approx(two["estimator"]["mean"].tolist(), rel=1e-12)
