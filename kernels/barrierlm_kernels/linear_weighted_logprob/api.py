"""Weighted sums of token log-probabilities, from hidden states and the LM head, in one pass."""

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_head, check_options, check_packing, check_tensor
from .._dispatch import choose
from .._head import autocast_dtype, matmul_dtype
from .._packing import read_packing
from .._rows import accumulation_dtype
from .._segments import rows_to_sequences, segment_sum
from ..results import WeightedLogProb
from ..vocab_parallel import VocabParallel, slice_arguments
from .op import linear_weighted_total


def linear_weighted_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    weights_per: str = "auto",
    compact: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_token_logps: bool = False,
    impl: str = "auto",
    memory_budget: int | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> WeightedLogProb:
    """Weighted sum of token log-probabilities, its gradient made in the same pass over the LM head.

        total = sum_i w_i log p_i      d total / d z_ij = w_i (1[j = target_i] - p_ij) / T   (times the softcap's)

    The weights are numbers known beforehand (multipliers, advantages, 1 / token count); no gradient flows to
    them. So forward turns each chunk of logits into its gradient at once: 6 N V H operations instead of 8, and
    never an [N, V] tensor. Backward only multiplies by the upstream scalar, so it is cheap, but the gradients
    are held from forward on. Under no_grad, or for inputs without gradient, they are not made.

    Rows that are ignored or whose weight is 0 contribute exactly 0, may hold NaN or infinity, and get a
    gradient of exactly 0. Under autocast the products are in autocast's dtype, as in F.linear.

    Args:
        hidden: [N, H], any float dtype. Row i predicts targets[i]: nothing is shifted here.
        weight: [V, H], dtype of `hidden` (autocast may mix dtypes).
        targets: [N], int32 or int64, in [0, V) or `ignore_index`.
        cu_seqlens: [B+1], int32 or int64: sequence b is rows cu_seqlens[b] to cu_seqlens[b+1] - 1.
        weights: [B] or [N], any float dtype, without gradient: one weight for each sequence or for each row.
        bias: [V], dtype of `hidden`.
        weights_per: "sequence", "token", or "auto" to tell by the length. With "auto" and B = N the two mean the
            same if every sequence has one token; if not, that is an error on the CPU, and elsewhere and under
            torch.compile (where it cannot be seen without a wait) the weights are read per token.
        compact: drop ignored and weightless rows before the products, which then cost only what the others
            need. The number of rows left must be known, so this waits for the device once.
        ignore_index: the target of rows that do not count.
        temperature: divides the logits, after the softcap.
        softcap: c in c tanh(logits / c).
        return_token_logps: also return the [N] token log-probabilities, detached.
        impl: "auto", "triton" or "reference"; see `which_impl`. The products are torch's in all of them.
        memory_budget: bytes of logits that may exist at a time. None: 48 MiB on the CPU, 512 MiB elsewhere.
        vocab_parallel: a `VocabParallel`: `weight` and `bias` are this rank's slice of the vocabulary, and all ranks
            of its group call this together with the same other arguments. None: `weight` is the whole head.

    Returns:
        `WeightedLogProb(total, logps, counts, token_logps)`, in fp32, or in fp64 for fp64 hidden states.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value, or `weights` requires
            gradient. Values of `targets` and `cu_seqlens` are checked on the CPU only.
        RuntimeError: impl="triton" where Triton cannot run, or a second derivative.

    Example:
        >>> import torch
        >>> hidden, head = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2)
        >>> targets, cu = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
        >>> out = linear_weighted_logprob(hidden, head, targets, cu, torch.tensor([0.5, 0.0]))
        >>> out.total.detach(), out.logps
        (tensor(-0.6931), tensor([-1.3863,  0.0000]))

    References:
        Linear surrogates of sampled constraints: Dhillon et al., "L3Ms", arXiv 2410.21533. Max and sum kept
        apart: Milakov, Gimelshein, arXiv 1805.02867.
    """
    check_tensor("hidden", hidden, ("N", "H"), FLOATS, None)
    check_head(hidden, weight, bias, autocast_dtype(hidden.device))
    check_choice("weights_per", weights_per, ("auto", "sequence", "token"))
    check_options(
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        impl=impl,
        memory_budget=memory_budget,
    )
    vocab = slice_arguments(vocab_parallel, len(weight))
    check_packing(targets, cu_seqlens, len(hidden), vocab[-1], hidden.device)
    impl = choose(impl, hidden.device, hidden.dtype)

    safe_targets, counted, counts = read_packing(targets, cu_seqlens, vocab[-1], ignore_index)
    weights = _weights_per_row(weights, weights_per, cu_seqlens, len(hidden), hidden.device)
    row_weights = torch.where(counted, weights, 0).to(accumulation_dtype(hidden.dtype))
    kept = None
    if compact:
        kept = row_weights.nonzero()[:, 0]  # the one wait
        hidden, safe_targets, row_weights = (x.index_select(0, kept) for x in (hidden, safe_targets, row_weights))
    # Under no_grad requires_grad still says yes.
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    total, token_logps, *_ = linear_weighted_total(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        safe_targets,
        row_weights,
        float(temperature),
        None if softcap is None else float(softcap),
        matmul_dtype(hidden),
        memory_budget,
        True,
        impl,
        needs,
        *vocab,
    )
    if kept is not None:
        token_logps = token_logps.new_zeros(len(targets)).index_copy_(0, kept, token_logps)
    return WeightedLogProb(
        total,
        segment_sum(token_logps, cu_seqlens, impl),
        counts,
        token_logps if return_token_logps else None,
    )


def _weights_per_row(weights: Tensor, weights_per: str, cu_seqlens: Tensor, rows: int, device: torch.device) -> Tensor:
    """Check the weights and spread them over the rows, [N]."""
    check_tensor("weights", weights, ("B or N",), FLOATS, device)
    if weights.requires_grad:
        raise ValueError(
            "weights must not require gradient: none flows to them; detach() them, or use linear_sequence_logprob"
        )
    sequences = len(cu_seqlens) - 1
    allowed = {"sequence": (sequences,), "token": (rows,), "auto": (sequences, rows)}[weights_per]
    if len(weights) not in allowed:
        raise ValueError(
            f"weights must have length B = {sequences} (one for each sequence) or N = {rows} (one for each row), "
            f"with weights_per={weights_per!r}; got {len(weights)}"
        )
    visible = device.type == "cpu" and not torch.compiler.is_compiling()
    if weights_per == "auto" and sequences == rows and visible and (cu_seqlens.diff() != 1).any():
        raise ValueError(
            f"weights is ambiguous: B = N = {rows}, but not every sequence has one token. "
            "Pass weights_per='sequence' or weights_per='token'"
        )
    if weights_per == "token" or (weights_per == "auto" and len(weights) == rows):
        return weights
    return weights[rows_to_sequences(cu_seqlens, rows)]
