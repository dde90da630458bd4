"""What `constraint_weights` returns."""

from typing import NamedTuple

import torch


class ConstraintWeights(NamedTuple):
    """Weights of log-probabilities, and the sums that a window's estimates are made of.

    Attributes:
        weights: [B], or [N] for per-token costs; cost units of the penalty per nat; fp32, or fp64 for fp64 costs.
        statistics: [K, 8], or [K, 8 + 2 P] with position baselines, fp64. Additive over micro-batches and ranks.
            Columns, with d = ratio (cost - center), and T and n the sum of d and the size of a group: number of
            samples, sum of d, sum of d^2, number of groups, sum of T^2, sum of T n, sum of n^2, and the number of
            inputs that were not finite; then P sums of reward-to-go by position bucket and P numbers of tokens.
        coefficients: [K], fp64: derivative of the penalty with respect to each constraint's mean.

    Example:
        >>> import torch
        >>> from barrierlm_kernels.constraint_weights import constraint_weights
        >>> out = constraint_weights(torch.tensor([[1.0, 3.0]]), torch.tensor([0.0]), coefficients=torch.tensor([1.0]))
        >>> out.statistics[0, :3]  # two samples, their sum, their sum of squares
        tensor([ 2.,  4., 10.], dtype=torch.float64)
    """

    weights: torch.Tensor
    statistics: torch.Tensor
    coefficients: torch.Tensor
