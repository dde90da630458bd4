"""What the tests of the TRL integration share: a tiny model, trainers that do not move it, gradients as they come."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig

from barrierlm import Constraint
from barrierlm.integrations.trl import BarrierDPOTrainer, BarrierGRPOTrainer, BarrierRLOOTrainer, BarrierSFTTrainer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

#: Of transformers and torch, about TRL's own settings and a machine without a GPU.
IGNORED = (
    "ignore::FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore::DeprecationWarning:multiprocessing",
    "ignore::ResourceWarning",
)
TRAINERS = {"grpo": BarrierGRPOTrainer, "rloo": BarrierRLOOTrainer, "sft": BarrierSFTTrainer, "dpo": BarrierDPOTrainer}
CONFIGS = {"grpo": GRPOConfig, "rloo": RLOOConfig, "sft": SFTConfig, "dpo": DPOConfig}
PROMPTS = ["say one", "say two", "is it red", "is it blue"]


def words(completions, **columns):
    """Reward: the number of different words."""
    return [float(len(set(text.split()))) for text in completions]


def length(completion_ids, **columns):
    """Cost: the number of tokens."""
    return [float(len(ids)) for ids in completion_ids]


def entropy(batch):
    """Measurement [n]: the mean entropy of a sequence's tokens."""
    return batch.outputs.entropy.sum(1) / batch.outputs.label_mask.sum(1)


def chosen(batch):
    """Measurement [n]: how much likelier the chosen responses became."""
    return batch.chosen_logps - batch.ref_chosen_logps


def dataset(kind, rows=64):
    """Rows that the trainer of this kind takes."""
    prompts = (PROMPTS * rows)[:rows]
    if kind in ("grpo", "rloo"):
        return Dataset.from_dict({"prompt": prompts})
    if kind == "sft":
        texts = (["say one two three", "it was red", "the four is green and blue"] * rows)[:rows]
        return Dataset.from_dict({"text": texts, "kept": [float(i % 3 != 1) for i in range(rows)]})
    return Dataset.from_dict({"prompt": prompts, "chosen": [" yes yes no"] * rows, "rejected": [" no yes"] * rows})


def make_config(kind, folder, **settings):
    """A config of this kind with its files in ``folder``."""
    common = {"per_device_train_batch_size": 8, "learning_rate": 5e-3, "max_steps": 4, "logging_steps": 1}
    common |= {"bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    if kind in ("grpo", "rloo"):
        common |= {"num_generations": 4, "max_completion_length": 8, "beta": 0.0}
    if kind == "grpo":
        common |= {"scale_rewards": "none"}
    return CONFIGS[kind](output_dir=str(folder), **(common | settings))


def make_trainer(kind, model, folder, *, optimizers=None, rows=64, settings=None, **arguments):
    """A trainer of this kind with one constraint, unless told otherwise."""
    if kind in ("grpo", "rloo"):
        own = {"reward_funcs": [words], "constraints": [Constraint("length", upper=4)], "costs": {"length": length}}
    elif kind == "sft":
        own = {"constraints": [Constraint("entropy", lower=2.9)], "measurements": {"entropy": entropy}}
    else:
        own = {"constraints": [Constraint("chosen", lower=-0.1)], "measurements": {"chosen": chosen}}
    own["args"] = make_config(kind, folder, **(settings or {}))
    own["train_dataset"] = dataset(kind, rows)
    trainer = TRAINERS[kind](model, **(own | arguments))
    if optimizers == "still":
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.0)
    return trainer


class Gradients(TrainerCallback):
    """The gradients that each optimizer step saw."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """The Trainer's hook."""
        self.steps.append(gradients(model))


def gradients(model):
    """All gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def state_equal(a, b):
    """Whether two state dicts hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(torch.nan_to_num(a, nan=-12345.0), torch.nan_to_num(b, nan=-12345.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(state_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(state_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def token_logps(model, ids, mask, labels):
    """Log-probabilities [n, T - 1] of the labels, 0 where they are -100, from plain logits."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    labels = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps * (labels != -100), logits
