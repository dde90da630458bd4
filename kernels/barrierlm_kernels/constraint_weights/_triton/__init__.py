"""The Triton kernels of `constraint_weights`: costs per response, costs per token, and what both share."""
