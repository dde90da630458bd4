"""What the TRL trainers refuse, and costs and measurements that are missing, late or broken."""

import asyncio
import doctest
import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_model import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOTrainer

from barrierlm import BarrierObjective, Constraint
from barrierlm.integrations.logits import kl as logits_kl
from barrierlm.integrations.trl import Batch, ConstrainedRewards

from .trl_tools import IGNORED, dataset, length, make_config, make_trainer, token_logps, words

pytestmark = [pytest.mark.filterwarnings(w) for w in IGNORED]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


REFUSED = [
    ("grpo", {"scale_rewards": "group"}, "scale_rewards='group'.*'none'.*standard deviation"),
    ("grpo", {"scale_rewards": "batch"}, "scale_rewards='batch'"),
    *(("grpo", {"loss_type": name}, f"loss_type='{name}'.*dr_grpo.*length") for name in ("grpo", "bnpo", "sapo")),
    ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation=.*sum_then_normalize"),
    ("grpo", {"mask_truncated_completions": True}, "mask_truncated_completions=True.*longest"),
    ("rloo", {"mask_truncated_completions": True}, "mask_truncated_completions=True.*longest"),
    ("rloo", {"normalize_advantages": True}, "normalize_advantages=True.*False"),
    ("rloo", {"reward_clip_range": (-1.0, 1.0)}, "reward_clip_range=.*clips"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED)
def test_settings_that_break_a_bound_are_refused(kind, settings, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, model, tmp_path, settings=settings)


def test_default_config_is_refused_too(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda self, *_, **__: setattr(self, "args", make_default(tmp_path)))
    with pytest.raises(ValueError, match="scale_rewards='group'"):
        make_trainer("grpo", model, tmp_path, args=None)


def make_default(folder):
    return make_config("grpo", folder, scale_rewards="group")


def test_other_distributions_warn(model, tmp_path):
    with pytest.warns(RuntimeWarning, match=r"top_p=0.9, top_k=5.*not samples of the model itself"):
        make_trainer("grpo", model, tmp_path, settings={"top_p": 0.9, "top_k": 5})


WRONG = [
    ("grpo", {"costs": {}}, r"costs has \[\].*\['length'\]"),
    ("grpo", {"costs": {"length": length, "other": length}}, "costs has .*other"),
    ("sft", {"measurements": [length]}, r"measurements has .*by name: \['entropy'\]"),
    ("sft", {"num_samples": {"other": len}}, "num_samples has 'other'.*entropy"),
    ("sft", {"columns": "kept"}, "columns='kept'.*list"),
    ("sft", {"columns": ["missing"]}, "columns has 'missing'.*dataset"),
    ("grpo", {"constraints": []}, "constraints is empty"),
    (
        "grpo",
        {"constraints": BarrierObjective(None, [Constraint("length", upper=1)], normalize=True)},
        "normalize=True",
    ),
    (
        "grpo",
        {"constraints": BarrierObjective(len, [Constraint("length", upper=1)])},
        "loss_fn=.*allowed: loss_fn=None",
    ),
    (
        "sft",
        {"constraints": BarrierObjective(None, [Constraint("entropy", upper=1)], multiplier="current")},
        "multiplier='current'.*committed",
    ),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), WRONG)
def test_wrong_arguments(kind, arguments, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, model, tmp_path, **arguments)


def test_packing_drops_columns(model, tmp_path):
    with pytest.raises(ValueError, match=r"columns=\['kept'\] with packing=True"):
        make_trainer(
            "sft", model, tmp_path, columns=["kept"], settings={"packing": True, "packing_strategy": "wrapped"}
        )


def test_measurements_of_another_size_need_num_samples(model, tmp_path):
    trainer = make_trainer("sft", model, tmp_path, measurements={"entropy": lambda b: b.outputs.entropy.flatten()})
    with pytest.raises(ValueError, match=r"returned \d+ values in a micro-batch of 8 samples.*num_samples="):
        trainer.train()


def test_what_is_announced_must_come(model, tmp_path):
    arguments = {"measurements": {"entropy": lambda b: None}, "num_samples": {"entropy": lambda inputs: 1}}
    with pytest.raises(ValueError, match="returned 0 values in a micro-batch of 1 samples"):
        make_trainer("sft", model, tmp_path, **arguments).train()
    arguments = {"measurements": {"entropy": lambda b: 1.0}, "num_samples": {"entropy": lambda inputs: 1}}
    with pytest.raises(TypeError, match="is a float; allowed: Sampled"):
        make_trainer("sft", model, tmp_path, **arguments).train()
    with pytest.raises(TypeError, match=r"num_samples\['entropy'\] returned None; allowed: a whole number"):
        make_trainer("sft", model, tmp_path, num_samples={"entropy": lambda inputs: None}).train()


