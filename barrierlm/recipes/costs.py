"""Cost functions: what a constraint averages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from barrierlm import Sampled
from barrierlm.integrations.costs import CostFunction, accepted, brief, checked_costs

from .attempts import Attempts, CostError
from .config import ConfigError, loading
from .extras import missing_extra
from .model import Policy, Sequences, lay_out
from .options import ConstraintOptions, CostOptions
from .rollout import Rollout


class Cost(ABC):
    """What one constraint measures on sampled responses."""

    @abstractmethod
    def measure(
        self, rollouts: Sequence[Rollout], sequences: Sequences, policy: Policy, groups: Tensor | None = None
    ) -> Sampled:
        """Costs of the responses, laid out as ``sequences``, for `BarrierObjective.linear`: no log-probabilities."""


class LengthCost(Cost):
    """Tokens of the response, its end of turn included; one per token."""

    def measure(
        self, rollouts: Sequence[Rollout], sequences: Sequences, policy: Policy, groups: Tensor | None = None
    ) -> Sampled:
        return Sampled.per_token(torch.ones_like(sequences.targets, dtype=torch.float32), groups=groups)


class KLCost(Cost):
    """log p - log p_start of every token; its mean over responses is the KL to the starting model, in nats."""

    def measure(
        self, rollouts: Sequence[Rollout], sequences: Sequences, policy: Policy, groups: Tensor | None = None
    ) -> Sampled:
        return Sampled.reference_kl(policy.reference(sequences), groups=groups)


class FunctionCost(Cost):
    """A Python function in TRL's reward signature.

    Args:
        function: ``(prompts, completions, completion_ids, **columns) -> list of floats``; it is given those of
            these arguments that it names, or all if it takes ``**kwargs``.
        name: For error messages.
        options: What is done when it fails.
    """

    def __init__(self, function: CostFunction, name: str, options: CostOptions | None = None) -> None:
        self.function, self.name = function, name
        self.options = options or CostOptions()
        self._attempts = Attempts(name, self.options)

    def measure(
        self, rollouts: Sequence[Rollout], sequences: Sequences, policy: Policy, groups: Tensor | None = None
    ) -> Sampled:
        return Sampled(torch.tensor(self(rollouts), dtype=torch.float32, device=policy.device), groups=groups)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Call the function and check what it returns.

        Returns:
            A number per response; where it failed or gave none, and ``on_error`` is "skip", NaN: the objective leaves
            the constraint's window out, on all ranks alike.

        Raises:
            CostError: It failed, or gave a NaN, an infinity or None, and ``on_error`` is "stop".
            TypeError: Not a sequence of numbers.
            ValueError: Not one number per response.
        """
        arguments: dict[str, Any] = {
            name: [r.prompt.pair.columns.get(name) for r in rollouts]
            for name in {key for r in rollouts for key in r.prompt.pair.columns}
        }
        arguments |= {
            "prompts": [r.prompt.pair.prompt for r in rollouts],
            "completions": [r.text for r in rollouts],
            "completion_ids": [r.ids for r in rollouts],
        }
        given = accepted(self.function, arguments)
        answer = self._attempts(lambda: (self.function(**given),))
        if answer is None:
            return [math.nan] * len(rollouts)
        floats = checked_costs(answer[0], self.name, len(rollouts))
        bad = [i for i, value in enumerate(floats) if not math.isfinite(value)]
        if bad and self.options.on_error == "stop":
            raise CostError(
                f"cost {self.name} gave {answer[0][bad[0]]} for response {bad[0]} of {len(floats)}, "
                f"{brief(rollouts[bad[0]].text)}; allowed: a finite number, or costs.on_error=skip, which leaves that "
                "constraint's window out"
            )
        return floats


def sentiment_cost() -> CostFunction:
    """VADER's compound score, from -1 (negative) to 1 (positive)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise missing_extra("cost 'sentiment'", "vaderSentiment") from None
    analyzer = SentimentIntensityAnalyzer()

    def sentiment(completions: list[str]) -> list[float]:
        return [analyzer.polarity_scores(text)["compound"] for text in completions]

    return sentiment


def profanity_cost() -> CostFunction:
    """Probability of profanity by alt-profanity-check's linear model, from 0 to 1."""
    try:
        from profanity_check import predict_prob
    except ModuleNotFoundError:
        raise missing_extra("cost 'profanity'", "alt-profanity-check") from None

    def profanity(completions: list[str]) -> list[float]:
        return [float(p) for p in predict_prob(completions)]

    return profanity


