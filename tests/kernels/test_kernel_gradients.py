"""Values and gradients against a plain fp64 twin, over shapes, options and packings."""

import pytest
import torch
from barrierlm_kernels import linear_sequence_logprob, linear_weighted_logprob, sequence_logprob
from barrierlm_kernels._scale import scale_
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import OPERATIONS, Batch, naive_linear, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"softcap": 2.0, "temperature": 1.3},
]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradcheck(name, options, reduction):
    # The weighted sum has no reduction; its two rounds are without and with compact.
    variant = {"compact": reduction == "mean"} if name == "linear_weighted_logprob" else {"reduction": reduction}
    batch = Batch([2, 0, 3, 1], hidden_size=3, vocab=5)
    leaves = [x.requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: OPERATIONS[name][0](h, w, b, batch, memory_budget=100, **options, **variant), leaves
    )


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 4), max_size=5),
    vocab=st.sampled_from([1, 2, 7, 33]),
    hidden_size=st.sampled_from([1, 4, 7]),
    seed=st.integers(0, 2**16),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    temperature=st.floats(0.2, 4),
    softcap=st.none() | st.floats(0.5, 50),
    reduction=st.sampled_from(["sum", "mean"]),
    memory_budget=st.sampled_from([1, 500, None]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_equals_the_definition(
    lengths, vocab, hidden_size, seed, ignored, temperature, softcap, reduction, memory_budget, index_dtype
):
    batch = Batch(lengths, hidden_size, vocab, seed=seed, ignored=ignored)
    batch.cu_seqlens, batch.targets = batch.cu_seqlens.to(index_dtype), batch.targets.to(index_dtype)
    kw = {"temperature": temperature, "softcap": softcap, "memory_budget": memory_budget}
    for name, (function, naive) in OPERATIONS.items():
        if name == "linear_weighted_logprob":
            variants = [{"compact": c, "per_token": p} for c in (False, True) for p in (False, True)]
        else:
            variants = [{"reduction": reduction}]
        for variant in variants:
            # The twin needs long targets for gather.
            expected = run(naive, batch_with_long_targets(batch), **kw, **variant)
            torch.testing.assert_close(run(function, batch, **kw, **variant), expected)


def batch_with_long_targets(batch):
    twin = Batch(batch.lengths, batch.hidden_size, batch.vocab, seed=batch.seed, ignored=batch.ignored)
    assert twin.targets.equal(batch.targets.long())
    return twin


@pytest.mark.parametrize("vocab", [123, 252, 507])
@pytest.mark.parametrize("name", OPERATIONS)
def test_odd_shapes(name, vocab):
    function, naive = OPERATIONS[name]
    batch = Batch([5, 1, 9], hidden_size=7, vocab=vocab)
    for use_bias in (False, True):
        torch.testing.assert_close(run(function, batch, use_bias=use_bias), run(naive, batch, use_bias=use_bias))


def test_softcap_comes_before_temperature():
    logits = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    out = sequence_logprob(logits, torch.tensor([0]), torch.tensor([0, 1]), softcap=2.0, temperature=0.5)
    capped_first = torch.log_softmax(2.0 * torch.tanh(logits / 2.0) / 0.5, -1)[0, :1]
    capped_last = torch.log_softmax(2.0 * torch.tanh(logits / 0.5 / 2.0), -1)[0, :1]
    torch.testing.assert_close(out.logps, capped_first)
    assert (out.logps - capped_last).abs() > 0.01


def test_entropy_and_token_logps_are_optional():
    batch = Batch([2, 2], 3, 5)
    for out in (
        sequence_logprob(batch.logits, *batch.packing),
        linear_sequence_logprob(batch.hidden, batch.weight, *batch.packing),
    ):
        assert out.token_logps is None
        assert out.entropy is None
        assert out.counts.dtype == torch.int64


@pytest.mark.parametrize("only", ["logps", "token_logps", "entropy"])
def test_each_output_alone_can_be_differentiated(only):
    batch = Batch([2, 0, 3], 3, 5)
    hidden = batch.hidden.requires_grad_()
    kw = {"return_token_logps": True, "return_entropy": True}
    for function, first in ((linear_sequence_logprob, (hidden, batch.weight)), (sequence_logprob, None)):
        args = first or (hidden @ batch.weight.T,)
        out = getattr(function(*args, *batch.packing, **kw), only)
        expected = getattr(naive_linear(hidden, batch.weight, *batch.packing), only)
        upstream = torch.arange(1.0, len(out) + 1, dtype=out.dtype)
        torch.testing.assert_close(
            torch.autograd.grad(out, hidden, upstream), torch.autograd.grad(expected, hidden, upstream)
        )


def test_weighted_logps_and_counts():
    batch = Batch([3, 0, 2, 2], 4, 6)
    weights = batch.weights.clone()
    weights[2] = 0
    out = linear_weighted_logprob(batch.hidden, batch.weight, *batch.packing, weights, weights_per="sequence")
    expected = naive_linear(batch.hidden, batch.weight, *batch.packing)
    torch.testing.assert_close(out.logps, torch.where(weights != 0, expected.logps, 0))
    assert out.counts.equal(expected.counts)
    assert not out.logps.requires_grad


def test_upstream_scale_reaches_the_weighted_gradient():
    batch = Batch([3, 2], 4, 6)
    hidden = batch.hidden.requires_grad_()
    out = linear_weighted_logprob(hidden, batch.weight, *batch.packing, batch.weights)
    once, thrice = (torch.autograd.grad(out.total * k, hidden, retain_graph=True)[0] for k in (1, 3))
    assert once.abs().max() > 0
    torch.testing.assert_close(3 * once, thrice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_saved_gradients_are_scaled_in_place_and_rounded_once(impl, dtype):
    for numel in (0, 1, 5000):
        gradient = torch.randn(numel).to(DEVICE, dtype)
        for by in (1.0, -0.37):
            factor = torch.tensor(by, device=DEVICE)
            expected = (gradient.float() * factor).to(dtype)
            scaled = scale_(gradient, factor, impl)
            assert scaled.data_ptr() == gradient.data_ptr()
            if impl == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
                torch.testing.assert_close(scaled, expected, rtol=2**-7, atol=0)  # the interpreter truncates
            else:
                assert torch.equal(scaled, expected)


def test_weights_of_length_n_and_b_when_both_are_equal():
    # Every sequence has one token: both readings are the same. Otherwise the reading must be named.
    batch = Batch([1, 1, 1], 4, 6, ignored=0)
    auto = linear_weighted_logprob(batch.hidden, batch.weight, *batch.packing, batch.weights)
    torch.testing.assert_close(
        (auto.total,), OPERATIONS["linear_weighted_logprob"][1](batch.hidden, batch.weight, None, batch)
    )
    batch = Batch([0, 2, 1], 4, 6, ignored=0)
    args = (batch.hidden, batch.weight, *batch.packing, batch.weights)
    with pytest.raises(ValueError, match="weights is ambiguous: B = N = 3"):
        linear_weighted_logprob(*args)
    token_logps = naive_linear(batch.hidden, batch.weight, *batch.packing).token_logps
    torch.testing.assert_close(
        linear_weighted_logprob(*args, weights_per="token").total, (batch.weights * token_logps).sum()
    )
    torch.testing.assert_close(
        linear_weighted_logprob(*args, weights_per="sequence").total,
        (batch.weights[[1, 1, 2]] * token_logps).sum(),
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_there_is_no_second_derivative(name):
    batch = Batch([2, 1], 3, 5, ignored=0)
    hidden = batch.hidden.requires_grad_()
    outputs = OPERATIONS[name][0](hidden, batch.weight, None, batch)
    upstream = torch.ones_like(outputs[0], requires_grad=True)
    (grad,) = torch.autograd.grad(outputs[0], hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
