"""Rows that do not count, empty things, poisoned rows, layouts."""

import pytest
import torch
from barrierlm_kernels import linear_sequence_logprob, linear_weighted_logprob, sequence_logprob
from kernel_oracle import IGNORE, OPERATIONS, Batch, naive_linear, run

POISON = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.5}], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_ignored_rows_may_hold_anything(name, poison, options):
    function = OPERATIONS[name][0]
    batch = Batch([4, 3, 2], hidden_size=5, vocab=11, ignored=0)
    batch.targets[[1, 7, 8]] = IGNORE  # the last sequence is ignored as a whole
    clean = run(function, batch, **options)
    batch.hidden[[1, 7, 8]] = poison
    if name == "sequence_logprob":
        # The product itself would spread the poison to dW: give the logits, not the hidden states.
        clean, dirty = (logit_outputs(batch, fill, **options) for fill in (0.0, poison))
    else:
        dirty = run(function, batch, **options)
        assert dirty[-3][[1, 7, 8]].eq(0).all()
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def logit_outputs(batch, fill, **options):
    logits = torch.randn(9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[batch.targets == IGNORE] = fill
    logits.requires_grad_()
    out = sequence_logprob(logits, *batch.packing, return_token_logps=True, return_entropy=True, **options)
    total = (out.logps * torch.tensor([1.0, 2.0, 3.0])).sum() + out.entropy.sum() + out.token_logps.sum()
    (grad,) = torch.autograd.grad(total, logits)
    assert grad[batch.targets == IGNORE].eq(0).all()
    return [*out, grad]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("compact", [False, True])
def test_weightless_rows_may_hold_anything(poison, compact):
    batch = Batch([4, 3, 2], hidden_size=5, vocab=11, ignored=0)
    batch.row_weights[[0, 4, 5, 6]] = 0  # part of a sequence, and a whole one
    batch.bias[3] = 200.0  # exp(200) overflows: also the bias alone must do no harm in those rows
    batch.hidden, batch.weight, batch.bias = batch.hidden.float(), batch.weight.float(), batch.bias.float()

    def results():
        got = run(OPERATIONS["linear_weighted_logprob"][0], batch, per_token=True, compact=compact)
        out = linear_weighted_logprob(
            batch.hidden, batch.weight, *batch.packing, batch.row_weights, bias=batch.bias, compact=compact
        )
        return [*got, out.logps]

    clean = results()
    batch.hidden[[0, 4, 5, 6]] = poison
    dirty = results()
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert dirty[1][[0, 4, 5, 6]].eq(0).all()
    assert dirty[-1][1] == 0


@pytest.mark.parametrize("name", ["sequence_logprob", "linear_sequence_logprob"])
def test_poison_stays_in_its_sequence(name):
    # A counted row with NaN makes its own sequence NaN, and if the caller gives that sequence an upstream
    # gradient of 0 (drops it), no gradient sees it.
    batch = Batch([2, 3, 2], hidden_size=5, vocab=11, ignored=0, dtype=torch.float32)
    batch.bias[2] = 200.0
    clean = naive_linear(batch.hidden, batch.weight, *batch.packing, bias=batch.bias)
    batch.hidden[3] = float("nan")
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    if name == "sequence_logprob":
        leaves = [(hidden @ weight.T + batch.bias).detach().requires_grad_()]
        out = sequence_logprob(*leaves, *batch.packing, return_entropy=True)
    else:
        leaves = [hidden, weight]
        out = linear_sequence_logprob(*leaves, *batch.packing, bias=batch.bias, return_entropy=True)
    assert out.logps.isnan().tolist() == [False, True, False]
    assert out.entropy.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(out.logps[[0, 2]], clean.logps[[0, 2]], rtol=1e-5, atol=1e-5)
    keep = torch.tensor([1.0, 0.0, 1.0])
    for outputs, upstream in (((out.logps,), (keep,)), ((out.logps, out.entropy), (keep, keep))):
        for grad in torch.autograd.grad(outputs, leaves, upstream, retain_graph=True):
            assert grad.isfinite().all()
            assert grad.abs().max() > 0


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("lengths", "ignored"),
    [([], 0.0), ([0], 0.0), ([0, 0, 0], 0.0), ([0, 3, 0, 0, 2, 0], 0.3), ([1, 1, 1], 0.3), ([2, 3], 1.0)],
    ids=str,
)
def test_empty_and_ignored(name, lengths, ignored):
    function, naive = OPERATIONS[name]
    batch = Batch(lengths, hidden_size=4, vocab=6, ignored=ignored)
    for variant in ({"reduction": "sum"}, {"reduction": "mean"}) if "weighted" not in name else ({},):
        got = run(function, batch, **variant)
        torch.testing.assert_close(got, run(naive, batch, **variant))
        if ignored == 1.0 or not sum(lengths):
            assert all(x.eq(0).all() for x in got)


