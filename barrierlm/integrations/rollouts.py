"""Responses that the model samples inside the training loop, as measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from barrierlm import Sampled

from .costs import CostFunction, call_cost
from .logits import IGNORED
from .models import in_evaluation

try:
    from transformers import GenerationConfig
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"barrierlm.integrations.rollouts needs the package {error.name or 'transformers'!r}, which is not installed; "
        "get it with: pip install 'barrierlm[transformers]'"
    ) from error

#: What of a batch is not handed to cost functions as a dataset column.
_MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "position_ids")


class _Responses(NamedTuple):
    """``ids`` [R, P+L] (left-padded prompts, responses), ``prompt_length`` P, ``mask`` [R, P+L] of what a model may
    see, ``keep`` [R, L] of response tokens through the end, ``censored`` [R]."""

    ids: Tensor
    prompt_length: int
    mask: Tensor
    keep: Tensor
    censored: Tensor


class Rollouts:
    r"""Samples responses to the prompts of a batch, and measures costs of them: a ``measure`` for a trainer.

    Temperature 1, full vocabulary, without dropout, whatever the model's own generation defaults are: a constraint is
    about the model's own distribution, so what is sampled and what log p is computed of must be the same. The
    forward pass with gradient runs in evaluation mode, too (checkpointed activations, a training-mode feature, are
    not used in it).

    Args:
        tokenizer: Decodes responses and names the padding and end tokens.
        costs: By constraint name: ``"length"`` (tokens of the response, its end included), or a function
            ``(prompts, completions, completion_ids, **columns) -> list of floats``, TRL's reward signature. Columns are
            the entries of the batch beside the model's inputs, a list with one entry per response.
        max_new_tokens: Cap; at least twice an upper length bound. Responses that reach it are counted in `metrics`.
        responses_per_prompt: Responses to each prompt; two or more are each other's baseline.
        prompts: Called with the batch, returns prompts as lists of token ids. Default: what precedes the first label of
            each row, as in supervised fine-tuning with masked prompts.

    Raises:
        TypeError: A cost that is neither ``"length"`` nor callable.
        ValueError: No cost, a tokenizer without an end token, a number below 1.

    Example:
        >>> from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=384, **sizes))
        >>> rollouts = Rollouts(ByT5Tokenizer(), {"length": "length"}, max_new_tokens=4)
        >>> batch = {"input_ids": torch.tensor([[75, 76, 1]]), "labels": torch.tensor([[-100, -100, 1]])}
        >>> len(rollouts(model, batch)["length"])
        1

    Source: barrierlm.
    """

    def __init__(
        self,
        tokenizer: Any,
        costs: Mapping[str, CostFunction | str],
        *,
        max_new_tokens: int,
        responses_per_prompt: int = 1,
        prompts: Callable[[Mapping[str, Any]], list[list[int]]] | None = None,
    ) -> None:
        if not costs:
            raise ValueError("costs is empty; allowed: at least one, by constraint name")
        for name, cost in costs.items():
            if cost != "length" and not callable(cost):
                raise TypeError(f"costs[{name!r}] is {cost!r}; allowed: 'length' or a function")
        for argument, number in (("max_new_tokens", max_new_tokens), ("responses_per_prompt", responses_per_prompt)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{argument}={number!r}; allowed: an integer >= 1")
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has no eos_token; allowed: one that ends a response")
        self.tokenizer, self.costs = tokenizer, dict(costs)
        self.max_new_tokens, self.responses_per_prompt = max_new_tokens, responses_per_prompt
        self.prompts = prompt_tokens if prompts is None else prompts
        self._seen = [0, 0, 0]  # responses, tokens, censored ones

    def __call__(self, model: Any, inputs: Mapping[str, Any], outputs: Any = None) -> dict[str, Sampled]:
        """Sample, run the model on what it sampled, and call the costs.

        Args:
            model: A transformers causal language model, wrapped (DDP, PEFT) or not.
            inputs: The batch: prompts, and columns for the costs.
            outputs: Not used; trainers hand it to every ``measure``.

        Returns:
            A measurement per cost; without gradient while gradients are off.

        Raises:
            TypeError, ValueError: What a cost returned, or a batch without prompts.
        """
        prompts = [p for p in self.prompts(inputs) for _ in range(self.responses_per_prompt)]
        with in_evaluation(model) as inner:
            responses = self._sample(inner, prompts)
            logps = _token_logps(model, responses)
        lengths = responses.keep.sum(1)
        cu_seqlens = functional.pad(lengths.cumsum(0), (1, 0))
        groups = None
        if self.responses_per_prompt > 1:
            groups = torch.arange(len(prompts), device=logps.device) // self.responses_per_prompt
        completion_ids = [
            row[keep].tolist()
            for row, keep in zip(responses.ids[:, responses.prompt_length :], responses.keep, strict=True)
        ]
        arguments = self._columns(inputs) | {
            "prompts": self.tokenizer.batch_decode(prompts, skip_special_tokens=True),
            "completions": self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
            "completion_ids": completion_ids,
        }
        measurements = {}
        for name, cost in self.costs.items():
            if callable(cost):
                values = torch.tensor(call_cost(cost, name, arguments, len(prompts)), device=logps.device)
                measurements[name] = Sampled(values, (logps * responses.keep).sum(1), groups)
            else:
                ones = logps.new_ones(int(cu_seqlens[-1]))
                measurements[name] = Sampled.per_token(ones, logps[responses.keep], cu_seqlens, groups=groups)
        counts = (len(prompts), int(cu_seqlens[-1]), int(responses.censored.sum()))
        self._seen = [a + b for a, b in zip(self._seen, counts, strict=True)]
        return measurements

    def metrics(self) -> dict[str, float]:
        """Mean tokens, and the share of responses cut at the cap, on this process since the last call of this."""
        count, tokens, censored = self._seen
        self._seen = [0, 0, 0]
        return {"rollout/mean_tokens": tokens / count, "rollout/censored": censored / count} if count else {}

    def _sample(self, model: Any, prompts: list[list[int]]) -> _Responses:
        if not prompts or not all(prompts):
            raise ValueError("prompts: none, or an empty one; allowed: at least one prompt of at least one token")
        ends = torch.tensor(_ends(model, self.tokenizer), device=model.device)
        pad = self.tokenizer.pad_token_id
        pad = int(ends[0]) if pad is None else pad
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=ends.tolist(),
            pad_token_id=pad,
            bos_token_id=self.tokenizer.bos_token_id,
            use_cache=True,
        )
        own = model.generation_config
        model.generation_config = config  # what a config leaves open, `generate` takes from the model's own
        try:
            with torch.no_grad():
                ids = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        finally:
            model.generation_config = own
        ended = torch.isin(ids[:, width:], ends)
        keep = ended.cumsum(1) - ended.long() == 0  # through the first end
        return _Responses(ids, width, torch.cat([mask, keep.long()], 1), keep, ~ended.any(1))

    def _columns(self, inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
        columns = {}
        for name, values in inputs.items():
            if name not in _MODEL_INPUTS and isinstance(values, Tensor | list | tuple):
                rows = values.tolist() if isinstance(values, Tensor) else values
                columns[name] = [value for value in rows for _ in range(self.responses_per_prompt)]
        return columns


def prompt_tokens(inputs: Mapping[str, Any]) -> list[list[int]]:
    """The tokens before the first label of each row, without padding.

    Args:
        inputs: ``input_ids`` and ``labels`` [B, T], perhaps ``attention_mask``.

    Returns:
        B lists of token ids.

    Raises:
        ValueError: No labels, or a row whose first token is one.

    Example:
        >>> prompt_tokens({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, -100, 7]])})
        [[5, 6]]
    """
    if inputs.get("labels") is None:
        raise ValueError("the batch has no labels to tell its prompts from; allowed: Rollouts(..., prompts=function)")
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    before = ((labels != IGNORED).cumsum(1) == 0) & (mask > 0)
    prompts: list[list[int]] = [row[chosen].tolist() for row, chosen in zip(ids, before, strict=True)]
    if not all(prompts):
        raise ValueError(
            "a row's first token has a label, so it has no prompt; allowed: labels of -100 on prompts, or "
            "Rollouts(..., prompts=function)"
        )
    return prompts


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a response: the model's own, which may be several, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([tokenizer.eos_token_id, *own]))


def _token_logps(model: Any, responses: _Responses) -> Tensor:
    """Log-probabilities [R, L] of the response tokens, fp32; those beyond the end do not count."""
    positions = (responses.mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=responses.ids, attention_mask=responses.mask, position_ids=positions, use_cache=False)
    logits = output.logits[:, responses.prompt_length - 1 : -1].float()
    targets = responses.ids[:, responses.prompt_length :]
    return -functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
