"""From padded batches to the packed form that the operations take."""

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """A padded batch seen as packed rows.

    Attributes:
        rows: [B*T, ...]; the hidden states or logits.
        targets: [B*T], `ignore_index` where the mask is 0.
        cu_seqlens: [B+1], int64; 0, T, 2T, ..., B*T.

    Example:
        >>> import torch
        >>> from barrierlm_kernels import padded_to_packed
        >>> ids, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [1, 0]])
        >>> padded_to_packed(torch.zeros(2, 2, 4), ids, mask).targets
        tensor([   1,    2,    3, -100])
    """

    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor


def padded_to_packed(x: Tensor, targets: Tensor, mask: Tensor, *, ignore_index: int = -100) -> PackedRows:
    """View a padded batch as packed rows, with the padding ignored instead of removed.

        rows[b T + t] = x[b, t]      targets[b T + t] = targets[b, t] if mask[b, t] else ignore_index

    No shape depends on the mask, so nothing waits for the device. The ignored rows still take part in the
    matrix products; `linear_weighted_logprob(compact=True)` drops them there.

    Nothing is shifted: x[b, t] must predict targets[b, t]. From a causal model that is
    `padded_to_packed(hidden[:, :-1], ids[:, 1:], completion_mask[:, 1:])`. Slicing all but the last position
    makes a copy of `x`; to avoid it, shift the targets and the mask instead and mask the last position.

    Args:
        x: [B, T, H] hidden states or [B, T, V] logits (or any [B, T, ...]).
        targets: [B, T], int32 or int64.
        mask: [B, T], bool, integer or float; the tokens to count are those where it is not 0.
        ignore_index: the target given to the others.

    Returns:
        `PackedRows(rows, targets, cu_seqlens)`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: the shapes do not fit, or the devices differ.

    Example:
        >>> import torch
        >>> from barrierlm_kernels import sequence_logprob
        >>> logits, ids = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 0]])
        >>> completion_mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
        >>> sequence_logprob(*padded_to_packed(logits, ids, completion_mask)).counts
        tensor([2, 1])
    """
    for name, value in (("x", x), ("targets", targets), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, T, ...], got {list(x.shape)}")
    batch, length = x.shape[:2]
    for name, value in (("targets", targets), ("mask", mask)):
        if value.shape != (batch, length):
            raise ValueError(f"{name} must have shape [B, T] = [{batch}, {length}], got {list(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {value.device}")
    return PackedRows(
        x.flatten(0, 1),
        torch.where(mask != 0, targets, ignore_index).flatten(),
        torch.arange(batch + 1, device=x.device) * length,
    )
