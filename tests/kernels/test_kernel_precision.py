"""Errors against fp64, as multiples of plain PyTorch's own error in the same dtype; extreme logits; autocast."""

import pytest
import torch
import torch.nn.functional as F
from barrierlm_kernels import linear_sequence_logprob, linear_weighted_logprob, sequence_logprob
from kernel_oracle import OPERATIONS, Batch, as_accurate_as_torch, device_for, in_fp64, run

implementations = pytest.mark.parametrize("impl", ["reference", "triton"])


def impl_for(impl, x):
    """The fp64 oracle is the reference's."""
    return "reference" if x.dtype == torch.float64 else impl


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.8}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_error_is_that_of_plain_torch(name, dtype, options):
    function, naive = OPERATIONS[name]
    results = []
    for seed in range(6):
        batch = Batch([30, 0, 1, 17], hidden_size=24, vocab=507, dtype=dtype, seed=seed, scale=0.5)
        ours = run(function, batch, memory_budget=507 * 8 * 4, **options)
        theirs = run(naive, batch, **options)
        results.append((ours, theirs, run(naive, in_fp64(batch), **options)))
    as_accurate_as_torch(results)


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(torch.linspace(-400, -89, 40).reshape(4, 10), id="all below -88"),
        pytest.param(torch.randn(4, 10, generator=torch.Generator().manual_seed(0)) * 1e4, id="+-1e4"),
        pytest.param(torch.randn(4, 10, generator=torch.Generator().manual_seed(0)) + 1e6, id="offset 1e6"),
        pytest.param(torch.full((4, 10), -3e38), id="near the lowest"),
        pytest.param(torch.zeros(4, 10), id="all equal"),
        pytest.param(torch.full((4, 10), -1e4), id="all -1e4"),
        pytest.param(torch.full((4, 10), -1e4).index_fill(1, torch.tensor([4]), 1e4), id="one +1e4"),
    ],
)
@implementations
def test_extreme_logits(logits, impl):
    logits = logits.to(device_for(impl))
    targets, cu = torch.tensor([0, 9, 4, 4]).to(logits.device), torch.tensor([0, 3, 4]).to(logits.device)
    grads, outputs = [], []
    for x in (logits, logits.double()):
        x = x.clone().requires_grad_()
        out = sequence_logprob(x, targets, cu, return_token_logps=True, return_entropy=True, impl=impl_for(impl, x))
        outputs.append(out)
        grads.append(torch.autograd.grad(out.logps.sum() + out.entropy.sum(), x)[0].double())
    exact = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(outputs[0].token_logps.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs[0].entropy.double(), outputs[1].entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@implementations
def test_large_logits_keep_their_digits(impl):
    # One fp32 log-sum-exp near 1e4 is rounded to 1e-3; max and log-sum apart are not.
    torch.set_default_device(device_for(impl))
    logits = torch.tensor([[10000.0, 10001.0, 9999.5]])
    out = sequence_logprob(logits, torch.tensor([0]), torch.tensor([0, 1]), impl=impl)
    exact = torch.log_softmax(logits.double(), -1)[0, :1]
    together = logits[:, 0] - torch.logsumexp(logits, -1)
    assert (out.logps - exact).abs() < 2e-7
    assert (together - exact).abs() > 1e-4


@implementations
def test_masked_vocabulary_entries(impl):
    torch.set_default_device(device_for(impl))
    logits = torch.tensor([[1.0, -torch.inf, 0.5], [0.0, -torch.inf, 2.0]], requires_grad=True)
    out = sequence_logprob(logits, torch.tensor([0, 2]), torch.tensor([0, 2]), return_entropy=True, impl=impl)
    (grad,) = torch.autograd.grad(3 * out.logps + 2 * out.entropy, logits)
    rest = logits.detach()[:, [0, 2]].requires_grad_()
    twin = sequence_logprob(rest, torch.tensor([0, 1]), torch.tensor([0, 2]), return_entropy=True)
    (expected,) = torch.autograd.grad(3 * twin.logps + 2 * twin.entropy, rest)
    torch.testing.assert_close((out.logps, out.entropy, grad[:, [0, 2]]), (twin.logps, twin.entropy, expected))
    assert grad[:, 1].eq(0).all()


def test_long_sequences_are_summed_in_more_than_fp32():
    rows = 20_000
    logits = torch.zeros(rows, 2)
    logits[0, 1] = 1e5
    out = sequence_logprob(logits, torch.zeros(rows, dtype=torch.long), torch.tensor([0, rows]))
    exact = torch.log_softmax(logits.double(), -1)[:, 0].sum()
    assert (out.logps.double() - exact).abs() <= 0.5 * torch.finfo(torch.float32).eps * 2**17


def test_small_weights_do_not_underflow_in_fp16():
    # The loss scale of fp16 training arrives in backward, after the gradient was made.
    batch = Batch([6, 6], hidden_size=8, vocab=33, dtype=torch.float16, ignored=0)
    weights, scale = batch.weights * 1e-7, 2.0**16
    hidden = batch.hidden.requires_grad_()
    out = linear_weighted_logprob(hidden, batch.weight, *batch.packing, weights)
    (grad,) = torch.autograd.grad(out.total * scale, hidden)
    twin = batch.hidden.detach().double().requires_grad_()
    exact = linear_weighted_logprob(twin, batch.weight.double(), *batch.packing, weights)
    (expected,) = torch.autograd.grad(exact.total * scale, twin)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=4e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["linear_sequence_logprob", "linear_weighted_logprob"])
