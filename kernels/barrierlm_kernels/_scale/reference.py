"""The product of a gradient and a factor, in plain PyTorch."""

from torch import Tensor

from .._head import piece_bytes


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """In pieces, each of which has a wide copy for a moment."""
    if factor.device.type == "cpu" and factor == 1:  # elsewhere looking would stall the device
        return gradient
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    for part in gradient.view(-1).split(piece_bytes(gradient.device) // gradient.dtype.itemsize):
        part.copy_(part * factor.reshape(1))  # 0-d, it would be rounded to the gradient's dtype first
    return gradient
