"""What is not made: a tensor [N, V], gradients nobody asked for, copies, waits for the device."""

import pytest
import torch
from barrierlm_kernels import linear_sequence_logprob, linear_weighted_logprob, sequence_logprob
from kernel_oracle import OPERATIONS, Batch, Recorder, run

LINEAR = ["linear_sequence_logprob", "linear_weighted_logprob"]
ROWS, SIZE, VOCAB = 64, 7, 123


def record(name, *, needs=(True, True), grad=True, weights=None, **kw):
    """Largest tensor and flops of forward plus backward, in units of N V (H)."""
    batch = Batch([30, 0, 34], SIZE, VOCAB, dtype=torch.float32, ignored=0)
    if weights is not None:
        batch.weights = torch.tensor(weights)
    hidden, weight = batch.hidden.requires_grad_(needs[0]), batch.weight.requires_grad_(needs[1])
    with Recorder() as recorder, torch.set_grad_enabled(grad):
        outputs = OPERATIONS[name][0](hidden, weight, None, batch, **kw)
        if grad and any(needs):
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert (hidden.grad is not None) == (needs[0] and grad)
    assert (weight.grad is not None) == (needs[1] and grad)
    return recorder.largest / (ROWS * VOCAB), recorder.flops / (ROWS * VOCAB * SIZE)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_the_logits_never_exist_as_a_whole(name, options):
    largest, _ = record(name, memory_budget=8 * VOCAB * 4, **options)
    assert largest == max(8 * VOCAB, VOCAB * SIZE) / (ROWS * VOCAB)  # a chunk of 8 rows, or dW


@pytest.mark.parametrize(
    ("name", "needs", "flops"),
    [
        ("linear_sequence_logprob", (True, True), 8),
        ("linear_sequence_logprob", (True, False), 6),
        ("linear_sequence_logprob", (False, True), 6),
        ("linear_sequence_logprob", (False, False), 2),
        ("linear_weighted_logprob", (True, True), 6),
        ("linear_weighted_logprob", (True, False), 4),
        ("linear_weighted_logprob", (False, True), 4),
        ("linear_weighted_logprob", (False, False), 2),
    ],
)
def test_only_what_is_asked_for_is_computed(name, needs, flops):
    for budget in (None, 10 * VOCAB * 4):
        assert record(name, needs=needs, memory_budget=budget)[1] == flops


@pytest.mark.parametrize("name", LINEAR)
def test_no_gradient_is_made_under_no_grad(name):
    assert record(name, grad=False)[1] == 2


def test_compact_drops_weightless_rows_from_the_products():
    weights = [1.0, 1.0, 0.0]
    assert record("linear_weighted_logprob", weights=weights)[1] == 6
    assert record("linear_weighted_logprob", weights=weights, compact=True)[1] == 6 * 30 / ROWS


@pytest.mark.parametrize("compact", [False, True])
def test_all_weights_zero(compact):
    batch = Batch([3, 2], 4, 6)
    batch.weights = torch.zeros(2)
    got = run(OPERATIONS["linear_weighted_logprob"][0], batch, compact=compact)
    assert all(x.eq(0).all() for x in got)
    assert len(got) == 4


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_results_do_not_depend_on_the_chunks(name, dtype, options):
    batch = Batch([12, 5], hidden_size=8, vocab=33, dtype=dtype)
    whole = run(OPERATIONS[name][0], batch, **options)
    for budget in (1, 3 * 33 * dtype.itemsize, 7 * 33 * 8):  # 1 byte: a chunk of 1 row
        for a, b in zip(run(OPERATIONS[name][0], batch, memory_budget=budget, **options), whole, strict=True):
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_tiles(dtype, monkeypatch):
    # 2**22 bytes of work space hold all rows of a test; make it hold 3.
    from barrierlm_kernels._rows.reference import ReferenceRows

    batch = Batch([9, 5], hidden_size=8, vocab=33, dtype=dtype)
    options = {"softcap": 3.0, "temperature": 0.7}
    whole = {name: run(OPERATIONS[name][0], batch, **options) for name in OPERATIONS}
    made = ReferenceRows.__init__

    def small(self, *args, **kw):
        made(self, *args, **kw)
        self.tile_rows = 3

    monkeypatch.setattr(ReferenceRows, "__init__", small)
    for name in OPERATIONS:
        got = run(OPERATIONS[name][0], batch, **options)
        torch.testing.assert_close(got, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_graph_can_be_kept(dtype):
    # The gradients are scaled in place when they are handed over; with retain_graph they must survive.
    batch = Batch([5, 4], hidden_size=6, vocab=12, dtype=dtype)
    leaves = [x.requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    (total,) = OPERATIONS["linear_weighted_logprob"][0](*leaves, batch)
    upstream = torch.tensor(3.0, dtype=total.dtype)
    first = [x.clone() for x in torch.autograd.grad(total, leaves, upstream, retain_graph=True)]
    second = [x.clone() for x in torch.autograd.grad(total, leaves, upstream, retain_graph=True)]
    last = torch.autograd.grad(total, leaves, upstream)
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(total, leaves)


def test_gradients_are_handed_over_without_a_copy():
    batch = Batch([5, 4], hidden_size=6, vocab=12, dtype=torch.float32)
    weight = batch.weight.requires_grad_()
    (total,) = OPERATIONS["linear_weighted_logprob"][0](batch.hidden, weight, None, batch)
    saved = next(x for x in total.grad_fn.saved_tensors if x is not None and x.shape == weight.shape)
    address = saved.data_ptr()
    del saved
    total.backward()
    assert weight.grad.data_ptr() == address


def test_gradients_accumulate_over_calls():
    batch = Batch([5, 4], hidden_size=6, vocab=12)
    weight = batch.weight.requires_grad_()
    for _ in range(2):
        OPERATIONS["linear_weighted_logprob"][0](batch.hidden, weight, None, batch)[0].backward()
    twice = weight.grad.clone()
    weight.grad = None
    OPERATIONS["linear_weighted_logprob"][0](batch.hidden, weight, None, batch)[0].backward()
    torch.testing.assert_close(twice, 2 * weight.grad)


def test_nothing_reads_a_value():
    # Meta tensors have none: any .item(), nonzero or boolean index raises. compact=True needs the one it admits.
    hidden = torch.empty(7, 5, device="meta", requires_grad=True)
    weight = torch.empty(11, 5, device="meta", requires_grad=True)
    packing = (torch.empty(7, dtype=torch.long, device="meta"), torch.empty(4, dtype=torch.int32, device="meta"))
    weights = torch.empty(3, device="meta")
    kw = {"softcap": 2.0, "return_entropy": True, "reduction": "mean"}
    out = linear_sequence_logprob(hidden, weight, *packing, bias=weight[:, 0], **kw)
    (out.logps.sum() + out.entropy.sum()).backward()
    out = sequence_logprob(hidden, *packing, **kw)
    (out.logps.sum() + out.entropy.sum()).backward()
    linear_weighted_logprob(hidden, weight, *packing, weights).total.backward()
    assert hidden.grad.shape == (7, 5)
    with pytest.raises(NotImplementedError, match="nonzero"):
        linear_weighted_logprob(hidden, weight, *packing, weights, compact=True)
