"""Per-sequence log-probabilities."""
