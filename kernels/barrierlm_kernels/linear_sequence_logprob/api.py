"""Per-sequence log-probabilities of packed sequences, from hidden states and the LM head."""

from torch import Tensor

from .._checks import FLOATS, check_choice, check_head, check_options, check_packing, check_tensor
from .._dispatch import choose
from .._head import autocast_dtype, matmul_dtype
from .._packing import read_packing
from .._segments import segment_reduce
from ..results import SequenceLogProbs
from ..vocab_parallel import VocabParallel, slice_arguments
from .op import linear_token_logprobs


def linear_sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "sum",
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_token_logps: bool = False,
    return_entropy: bool = False,
    impl: str = "auto",
    memory_budget: int | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> SequenceLogProbs:
    """Log-probability of each sequence of a packed batch, from hidden states, with no [N, V] tensor.

    `sequence_logprob(hidden @ weight.T + bias, ...)`, with the logits made a chunk of rows at a time, and made
    again in backward (8 N V H operations in all). No gradient is computed that nobody asked for: a frozen head
    costs no dW. dW and dbias are accumulated in fp32 (fp64 for fp64).

    Under autocast the products are in autocast's dtype, as in F.linear, and hidden, weight and bias may differ
    in dtype; the bias is added, and everything after, is computed in fp32.

    Args:
        hidden: [N, H], any float dtype. Row i predicts targets[i]: nothing is shifted here. Rows whose target
            is ignored may hold NaN or infinity.
        weight: [V, H], dtype of `hidden`.
        targets: [N], int32 or int64, in [0, V) or `ignore_index`.
        cu_seqlens: [B+1], int32 or int64: sequence b is rows cu_seqlens[b] to cu_seqlens[b+1] - 1.
        bias: [V], dtype of `hidden`.
        reduction: "sum", or "mean" over the counted tokens (0, with zero gradient, if there are none).
        ignore_index: the target of rows that do not count.
        temperature: divides the logits, after the softcap.
        softcap: c in c tanh(logits / c).
        return_token_logps: also return the [N] token log-probabilities.
        return_entropy: also return the [B] entropies, reduced as the log-probabilities are.
        impl: "auto", "triton" or "reference"; see `which_impl`. The products are torch's in all of them.
        memory_budget: bytes of logits that may exist at a time. None: 48 MiB on the CPU, 512 MiB elsewhere.
            Results agree for all budgets to rounding, and exactly for equal ones.
        vocab_parallel: a `VocabParallel`: `weight` and `bias` are this rank's slice of the vocabulary, and all ranks
            of its group call this together with the same other arguments. None: `weight` is the whole head.

    Returns:
        `SequenceLogProbs(logps, counts, token_logps, entropy)` in fp32, or in fp64 for fp64 hidden states.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value. The values of `targets`
            and `cu_seqlens` are checked on the CPU only, because the check would stall another device.
        RuntimeError: impl="triton" where Triton cannot run, or a second derivative.

    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(3, 2), torch.zeros(4, 2, requires_grad=True)
        >>> out = linear_sequence_logprob(hidden, head, torch.tensor([0, 1, -100]), torch.tensor([0, 1, 3]))
        >>> out.logps.detach(), out.counts
        (tensor([-1.3863, -1.3863]), tensor([1, 1]))

    References:
        Milakov, Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867 (max and sum kept
        apart). The surrogates built on it: Dhillon et al., "L3Ms", arXiv 2410.21533.
    """
    check_tensor("hidden", hidden, ("N", "H"), FLOATS, None)
    check_head(hidden, weight, bias, autocast_dtype(hidden.device))
    check_choice("reduction", reduction, ("sum", "mean"))
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
    token_logps, token_entropy, *_ = linear_token_logprobs(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        safe_targets,
        counted,
        float(temperature),
        None if softcap is None else float(softcap),
        return_entropy,
        matmul_dtype(hidden),
        memory_budget,
        impl,
        *vocab,
    )
    return SequenceLogProbs(
        segment_reduce(token_logps, cu_seqlens, counts, reduction, impl),
        counts,
        token_logps if return_token_logps else None,
        segment_reduce(token_entropy, cu_seqlens, counts, reduction, impl) if return_entropy else None,
    )
