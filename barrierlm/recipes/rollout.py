"""Responses sampled from the model's own distribution, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .data import Tokens
from .model import Policy

#: `generate` runs for so many tokens at a time; rows that have ended are dropped in between.
_SEGMENT = 8


@dataclass(frozen=True)
class Rollout:
    """One sampled response. ``ids`` end with the end of turn unless ``censored`` (cut at the token cap)."""

    prompt: Tokens
    ids: list[int]
    text: str
    censored: bool


def sampling_config(tokenizer: PreTrainedTokenizerBase, end_of_turn: int, max_new_tokens: int) -> GenerationConfig:
    """Temperature 1 from the full distribution, whatever the model's own generation defaults are."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        return_dict_in_generate=True,
        use_cache=True,
    )


def sample_responses(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    end_of_turn: int,
    max_new_tokens: int,
) -> list[Rollout]:
    """One response per entry of ``prompts`` (repeat an entry for several).

    Args:
        policy: The model.
        tokenizer: For padding and decoding.
        prompts: Prompts as token ids.
        end_of_turn: Id that ends a response; it is part of it.
        max_new_tokens: Cap; a response that reaches it without ending is censored.

    Returns:
        The responses, in the order of ``prompts``.
    """
    if not prompts:
        return []
    width = max(len(p.prompt_ids) for p in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p.prompt_ids)) + p.prompt_ids for p in prompts], device=policy.device)
    mask = torch.tensor(
        [[0] * (width - len(p.prompt_ids)) + [1] * len(p.prompt_ids) for p in prompts], device=policy.device
    )
    responses: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    cache, done = None, 0
    with policy.sampling() as lm:
        while active and done < max_new_tokens:
            config = sampling_config(tokenizer, end_of_turn, min(_SEGMENT, max_new_tokens - done))
            output = lm.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config)
            new = output.sequences[:, ids.shape[1] :]
            done += new.shape[1]
            still = []
            for row, tokens in enumerate(new.tolist()):
                if end_of_turn in tokens:
                    responses[active[row]] += tokens[: tokens.index(end_of_turn) + 1]
                else:
                    responses[active[row]] += tokens
                    still.append(row)
            active = [active[row] for row in still]
            keep = torch.tensor(still, dtype=torch.long, device=ids.device)
            ids = output.sequences[keep]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], new.shape[1])], 1)[keep]
            cache = output.past_key_values
            if len(still) < new.shape[0] and still:
                cache.batch_select_indices(keep)
    rollouts = []
    for prompt, tokens in zip(prompts, responses, strict=True):
        ended = tokens[-1] == end_of_turn
        text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        rollouts.append(Rollout(prompt, tokens, text, censored=not ended))
    return rollouts
