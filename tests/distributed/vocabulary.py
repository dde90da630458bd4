"""Run by `launch`: the head's operations on slices of the vocabulary, beside the same on the whole head."""

import torch
import torch.distributed as dist
from barrierlm_kernels import VocabParallel, linear_weighted_logprob
from kernel_oracle import OPERATIONS, Batch, in_fp64, run, share_of_allowed_error
from launch import end, join

VOCAB = 37
NAMES = ("linear_sequence_logprob", "linear_weighted_logprob")


def bounds(ranks, vocab=VOCAB):
    """Uneven slices: the first rank has the most."""
    cuts = [vocab * (k + 1) // (ranks + 1) for k in range(1, ranks)]
    return [0, *cuts, vocab]


def sliced(function, rank, ranks):
    """The operation with its head cut down to this rank's slice; gradients come back for the whole head."""
    lo, hi = bounds(ranks)[rank : rank + 2]
    vocab = VocabParallel(hi - lo)
    assert (vocab.start, vocab.size, vocab.ranks) == (lo, VOCAB, ranks)

    def call(hidden, weight, bias, batch, **kw):
        bias = None if bias is None else bias[lo:hi]
        return function(hidden, weight[lo:hi], bias, batch, vocab_parallel=vocab, **kw)

    return call


def whole_head(outcome, ranks, use_bias):
    """Add the slices' gradients up: each rank has zeros outside of its own."""
    for gradient in outcome[-(2 if use_bias else 1) :]:
        dist.all_reduce(gradient)
    return outcome


CASES = {
    "plain": {},
    "bias, softcap, temperature": {"use_bias": True, "softcap": 3.0, "temperature": 0.7},
    "chunks": {"memory_budget": 3 * 8 * 13},
    "row by row": {"memory_budget": 1, "use_bias": True},
    "compact": {"compact": True},
    "per token": {"per_token": True, "memory_budget": 500},
}


def cases(name):
    for case, options in CASES.items():
        own = {"compact", "per_token"} & options.keys()
        if not own or name == "linear_weighted_logprob":
            yield case, {"use_bias": False} | options


def exact(rank, ranks):
    """Largest differences to the whole head in fp64, by operation and case."""
    worst = {}
    for name in NAMES:
        function = OPERATIONS[name][0]
        for case, options in cases(name):
            batch = Batch([5, 0, 1, 6], hidden_size=8, vocab=VOCAB)
            whole = run(function, batch, **options)
            ours = whole_head(run(sliced(function, rank, ranks), batch, **options), ranks, options["use_bias"])
            for index, (a, b) in enumerate(zip(ours, whole, strict=True)):
                assert b.abs().max() > 0
                worst[f"{name}, {case}, {index}"] = (a - b).abs().max().item()
    return worst


def precise(rank, ranks, impl, dtype, **options):
    """The operations' errors, each over the one allowed, and what every rank must have the same bits of."""
    error, bits = {}, {}
    for name in NAMES:
        function, naive = OPERATIONS[name]
        outcomes = []
        for seed in range(2 if impl == "triton" else 6):
            batch = Batch([7, 0, 1, 4], hidden_size=24, vocab=VOCAB, dtype=dtype, seed=seed, scale=0.5)
            ours = run(sliced(function, rank, ranks), batch, impl=impl, memory_budget=VOCAB * 8, **options)
            theirs, fp64 = run(naive, batch, **options), run(naive, in_fp64(batch), **options)
            outcomes.append((whole_head(ours, ranks, True), theirs, fp64))
        kind = f"{name}, {impl}, {dtype}"
        error[kind], bits[kind] = (
            share_of_allowed_error(outcomes, given=dtype if impl == "triton" else None),
            [x for ours, *_ in outcomes for x in ours[:-2]],
        )
    return error, bits


def masked(rank, ranks):
    """A slice whose every entry is masked by its bias, and logits beyond the reach of exp: finite, and as the whole."""
    worst = {}
    lo, hi = bounds(ranks)[:2]
    for impl in ("reference", "triton"):
        batch = Batch([4, 3], hidden_size=8, vocab=VOCAB, dtype=torch.float32, ignored=0)
        batch.weight = batch.weight * 300
        batch.bias[lo:hi] = -torch.inf
        batch.targets = batch.targets.clamp(min=hi)
        for name in NAMES:
            function = OPERATIONS[name][0]
            ours = run(sliced(function, rank, ranks), batch, impl=impl)
            whole = run(function, in_fp64(batch))
            for index, (a, b) in enumerate(zip(whole_head(ours, ranks, True), whole, strict=True)):
                assert a.isfinite().all(), (impl, name, index)
                worst[f"{impl}, {name}, {index}"] = ((a - b).norm() / b.norm().clamp(min=1)).item()
    return worst


def poisoned(rank, ranks):
    """NaN in rows without weight stays where it is."""
    lo, hi = bounds(ranks)[rank : rank + 2]
    vocab = VocabParallel(hi - lo)
    batch = Batch([3, 3], hidden_size=8, vocab=VOCAB, ignored=0)
    batch.hidden[3:] = torch.nan
    hidden, head = batch.hidden.requires_grad_(), batch.weight[lo:hi].clone().requires_grad_()
    weights = torch.tensor([1.0, 0.0])
    linear_weighted_logprob(hidden, head, *batch.packing, weights, vocab_parallel=vocab).total.backward()
    return {"hidden": hidden.grad, "head": head.grad}


def compiled(rank, ranks):
    """A step with a slice compiles whole, and gives the same numbers."""
    lo, hi = bounds(ranks)[rank : rank + 2]
    vocab = VocabParallel(hi - lo)
    batch = Batch([3, 3], hidden_size=8, vocab=VOCAB)

    def loss(hidden, head):
        return linear_weighted_logprob(hidden, head, *batch.packing, batch.weights, vocab_parallel=vocab).total

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight[lo:hi])]
        function(*leaves).backward()
        gradients.append([x.grad for x in leaves])
    return [(a - b).abs().max().item() for a, b in zip(*gradients, strict=True)]


