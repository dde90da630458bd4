"""Per-sequence log-probabilities, from logits."""

from .api import sequence_logprob

__all__ = ["sequence_logprob"]
