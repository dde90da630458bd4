"""Statistics and gradients of rows of logits: one interface, a torch and a Triton implementation."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from .base import Rows, accumulation_dtype, spans
from .reference import ReferenceRows
from .sliced import SlicedRows

__all__ = ["Rows", "accumulation_dtype", "head_rows", "rows_class", "spans"]


def rows_class(impl: str) -> type[Rows]:
    """The implementation for "reference" or "triton"; the latter is imported only now."""
    if impl == "reference":
        return ReferenceRows
    from .triton import TritonRows

    return TritonRows


def head_rows(
    impl: str, rows: int, vocab: int, like: Tensor, group: dist.ProcessGroup | None, first: int, **options: Any
) -> Rows:
    """Rows of logits of a head; with a group, of its slice that begins with token number `first`."""
    own = rows_class(impl)(rows, vocab, like, **options)
    return own if group is None else SlicedRows(own, group, first)
