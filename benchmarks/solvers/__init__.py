"""Constrained optimisation under sampling noise: this library and others on problems with known answers."""
