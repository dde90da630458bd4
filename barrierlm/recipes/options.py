"""Every option of the recipe, once: the source of the YAML schema, the command line and the option table."""

# ruff: noqa: RUF009 - `_option` returns a dataclass field
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help text and its range: ``low``, ``above`` and ``below`` (strict), and ``choices``.

    ``may_differ=True``: a resumed run need not agree in it with the run that was stopped.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelOptions:
    """Which model is trained, and which of its weights."""

    name: str = _option("smollm2-135m-instruct", "Hugging Face name or folder; the default is the packaged model")
    dtype: str = _option(
        "auto",
        "precision of the forward pass; auto: bfloat16 where the device has it, else float32; trained weights are fp32",
        choices=("auto", "bfloat16", "float32"),
    )
    lora_rank: int = _option(16, "rank of the LoRA adapters; 0 trains every weight", low=0)
    lora_alpha: float = _option(32.0, "LoRA scaling numerator (alpha / rank multiplies the update)", above=0)
    lora_targets: str = _option("all-linear", "module names that get an adapter, comma-separated, or all-linear")


@dataclass
class DataOptions:
    """Prompt/response pairs."""

    source: str = _option(
        "dialogues", "dialogues (packaged), a .jsonl file, or a dataset name or folder", may_differ=True
    )
    split: str = _option("train", "split of a Hugging Face dataset")
    prompt_column: str = _option("prompt", "column of the prompt")
    response_column: str = _option("response", "column of the response")
    system_prompt: str | None = _option("", "system message of the chat template; null: the template's own")
    max_prompt_tokens: int = _option(48, "longer prompts are left out", low=1)
    max_response_tokens: int = _option(64, "longer responses are left out", low=1)
    max_pairs: int | None = _option(None, "use only so many pairs, chosen once; null: all", low=2)
    heldout_share: float = _option(
        0.05, "share of the conversations (or prompts) that is never trained on", above=0, below=1
    )
    split_seed: int = _option(0, "seed of the choice and of the held-out split; leave it to compare runs")


@dataclass
class ConstraintOptions:
    """One entry of ``constraints``: a cost function and the bounds of its mean."""

    cost: str | None = _option(
        None,
        "length, sentiment, profanity, kl, path/to/file.py:function, package.module:function, or "
        "reward_model:NAME[#LABEL]; null: the constraint's own name",
    )
    lower: float | None = _option(None, "smallest allowed mean, in the cost's unit")
    upper: float | None = _option(None, "largest allowed mean, in the cost's unit")
    scale: float | None = _option(None, "one unit of violation; null: chosen by the objective", above=0)


@dataclass
class CostOptions:
    """What is done about cost functions that fail: raise, hang, or give no finite number."""

    timeout: float | None = _option(
        None,
        "seconds that a call may take; null: any time (a call that hangs is given up, not ended)",
        above=0,
        may_differ=True,
    )
    retries: int = _option(0, "how often a call that raised or took too long is tried again", low=0, may_differ=True)
    retry_delay: float = _option(
        1.0, "seconds before the first retry, doubled for each further one", low=0, may_differ=True
    )
    on_error: str = _option(
        "stop",
        "after that, or where a cost is NaN, infinite or None: stop the run, or skip that constraint's window",
        choices=("stop", "skip"),
        may_differ=True,
    )


@dataclass
class ObjectiveOptions:
    """How bounds become multipliers; the options of a part are its constructor's arguments."""

    rule: str = _option("AdaptiveBarrier", "class name of the rule")
    rule_options: dict[str, Any] = _option({}, "arguments of the rule")
    unit: float = _option(
        0.06,
        "an ordinary multiplier, in nats per token and unit of violation: the `unit` of AdaptiveBarrier and "
        "ModifiedBarrier",
        above=0,
    )
    schedule: str = _option("AdaptiveSchedule", "class name of the schedule of mu")
    schedule_options: dict[str, Any] = _option({}, "arguments of the schedule")
    estimator: str = _option("EMA", "class name of the estimator")
    estimator_options: dict[str, Any] = _option({}, "arguments of the estimator")
    noise_floor: float = _option(1.0, "s stays above this many standard errors; 0: off", low=0)
    confidence: float | None = _option(
        None,
        "bounds are drawn in by this many standard errors of a mean over 200 windows; null: 6 (0.4 of a window's) for "
        "ModifiedBarrier and, once it learns, AdaptiveBarrier, as their averages end on the bounds; 0 for the others",
        low=0,
    )


