"""Statistics and gradients of rows of logits: one interface, a torch and a Triton implementation."""

from .base import Rows, accumulation_dtype, spans
from .reference import ReferenceRows

__all__ = ["Rows", "accumulation_dtype", "rows_class", "spans"]


def rows_class(impl: str) -> type[Rows]:
    """The implementation for "reference" or "triton"; the latter is imported only now."""
    if impl == "reference":
        return ReferenceRows
    from .triton import TritonRows

    return TritonRows
