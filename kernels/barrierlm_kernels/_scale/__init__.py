"""A saved gradient times the upstream one, in place: the last thing between a gradient and its parameter."""

from torch import Tensor

from . import reference

__all__ = ["scale_"]


def scale_(gradient: Tensor, factor: Tensor, impl: str) -> Tensor:
    """gradient *= factor (0-d, fp32 or fp64), rounded once, with no copy of the gradient in a wide dtype."""
    if impl == "reference":
        return reference.scale_(gradient, factor)
    from . import triton

    return triton.scale_(gradient, factor)
