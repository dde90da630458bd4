"""What the operations return."""

from typing import NamedTuple

import torch


class SequenceLogProbs(NamedTuple):
    """Log-probabilities of packed sequences.

    Attributes:
        logps: [B], nats; per-sequence sum (or mean) of the token log-probabilities; differentiable.
        counts: [B], int64; tokens of each sequence whose target is not ignored.
        token_logps: [N], nats, 0 at ignored rows, differentiable; None unless asked for.
        entropy: [B], nats; entropies of the predictive distributions, reduced as `logps` is, differentiable;
            None unless asked for.

    Example:
        >>> import torch
        >>> from barrierlm_kernels import sequence_logprob
        >>> out = sequence_logprob(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]))
        >>> out.counts
        tensor([1, 2])
    """

    logps: torch.Tensor
    counts: torch.Tensor
    token_logps: torch.Tensor | None
    entropy: torch.Tensor | None


class WeightedLogProb(NamedTuple):
    """A weighted sum of token log-probabilities, and the log-probabilities it was made of.

    Attributes:
        total: 0-d; sum_i w_i log p_i, differentiable.
        logps: [B], nats, detached; per-sequence sums over the rows that are neither ignored nor weightless.
        counts: [B], int64; tokens of each sequence whose target is not ignored, whatever their weight.
        token_logps: [N], nats, detached, 0 at ignored and weightless rows; None unless asked for.

    Example:
        >>> import torch
        >>> from barrierlm_kernels import linear_weighted_logprob
        >>> hidden, head = torch.zeros(3, 2), torch.zeros(4, 2)
        >>> targets, cu = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
        >>> linear_weighted_logprob(hidden, head, targets, cu, torch.tensor([0.0, 1.0])).counts
        tensor([1, 2])
    """

    total: torch.Tensor
    logps: torch.Tensor
    counts: torch.Tensor
    token_logps: torch.Tensor | None
