"""The Triton kernels against fp64: in the interpreter where there is no GPU, natively where there is one."""

import pytest
import torch
from barrierlm_kernels import linear_weighted_logprob, sequence_logprob
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import OPERATIONS, Batch, as_accurate_as_torch, device_for, in_fp64, run

pytest.importorskip("triton")

DEVICE = device_for("triton")
TRITON = {"impl": "triton"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def three(name, batch, **options):
    """(Triton's, plain PyTorch's, fp64's) outputs and gradients."""
    function, naive = OPERATIONS[name]
    plain = {k: v for k, v in options.items() if k not in ("memory_budget", "compact", "per_token")}
    return (
        run(function, batch, **options, **TRITON),
        run(naive, batch, **plain),
        run(naive, in_fp64(batch), **plain),
    )


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=15, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=4).filter(any),
    vocab=st.sampled_from([33, 252, 507, 1031]),
    hidden_size=st.sampled_from([7, 96, 123]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    reduction=st.sampled_from(["sum", "mean"]),
    use_bias=st.booleans(),
    chunks=st.sampled_from([None, 3, 8]),
    compact=st.booleans(),
)
def test_every_combination_of_options(
    name, lengths, vocab, hidden_size, dtype, seed, ignored, temperature, softcap, reduction, use_bias, chunks, compact
):
    variant = {"compact": compact} if name == "linear_weighted_logprob" else {"reduction": reduction}
    budget = None if chunks is None else chunks * vocab * dtype.itemsize
    options = {"temperature": temperature, "softcap": softcap, "memory_budget": budget, "use_bias": use_bias}
    results = []
    for k in range(3):
        batch = Batch(lengths, hidden_size, vocab, dtype, seed + k, ignored, scale=hidden_size**-0.5)
        results.append(three(name, batch.to(DEVICE), **options, **variant))
    as_accurate_as_torch(results, given=dtype)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_smallest_shapes(name, vocab, lengths):
    batch = Batch(lengths, 1, vocab, dtype=torch.float32, ignored=0).to(DEVICE)
    got = run(OPERATIONS[name][0], batch, **TRITON)
    torch.testing.assert_close(got, run(OPERATIONS[name][1], batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("vocab", [252, 507, 1031, 5003])
@pytest.mark.parametrize("name", OPERATIONS)
def test_odd_shapes(name, vocab, dtype):
    # Vocabularies that no tile divides, hidden sizes that no vector width does, 5003 in more than one tile.
    results = []
    for seed, hidden_size in enumerate((96, 123)):
        batch = Batch([0, 1, 2, 30], hidden_size, vocab, dtype=dtype, seed=seed, scale=hidden_size**-0.5)
        results.append(three(name, batch.to(DEVICE), softcap=20.0))
    as_accurate_as_torch(results)


@pytest.mark.parametrize("name", OPERATIONS)
def test_long_sequences(name):
    batch = Batch([300, 0, 1], 9, 40, dtype=torch.float32)
    as_accurate_as_torch([three(name, batch.to(DEVICE))])


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_call_gives_the_same_bits(name):
    batch = Batch([5, 0, 12], 16, 507, dtype=torch.bfloat16).to(DEVICE)
    first, second = (run(OPERATIONS[name][0], batch, softcap=9.0, **TRITON) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_output_is_written(name, impl, monkeypatch):
    # Memory that is handed out holds NaN; what comes back must not.
    batch = Batch([3, 0, 1, 6], 8, 71, dtype=torch.float32).to(DEVICE)
    clean = run(OPERATIONS[name][0], batch, impl=impl)

    def poisoned(make):
        def made(*args, **kw):
            out = make(*args, **kw)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-7)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    got = run(OPERATIONS[name][0], batch, impl=impl)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_and_weightless_rows_may_hold_anything(dtype, poison):
    batch = Batch([4, 3, 2], 8, 71, dtype=dtype, ignored=0)
    batch.targets[[1, 7, 8]] = -100
    batch.bias[3] = 200.0 if dtype != torch.float16 else 20.0
    batch.weights[1] = 0
    batch.row_weights = batch.weights.repeat_interleave(torch.tensor(batch.lengths))
    batch = batch.to(DEVICE)
    # (rows that may hold anything, operation): with an upstream gradient everywhere, but no weight for sequence 1.
    for name, rows in (("linear_sequence_logprob", [1, 7, 8]), ("linear_weighted_logprob", [1, 4, 5, 6, 7, 8])):
        clean = run(OPERATIONS[name][0], batch, **TRITON)
        kept = batch.hidden.clone()
        batch.hidden[rows] = poison
        dirty = run(OPERATIONS[name][0], batch, **TRITON)
        batch.hidden = kept
        assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))
        assert dirty[-3][rows].eq(0).all()
    logits = batch.logits.detach()
    logits[[1, 7, 8]] = poison
    logits.requires_grad_()
    out = sequence_logprob(logits, *batch.packing, return_entropy=True, return_token_logps=True, **TRITON)
    (grad,) = torch.autograd.grad((out.logps + 2 * out.entropy).sum() + out.token_logps.sum(), logits)
    assert grad.isfinite().all()
    assert grad[[1, 7, 8]].eq(0).all()
    assert torch.cat([out.logps, out.entropy, out.token_logps]).isfinite().all()