def test_processes_that_the_trainer_does_not_know_of_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("barrierlm.integrations.checkpoint.world_size", lambda group: 2)
    for kind in ("sft", "grpo"):
        with pytest.raises(ValueError, match="in a group of 2; allowed"):
            make_trainer(kind, model, tmp_path)


def test_nan_is_not_hidden_by_the_filter(model, tmp_path):
    """logging_nan_inf_filter would log the mean of earlier losses in its place."""

    def broken(batch):
        return batch.outputs.log_probs.sum(1) * float("nan")

    trainer = make_trainer("sft", model, tmp_path, measurements={"entropy": broken})
    with pytest.raises(FloatingPointError, match=r"8 NaN or infinite value.*'entropy'"):
        trainer.train()


def test_infinite_costs(model, tmp_path):
    trainer = make_trainer(
        "grpo", model, tmp_path, costs={"length": lambda completions, **_: [float("inf")] * len(completions)}
    )
    with pytest.raises(FloatingPointError, match=r"costs\['length'\] returned an infinite"):
        trainer.train()


def test_skipped_steps_commit_nothing(model, tmp_path, monkeypatch):
    """As fp16 skips them."""
    trainer = make_trainer("sft", model, tmp_path, settings={"max_steps": 2})
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", True)
    trainer.train()
    assert trainer.objective.windows == 0
    assert trainer.objective._window.calls == 0


async def late(completion_ids, **columns):
    await asyncio.sleep(0.001)
    return [float(len(ids)) if i % 4 else None for i, ids in enumerate(completion_ids)]


def scored(trainer, rewards):
    """What `_calculate_rewards` makes of the columns [n, 2] that TRL has computed."""
    trainer.model.train()
    original = GRPOTrainer._calculate_rewards
    try:
        GRPOTrainer._calculate_rewards = lambda self, *args, **kwargs: rewards.clone()
        return trainer._calculate_rewards()
    finally:
        GRPOTrainer._calculate_rewards = original


def test_costs_may_be_async_and_missing(model, tmp_path):
    seen = []

    class Seen(ConstrainedRewards, GRPOTrainer):
        def _measure(self, costs):
            seen.append(costs.clone())
            super()._measure(costs)

    trainer = Seen(
        model,
        reward_funcs=words,
        args=make_config("grpo", tmp_path, max_steps=2, reward_weights=[2.0]),
        train_dataset=make_trainer("grpo", model, tmp_path).train_dataset,
        constraints=[Constraint("length", upper=4)],
        costs={"length": late},
    )
    assert trainer.args.reward_weights == [2.0]
    assert trainer.reward_func_names == ["words", "costs/length"]
    trainer.train()
    assert float(trainer.reward_weights[0]) == 2.0
    assert len(seen) == 2
    assert [int(costs.isnan().sum()) for costs in seen] == [2, 2]
    known = [costs[~costs.isnan()] for costs in seen]
    # EMA(0.1), corrected for its start
    expected = (0.9 * known[0].mean() + known[1].mean()) / 1.9
    assert trainer.objective.report()[0].estimate == pytest.approx(float(expected), rel=1e-6)


def test_missing_costs_are_average_ones(model, tmp_path):
    """A response without a cost, or without any reward, gains or loses nothing by it."""
    trainer = make_trainer("grpo", model, tmp_path)
    nan = float("nan")
    rewards = torch.tensor([[1.0, 2], [3, nan], [nan, 6], [5, 4], [1, nan], [nan, nan], [2, nan], [0, nan]])
    out = scored(trainer, rewards)
    assert out[:4].tolist() == [[1, 2], [3, 4], [3, 6], [5, 4]]
    assert out[4:, 0].tolist() == [1, 1, 2, 0]
    assert out[4:, 1].isnan().all()
    trainer.objective.step()
    assert trainer.objective.report()[0].estimate == pytest.approx(4)


def test_two_rewards_keep_what_trl_does_with_none(model, tmp_path):
    trainer = make_trainer("grpo", model, tmp_path, reward_funcs=[words, length])
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan, 2], [3, 1, 2], [nan, nan, 6], [5, 1, 4]])
    out = scored(trainer, rewards)
    assert torch.equal(out.nan_to_num(-1), torch.tensor([[1.0, -1, 2], [3, 1, 2], [3, 1, 6], [5, 1, 4]]))


def test_without_trl():
    code = "import sys; sys.modules['trl'] = None\nimport barrierlm.integrations.trl"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ModuleNotFoundError: barrierlm.integrations.trl needs the package 'trl'" in run.stderr
    assert "pip install 'barrierlm[trl]'" in run.stderr


