"""What only a GPU can show: native compilation, waits for the device, graphs, memory, large offsets."""

import pytest
import torch
from barrierlm_kernels import (
    constraint_weights,
    linear_sequence_logprob,
    linear_weighted_logprob,
    sequence_logprob,
    which_impl,
)
from barrierlm_kernels._head import _accumulates_in_product
from kernel_oracle import OPERATIONS, Batch, as_accurate_as_torch, in_fp64, run
from test_registered_ops import losses, training_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def one_step(hidden, weight, targets, cu, weights):
    """All operations, forward and backward."""
    out = linear_sequence_logprob(hidden, weight, targets, cu, return_entropy=True)
    total = (out.logps * weights).sum() + out.entropy.sum()
    total = total + linear_weighted_logprob(hidden, weight, targets, cu, weights, weights_per="sequence").total
    total = total + sequence_logprob(hidden @ weight.T, targets, cu, inplace_backward=True).logps.sum()
    total.backward()
    return total


def large(lengths=(100, 0, 57), hidden_size=64, vocab=5003, dtype=torch.bfloat16):
    batch = Batch(list(lengths), hidden_size, vocab, dtype=dtype, scale=hidden_size**-0.5).to("cuda")
    return batch.hidden.requires_grad_(), batch.weight.requires_grad_(), *batch.packing, batch.weights.float()


def test_auto_is_triton_here():
    assert which_impl(device="cuda").impl == "triton"


def test_a_step_never_waits_for_the_device():
    arguments = large()
    one_step(*arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_constraint_weights_in_a_cuda_graph_and_in_one_launch():
    costs = torch.rand(8, 64, device="cuda")
    center, groups = torch.zeros(8, device="cuda"), torch.arange(64, device="cuda") // 4
    bounds = {"upper": torch.full((8,), 0.4, device="cuda"), "mu": torch.tensor(0.1, device="cuda")}

    def weights():
        return constraint_weights(costs, center, groups=groups, **bounds)

    expected = weights()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        weights()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]
    assert len(kernels) == 1, [e.name for e in kernels]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = weights()
    costs.copy_(torch.rand(8, 64, device="cuda"))
    graph.replay()
    torch.testing.assert_close(captured.weights, weights().weights)
    assert not torch.equal(captured.weights, expected.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_large_vocabularies(name, dtype):
    function, naive = OPERATIONS[name]
    batch = Batch([300, 0, 1, 41], 256, 128_256, dtype=dtype, scale=1 / 16).to("cuda")
    ours = run(function, batch, memory_budget=100 * 128_256 * dtype.itemsize, softcap=30.0)
    as_accurate_as_torch(
        [(ours, run(naive, batch, softcap=30.0), run(naive, in_fp64(batch), softcap=30.0))], given=dtype
    )


@pytest.mark.parametrize("name", losses("triton"))
def test_a_step_compiles_whole(name):
    torch._dynamo.reset()
    loss = losses("triton")[name]
    eager = training_step(loss, "cuda")
    torch.testing.assert_close(training_step(loss, "cuda", backend="inductor"), eager, rtol=1e-4, atol=1e-5)


def test_more_rows_than_a_second_grid_dimension_holds():
    rows = 70_000
    logits = torch.randn(rows, 9, device="cuda", requires_grad=True)
    targets, cu = torch.randint(9, (rows,), device="cuda"), torch.tensor([0, rows], device="cuda")
    out = sequence_logprob(logits, targets, cu)
    expected = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None]).sum()
    torch.testing.assert_close(out.logps[0].double(), expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(out.logps.sum(), logits)
    torch.testing.assert_close(grad.sum(1), torch.zeros(rows, device="cuda"), rtol=0, atol=1e-5)


def test_more_logits_than_int32_counts():
    rows, vocab = 17_000, 131_072  # 2.2e9 logits, 4.5 GB
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets, cu = torch.randint(vocab, (rows,), device="cuda"), torch.tensor([0, rows - 1, rows], device="cuda")
    out = sequence_logprob(logits, targets, cu)
    last = torch.log_softmax(logits[-1].double(), -1)
    torch.testing.assert_close(out.logps[1].double(), last[targets[-1]], rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(out.logps[1], logits)
    expected = -last.exp()
    expected[targets[-1]] += 1
    torch.testing.assert_close(grad[-1].double(), expected, rtol=1e-2, atol=1e-8)
    assert grad[:-1].eq(0).all()


def test_the_weight_gradient_is_accumulated_in_fp32():
    # 64 chunks of one row with equal gradients: added up in bf16 they would stop growing.
    rows, size, vocab = 4096, 64, 512
    hidden = torch.ones(rows, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(vocab, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets, cu = torch.zeros(rows, dtype=torch.long, device="cuda"), torch.tensor([0, rows], device="cuda")
    weights = torch.full((rows,), 1 / 512, device="cuda")
    budget = 64 * vocab * 2
    out = linear_weighted_logprob(hidden, weight, targets, cu, weights, memory_budget=budget)
    out.total.backward()
    expected = rows / 512 * (1 - 1 / vocab)
    torch.testing.assert_close(weight.grad[0].float(), torch.full((size,), expected, device="cuda"), rtol=4e-3, atol=0)


def test_sums_within_the_product_where_torch_can():
    total = torch.randn(40, 24, device="cuda")
    left = torch.randn(40, 16, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(16, 24, device="cuda", dtype=torch.bfloat16)
    if not _accumulates_in_product(total.device, torch.bfloat16):
        pytest.skip("this torch does not add bf16 products to fp32")
    expected = total.double() + left.double() @ right.double()
    got = torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    assert got.data_ptr() == total.data_ptr()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_memory_beyond_the_gradients():
    rows, size, vocab = 4096, 1024, 65_536
    hidden = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16).mul_(size**-0.5).requires_grad_()
    weight = torch.randn(vocab, size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets, cu = torch.randint(vocab, (rows,), device="cuda"), torch.arange(0, rows + 1, 64, device="cuda")
    weights, budget = torch.ones(64, device="cuda"), 64 * 2**20
    for _ in range(2):  # the first pass compiles, and takes cuBLAS's work space
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_weighted_logprob(hidden, weight, targets, cu, weights, memory_budget=budget).total.backward()
        peak = torch.cuda.max_memory_allocated() - before
    gradients = hidden.numel() * 2 + weight.numel() * 4
    assert peak - gradients < max(budget, weight.numel() * 2) + 32 * 2**20


@pytest.mark.parametrize("name", OPERATIONS)
def test_two_runs_give_the_same_bits(name):
    batch = Batch([300, 0, 41], 128, 32_000, dtype=torch.bfloat16, scale=128**-0.5).to("cuda")
    first, second = (run(OPERATIONS[name][0], batch) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
