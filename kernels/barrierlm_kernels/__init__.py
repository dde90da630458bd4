"""Per-sequence log-probabilities of packed sequences, and their gradients, in little memory."""

from ._dispatch import Choice, which_impl
from .constraint_weights import ConstraintWeights, constraint_weights
from .linear_sequence_logprob import linear_sequence_logprob
from .linear_weighted_logprob import linear_weighted_logprob
from .padded import PackedRows, padded_to_packed
from .results import SequenceLogProbs, WeightedLogProb
from .sequence_logprob import sequence_logprob
from .vocab_parallel import VocabParallel

__all__ = [
    "Choice",
    "ConstraintWeights",
    "PackedRows",
    "SequenceLogProbs",
    "VocabParallel",
    "WeightedLogProb",
    "constraint_weights",
    "linear_sequence_logprob",
    "linear_weighted_logprob",
    "padded_to_packed",
    "sequence_logprob",
    "which_impl",
]
