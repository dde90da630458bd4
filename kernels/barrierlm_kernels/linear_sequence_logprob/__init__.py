"""Per-sequence log-probabilities, from hidden states and the LM head."""

from .api import linear_sequence_logprob

__all__ = ["linear_sequence_logprob"]
