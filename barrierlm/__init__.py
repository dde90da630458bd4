"""Constrained fine-tuning of language models."""
