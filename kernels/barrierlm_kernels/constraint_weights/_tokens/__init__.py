"""The Triton kernel for costs per token."""