@dataclass
class RolloutOptions:
    """Responses sampled from the model, at temperature 1 from the full distribution."""

    prompts: int = _option(16, "prompts per micro-batch and process", low=1)
    responses_per_prompt: int = _option(
        1, "responses per prompt; with 2 or more, costs of whole responses use group baselines", low=1
    )
    max_new_tokens: int = _option(48, "cap; at least twice an upper bound of a length constraint", low=1)


@dataclass
class OptimOptions:
    """The loop."""

    steps: int = _option(60, "optimizer steps", low=1, may_differ=True)
    batch_size: int = _option(8, "prompt/response pairs per micro-batch and process", low=1)
    gradient_accumulation: int = _option(1, "micro-batches per optimizer step", low=1)
    learning_rate: float = _option(5e-4, "peak learning rate of AdamW", above=0)
    warmup_steps: int = _option(5, "steps of linear warm-up", low=0)
    decay: str = _option("linear", "after the warm-up", choices=("linear", "cosine", "constant"))
    min_learning_rate: float = _option(0.1, "end of the decay, as a share of the peak", low=0)
    momentum: float = _option(0.9, "AdamW's beta1; less follows a constraint with less delay", low=0, below=1)
    weight_decay: float = _option(0.0, "AdamW's decoupled weight decay", low=0)
    max_grad_norm: float = _option(1.0, "gradient norm is clipped at this", above=0)
    constraint_max_grad_norm: float | None = _option(
        None,
        "the constraints' gradient is clipped at this, apart from the task's at max_grad_norm, so that multipliers "
        "leave the task its part of a step; null: their sum is clipped",
        above=0,
    )


@dataclass
class EvaluationOptions:
    """Held-out evaluation at the end."""

    pairs: int = _option(256, "held-out pairs for the NLL", low=1, may_differ=True)
    prompts: int = _option(128, "held-out prompts, one sampled response each", low=2, may_differ=True)
    batch_size: int = _option(32, "responses sampled at once", low=1, may_differ=True)
    samples: int = _option(4, "sample responses to show", low=0, may_differ=True)


@dataclass
class Options:
    """All options of ``barrierlm finetune``."""

    model: ModelOptions = _option(ModelOptions, "")
    data: DataOptions = _option(DataOptions, "")
    constraints: dict[str, ConstraintOptions] = _option({}, "by name; none: plain supervised fine-tuning")
    costs: CostOptions = _option(CostOptions, "")
    objective: ObjectiveOptions = _option(ObjectiveOptions, "")
    rollout: RolloutOptions = _option(RolloutOptions, "")
    optim: OptimOptions = _option(OptimOptions, "")
    evaluation: EvaluationOptions = _option(EvaluationOptions, "")
    seed: int = _option(0, "seed of the data order, the adapters and the sampling", low=0, below=2**40)
    rank_timeout: float = _option(
        600.0, "seconds that a process waits for the others before it stops with an error", above=0, may_differ=True
    )
    output_dir: str = _option(
        "runs/finetune", "folder of metrics, checkpoints, summary, figure and weights", may_differ=True
    )
    balance_every: int = _option(
        0,
        "steps between logs of the gradient norms of task and constraints (`balance/...`); each takes one more forward "
        "and backward pass, but no sampling; 0: never. With optim.constraint_max_grad_norm every step has them",
        low=0,
    )
    checkpoint_every: int = _option(0, "steps between checkpoints; 0: none", low=0, may_differ=True)
    keep_best: bool = _option(
        False,
        "also keep the weights of the best state that met all bounds with confidence (else of the least violated one), "
        "evaluate them at the end, and write them to output_dir/best with save_model",
    )
    resume: bool = _option(False, "continue from the newest checkpoint in output_dir", may_differ=True)
    save_model: bool = _option(True, "write the trained weights to output_dir/model", may_differ=True)
