"""Per-sequence log-probabilities of packed sequences, from logits."""

import torch
from torch import Tensor

from .._checks import FLOATS, check_choice, check_options, check_packing, check_tensor
from .._segments import count_tokens, segment_reduce
from ..results import SequenceLogProbs
from .reference import token_logprobs


def sequence_logprob(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    reduction: str = "sum",
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_token_logps: bool = False,
    return_entropy: bool = False,
    impl: str = "auto",
) -> SequenceLogProbs:
    """Log-probability of each sequence of a packed batch, from its logits.

    With y = c tanh(z / c) for a softcap c (y = z without), applied before the temperature T as in Gemma:

        log p_i = log softmax(y_i / T)[target_i]       logps_b = sum of log p_i over the counted rows of b

    Row i counts if target_i is not `ignore_index`. Other rows contribute exactly 0, may hold NaN or infinity,
    and get a gradient of exactly 0; so does a row whose upstream gradient is 0.

    Args:
        logits: [N, V], any float dtype. Computation is in fp32 (fp64 for fp64). Row i predicts targets[i]:
            nothing is shifted here.
        targets: [N], int32 or int64, in [0, V) or `ignore_index`.
        cu_seqlens: [B+1], int32 or int64: sequence b is rows cu_seqlens[b] to cu_seqlens[b+1] - 1. Starts at
            0, ends at N, never decreases; equal neighbours make an empty sequence.
        reduction: "sum", or "mean" over the counted tokens (0, with zero gradient, if there are none).
        ignore_index: the target of rows that do not count.
        temperature: divides the logits.
        softcap: bound c on the absolute value of the logits, in logits.
        return_token_logps: also return the [N] token log-probabilities.
        return_entropy: also return the [B] entropies, reduced as the log-probabilities are.
        impl: "auto" and "reference" run the torch implementation.

    Returns:
        `SequenceLogProbs(logps, counts, token_logps, entropy)` in fp32, or in fp64 for fp64 logits.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value. The values of `targets`
            and `cu_seqlens` are checked on the CPU only, because the check would stall another device.
        RuntimeError: impl="triton", or a second derivative.

    Example:
        >>> import torch
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> out = sequence_logprob(logits, torch.tensor([0, 1, -100]), torch.tensor([0, 1, 3]))
        >>> out.logps, out.counts
        (tensor([-1.3863, -1.3863], grad_fn=<_SegmentSumBackward>), tensor([1, 1]))

    References:
        Milakov, Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867 (max and sum kept
        apart). The surrogates built on it: Dhillon et al., "L3Ms", arXiv 2410.21533.
    """
    check_tensor("logits", logits, ("N", "V"), FLOATS, None)
    check_choice("reduction", reduction, ("sum", "mean"))
    check_options(ignore_index=ignore_index, temperature=temperature, softcap=softcap, impl=impl)
    check_packing(targets, cu_seqlens, logits.shape[0], logits.shape[1], ignore_index, logits.device)

    counted = targets != ignore_index
    safe_targets = torch.where(counted, targets, 0).long()
    token_logps, token_entropy = token_logprobs(
        logits, safe_targets, counted, temperature=temperature, softcap=softcap, entropy=return_entropy
    )
    counts = count_tokens(counted, cu_seqlens)
    return SequenceLogProbs(
        segment_reduce(token_logps, cu_seqlens, counts, reduction),
        counts,
        token_logps if return_token_logps else None,
        None if token_entropy is None else segment_reduce(token_entropy, cu_seqlens, counts, reduction),
    )
