"""Packed sequences: some to learn from, some that the policy sampled itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import Sampled


@dataclass(frozen=True, eq=False)
class PackedBatch:
    r"""Sequences to learn from and the policy's own responses, packed one after the other.

    The task loss is :math:`-\sum_i t_i \log p_i` over all tokens i, with t the task weights.

    Args:
        targets: Token ids [N] that rows 0 to N-1 predict; ``ignore_index`` where a row does not count.
        cu_seqlens: Offsets [B+1], integer: sequence b is rows ``cu_seqlens[b]`` to ``cu_seqlens[b+1] - 1``.
        task_weights: Weight t of every sequence [B] or row [N] in the task loss, floating, no gradient: 1 / tokens
            in the window for sequences to imitate, 0 for sampled ones, an advantage in a policy gradient. Where
            B = N it is one per row, which is the same if every sequence has one row.
        num_sampled: The last so many sequences are responses that the policy sampled. Measurements are about them.
        num_sampled_tokens: Rows of these, all included. Off the CPU it saves the forward-only pass (see
            `BarrierObjective.linear`) the other rows; elsewhere it is known anyway.

    Raises:
        TypeError: A tensor or number of the wrong kind.
        ValueError: Shapes or numbers that do not fit; B = N with sequences of other than one row (on the CPU).

    Example:
        >>> cu_seqlens = torch.tensor([0, 3, 5])
        >>> PackedBatch(torch.tensor([4, 2, 1, 7, 1]), cu_seqlens, torch.tensor([1 / 3, 0.0]), num_sampled=1)
        PackedBatch(2 sequences, 1 sampled, 5 rows)

    Source: ARCHITECTURE.md, "One pass over the head".
    """

    targets: Tensor
    cu_seqlens: Tensor
    task_weights: Tensor
    num_sampled: int = 0
    num_sampled_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "cu_seqlens", "task_weights"):
            value = getattr(self, name)
            floating = name == "task_weights"
            if not isinstance(value, Tensor) or value.is_floating_point() != floating or value.dtype == torch.bool:
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"{name} is {given}; allowed: {'a floating' if floating else 'an integer'} torch.Tensor"
                )
            if value.dim() != 1:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: 1 dimension")
            if value.device != self.targets.device:
                raise ValueError(f"{name} is on {value.device}, targets on {self.targets.device}; allowed: one device")
        if len(self.cu_seqlens) < 1:
            raise ValueError("cu_seqlens is empty; allowed: [B+1], at least [0]")
        rows, sequences = self.num_rows, self.num_sequences
        if self.task_weights.requires_grad:
            raise ValueError("task_weights requires grad; allowed: numbers (no gradient flows to them)")
        if len(self.task_weights) not in (rows, sequences):
            raise ValueError(
                f"task_weights has shape ({len(self.task_weights)},); allowed: one per sequence ({sequences},) or per "
                f"row ({rows},)"
            )
        for name, most in (("num_sampled", sequences), ("num_sampled_tokens", rows)):
            n = getattr(self, name)
            if n is None and name == "num_sampled_tokens":
                continue
            if isinstance(n, bool) or not isinstance(n, int):
                raise TypeError(f"{name} is a {type(n).__name__}; allowed: an int (shapes must not depend on a device)")
            if not 0 <= n <= most:
                raise ValueError(f"{name}={n}; allowed: 0 to {most}")
        if self.cu_seqlens.device.type == "cpu":  # elsewhere looking at the numbers would stall the device
            self._check_numbers(self.cu_seqlens.tolist())

    def _check_numbers(self, ends: list[int]) -> None:
        if ends != sorted(ends) or ends[0] != 0 or ends[-1] != self.num_rows:
            raise ValueError(
                f"cu_seqlens={ends}; allowed: 0 = first <= ... <= last = the number of targets, {self.num_rows}"
            )
        if self.num_rows == self.num_sequences and ends != list(range(len(ends))):
            raise ValueError(
                f"task_weights has {self.num_rows} entries, as many as there are sequences and rows, but not every "
                "sequence has one row; allowed: leave empty sequences out"
            )
        sampled = ends[-1] - ends[self.num_sequences - self.num_sampled]
        if self.num_sampled_tokens not in (None, sampled):
            raise ValueError(
                f"num_sampled_tokens={self.num_sampled_tokens}; allowed: {sampled}, the rows of the last "
                f"{self.num_sampled} sequences"
            )

    @property
    def num_rows(self) -> int:
        """N."""
        return self.targets.shape[0]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    def __repr__(self) -> str:
        return f"PackedBatch({self.num_sequences} sequences, {self.num_sampled} sampled, {self.num_rows} rows)"

    def sampled_rows(self) -> int | None:
        """Rows of the sampled sequences; None where only the device knows."""
        if self.num_sampled_tokens is not None:
            return self.num_sampled_tokens
        if self.num_sampled in (0, self.num_sequences):
            return self.num_rows if self.num_sampled else 0
        if self.cu_seqlens.device.type == "cpu":
            return self.num_rows - int(self.cu_seqlens[self.num_sequences - self.num_sampled])
        return None

    def row_task_weights(self) -> Tensor:
        """Task weights [N] of the rows."""
        if len(self.task_weights) == self.num_rows:
            return self.task_weights
        return self.task_weights[owner_of_rows(self.cu_seqlens, self.num_rows)]


def owner_of_rows(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Index [rows] of the sequence that each row belongs to."""
    place = torch.arange(rows, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), place, right=True)


def check_responses(batch: PackedBatch, sampled: Mapping[str, Sampled]) -> None:
    """Measurements against the batch's sampled sequences, before any state changes."""
    num_rows = batch.sampled_rows()
    for name, m in sampled.items():
        given = f"measurements[{name!r}]"
        if m.device != batch.targets.device:
            raise ValueError(f"{given} is on {m.device}, the batch on {batch.targets.device}; allowed: one device")
        if m.credited_per_token:
            num_rows = m.size if num_rows is None else num_rows
        expected, what = (num_rows, "tokens") if m.credited_per_token else (batch.num_sampled, "sequences")
        if m.size != expected:
            raise ValueError(f"{given} has {m.size} costs; allowed: one for each of the {expected} sampled {what}")
        for argument, tensor, size in (("groups", m.groups, 0), ("cu_seqlens", m.cu_seqlens, 1)):
            if tensor is not None and tuple(tensor.shape) != (batch.num_sampled + size,):
                raise ValueError(
                    f"{given}: {argument} has shape {tuple(tensor.shape)}; allowed: ({batch.num_sampled + size},) for "
                    f"the batch's {batch.num_sampled} sampled sequences"
                )
        if m.cu_seqlens is not None and {m.cu_seqlens.device.type, batch.targets.device.type} == {"cpu"}:
            own = batch.cu_seqlens[batch.num_sequences - batch.num_sampled :]
            own = own - own[0]
            if (m.cu_seqlens != own).any():
                raise ValueError(
                    f"{given}: cu_seqlens={m.cu_seqlens.tolist()}; allowed: those of the batch, {own.tolist()}, or "
                    "left out"
                )
