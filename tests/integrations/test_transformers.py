"""transformers' Trainer: the same gradient as a plain loop, nothing in evaluation, resume bit for bit, real runs."""

import errno
import importlib
import json
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from barrierlm import EMA, BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier, Sampled
from barrierlm.integrations.checkpoint import load_objective, save_objective
from barrierlm.integrations.logits import entropy, kl, logps, nll
from barrierlm.integrations.rollouts import Rollouts, prompt_tokens
from barrierlm.integrations.transformers import BarrierTrainer

from .examples import ROOT, added_lines, run_both
from .tiny import TOKENIZER, collate, make_model, make_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.utils.tensorboard.*"),
]


def make_objective(*constraints):
    """With multipliers that matter from the second window on."""
    return BarrierObjective(
        None,
        constraints or [Constraint("entropy", lower=6.0, scale=1.0), Constraint("flagged", upper=1.0, scale=1.0)],
        rule=RelaxedLogBarrier(),
        schedule=ConstantSchedule(0.5),
        estimator=EMA(0.5),
    )


def measure(model, inputs, outputs):
    return {
        "entropy": entropy(outputs.logits, inputs["labels"]),
        "flagged": nll(outputs.logits, inputs["labels"])[inputs["flag"]],
    }


def make_trainer(folder, objective, rows, measure=measure, *, kind=BarrierTrainer, callbacks=(), **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    num_samples = options.pop("num_samples", lambda batch: {"flagged": int(batch["flag"].sum())})
    columns = options.pop("columns", ["flag", "word"])
    model = options.pop("model", None)
    own = {"objective": objective, "measure": measure, "columns": columns, "num_samples": num_samples}
    return kind(
        make_model() if model is None else model,
        TrainingArguments(str(folder), **(defaults | options)),
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=collate,
        callbacks=list(callbacks),
        **own,
    )


class Gradients(TrainerCallback):
    """Keeps every window's gradient."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad]))


class InOrder(BarrierTrainer):
    def _get_train_sampler(self, *args):
        return None


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_are_those_of_a_plain_loop(tmp_path, scaled):
    """22 rows in micro-batches of 2, windows of 3 micro-batches: the last has two, and flags are unequally spread."""
    rows = make_rows(22)
    for row in rows:
        row["flag"] = int(row["word"]) % 3 == 0 or int(row["word"]) > 17
    gradients, objective = Gradients(), make_objective()
    trainer = make_trainer(tmp_path, objective, rows, kind=InOrder, callbacks=[gradients])
    if not scaled:
        trainer.model_accepts_loss_kwargs = False  # a per-batch mean, which training_step divides by the window's size
    trainer.train()

    model, other, seen = make_model(), make_objective(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for start in [*range(0, 22, 6)] * 2:
        window = rows[start : min(start + 6, 22)]
        batch = collate(window)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        flags = torch.tensor([row["flag"] for row in window])
        if scaled:
            counts = (batch["labels"][:, 1:] != -100).sum(1)
            task = (nll(logits, batch["labels"]) * counts).sum() / counts.sum()
        else:
            means = []
            for i in range(0, len(window), 2):
                small = collate(window[i : i + 2])
                out = model(input_ids=small["input_ids"], attention_mask=small["attention_mask"]).logits
                counts = (small["labels"][:, 1:] != -100).sum(1)
                means.append((nll(out, small["labels"]) * counts).sum() / counts.sum())
            task = torch.stack(means).mean()
        both = {"entropy": entropy(logits, batch["labels"]), "flagged": nll(logits, batch["labels"])[flags]}
        other.combine(task, both).loss.backward()
        seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
        other.step()
    assert len(seen) == len(gradients.seen) == 8
    for mine, plain in zip(gradients.seen, seen, strict=True):
        assert (mine - plain).norm() < 2e-6 * plain.norm()
    assert objective.report()[0].multiplier > 0.1
    assert objective.report()[0].multiplier == pytest.approx(other.report()[0].multiplier, rel=1e-5)


def test_evaluation_changes_nothing_and_sees_the_task_alone(tmp_path):
    objective = make_objective()
    trainer = make_trainer(tmp_path, objective, make_rows(12), num_train_epochs=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert objective.windows == 2
    before = objective.metrics()
    evaluated = trainer.evaluate()
    assert objective.metrics() == before
    batch = collate(make_rows(4))
    with torch.no_grad():
        own = trainer.model(**batch).loss
    assert evaluated["eval_loss"] == pytest.approx(float(own), rel=1e-3)
    unlabelled = [{k: v for k, v in row.items() if k != "flag"} for row in make_rows(4)]
    assert trainer.predict(unlabelled).predictions.shape[0] == 4
    assert not [key for entry in trainer.state.log_history if "eval_loss" in entry for key in entry if "barrier" in key]


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    rows, straight = make_rows(22), make_objective()
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    first = make_trainer(tmp_path, straight, rows, **options)
    first.train()
    resumed = make_objective()
    second = make_trainer(tmp_path, resumed, rows, model=make_model(1), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.metrics() == straight.metrics()
    assert resumed.windows == straight.windows == 8
    assert not list(tmp_path.glob("*/*.unfinished"))


def test_a_checkpoint_without_an_objective_is_refused(tmp_path):
    rows = make_rows(12)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, make_objective(), rows, **options).train()
    (tmp_path / "checkpoint-2" / "objective.pt").unlink()
    with pytest.raises(FileNotFoundError, match="without these constraints"):
        make_trainer(tmp_path, make_objective(), rows, **options).train(resume_from_checkpoint=True)


def test_logs_go_where_the_trainers_go(tmp_path):
    objective = make_objective()
    options = {"report_to": "tensorboard", "logging_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path, objective, make_rows(12), **options)
    trainer.args.logging_dir = str(tmp_path / "board")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["constraints/entropy/lower/multiplier"] == objective.report()[0].multiplier
    assert logged[0]["loss/task"] == pytest.approx(5.95, abs=0.1)
    json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(tmp_path.rglob("events.out.tfevents*")).parent
    board = EventAccumulator(str(folder))
    board.Reload()
    values = [event.value for event in board.Scalars("train/constraints/entropy/lower/multiplier")]
    assert values == pytest.approx([entry["constraints/entropy/lower/multiplier"] for entry in logged])


@pytest.mark.parametrize("filtered", [True, False])
def test_what_is_not_finite_shows_whatever_the_filter(tmp_path, filtered):
    def broken(model, inputs, outputs):
        return measure(model, inputs, outputs) | {"entropy": outputs.logits.mean((1, 2)) * math.nan}

    trainer = make_trainer(tmp_path, make_objective(), make_rows(12), broken, logging_nan_inf_filter=filtered)
    with pytest.raises(FloatingPointError, match="entropy"):
        trainer.train()


def test_a_skipped_optimizer_step_is_forgotten(tmp_path):
    objective = make_objective()
    trainer = make_trainer(tmp_path, objective, make_rows(12), max_steps=3)

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer._is_overflow = state.global_step == 1

    trainer.add_callback(Overflow())
    assert trainer.accelerator is not None
    trainer.train()
    assert objective.windows == 2


def test_rollouts_are_the_models_own_distribution():
    """Enumerated: two prompts, one token; sampled frequencies against probabilities, log p against the model's."""
    model = make_model()
    model.generation_config.update(do_sample=False, temperature=0.1, top_k=1, repetition_penalty=3.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.train()
    batch = collate(make_rows(2))
    rollouts = Rollouts(
        TOKENIZER,
        {"length": "length", "word": lambda word, **_: [float(w) for w in word]},
        max_new_tokens=1,
        responses_per_prompt=2000,
    )
    measured = rollouts(model, batch | {"word": ["3", "4"]})
    assert model.training
    assert model.generation_config.top_k == 1
    assert measured["word"].values.unique(return_counts=True)[1].tolist() == [2000, 2000]
    prompts = prompt_tokens(batch)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(prompts)).logits[:, -1].log_softmax(-1)
    own = measured["word"].logps.detach().view(2, 2000)
    for row, expected in zip(own, logits, strict=True):
        distances = (row[:, None] - expected[None, :]).abs().min(1).values
        assert distances.max() < 1e-3
        entropy_of_policy = -(expected.exp() * expected).sum()  # what -log p averages to, if p is what was sampled
        assert abs(-row.mean() - entropy_of_policy) < 4 * row.std() / 2000**0.5
        assert row.std() > 0.1


def test_padded_responses_count_through_their_end():
    model = make_model()
    batch = collate(make_rows(3))
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] = 0.0
    rollouts = Rollouts(TOKENIZER, {"length": "length"}, max_new_tokens=6)
    torch.manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight.mul_(0)  # every token has probability 1/384
    measured = rollouts(model, batch)["length"]
    assert measured.logps.detach().tolist() == pytest.approx([-math.log(384)] * measured.size, rel=1e-5)
    assert rollouts.metrics()["rollout/mean_tokens"] == measured.size / 3
    assert rollouts.metrics() == {}


