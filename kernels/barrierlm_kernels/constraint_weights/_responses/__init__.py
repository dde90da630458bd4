"""The Triton kernel for one cost per response."""
