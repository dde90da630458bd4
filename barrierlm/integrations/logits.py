"""Measurements of a causal language model's logits: one differentiable value per row, in nats.

Position t of ``logits`` predicts label t + 1, as in transformers; labels of -100 do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Label of a token that does not count.
IGNORED = -100


def logps(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Log-probabilities of whole responses: the ``logps`` of a `barrierlm.Sampled`.

    .. math:: \log p(y_b) = \sum_{t:\, \text{label}} \log p(y_{bt} \mid y_{b,<t})

    Args:
        logits: [B, T, V], floating.
        labels: [B, T], integer; -100 where a token does not count.

    Returns:
        [B], fp32, in nats, with gradient.

    Raises:
        ValueError: Shapes that do not agree.

    Example:
        >>> logps(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]]))  # 2 log 1/4
        tensor([-2.7726])
    """
    logits, targets, _ = _aligned(logits, labels)
    per_token = functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return -per_token.sum(1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood per token, averaged within each row: a second loss on chosen rows.

    Args:
        logits: [B, T, V], floating.
        labels: [B, T], integer; -100 where a token does not count. A row without labels gives 0.

    Returns:
        [B], fp32, in nats, with gradient.

    Raises:
        ValueError: Shapes that do not agree.

    Example:
        >>> nll(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]]))  # log 4
        tensor([1.3863])
    """
    return -logps(logits, labels) / _aligned(logits, labels)[2].sum(1).clamp(min=1)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Entropy of the next token, averaged over each row's labelled positions.

    .. math:: H = -\sum_v p_v \log p_v

    Args:
        logits: [B, T, V], floating.
        labels: [B, T], integer; says which positions count. A row without labels gives 0.

    Returns:
        [B], fp32, in nats, with gradient.

    Raises:
        ValueError: Shapes that do not agree.

    Example:
        >>> entropy(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]]))  # log 4
        tensor([1.3863])
    """
    logits, _, counts = _aligned(logits, labels)
    logits = logits.float()
    # A finite log p where p is 0; its mask is all that this keeps for the backward pass.
    log_p = logits.masked_fill(logits == -torch.inf, torch.finfo(torch.float32).min).log_softmax(-1)
    return _row_mean(-(log_p.exp() * log_p).sum(-1), counts)


def kl(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    r"""KL to a reference over the full vocabulary, averaged over each row's labelled positions.

    .. math:: \operatorname{KL}(p \,\|\, \text{ref}) = \sum_v p_v (\log p_v - \log \text{ref}_v)

    Pathwise and exact at every position, unlike a KL from sampled tokens (`barrierlm.Sampled.reference_kl`); but at the
    positions of these rows, not of the policy's own responses.

    Args:
        logits: [B, T, V], floating.
        ref_logits: Of the reference [B, T, V], without gradient.
        labels: [B, T], integer; says which positions count. A row without labels gives 0.

    Returns:
        [B], fp32, in nats, with gradient.

    Raises:
        ValueError: Shapes that do not agree, ``ref_logits`` with gradient.

    Example:
        >>> kl(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2), torch.tensor([[0, 1]]))
        tensor([0.1109])
    """
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits has shape {tuple(ref_logits.shape)}; allowed: that of logits, {tuple(logits.shape)}"
        )
    if ref_logits.requires_grad:
        raise ValueError("ref_logits requires grad; allowed: logits computed under torch.no_grad()")
    ref_logits, _, counts = _aligned(ref_logits, labels)
    log_p, log_ref = logits[:, :-1].float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    ratio = (log_p - log_ref).masked_fill(log_p == -torch.inf, 0.0)  # where p is 0, whatever the reference
    return _row_mean((log_p.exp() * ratio).sum(-1), counts)


def _aligned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, T-1, V], the labels that they predict [B, T-1], and which of these count [B, T-1]."""
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; allowed: [B, T, V] and [B, T]"
        )
    targets = labels[:, 1:]
    return logits[:, :-1], targets, targets != IGNORED


def _row_mean(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, values, 0).sum(1) / counts.sum(1).clamp(min=1)
