"""Lightning: gradients of a plain loop, commits after optimizer steps, checkpoints, validation, Fabric."""

import importlib
import math
import sys
import types

import lightning
import pytest
import torch

from barrierlm import EMA, BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier
from barrierlm.integrations.lightning import BarrierCallback
from barrierlm.integrations.logits import entropy

from .examples import added_lines, run_both
from .tiny import collate, make_model, make_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and deprecated calls to torch


def make_objective():
    return BarrierObjective(
        None,
        [Constraint("entropy", lower=6.0, scale=1.0)],
        rule=RelaxedLogBarrier(),
        schedule=ConstantSchedule(0.5),
        estimator=EMA(0.5),
    )


class Module(lightning.LightningModule):
    def __init__(self, objective, seed=0):
        super().__init__()
        self.model, self.objective, self.seen = make_model(seed), objective, []

    def _loss(self, batch):
        outputs = self.model(**batch)
        return self.objective.combine(outputs.loss, {"entropy": entropy(outputs.logits, batch["labels"])}).loss

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self._loss(batch)

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader():
    return torch.utils.data.DataLoader(make_rows(16), batch_size=4, collate_fn=lambda rows: dict(collate(rows)))


def fit(folder, objective, epochs, *, kind=Module, seed=0, ckpt_path=None, callback=True, **options):
    module = kind(objective, seed)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BarrierCallback(objective)] if callback else [],
        **options,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module


class Skipping(Module):
    """Skips half of an epoch's first window, and all of its second."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx else self._loss(batch)

    def on_before_optimizer_step(self, optimizer):
        pass  # there is no gradient


def test_a_step_that_is_skipped_commits_nothing(tmp_path):
    objective = make_objective()
    trainer, _ = fit(tmp_path, objective, 2, kind=Skipping)
    assert trainer.global_step == 4
    assert objective.windows == 2
    assert math.isfinite(objective.report()[0].estimate)


class Forgetful(Module):
    """Trains on a loss without the constraints."""

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


def test_an_objective_that_is_never_called_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"step\(\) with nothing measured"):
        fit(tmp_path, make_objective(), 1, kind=Forgetful)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_skipped_in_one_process_alone(tmp_path, ranks):
    """Several have to commit together, whatever one of them measured."""
    objective, committed = make_objective(), []
    callback, module = BarrierCallback(objective), types.SimpleNamespace(automatic_optimization=True, log_dict=len)
    objective.step = lambda: committed.append(1)
    trainer = types.SimpleNamespace(global_step=0, world_size=ranks, precision_plugin=None)
    callback.on_train_start(trainer, module)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, {}, None, 0)
    assert len(committed) == ranks - 1


def test_gradients_are_those_of_a_plain_loop_and_validation_changes_nothing(tmp_path):
    objective, other, model = make_objective(), make_objective(), make_model()
    trainer, module = fit(tmp_path, objective, 2)
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=0.01), list(loader()) * 2
    for i, batch in enumerate(batches):
        outputs = model(**batch)
        (other.combine(outputs.loss, {"entropy": entropy(outputs.logits, batch["labels"])}).loss / 2).backward()
        if i % 2:
            plain = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert (module.seen[i // 2] - plain).norm() <= 2e-6 * plain.norm()
            optimizer.step()
            optimizer.zero_grad()
            other.step()
    assert objective.windows == other.windows == 4
    assert objective.report()[0].multiplier == pytest.approx(other.report()[0].multiplier, rel=1e-6)
    assert trainer.callback_metrics["constraints/entropy/lower/multiplier"] == pytest.approx(
        objective.report()[0].multiplier
    )


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    straight = make_objective()
    _, module = fit(tmp_path, straight, 4)
    first, resumed = make_objective(), make_objective()
    trainer, _ = fit(tmp_path, first, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    _, other = fit(tmp_path, resumed, 4, seed=1, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.metrics() == straight.metrics()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_the_callback_is_refused(tmp_path):
    module_objective = make_objective()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BarrierObjective, "step", BarrierObjective.discard_window)
        trainer, _ = fit(tmp_path, module_objective, 1, callback=False)
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match="without BarrierCallback"):
        fit(tmp_path, make_objective(), 2, ckpt_path=tmp_path / "without.ckpt")


def test_a_step_that_the_scaler_skipped_is_forgotten():
    objective, callback = make_objective(), None
    callback = BarrierCallback(objective)
    scales = iter([4.0, 2.0])
    scaler = types.SimpleNamespace(get_scale=lambda: next(scales))
    trainer = types.SimpleNamespace(global_step=0, precision_plugin=types.SimpleNamespace(scaler=scaler))
    callback.on_train_start(trainer, None)
    value = torch.ones((), requires_grad=True)
    objective.combine(None, {"entropy": value})
    callback.on_before_optimizer_step(trainer, None, None)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert objective.windows == 0
    with pytest.raises(RuntimeError, match="nothing measured"):
        objective.step()


def test_fabric_saves_and_loads_an_objective(tmp_path):
    fabric = lightning.Fabric(accelerator="cpu")
    objective, other = make_objective(), make_objective()
    objective.calibrate({"entropy": torch.tensor([5.0, 4.0])})
    fabric.save(tmp_path / "state.ckpt", {"objective": objective})
    fabric.load(tmp_path / "state.ckpt", {"objective": other})
    assert other.report() == objective.report()


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match="allowed: a BarrierObjective"):
        BarrierCallback(None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "barrierlm.integrations.lightning")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'barrierlm\[lightning\]'"):
        importlib.import_module("barrierlm.integrations.lightning")


def test_the_example_meets_its_bound(tmp_path):
    constrained, plain = run_both("lightning_module.py", tmp_path)
    assert constrained["entropy"] >= 1.2 > plain["entropy"]
    assert len(added_lines("lightning_module.py")) <= 12