def errors(rank, ranks):
    """Messages of what is refused, on every rank alike."""
    messages = []
    batch = Batch([3, 3], hidden_size=8, vocab=VOCAB)
    lo, hi = bounds(ranks)[rank : rank + 2]
    vocab = VocabParallel(hi - lo)
    too_high = batch.targets.clone()
    too_high[0] = VOCAB
    for make in (
        lambda: VocabParallel(0 if rank == 0 else 3),
        lambda: VocabParallel(2.0),
        lambda: linear_weighted_logprob(
            batch.hidden, batch.weight, *batch.packing, batch.weights, vocab_parallel=vocab
        ),
        lambda: linear_weighted_logprob(
            batch.hidden, batch.weight[lo:hi], too_high, batch.cu_seqlens, batch.weights, vocab_parallel=vocab
        ),
        lambda: linear_weighted_logprob(
            batch.hidden, batch.weight[lo:hi], *batch.packing, batch.weights, vocab_parallel=dist.group.WORLD
        ),
    ):
        try:
            make()
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages


def main():
    rank, ranks, _ = join()
    results = {"exact": exact(rank, ranks), "masked": masked(rank, ranks), "poisoned": poisoned(rank, ranks)}
    results["compiled"], results["errors"] = compiled(rank, ranks), errors(rank, ranks)
    runs = [precise(rank, ranks, "reference", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    runs.append(precise(rank, ranks, "triton", torch.bfloat16, softcap=5.0, temperature=0.8))
    results["error"] = {kind: x for error, _ in runs for kind, x in error.items()}
    results["bits"] = {kind: x for _, bits in runs for kind, x in bits.items()}
    end(results)


if __name__ == "__main__":
    main()