def test_poison_stays_in_its_row():
    logits = torch.randn(5, 300, device=DEVICE)
    logits[2, 7] = float("nan")
    logits.requires_grad_()
    cu = torch.tensor([0, 2, 3, 5], device=DEVICE)
    targets = torch.tensor([1, 2, 3, 4, 5], device=DEVICE)
    out = sequence_logprob(logits, targets, cu, return_entropy=True, **TRITON)
    assert out.logps.isnan().tolist() == out.entropy.isnan().tolist() == [False, True, False]
    upstream = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    (grad,) = torch.autograd.grad(out.logps, logits, upstream)
    assert grad.isfinite().all()
    assert grad[2].eq(0).all()
    assert grad[[0, 1, 3, 4]].abs().sum(1).gt(0).all()


def test_upstream_gradients_of_any_layout():
    # An expanded scalar (stride 0) and every second element of a longer tensor.
    batch = Batch([4, 0, 5], 8, 71, dtype=torch.float32, ignored=0).to(DEVICE)
    logits = batch.logits.detach().requires_grad_()
    for make in (
        lambda n: torch.tensor(2.5, device=DEVICE).expand(n),
        lambda n: torch.arange(2.0 * n, device=DEVICE)[::2],
    ):
        grads = []
        for impl in ("triton", "reference"):
            out = sequence_logprob(logits, *batch.packing, return_entropy=True, return_token_logps=True, impl=impl)
            outputs = (out.logps, out.entropy, out.token_logps)
            grads.append(torch.autograd.grad(outputs, logits, [make(len(x)) for x in outputs])[0])
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t().contiguous().t(), id="transposed"),
        pytest.param(lambda x: torch.stack([x, x], -1)[..., 0], id="every second column"),
        pytest.param(lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], id="rows apart"),
    ],
)
def test_logits_of_any_layout(view):
    batch = Batch([4, 0, 5], 8, 71, dtype=torch.float32).to(DEVICE)
    results = []
    for logits in (batch.logits.detach(), view(batch.logits.detach())):
        logits.requires_grad_()
        out = sequence_logprob(logits, *batch.packing, softcap=5.0, return_entropy=True, **TRITON)
        results.append([*torch.autograd.grad((out.logps + out.entropy).sum(), logits), out.logps, out.entropy])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_backward_in_place(impl, entropy):
    batch = Batch([4, 0, 5], 8, 71, dtype=torch.bfloat16).to(DEVICE)

    def grad_of(inplace):
        leaf = batch.logits.detach().requires_grad_()
        logits = leaf * 1.0
        out = sequence_logprob(logits, *batch.packing, return_entropy=entropy, inplace_backward=inplace, impl=impl)
        before = logits.detach().clone()
        (out.logps.sum() + (out.entropy.sum() if entropy else 0)).backward()
        return leaf.grad, not torch.equal(logits, before)

    expected, changed = grad_of(False)
    assert not changed
    got, changed = grad_of(True)
    assert changed
    assert torch.equal(got, expected)


def test_backward_in_place_spares_a_graph_that_is_kept():
    batch = Batch([4, 0, 5], 8, 71, dtype=torch.float32).to(DEVICE)
    leaf = batch.logits.detach().requires_grad_()
    out = sequence_logprob(leaf * 1.0, *batch.packing, inplace_backward=True)
    first = torch.autograd.grad(out.logps.sum(), leaf, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(out.logps.sum(), leaf)[0], first)


def test_rows_lie_in_the_first_dimension_of_the_grid(monkeypatch):
    # It holds 2^31 - 1 programs, the others 65,535.
    from barrierlm_kernels._rows import triton as kernels

    grids = []

    class Recording:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kw: None

    names = ["measure_kernel", "differentiate_kernel", "measure_and_differentiate_kernel"]
    for name in names:
        monkeypatch.setattr(kernels, name, Recording())
    rows, vocab = 65_537, 2**20
    logits = torch.empty(rows, vocab, device="meta")
    column = torch.empty(rows, device="meta")
    work = kernels.TritonRows(rows, vocab, logits, block_rows=rows, temperature=1.0, softcap=None, entropy=False)
    work.measure(logits, column.long(), 0)
    work.differentiate(logits, logits, column.long(), 0, column, None)
    work.measure_and_differentiate_(logits, column.long(), 0, column)
    assert grids == [(rows,), (rows, vocab // 4096), (rows,)]


@pytest.mark.parametrize("what", ["rows", "columns"])
def test_offsets_beyond_int32(what):
    # Two rows, or two columns, that lie 2^31 + 11 elements apart; the memory between them is never touched.
    far = 2**31 + 11
    batch = Batch([1, 1], 4, 2 if what == "columns" else 37, dtype=torch.bfloat16, ignored=0).to(DEVICE)
    near = batch.logits.detach()
    room = torch.empty(far + 100, dtype=torch.bfloat16, device=DEVICE)
    logits = room.as_strided(near.shape, (far, 1) if what == "rows" else (1, far)).copy_(near)
    results = []
    for x in (near, logits):
        x.requires_grad_()
        out = sequence_logprob(x, *batch.packing, **TRITON)
        results.append((out.logps, *torch.autograd.grad(out.logps.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_token_logps_of_the_weighted_sum():
    batch = Batch([3, 0, 4], 8, 71, dtype=torch.float32).to(DEVICE)
    batch.weights[0] = 0
    for impl in ("reference", "triton"):
        for compact in (False, True):
            out = linear_weighted_logprob(
                batch.hidden,
                batch.weight,
                *batch.packing,
                batch.weights,
                return_token_logps=True,
                compact=compact,
                impl=impl,
            )
            expected = sequence_logprob(batch.logits, *batch.packing, return_token_logps=True).token_logps
            expected[:3] = 0
            torch.testing.assert_close(out.token_logps, expected, rtol=1e-5, atol=1e-5)
            assert not out.token_logps.requires_grad
