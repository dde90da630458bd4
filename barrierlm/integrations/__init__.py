"""Constraints at home in a trainer: one module per framework, imported by name.

`transformers` and `lightning` need those packages; `logits`, `rollouts` and `costs` hold what their users share.
"""
