"""The gradient of each TRL trainer with constraints, against a plain loop that is written from the formula."""

import pytest
import torch
from datasets import Dataset
from tiny_model import tiny_model

from barrierlm import BarrierObjective, Constraint, DualAscent

from .trl_tools import IGNORED, Gradients, chosen, entropy, make_trainer, token_logps

pytestmark = [pytest.mark.filterwarnings(w) for w in IGNORED]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def still(kind, model, tmp_path, *, settings=None, **arguments):
    """A trainer whose optimizer does nothing, so that every step is at the same parameters; and its gradients."""
    recorded = Gradients()
    settings = {"max_steps": 2, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2} | (settings or {})
    trainer = make_trainer(kind, model, tmp_path, settings=settings, callbacks=[recorded], **arguments)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.0)
    return trainer, recorded


def plain_gradient(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def close(a, b):
    """Two gradients up to round-off in fp32 and in another order of sums."""
    return float((a - b).norm() / b.norm()) < 1e-5


REWARDS = [("grpo", loss) for loss in ("dapo", "dr_grpo", "cispo", "luspo", "vespo")] + [("rloo", None)]


@pytest.mark.parametrize(("kind", "loss_type"), REWARDS)
def test_rewards(kind, loss_type, model, tmp_path):
    """sum_i A_i grad log p(y_i) with A from reward - w cost, at the weights committed by the step before."""
    settings = {"loss_type": loss_type} if loss_type else {}
    if loss_type == "cispo":
        settings["epsilon_high"] = 5.0  # the largest ratio there, not its distance from 1
    trainer, recorded = still(kind, model, tmp_path, settings=settings)
    seen = []
    commit = trainer._commit
    trainer._commit = lambda: (seen.append(trainer.objective.weights["length"]), commit())
    trainer.train()
    assert seen[0] == 0.0
    weight = seen[1]
    assert weight > 0.1
    batches = trainer._buffered_inputs
    logps, advantages, tokens, groups, scores = [], [], 0, [], []
    for batch in batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
        logps.append(token_logps(trainer.model, ids, mask, ids.masked_fill(counted == 0, -100))[0].sum(1))
        tokens += int(batch["completion_mask"].sum())
        texts = trainer.processing_class.batch_decode(
            batch["completion_ids"] * batch["completion_mask"], skip_special_tokens=True
        )
        lengths = batch["completion_mask"].sum(1)
        scores += [len(set(t.split())) - weight * float(n) for t, n in zip(texts, lengths, strict=True)]
        groups += [tuple(row.tolist()) for row in batch["prompt_ids"]]
    assert len(groups) == 16
    for i, group in enumerate(groups):
        others = [s for j, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and j != i]
        assert len(others) == 3
        own = scores[i]
        advantages.append(own - sum(others) / 3 if kind == "rloo" else own - (sum(others) + own) / 4)
    total = (torch.tensor(advantages) * torch.cat(logps)).sum()
    divisor = {"dr_grpo": 16 * 8, "luspo": 16, None: 16}.get(loss_type, tokens)
    gradient = plain_gradient(trainer, -total / divisor)
    assert close(recorded.steps[1], gradient)
    assert not close(recorded.steps[0], gradient)


def test_a_loss_divided_by_own_length_is_another_gradient(model, tmp_path):
    """Why loss_type='grpo' is refused: at equal advantages, it is not a multiple of the policy gradient."""
    steps = {}
    for loss_type in ("dapo", "grpo"):
        arguments = {"settings": {"loss_type": "dapo"}}
        trainer, recorded = still("grpo", model, tmp_path, **arguments)
        trainer.loss_type = loss_type
        trainer.train()
        steps[loss_type] = recorded.steps[0]
    assert torch.cosine_similarity(steps["dapo"], steps["grpo"], dim=0) < 0.98


@pytest.mark.parametrize("batch_size", [4, 2])  # uneven micro-batches 4 + 2; and a window 2 + 2, then a short one of 2
def test_sft(batch_size, model, tmp_path):
    """Values per sequence, of a subset of them and exact ones, each with its own mean over the window."""
    seen = []

    def kept_nll(batch):
        seen.append(batch)
        nll = -batch.outputs.log_probs.sum(1) / batch.outputs.label_mask.sum(1)
        return nll[batch.columns["kept"] == 1]

    def norm(batch):
        return sum(p.square().sum() for p in batch.model.parameters())

    bounds = [
        Constraint("entropy", lower=3.5, scale=1),
        Constraint("kept", upper=1, scale=1),
        Constraint("norm", upper=1),
    ]
    trainer, recorded = still(
        "sft",
        model,
        tmp_path,
        rows=6,
        settings={
            "per_device_train_batch_size": batch_size,
            "num_train_epochs": 1,
            "max_steps": -1 if batch_size == 2 else 2,
        },
        constraints=bounds,
        measurements={"kept": kept_nll, "norm": norm, "entropy": entropy},
        num_samples={"kept": lambda inputs: inputs["kept"].sum()},
        columns=["kept"],
    )
    weights, items = [], []
    commit, take = trainer._commit, trainer.get_batch_samples
    trainer._commit = lambda: (weights.append(trainer.objective.weights), commit())
    trainer.get_batch_samples = lambda *given: (batches := take(*given), items.append(batches[1]))[0]
    trainer.train()
    assert len(recorded.steps) == 2
    window = seen[2:]
    assert [len(batch.columns["kept"]) for batch in window] in ([4, 2], [2])
    assert all(abs(w) > 0.5 for w in weights[1].values())
    nll, tokens, entropies, kept = 0.0, 0, [], []
    for batch in window:
        logps, logits = token_logps(
            trainer.model, *(batch.inputs[k] for k in ("input_ids", "attention_mask", "labels"))
        )
        mask = batch.inputs["labels"][:, 1:] != -100
        nll, tokens = nll - logps.sum(), tokens + mask.sum()
        entropies.append((torch.distributions.Categorical(logits=logits).entropy() * mask).sum(1) / mask.sum(1))
        kept.append((-logps.sum(1) / mask.sum(1))[batch.columns["kept"] == 1])
    # The Trainer of transformers 5.0 divides by the first token of each row as well, which no position predicts.
    assert items[1] in (tokens, tokens + sum(len(batch.inputs["labels"]) for batch in window))
    loss = nll / items[1]
    for name, values in (("entropy", entropies), ("kept", kept), ("norm", [norm(window[0])[None]])):
        loss = loss + weights[1][name] * torch.cat(values).mean()
    assert close(recorded.steps[1], plain_gradient(trainer, loss))


@pytest.mark.parametrize("exact", [True, False])
def test_sft_with_a_measurement_of_some_micro_batches(exact, model, tmp_path):
    """Announced by num_samples, the mean is over those alone; here they hold the same rows as the others."""
    steps = []
    for kept in ([1.0] * 8, [1.0, 1.0, 0.0, 0.0] * 2):

        def measure(batch):
            values = entropy(batch)
            return None if not batch.columns["kept"].any() else values.mean() if exact else values

        # Large, so that the task's gradient is none of it.
        rule = DualAscent(1e-9, start_at=1e6, cap=1e9)
        trainer, recorded = still(
            "sft",
            model,
            tmp_path,
            settings={"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"},
            train_dataset=Dataset.from_dict({"text": ["say one two three", "it was red"] * 4, "kept": kept}),
            constraints=BarrierObjective(None, [Constraint("entropy", lower=9.0, scale=1.0)], rule=rule),
            measurements={"entropy": measure},
            num_samples={"entropy": lambda inputs: inputs["kept"].sum()},
            columns=["kept"],
        )
        trainer.train()
        steps.append(recorded.steps[1])
    assert close(*steps)


def test_dpo(model, tmp_path):
    """The mean of micro-batches for the loss, which is TRL's; the mean over pairs for the constraint."""
    seen = []

    def measured(batch):
        seen.append(batch)
        return chosen(batch)

    trainer, recorded = still(
        "dpo",
        model,
        tmp_path,
        rows=6,
        settings={"per_device_train_batch_size": 4},
        constraints=[Constraint("chosen", lower=1, scale=1)],
        measurements={"chosen": measured},
    )
    with torch.no_grad():
        for p in trainer.ref_model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    weights = []
    commit = trainer._commit
    trainer._commit = lambda: (weights.append(trainer.objective.weights["chosen"]), commit())
    trainer.train()
    window = seen[2:]
    assert weights[1] < -0.5
    loss, values = 0.0, []
    for batch in window:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        labels = ids.masked_fill(batch.inputs["completion_mask"] == 0, -100)
        logps = token_logps(trainer.model, ids, mask, labels)[0].sum(1)
        with torch.no_grad():
            reference = token_logps(trainer.ref_model, ids, mask, labels)[0].sum(1)
        won, lost = (logps - reference).chunk(2)
        loss = loss - torch.nn.functional.logsigmoid(0.1 * (won - lost)).mean() / len(window)
        values.append(won)
    assert [len(v) for v in values] == [4, 2]
    assert torch.cat(values).detach().abs().mean() > 1e-3
    loss = loss + weights[1] * torch.cat(values).mean()
    assert close(recorded.steps[1], plain_gradient(trainer, loss))


def test_a_forgotten_column_is_explained(model, tmp_path):
    bounds = [Constraint("kept", upper=1, scale=1)]
    measurements = {"kept": lambda batch: batch.columns["kept"]}
    trainer, _ = still("sft", model, tmp_path, rows=4, constraints=bounds, measurements=measurements)
    with pytest.raises(KeyError, match="kept") as caught:
        trainer.train()
    assert caught.value.__notes__ == ["Of the dataset's columns a measurement gets those named in columns=[]"]