def batch_of(model, tokenizer, labels_from=0):
    rows = tokenizer(["say one two three", "it was"], return_tensors="pt", padding=True, padding_side="right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    labels[:, :labels_from] = -100
    outputs = SimpleNamespace(label_mask=labels[:, 1:] != -100)
    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "labels": labels}
    return Batch(model, inputs, outputs, {})


def test_reference_kl(model, tmp_path):
    """Against torch.distributions; the adapter's own base is the reference of a PEFT model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference, policy = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    with pytest.raises(ValueError, match="reference=None and a model without an adapter"):
        batch_of(policy, tokenizer).reference_kl()
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    assert batch_of(adapted, tokenizer).reference_kl().abs().max() < 1e-6
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = batch_of(adapted, tokenizer, labels_from=2)
    p, q = (
        torch.distributions.Categorical(logits=m(batch.inputs["input_ids"], batch.inputs["attention_mask"]).logits)
        for m in (adapted, reference)
    )
    kl = torch.distributions.kl_divergence(p, q)
    expected = torch.stack([kl[0, 1:3].mean(), kl[1, 0] * 0])  # labels at 2 and 3; none in the second row
    assert expected[0] > 1e-3
    torch.testing.assert_close(batch.reference_kl(), expected)
    torch.testing.assert_close(batch.reference_kl(reference), expected)
    assert batch.reference_kl().requires_grad
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_reference_kl_in_bf16_is_that_of_its_logits():
    """Softmaxes in bf16 made it negative."""
    torch.manual_seed(0)
    base = (3 * torch.randn(2, 9, 512)).bfloat16()
    policy = (base.float() + 0.05 * torch.randn(2, 9, 512)).bfloat16()
    labels = torch.zeros(2, 9, dtype=torch.long)

    def model(logits):
        return lambda **inputs: SimpleNamespace(logits=logits)

    batch = Batch(model(policy), {"input_ids": labels}, SimpleNamespace(label_mask=torch.ones(2, 8)), {})
    expected = logits_kl(policy.double(), base.double(), labels)
    torch.testing.assert_close(batch.reference_kl(model(base)), expected, rtol=1e-4, atol=1e-7)
    assert batch.reference_kl(model(policy)).eq(0).all()


REFERENCES = [
    {"columns": ["weight"]},
    {"settings": {"precompute_ref_log_probs": True}},
    {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"])},
]


@pytest.mark.parametrize("arguments", REFERENCES, ids=["model", "precomputed", "peft"])
def test_dpo_references(arguments, model, tmp_path):
    """Log-ratios against the starting model's, wherever TRL has its log-probabilities from."""
    seen = []

    def measured(batch):
        seen.append(batch)
        return batch.chosen_logps - batch.ref_chosen_logps

    pairs = dataset("dpo", 16).add_column("weight", list(range(16)))
    settings = {"learning_rate": 0.05} | arguments.pop("settings", {})
    trainer = make_trainer(
        "dpo", model, tmp_path, measurements={"chosen": measured}, train_dataset=pairs, settings=settings, **arguments
    )
    trainer.train()
    start = AutoModelForCausalLM.from_pretrained(model)
    for batch in seen:
        inputs = batch.inputs
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        logps, _ = token_logps(start, inputs["input_ids"], inputs["attention_mask"], labels)
        won, lost = logps.sum(1).detach().chunk(2)
        torch.testing.assert_close(batch.ref_chosen_logps, won, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.ref_rejected_logps, lost, rtol=1e-4, atol=1e-4)
        assert not batch.ref_chosen_logps.requires_grad
        assert batch.chosen_logps.requires_grad
        assert ("weight" in batch.columns) == ("columns" in arguments)
    assert (seen[-1].chosen_logps - seen[-1].ref_chosen_logps).detach().abs().mean() > 0.05


def test_ld_alpha_with_precomputed_reference(model, tmp_path):
    trainer = make_trainer("dpo", model, tmp_path, settings={"precompute_ref_log_probs": True, "ld_alpha": 0.5})
    with pytest.raises(ValueError, match=r"ld_alpha=0.5 with precompute_ref_log_probs=True"):
        trainer.train()


@pytest.mark.parametrize("how", ["path", "model"])
def test_costs_may_be_reward_models(how, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    folder = tmp_path / "judge"
    judge.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cost = str(folder) if how == "path" else AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = make_trainer("grpo", model, tmp_path, costs={"length": cost}, settings={"max_steps": 2})
    trainer.train()
    logged = [entry["rewards/costs/length/mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.objective.report()[0].estimate == pytest.approx((0.9 * logged[0] + logged[1]) / 1.9, rel=1e-5)


@pytest.mark.parametrize("name", ["batch", "losses", "rewards"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"barrierlm.integrations.trl.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
