"""Weighted sums of token log-probabilities, from hidden states and the LM head."""

from .api import linear_weighted_logprob

__all__ = ["linear_weighted_logprob"]