def test_autocast_multiplies_as_linear_does(name):
    function, naive = OPERATIONS[name]
    results = []
    for seed in range(4):
        batch = Batch([9, 4], hidden_size=24, vocab=123, dtype=torch.float32, seed=seed, scale=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = run(function, batch), run(naive, batch)  # backward runs inside as well
        results.append((ours, theirs, run(naive, in_fp64(batch))))
        assert {x.dtype for x in ours} == {torch.float32}
        assert not torch.equal(ours[-3], run(function, batch)[-3])  # it was bf16 that multiplied
    as_accurate_as_torch(results)


def test_autocast_mixes_dtypes():
    batch = Batch([3, 4], hidden_size=8, vocab=33, dtype=torch.float32)
    hidden = batch.hidden.bfloat16().requires_grad_()
    weight = batch.weight.clone().requires_grad_()
    for function, extra in ((linear_sequence_logprob, ()), (linear_weighted_logprob, (batch.weights,))):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(hidden, weight, *batch.packing, *extra)
            product = F.linear(hidden, weight)
        grads = torch.autograd.grad(out[0].sum(), (hidden, weight))
        assert product.dtype == torch.bfloat16
        assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32]
        twin = sequence_logprob(product, *batch.packing)
        expected = twin.logps if not extra else (twin.logps * batch.weights.float()).sum()
        torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)


def test_backward_multiplies_in_the_dtype_of_forward():
    batch = Batch([3, 4], hidden_size=8, vocab=33, dtype=torch.bfloat16)
    leaves = [batch.hidden.requires_grad_(), batch.weight.requires_grad_()]
    out = linear_sequence_logprob(*leaves, *batch.packing).logps.sum()
    expected = torch.autograd.grad(out, leaves, retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        got = torch.autograd.grad(out, leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear_sequence_logprob", "linear_weighted_logprob"])
def test_the_weight_gradient_of_many_chunks_is_added_up_in_fp32(name):
    # 400 chunks of one row: added up in bf16, what is smaller than 1/256 of the sum so far would be lost.
    function, naive = OPERATIONS[name]
    batch = Batch([400], hidden_size=4, vocab=5, dtype=torch.bfloat16)
    ours, theirs = run(function, batch, memory_budget=1), run(naive, batch)
    as_accurate_as_torch([(ours[-2:], theirs[-2:], run(naive, in_fp64(batch))[-2:])])


@pytest.mark.parametrize("keep", [True, False])
def test_the_upstream_factor_is_not_rounded_to_the_dtype_of_the_gradient(keep):
    # 1.003 is 1 in bf16: every gradient would be off in the same direction.
    batch = Batch([20], hidden_size=8, vocab=33, dtype=torch.bfloat16, ignored=0)
    hidden = batch.hidden.requires_grad_()
    total = linear_weighted_logprob(hidden, batch.weight, *batch.packing, batch.weights).total
    (once,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(total, hidden, torch.tensor(1.003), retain_graph=keep)
    assert torch.equal(scaled, (once.float() * 1.003).bfloat16())
    assert not torch.equal(scaled, once)


def test_autocast_leaves_fp64_alone():
    batch = Batch([3, 4], hidden_size=8, vocab=33)
    expected = run(OPERATIONS["linear_sequence_logprob"][0], batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(OPERATIONS["linear_sequence_logprob"][0], batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