@pytest.mark.parametrize("bound", [-9.0, 0.5])
def test_rollouts_in_the_trainer_change_the_policy(tmp_path, bound):
    """The task knows ASCII alone; half of the sampled bytes must be others. -9 is no bound."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(0)  # every token is as likely: two thirds are beyond ASCII

    def share(completion_ids, **kwargs):
        return [sum(i > 130 for i in ids) / len(ids) for ids in completion_ids]

    rollouts = Rollouts(TOKENIZER, {"high": share}, max_new_tokens=3, responses_per_prompt=4)
    objective = make_objective(Constraint("high", lower=bound, scale=0.05))
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "per_device_train_batch_size": 8, "max_steps": 25}
    counts = {"columns": [], "num_samples": lambda batch: {"high": 4 * len(batch["input_ids"])}}
    trainer = make_trainer(
        tmp_path, objective, make_rows(16), rollouts, model=model, gradient_accumulation_steps=1, **options, **counts
    )
    trainer.train()
    estimate = objective.report()[0].estimate
    assert estimate >= 0.5 if bound > 0 else estimate < 0.25
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < logged[-1]["rollout/censored"] <= 1


@pytest.mark.parametrize("options", [{"measure": None}, {"objective": None}, {"columns": "flag"}, {"num_samples": 3}])
def test_arguments_of_the_wrong_kind(tmp_path, options):
    own = {"objective": make_objective(), "measure": measure} | options
    with pytest.raises(TypeError, match=f"{next(iter(options))}.*allowed"):
        BarrierTrainer(make_model(), TrainingArguments(str(tmp_path)), **own)


RETURNED = [
    ({"measure": lambda *given: None}, TypeError, "measure returned a NoneType; allowed: measurements by"),
    ({"measure": lambda *given: torch.ones(2)}, TypeError, "measure returned a Tensor; allowed"),
    ({"num_samples": lambda batch: 3}, TypeError, "num_samples returned a int; allowed: numbers by constraint name"),
    ({"num_samples": lambda batch: {"flaged": 3}}, ValueError, "a number for 'flaged'; allowed: .*'flagged'"),
    ({"num_samples": lambda batch: {"flagged": None}}, TypeError, "for 'flagged', returned None; allowed: a whole"),
    ({"num_samples": lambda batch: {"flagged": torch.ones(2)}}, TypeError, "for 'flagged', returned tensor"),
    ({"num_samples": lambda batch: {"flagged": math.nan}}, ValueError, "for 'flagged', returned nan; allowed"),
    ({"num_samples": lambda batch: {"flagged": 0.5}}, ValueError, "for 'flagged', returned 0.5; allowed"),
]


@pytest.mark.parametrize(("options", "error", "message"), RETURNED)
def test_functions_that_return_something_else(tmp_path, options, error, message):
    objective = make_objective()
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, objective, make_rows(6), **options).train()
    assert objective.windows == 0


def test_an_objective_with_a_loss_of_its_own_is_refused(tmp_path):
    objective = BarrierObjective(torch.nn.functional.mse_loss, [Constraint("entropy", lower=6.0)])
    with pytest.raises(ValueError, match=r"objective has loss_fn=.*allowed: None"):
        make_trainer(tmp_path, objective, make_rows(6))


def test_processes_that_the_trainer_does_not_know_of_are_refused(tmp_path, monkeypatch):
    """As torchrun on CPUs without use_cpu=True: each process would train, and save, a model of its own."""
    monkeypatch.setattr("barrierlm.integrations.checkpoint.world_size", lambda group: 2)
    with pytest.raises(ValueError, match=r"runs as one process .* in a group of 2; allowed: .*use_cpu=True"):
        make_trainer(tmp_path, make_objective(), make_rows(6))


@pytest.mark.parametrize("announced", [True, False])
def test_a_constraint_of_some_micro_batches_has_its_gradient_if_it_is_announced(tmp_path, announced):
    """Measured in every second micro-batch: a mean over those, where num_samples says so; else half, with a warning."""
    rows, gradients, measured, counted = make_rows(8), Gradients(), [], []

    def sometimes(model, inputs, outputs):
        measured.append(inputs)
        return {"entropy": entropy(outputs.logits, inputs["labels"])} if len(measured) % 2 else {}

    def num_samples(batch):
        counted.append(batch)
        return {"entropy": 2} if len(counted) % 2 else {}

    trainer = make_trainer(
        tmp_path,
        make_objective(Constraint("entropy", lower=9.0, scale=1.0)),
        rows,
        sometimes,
        kind=InOrder,
        callbacks=[gradients],
        num_samples=num_samples if announced else None,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=0.0,
    )
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * 0  # no task
    with warnings.catch_warnings() if announced else pytest.warns(RuntimeWarning, match="was 0.5 times the right one"):
        trainer.train()
    trainer.model.zero_grad()
    batch = collate(rows[4:6])
    (-2.0 * entropy(trainer.model(**batch).logits, batch["labels"]).mean()).backward()  # mu / s: violated
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]) / (1 if announced else 2)
    assert (gradients.seen[1] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_a_damaged_state_names_its_file(tmp_path, damage):
    objective = make_objective()
    save_objective(objective, str(tmp_path))
    file = tmp_path / "objective.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"objective.pt is damaged.*allowed"):
        load_objective(objective, str(tmp_path))


def test_a_state_that_cannot_be_read_or_is_of_something_else_is_not_damaged(tmp_path, monkeypatch):
    objective = make_objective()
    torch.save(torch.nn.Linear(1, 1), tmp_path / "objective.pt")
    with pytest.raises(ValueError, match=r"objective.pt holds something else than an objective's state"):
        load_objective(objective, str(tmp_path))

    def refuse(*given, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("barrierlm.files.zipfile.ZipFile", refuse)
    with pytest.raises(PermissionError):
        load_objective(objective, str(tmp_path))


def test_a_column_that_is_not_there(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "flag"} for row in make_rows(6)]
    with pytest.raises(ValueError, match="no 'flag'"):
        make_trainer(tmp_path, make_objective(), rows, num_samples=None).train()


def test_measures_of_logits_by_the_formula():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 3, -100, 2, 1], [-100, -100, 4, 5, -100]])
    ref = torch.randn(2, 5, 7)
    p, r = logits.softmax(-1), ref.softmax(-1)
    for b in range(2):
        at = [t for t in range(4) if labels[b, t + 1] != -100]
        own = sum(p[b, t, labels[b, t + 1]].log() for t in at)
        torch.testing.assert_close(logps(logits, labels)[b], own)
        torch.testing.assert_close(nll(logits, labels)[b], -own / len(at))
        h = -sum((p[b, t] * p[b, t].log()).sum() for t in at) / len(at)
        torch.testing.assert_close(entropy(logits, labels)[b], h)
        d = sum((p[b, t] * (p[b, t] / r[b, t]).log()).sum() for t in at) / len(at)
        torch.testing.assert_close(kl(logits, ref, labels)[b], d)


def test_what_has_no_probability_does_not_count():
    """Masked vocabulary: p log p is 0 there, in value and gradient."""
    logits, ref, labels = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.long)
    masked, masked_ref = (
        torch.cat([x, torch.full((2, 5, 2), -torch.inf)], -1).requires_grad_(i == 0)
        for i, x in enumerate((logits, ref))
    )
    logits.requires_grad_()
    for own, expected in (
        (entropy(masked, labels), entropy(logits, labels)),
        (kl(masked, masked_ref, labels), kl(logits, ref, labels)),
        (kl(masked, torch.cat([ref, ref[..., :2]], -1), labels) * 0, torch.zeros(2)),
    ):
        torch.testing.assert_close(own, expected)
        gradients = torch.autograd.grad(own.sum(), masked)[0]
        assert gradients[..., 7:].eq(0).all()
        if expected.requires_grad:
            torch.testing.assert_close(gradients[..., :7], torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("module", ["transformers", "rollouts"])
def test_importing_without_transformers_names_the_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, f"barrierlm.integrations.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'barrierlm\[transformers\]'"):
        importlib.import_module(f"barrierlm.integrations.{module}")


def test_the_example_meets_its_bounds(tmp_path):
    constrained, plain = run_both("transformers_trainer.py", tmp_path)
    assert constrained["private"] >= 1.5 > plain["private"]
    assert constrained["entropy"] >= 1.2 > plain["entropy"]
    assert len(added_lines("transformers_trainer.py")) <= 12


def off_policy(model, inputs, outputs):
    """Stored responses of a known policy: costs and its log-probabilities are columns."""
    own = logps(outputs.logits, inputs["labels"])
    return {"cost": Sampled(inputs["cost"], own, old_logps=inputs["old_logps"])}


def test_columns_of_stored_responses(tmp_path):
    rows = make_rows(12)
    model = make_model()
    for row in rows:
        batch = collate([row])
        with torch.no_grad():
            row["old_logps"] = float(logps(model(**batch).logits, batch["labels"]))
        row["cost"] = float(row["flag"])
    objective = make_objective(Constraint("cost", upper=0.1, scale=1.0))
    columns = ["cost", "old_logps"]
    trainer = make_trainer(
        tmp_path, objective, rows, off_policy, columns=columns, num_samples=None, max_steps=1,
        gradient_accumulation_steps=6,
    )  # fmt: skip
    trainer.train()
    assert objective.report()[0].estimate == pytest.approx(0.5)  # ratios are 1: the policy that sampled


TWO_PROCESSES = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.integrations.test_transformers import *
from pathlib import Path

class Shard(BarrierTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

def sampled(model, inputs, outputs):
    own = logps(model(**{{k: inputs[k] for k in ("input_ids", "attention_mask")}}).logits, inputs["labels"])
    return measure(model, inputs, outputs) | {{"cost": Sampled(inputs["flag"].float(), own)}}

folder, gradients = Path({folder!r}), Gradients()
more = Constraint("cost", upper=0.2, scale=1.0)
objective = make_objective(*make_objective().constraints, more)
rows = make_rows(16)
for row in rows:
    row["flag"] = int(row["word"]) in (0, 1, 2, 5, 8, 11, 15)
trainer = make_trainer(folder, objective, rows, sampled, kind=Shard, callbacks=[gradients], ddp_backend="gloo",
    per_device_train_batch_size=4 // int(sys.argv[1]), gradient_accumulation_steps=2, max_steps=4,
    save_strategy="steps", save_steps=2, average_tokens_across_devices=True)
trainer.train()
if trainer.is_world_process_zero():
    torch.save([gradients.seen, objective.metrics(), torch.load(folder / "checkpoint-2" / "objective.pt")["windows"]],
               folder / "result.pt")
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """DDP on gloo, with a second forward pass per step: gradients and metrics of one process with twice the batch."""
    results = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        script = folder / "script.py"
        script.write_text(TWO_PROCESSES.format(root=str(ROOT), folder=str(folder)), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(script), str(ranks)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-30_000:]  # the launcher has the last word, and a worker the cause
        results.append(torch.load(folder / "result.pt", weights_only=True))
    (one, metrics, windows), (two, metrics_of_two, windows_of_two) = results
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() < 5e-6 * a.norm()
    # A spread of entropies near 6, which fp32 rounds to 5e-7, has no fewer digits wrong itself.
    assert metrics == pytest.approx(metrics_of_two, rel=1e-4, abs=5e-7)
    assert windows == windows_of_two == 2
