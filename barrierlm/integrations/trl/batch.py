"""What a measurement of the SFT and DPO trainers sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..logits import IGNORED, kl
from ..models import reference_logits, unwrapped


@dataclass(frozen=True)
class Batch:
    """A micro-batch, as a measurement of `BarrierSFTTrainer` sees it.

    Args:
        model: What the trainer calls, wrapped where it is (DDP); call it to measure something on other inputs.
        inputs: The model's inputs, on its device: ``input_ids`` [n, T], ``labels`` [n, T], ...
        outputs: Of the trainer's own pass, with gradient: ``log_probs`` (of the labels, in nats), ``entropy`` (in nats)
            and ``label_mask``, all [n, T - 1]; 0 where the label is -100.
        columns: The dataset columns that were asked for, by name: a tensor [n] of numbers, or a list.

    Raises nothing.

    Example:
        >>> def entropy(batch):  # a value [n] per sequence: the mean entropy of its tokens
        ...     return batch.outputs.entropy.sum(1) / batch.outputs.label_mask.sum(1)
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    outputs: Any
    columns: Mapping[str, Any]

    def reference_kl(self, reference: nn.Module | None = None) -> Tensor:
        r"""The KL to a reference over the whole vocabulary, its mean over each sequence's tokens that have a label.

        .. math:: \frac{1}{T_i} \sum_t \sum_v p_{itv} (\log p_{itv} - \log \text{ref}_{itv})

        It takes another pass of the model and one of the reference, with all logits [rows, T, V].

        Args:
            reference: Anything that is called as the model is; None: the model without its PEFT adapter.

        Returns:
            A value [rows] per row of ``input_ids``, in nats, with gradient.

        Raises:
            ValueError: No reference, and the model has no adapter.
        """
        inputs = {k: v for k, v in self.inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
        if reference is None and not hasattr(unwrapped(self.model), "disable_adapter"):
            raise ValueError("reference=None and a model without an adapter; allowed: a model, or None with PEFT")
        with torch.no_grad():
            ref_logits = reference_logits(self.model, inputs) if reference is None else reference(**inputs).logits
        counts = pad(self.outputs.label_mask.bool(), (1, 0))
        return kl(self.model(**inputs).logits, ref_logits, torch.where(counts, 0, IGNORED))


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """A micro-batch of n pairs, as a measurement of `BarrierDPOTrainer` sees it.

    Args:
        model: See `Batch`.
        inputs: See `Batch`; the n chosen, then the n rejected sequences.
        outputs: See `Batch`; 2 n rows.
        columns: See `Batch`.
        chosen_logps: Log-probabilities [n] of the chosen responses, in nats, with gradient.
        rejected_logps: Of the rejected ones.
        ref_chosen_logps: Of the chosen ones under the reference, without gradient.
        ref_rejected_logps: Of the rejected ones.

    Raises nothing.

    Example:
        >>> def chosen(batch):
        ...     return batch.chosen_logps - batch.ref_chosen_logps
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
