"""From costs to the weights of log-probabilities, and a window's statistics."""

from .api import constraint_weights
from .results import ConstraintWeights

__all__ = ["ConstraintWeights", "constraint_weights"]
