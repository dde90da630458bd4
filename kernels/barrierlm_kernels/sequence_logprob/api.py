"""Per-sequence log-probabilities of packed sequences, from logits."""

from torch import Tensor

from .._checks import FLOATS, check_choice, check_flag, check_options, check_packing, check_tensor
from .._dispatch import choose
from .._packing import read_packing
from .._segments import segment_reduce
from ..results import SequenceLogProbs
from .op import token_logprobs


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
    inplace_backward: bool = False,
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
        inplace_backward: write the gradient over the logits, which saves their size in memory; afterwards they are
            gone. For logits that nothing else reads, such as a head's output. With retain_graph=True, under
            torch.compile and for logits that are not contiguous the gradient gets memory of its own all the same.
        impl: "auto", "triton" or "reference"; see `which_impl`.

    Returns:
        `SequenceLogProbs(logps, counts, token_logps, entropy)` in fp32, or in fp64 for fp64 logits.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value. The values of `targets`
            and `cu_seqlens` are checked on the CPU only, because the check would stall another device.
        RuntimeError: impl="triton" where Triton cannot run, or a second derivative.

    Example:
        >>> import torch
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> out = sequence_logprob(logits, torch.tensor([0, 1, -100]), torch.tensor([0, 1, 3]))
        >>> out.logps.detach(), out.counts
        (tensor([-1.3863, -1.3863]), tensor([1, 1]))

    References:
        Milakov, Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867 (max and sum kept
        apart). The surrogates built on it: Dhillon et al., "L3Ms", arXiv 2410.21533.
    """
    check_tensor("logits", logits, ("N", "V"), FLOATS, None)
    check_choice("reduction", reduction, ("sum", "mean"))
    check_options(ignore_index=ignore_index, temperature=temperature, softcap=softcap, impl=impl)
    check_flag("inplace_backward", inplace_backward)
    check_packing(targets, cu_seqlens, logits.shape[0], logits.shape[1], logits.device)
    impl = choose(impl, logits.device, logits.dtype)

    safe_targets, counted, counts = read_packing(targets, cu_seqlens, logits.shape[1], ignore_index)
    token_logps, token_entropy, *_ = token_logprobs(
        logits,
        safe_targets,
        counted,
        float(temperature),
        None if softcap is None else float(softcap),
        return_entropy,
        inplace_backward,
        impl,
    )
    return SequenceLogProbs(
        segment_reduce(token_logps, cu_seqlens, counts, reduction, impl),
        counts,
        token_logps if return_token_logps else None,
        segment_reduce(token_entropy, cu_seqlens, counts, reduction, impl) if return_entropy else None,
    )
