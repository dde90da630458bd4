"""The experiments of the L3Ms paper with a real model: length windows, and helpful and harmless responses."""
