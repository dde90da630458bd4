"""The operations as PyTorch sees them: opcheck, torch.compile without graph breaks, which implementation runs."""

import subprocess
import sys

import pytest
import torch
from barrierlm_kernels import linear_sequence_logprob, linear_weighted_logprob, sequence_logprob, which_impl
from barrierlm_kernels._packing import read_packing
from barrierlm_kernels._segments import segment_sum
from barrierlm_kernels.linear_sequence_logprob.op import linear_token_logprobs, linear_token_logprobs_backward
from barrierlm_kernels.linear_weighted_logprob.op import linear_weighted_total
from barrierlm_kernels.sequence_logprob.op import (
    token_logprobs,
    token_logprobs_backward,
    token_logprobs_backward_,
)
from kernel_oracle import Batch, device_for

N, H, V = 7, 5, 11
IMPLS = ["reference", "triton"]
NEEDS = [[True, True, True], [True, False, False], [False, False, False]]


def samples(impl):
    """(operation, arguments) for every registered operation, with and without what is optional."""
    device = device_for(impl)
    batch = Batch([4, 0, 3], H, V, dtype=torch.float32, ignored=0).to(device)
    targets, counted = batch.targets, torch.tensor([True, True, False, True, True, True, True], device=device)
    hidden, weight, bias = (x.requires_grad_() for x in (batch.hidden, batch.weight, batch.bias))
    logits = batch.logits.detach().requires_grad_()
    column = torch.rand(N, device=device)
    yield read_packing, (targets, batch.cu_seqlens, V, -100)
    yield segment_sum, (column.clone().requires_grad_(), batch.cu_seqlens, impl)
    whole = (None, 0, V)
    statistics = [torch.zeros_like(column), torch.ones_like(column), torch.zeros_like(column)]
    for entropy in (False, True):
        softcap = 3.0 if entropy else None
        grad_entropy = column if entropy else None
        yield token_logprobs, (logits, targets, counted, 0.7, softcap, entropy, False, impl)
        yield (
            token_logprobs_backward,
            ((column, grad_entropy, logits.detach(), targets, counted, statistics, 0.7, softcap, impl)),
        )
        yield (
            token_logprobs_backward_,
            ((column, grad_entropy, logits.detach().clone(), targets, counted, statistics, 0.7, softcap, impl)),
        )
        b = bias if entropy else None
        options = (0.7, softcap, entropy, torch.float32, 100)
        yield linear_token_logprobs, (hidden, weight, b, targets, counted, *options, impl, *whole)
        for needs in NEEDS if entropy else NEEDS[1:]:
            inputs = [None if x is None else x.detach() for x in (hidden, weight, b)]
            rest = (0.7, softcap, torch.float32, 100, impl, *whole, needs)
            yield linear_token_logprobs_backward, (column, grad_entropy, *inputs, targets, counted, statistics, *rest)
    for needs in NEEDS:
        inputs = (x.detach().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs, strict=True))
        options = (0.7, None, torch.float32, 100, False, impl, needs, *whole)
        yield linear_weighted_total, (*inputs, targets, column, *options)


CASES = [(impl, k) for impl in IMPLS for k in range(len(list(samples("reference"))))]


@pytest.mark.parametrize(("impl", "number"), CASES)
def test_opcheck(impl, number):
    if impl == "triton":
        pytest.importorskip("triton")
    operation, arguments = list(samples(impl))[number]
    torch.library.opcheck(operation, arguments)


def losses(impl):
    """One training loss for every public operation: (name, function of hidden, weight, targets, cu_seqlens)."""
    weights = torch.tensor([0.5, 0.0, -1.0])

    def from_logits(hidden, weight, *packing):
        out = sequence_logprob(hidden @ weight.T, *packing, return_entropy=True, softcap=5.0, impl=impl)
        return (out.logps * weights.to(hidden.device)).sum() + 0.1 * out.entropy.sum()

    def from_hidden(hidden, weight, *packing):
        options = {"return_entropy": True, "reduction": "mean", "return_token_logps": True}
        out = linear_sequence_logprob(hidden, weight, *packing, temperature=0.7, **options, impl=impl)
        return (out.logps * weights.to(hidden.device)).sum() + 0.1 * out.entropy.sum() + out.token_logps.square().sum()

    def weighted(hidden, weight, *packing):
        out = linear_weighted_logprob(hidden, weight, *packing, weights.to(hidden.device), impl=impl)
        return out.total * 3

    return {f.__name__: f for f in (from_logits, from_hidden, weighted)}


def training_step(loss, device, **compile_options):
    batch = Batch([4, 0, 3], H, V, dtype=torch.float32).to(device)
    torch.manual_seed(0)
    model = torch.nn.Linear(H, H).to(device)
    head = batch.weight.requires_grad_()

    def step(x, *packing):
        return loss(torch.tanh(model(x)), head, *packing)

    function = torch.compile(step, fullgraph=True, **compile_options) if compile_options else step
    total = function(batch.hidden, *batch.packing)
    total.backward()
    return [total.detach(), model.weight.grad, head.grad]


@pytest.mark.parametrize("name", losses("reference"))
def test_a_step_compiles_whole_on_the_cpu(name):
    torch._dynamo.reset()
    loss = losses("reference")[name]
    eager = training_step(loss, "cpu")
    compiled = training_step(loss, "cpu", backend="inductor")
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_compiled_code_checks_values_too():
    torch._dynamo.reset()
    function = torch.compile(losses("reference")["from_logits"], fullgraph=True, backend="aot_eager")
    batch = Batch([4, 0, 3], H, V, dtype=torch.float32, ignored=0)
    batch.targets[2] = V
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 11\) or be ignore_index"):
        function(batch.hidden, batch.weight, *batch.packing)


def test_which_impl_tells_why():
    assert which_impl(device="cpu") == ("reference", "impl='auto' on cpu: Triton kernels are for CUDA devices")
    assert which_impl("reference", device="cuda").impl == "reference"
    fp64 = which_impl(device="cuda", dtype=torch.float64)
    assert fp64 == ("reference", "impl='auto' on cuda: the Triton kernels compute in fp32, not in fp64")
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'reference', got 'fast'"):
        which_impl("fast")
    pytest.importorskip("triton")
    assert which_impl(device="cuda") == ("triton", "impl='auto' on cuda: Triton is installed")


def test_an_explicit_choice_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = Batch([4, 0, 3], H, V, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: Triton kernels are for CUDA devices"):
        sequence_logprob(batch.logits, *batch.packing, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="compute in fp32, not in fp64"):
        linear_sequence_logprob(batch.hidden.double(), batch.weight.double(), *batch.packing, impl="triton")


def test_without_triton_the_reference_runs_and_triton_says_what_is_missing():
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "sys.modules['triton'] = None; import torch, barrierlm_kernels as k;"
        "assert k.which_impl(device='cuda').impl == 'reference';"
        "out = k.sequence_logprob(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0, 1]));"
        "assert abs(out.logps.item() + 0.6931) < 1e-3;"
        "k.which_impl('triton', device='cuda')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(
        "RuntimeError: impl='triton' cannot run: the package triton is not installed (pip install"
    )
