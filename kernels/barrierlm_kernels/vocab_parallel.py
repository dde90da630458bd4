"""A head that is split over ranks by vocabulary."""

from typing import Any

import torch
import torch.distributed as dist


class VocabParallel:
    """Says that the head given to an operation is this rank's slice of the vocabulary.

    The ranks of ``group`` hold slices that follow each other in rank order, and call the operation together, with the
    same hidden states, targets (numbers of the whole vocabulary), weights and options: they are replicas, as
    tensor-parallel ranks are, and get the same result. Maximum, sum and the target's logit of every row are combined
    before the softmax is formed, so each rank makes the gradient of its own slice; the gradient for the hidden states
    is summed over the ranks.

    Args:
        rows: V_r, rows of this rank's slice of the head; slices may differ in size. At least 1.
        group: The ranks that share the head; None: the default group. Made by all of them: the sizes are exchanged
            once, here.

    Attributes:
        group: As given.
        start: The first token number of this rank's slice.
        size: V, entries of the whole vocabulary.
        ranks: Number of slices.

    Raises:
        TypeError: ``rows`` is no int.
        ValueError: ``rows`` < 1 on some rank.
        RuntimeError: torch.distributed is not initialized.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from barrierlm_kernels import VocabParallel, linear_sequence_logprob
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> vocab = VocabParallel(rows=4)
        >>> packing = torch.tensor([0, 1, 3]), torch.tensor([0, 3])
        >>> linear_sequence_logprob(torch.zeros(3, 2), torch.zeros(4, 2), *packing, vocab_parallel=vocab).logps
        tensor([-4.1589])
        >>> dist.destroy_process_group()

    Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3 (vocabulary-parallel cross-entropy).
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None = None) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int):
            raise TypeError(f"rows must be an int, got {rows!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("VocabParallel needs torch.distributed: call torch.distributed.init_process_group first")
        self.group = dist.group.WORLD if group is None else group
        self.ranks = dist.get_world_size(self.group)
        rank = dist.get_rank(self.group)
        if rank < 0:
            raise ValueError(f"group must hold this rank ({dist.get_rank()}), got {group!r}")
        # NCCL exchanges only what lives on a GPU.
        device = torch.cuda.current_device() if "nccl" in dist.get_backend(self.group) else "cpu"
        sizes = torch.zeros(self.ranks, dtype=torch.int64, device=device)
        sizes[rank] = rows
        dist.all_reduce(sizes, group=self.group)
        every = sizes.tolist()
        if min(every) < 1:
            raise ValueError(f"rows must be at least 1 on every rank, got {every}")
        self.start, self.size = sum(every[:rank]), sum(every)
        self.rows = rows


def slice_arguments(vocab: Any, rows: int) -> tuple[str | None, int, int]:
    """(name of the group, start, size) as operations take them, of a head of `rows` rows."""
    if vocab is None:
        return None, 0, rows
    if not isinstance(vocab, VocabParallel):
        raise TypeError(f"vocab_parallel must be a VocabParallel or None, got {type(vocab).__name__}")
    if vocab.rows != rows:
        raise ValueError(f"weight must have the {vocab.rows} rows that vocab_parallel was made for, got {rows}")
    assert vocab.group is not None
    return vocab.group.group_name, vocab.start, vocab.size


def group_of(name: str | None) -> dist.ProcessGroup | None:
    """The group with that name; None for None. Operations take names: a group is no type of theirs."""
    if name is None:
        return None
    resolve: Any = dist.distributed_c10d._resolve_process_group
    group: dist.ProcessGroup = resolve(name)
    return group
