"""Padded batches as packed rows; the examples in the docstrings."""

import doctest
import importlib
import pkgutil

import barrierlm_kernels
import pytest
import torch
from barrierlm_kernels import linear_sequence_logprob, padded_to_packed, sequence_logprob
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(0, 4),
    length=st.integers(0, 5),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.float32]),
)
def test_padded_equals_masked_sum(batch, length, seed, dtype):
    torch.manual_seed(seed)
    logits = torch.randn(batch, length, 6, dtype=torch.float64)
    ids = torch.randint(6, (batch, length))
    mask = (torch.rand(batch, length) < 0.5).to(dtype)
    out = sequence_logprob(*padded_to_packed(logits, ids, mask))
    picked = torch.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0]
    torch.testing.assert_close(out.logps, torch.where(mask != 0, picked, 0).sum(1))
    assert out.counts.equal((mask != 0).sum(1))


def test_padding_may_hold_nan_and_takes_no_gradient():
    # As after a causal model: position t predicts token t + 1, and padded positions may be garbage.
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 4, 3), torch.randn(5, 3)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]])
    completion_mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    hidden[1, 1:] = torch.nan
    hidden.requires_grad_()
    packed = padded_to_packed(hidden[:, :-1], ids[:, 1:], completion_mask[:, 1:])
    out = linear_sequence_logprob(packed.rows, head, packed.targets, packed.cu_seqlens)
    out.logps.sum().backward()
    assert out.counts.tolist() == [3, 1]
    assert out.logps.isfinite().all()
    moved = hidden.grad.ne(0).any(-1)
    assert moved.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert hidden.grad.isfinite().all()


def test_padded_is_a_view_and_reads_no_value():
    x = torch.randn(2, 3, 4)
    rows, _, cu_seqlens = padded_to_packed(x, torch.zeros(2, 3).long(), torch.ones(2, 3))
    assert rows.data_ptr() == x.data_ptr()
    assert cu_seqlens.tolist() == [0, 3, 6]
    meta = [torch.zeros(2, 3, dtype=torch.long, device="meta") for _ in range(2)]
    assert padded_to_packed(x.to("meta"), *meta, ignore_index=-1).targets.shape == (6,)


MODULES = [x.name for x in pkgutil.walk_packages(barrierlm_kernels.__path__, "barrierlm_kernels.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("name", barrierlm_kernels.__all__)
def test_public_names_have_an_example(name):
    documentation = getattr(barrierlm_kernels, name).__doc__
    assert ">>> " in documentation
    assert "Example:" in documentation