def reward_model_cost(name: str, *, device: torch.device | str = "cpu") -> CostFunction:
    """Score of a sequence classifier: its one logit, or with ``#LABEL`` that label's probability.

    Args:
        name: Hugging Face name or folder, optionally followed by ``#LABEL``.
        device: Where it runs.

    Raises:
        ConfigError: No such model; several labels and none named, or an unknown one.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source, _, label = name.partition("#")
    with loading(f"reward_model:{source}", "a sequence classifier's folder, or its name on the Hub"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(source).to(device).eval()
    labels = {str(text): int(index) for index, text in model.config.id2label.items()}
    if (label and label not in labels) or (not label and len(labels) > 1):
        raise ConfigError(
            f"reward_model:{name}: allowed: reward_model:{source}#LABEL with LABEL in {', '.join(labels)}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        if tokenizer.chat_template is None:
            inputs = tokenizer(prompts, completions, return_tensors="pt", padding=True, truncation=True)
        else:
            chats = [
                [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
                for p, c in zip(prompts, completions, strict=True)
            ]
            texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, add_special_tokens=False)
        with torch.no_grad():
            logits = model(**inputs.to(device)).logits.float()
        scores = logits.softmax(-1)[:, labels[label]] if label else logits[:, 0]
        result: list[float] = scores.tolist()
        return result

    return reward


def import_function(path: str) -> CostFunction:
    """The function at ``path/to/file.py:function`` or ``package.module:function``. Runs that module's code.

    Raises:
        ConfigError: No such file, module or function.
    """
    place, _, name = path.rpartition(":")
    if place.endswith(".py"):
        file = Path(place).resolve()
        if not file.is_file():
            raise ConfigError(f"cost {path!r}: {file} is not a file; allowed: path/to/file.py:function")
        spec = importlib.util.spec_from_file_location(f"barrierlm_user_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        if os.getcwd() not in sys.path:  # the command's own folder is there instead
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ConfigError(f"cost {path!r}: {error}; allowed: package.module:function") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise ConfigError(f"cost {path!r}: no function {name!r}; allowed: {known or 'a function of that module'}")
    result: CostFunction = function
    return result


def imported_costs(constraints: Mapping[str, ConstraintOptions]) -> list[str]:
    """The cost functions whose code `load_costs` would import and run."""
    costs = [c.cost for c in constraints.values() if c.cost]
    return [cost for cost in costs if ":" in cost and not cost.startswith("reward_model:")]


def load_costs(
    constraints: Mapping[str, ConstraintOptions],
    options: CostOptions | None = None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Cost]:
    """The cost of every constraint, by its name.

    Args:
        constraints: As in the options; costs are checked names or paths.
        options: What is done when a cost function fails.
        device: Where reward models run.

    Raises:
        ConfigError: A function or label that does not exist.
        ModuleNotFoundError: A package of the extra ``recipes`` is missing.
    """
    costs: dict[str, Cost] = {}
    for name, constraint in constraints.items():
        what = constraint.cost or name
        if what == "length":
            costs[name] = LengthCost()
        elif what == "kl":
            costs[name] = KLCost()
        elif what == "sentiment":
            costs[name] = FunctionCost(sentiment_cost(), what, options)
        elif what == "profanity":
            costs[name] = FunctionCost(profanity_cost(), what, options)
        elif what.startswith("reward_model:"):
            reward = reward_model_cost(what.removeprefix("reward_model:"), device=device)
            costs[name] = FunctionCost(reward, what, options)
        else:
            costs[name] = FunctionCost(import_function(what), what, options)
    return costs


def measure_rollouts(
    costs: Mapping[str, Cost], policy: Policy, rollouts: Sequence[Rollout], groups: Tensor | None = None
) -> tuple[dict[str, Sampled], Sequences]:
    """Every cost of the responses, and the responses laid out.

    Args:
        costs: By constraint name.
        policy: The model that the responses are from.
        rollouts: B responses.
        groups: The prompt that each answers [B]; None: each its own.
    """
    sequences = lay_out(
        [r.prompt.prompt_ids for r in rollouts], [r.ids for r in rollouts], packed=policy.packed, device=policy.device
    )
    return {name: cost.measure(rollouts, sequences, policy, groups) for name, cost in costs.items()}, sequences


def per_response(measurement: Sampled, sequences: Sequences, logps: Tensor | None = None) -> Tensor:
    """Costs [B] of whole responses, fp64; ``logps`` [N] of their tokens where a KL ``needs_logps``."""
    costs = measurement.values
    if costs is None:
        assert logps is not None
        assert measurement.ref_logps is not None
        costs = logps - measurement.ref_logps
    costs = costs.double()
    if not measurement.credited_per_token:
        return costs
    lengths = sequences.cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=costs.device), lengths)
    return costs.new_zeros(len(lengths)).index_add(0, owner, costs)
