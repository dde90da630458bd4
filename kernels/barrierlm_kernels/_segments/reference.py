"""Sums within sequences in torch. The specification."""

import torch
from torch import Tensor


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] -> [B], added up in fp64 and rounded once to the dtype of `values`."""
    # One sequence at a time: a NaN stays in its own sequence (a difference of cumulative sums would spread it to
    # all later ones), and there are no float atomics (index_add has them).
    sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, axis=0, unsafe=True)
    return sums.to(values.dtype)
