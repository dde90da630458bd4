"""The model inside what trainers wrap it in, and the reference that a model with adapters carries in itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unwrapped(model: Any) -> Any:
    """The model inside DDP and torch.compile; PEFT's stays, since its adapters belong to the policy.

    Args:
        model: A module.

    Returns:
        The module that has ``generate``, or ``disable_adapter``.

    Raises nothing.

    Example:
        >>> unwrapped(torch.nn.Linear(1, 1))
        Linear(in_features=1, out_features=1, bias=True)
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model


@contextmanager
def in_evaluation(model: Any) -> Iterator[Any]:
    """The unwrapped model in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    inner = unwrapped(model)
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    try:
        yield inner
    finally:
        # By `train`, which modules override to undo what their `eval` did; parents first, since it is for all below.
        for module, training in modes:
            if module.training != training:
                module.train(training)


def reference_logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    r"""Logits of the model that the adapters were put on: the reference of a `logits.kl` without a second model.

    .. math:: \operatorname{ref}(y_t \mid y_{<t}) = \operatorname{softmax}(\text{logits}_{t})

    A forward pass with PEFT's adapters disabled, in evaluation mode and without gradient; the model is then as before.

    Args:
        model: A `peft.PeftModel`, within DDP and torch.compile or not.
        inputs: A batch: ``input_ids`` [B, T], and ``attention_mask`` and ``position_ids`` [B, T] where it has them.

    Returns:
        [B, T, V], in the model's dtype, without gradient.

    Raises:
        ValueError: A model without adapters.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=11, **size))
        >>> model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        >>> reference_logits(model, {"input_ids": torch.tensor([[1, 2, 3]])}).shape
        torch.Size([1, 3, 11])

    Source: PEFT, ``PeftModel.disable_adapter``.
    """
    if not hasattr(unwrapped(model), "disable_adapter"):
        raise ValueError(
            f"model is a {type(unwrapped(model)).__name__}; allowed: a PeftModel, whose adapter can be off"
        )
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    before = [(p, p.requires_grad) for p in unwrapped(model).parameters()]
    try:
        with in_evaluation(model) as inner, torch.no_grad(), inner.disable_adapter():
            logits: Tensor = inner(**given).logits
    finally:
        for p, trained in before:  # PEFT makes all of the adapter trainable that it switches on, and freezes others
            p.requires_grad_(trained)
    return logits
