"""Training steps as one would write them first: padded batches, all logits, plain `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from ..candidate import Outputs
from ..steps import StepProblem

_NOT_COUNTED = -100
#: Context managers by the name of a step's part.
Timed = Callable[[str], Any]


def _padded(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad: int, device: Any) -> tuple[Tensor, ...]:
    """Ids, attention mask and labels of a right-padded batch."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _NOT_COUNTED)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids.to(device), mask.to(device), labels.to(device)


def generate(p: StepProblem, prompts: list[list[int]]) -> Tensor:
    """Responses by Hugging Face's `generate`, prompts padded on the left, until all rows have ended."""
    lm, tokenizer, pad = p.policy.lm, p.workspace.tokenizer, p.workspace.tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=p.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=p.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=p.workspace.options.rollout.max_new_tokens,
        eos_token_id=p.workspace.end_of_turn,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    lm.eval()
    with torch.no_grad(), p.policy.autocast():
        out = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    lm.train()
    return out[:, width:]  # type: ignore[no-any-return]


def _logits(p: StepProblem, timed: Timed, ids: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """All logits [B, L, V] in fp32, and the hidden states that they are made of."""
    entered, hidden = ExitStack(), []

    def before(module: Any, args: tuple[Tensor]) -> None:
        hidden.append(args[0])
        entered.enter_context(timed("head"))

    head: Any = p.policy.head
    with ExitStack() as hooks:
        hooks.callback(head.register_forward_pre_hook(before).remove)
        hooks.callback(head.register_forward_hook(lambda *_: entered.close()).remove)
        with timed("forward"), p.policy.autocast():
            logits = p.policy.lm(input_ids=ids, use_cache=False, **inputs).logits
    with timed("head"):
        return logits.float(), hidden[0]


def _backward(loss: Tensor, hidden: Tensor, timed: Timed) -> None:
    """The head's part ends where the gradient of its input is there."""
    entered = ExitStack()
    hidden.register_hook(lambda gradient: entered.close())
    with timed("backward"):
        entered.enter_context(timed("head"))
        loss.backward()


def straightforward(p: StepProblem, clock: Any = None) -> Outputs:
    """Separate padded batches for pairs and responses, each with its own forward and backward pass."""
    timed: Timed = clock or (lambda name: nullcontext())
    pad, prompts = p.workspace.tokenizer.pad_token_id, [r.prompt.prompt_ids for r in p.responses]
    if p.generates:
        with timed("generation"):
            drawn = generate(p, prompts).tolist()
            p.workspace.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    ids, mask, labels = _padded(
        [t.prompt_ids for t in p.batch.pairs], [t.response_ids for t in p.batch.pairs], pad, p.device
    )
    logits, hidden = _logits(p, timed, ids, attention_mask=mask)
    with timed("head"):
        task = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_NOT_COUNTED, reduction="sum"
        )
        task = task / p.pair_tokens
    del logits
    _backward(task, hidden, timed)
    ids, mask, labels = _padded(prompts, [r.ids for r in p.responses], pad, p.device)
    logits, hidden = _logits(p, timed, ids, attention_mask=mask)
    with timed("head"):
        counted = labels[:, 1:] != _NOT_COUNTED
        logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][counted]
    del logits
    with timed("costs"):
        lengths = p.lengths(logps)
    with timed("objective"):
        constraints = p.objective.combine(None, {"length": lengths}).loss
    _backward(constraints, hidden, timed)
    _update(p, timed)
    with timed("objective"):
        p.objective.step()
    return p.result(float(task.detach()) + float(constraints.detach()))


def packed_sft(p: StepProblem, clock: Any = None) -> None:
    """Plain fine-tuning on the same packed rows: all logits, mean cross entropy of all response tokens."""
    from barrierlm.recipes.model import lay_out

    timed: Timed = clock or (lambda name: nullcontext())
    sequences = lay_out(
        [t.prompt_ids for t in p.batch.pairs] + [r.prompt.prompt_ids for r in p.responses],
        [t.response_ids for t in p.batch.pairs] + [r.ids for r in p.responses],
        packed=p.policy.packed,
        device=p.device,
    )
    labels = torch.full_like(sequences.input_ids, _NOT_COUNTED).flatten()
    labels[sequences.rows] = sequences.targets
    logits, hidden = _logits(p, timed, sequences.input_ids, position_ids=sequences.position_ids)
    with timed("head"):
        loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=_NOT_COUNTED)
    del logits
    _backward(loss, hidden, timed)
    _update(p, timed)
    float(loss.detach())


def _update(p: StepProblem, timed: Timed) -> None:
    with timed("optimizer"):
        torch.nn.utils.clip_grad_norm_(p.policy.trained(), p.workspace.options.optim.max_grad_norm)
        p.optimizer.step()
        p.optimizer.zero_grad()
