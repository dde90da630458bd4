"""Triton functions that the kernels for costs per response and per token share."""
