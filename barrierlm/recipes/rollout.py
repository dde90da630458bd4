"""Responses sampled from the model's own distribution, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import Tokens
from .model import Policy

#: Tokens between looks at which rows have ended, to drop these: each look waits for the device.
_SEGMENT = 4
#: Probabilities are added up in blocks of so many, and then within one.
_BLOCK = 256


@dataclass(frozen=True)
class Rollout:
    """One sampled response. ``ids`` end with the end of turn unless ``censored`` (cut at the token cap)."""

    prompt: Tokens
    ids: list[int]
    text: str
    censored: bool


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
    responses: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    with policy.sampling() as lm:
        logits, cache, mask = _read_prompts(lm, [p.prompt_ids for p in prompts], tokenizer.pad_token_id, policy.device)
        drawn: list[Tensor] = []
        for done in range(1, max_new_tokens + 1):
            tokens = draw(logits)
            drawn.append(tokens)
            if done % _SEGMENT == 0 or done == max_new_tokens:
                still = []
                for row, new in enumerate(torch.stack(drawn, 1).tolist()):
                    ends = end_of_turn in new
                    responses[active[row]] += new[: new.index(end_of_turn) + 1] if ends else new
                    if not ends:
                        still.append(row)
                drawn.clear()
                if not still or done == max_new_tokens:
                    break
                if len(still) < len(active):
                    keep = torch.tensor(still, device=policy.device)
                    tokens, mask = tokens[keep], mask[keep]
                    cache.batch_select_indices(keep)
                    active = [active[row] for row in still]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            places = mask.sum(1, keepdim=True) - 1
            output = lm(input_ids=tokens[:, None], attention_mask=mask, position_ids=places, past_key_values=cache)
            logits, cache = output.logits[:, -1], output.past_key_values
    rollouts = []
    for prompt, ids in zip(prompts, responses, strict=True):
        ended = ids[-1] == end_of_turn
        text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        assert isinstance(text, str)
        rollouts.append(Rollout(prompt, ids, text, censored=not ended))
    return rollouts


def _read_prompts(
    lm: Any, prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Any, Tensor]:
    """Next-token logits [B, V], cache and attention mask [B, L]; a prompt that is there several times is read once."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    width = max(map(len, distinct))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in distinct], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    output = lm(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
    logits, cache = output.logits[:, -1], output.past_key_values
    if len(distinct) < len(prompts):
        index = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([index[tuple(p)] for p in prompts], device=device)
        logits, mask = logits[rows], mask[rows]
        cache.batch_select_indices(rows)
    return logits, cache, mask


def draw(logits: Tensor) -> Tensor:
    """One token [B] for each row of logits [B, V], from their softmax.

    By the inverse of the distribution function: one random number a row, where `torch.multinomial` draws one for every
    entry of the vocabulary. Sums are fp64 (of blocks of the vocabulary fp32), over blocks and then within one.
    """
    p = logits.float().softmax(-1)
    blocks = F.pad(p, (0, -p.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    torch._assert_async(ends[:, -1].isfinite().all(), "logits are NaN or infinite")
    point = torch.rand(len(p), 1, dtype=torch.float64, device=p.device) * ends[:, -1:]
    block = _first_above(ends, point)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].double().cumsum(-1)
    before = ends.take_along_dim(block, 1) - sums.take_along_dim(block, 1)
    return (_BLOCK * block + _first_above(inside, point - before))[:, 0]


def _first_above(ends: Tensor, point: Tensor) -> Tensor:
    """Index [B, 1] of the first of the ascending ``ends`` [B, N] above ``point``: one of probability 0 never is."""
    below = torch.minimum(point, torch.nextafter(ends[:, -1:], torch.zeros_like(point)))
    return torch.searchsorted(ends, below, right=True)