@pytest.mark.parametrize("ignore_index", [-1, 0, 3])
def test_ignore_index_may_be_a_token(ignore_index):
    batch = Batch([3, 3], hidden_size=4, vocab=6, ignored=0)
    batch.targets[[0, 4]] = ignore_index
    out = sequence_logprob(batch.logits, *batch.packing, ignore_index=ignore_index)
    expected = naive_linear(batch.hidden, batch.weight, *batch.packing, ignore_index=ignore_index)
    torch.testing.assert_close(out.logps, expected.logps)
    assert out.counts.equal(expected.counts)


@pytest.mark.parametrize("name", OPERATIONS)
def test_layouts(name):
    # Transposed and strided inputs, and upstream gradients that are expanded or strided.
    function = OPERATIONS[name][0]
    batch = Batch([3, 0, 4], hidden_size=5, vocab=9)
    expected = run(function, batch)
    twin = Batch([3, 0, 4], hidden_size=5, vocab=9)
    twin.hidden = batch.hidden.T.contiguous().T
    twin.weight = torch.stack([batch.weight, batch.weight], -1)[..., 0]
    twin.bias = torch.stack([batch.bias, batch.bias], -1)[..., 0]
    twin.targets = torch.stack([batch.targets, batch.targets], -1)[:, 0]
    twin.cu_seqlens = torch.stack([batch.cu_seqlens, batch.cu_seqlens], -1)[:, 0]
    twin.weights = torch.stack([batch.weights, batch.weights], -1)[:, 0]
    assert not twin.hidden.is_contiguous()
    assert not twin.weight.is_contiguous()
    leaves = [x.requires_grad_() for x in (twin.hidden, twin.weight, twin.bias)]
    outputs = function(*leaves, twin)
    torch.testing.assert_close([x.detach() for x in outputs], expected[: len(outputs)])
    strided = [torch.randn(*x.shape, 2, dtype=x.dtype)[..., 0] for x in outputs]
    for upstream in (strided, [torch.ones((), dtype=x.dtype).expand(x.shape) for x in outputs]):
        got = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        packed = torch.autograd.grad(outputs, leaves, [x.contiguous() for x in upstream], retain_graph=True)
        torch.testing.assert_close(got, packed, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_repeats_bit_for_bit(name):
    batch = Batch([5, 0, 7], hidden_size=16, vocab=252, dtype=torch.float32)
    first, second = (run(OPERATIONS[name][0], batch, memory_budget=5000) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_arguments_are_left_alone(name):
    # The work is done in place, but never in what the caller gave.
    batch = Batch([5, 4], hidden_size=6, vocab=12, dtype=torch.float32)
    twin = Batch([5, 4], hidden_size=6, vocab=12, dtype=torch.float32)
    logits = batch.logits
    before = logits.clone()
    run(OPERATIONS[name][0], batch, softcap=2.0, temperature=0.5)
    sequence_logprob(logits.requires_grad_(), *batch.packing, softcap=2.0, return_entropy=True).logps.sum().backward()
    assert torch.equal(logits, before)
    for field in ("hidden", "weight", "bias", "targets", "cu_seqlens", "weights"):
        assert torch.equal(getattr(batch, field), getattr(twin, field)), field
