"""Slices of the vocabulary on several ranks give what the whole head gives on one."""

import pytest
import torch
from launch import launch


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    pytest.importorskip("triton")
    return launch("vocabulary.py", request.param, tmp_path_factory.mktemp("vocabulary"))


def test_fp64_is_exact(results):
    for rank in results:
        assert len(rank["exact"]) == 42
        assert max(rank["exact"].values()) < 1e-13, rank["exact"]


def test_error_is_that_of_plain_torch(results):
    """In fp32, bf16 and fp16, relative to fp64, over all outputs and gradients; also of the Triton kernels."""
    for rank in results:
        assert len(rank["error"]) == 8
        assert max(rank["error"].values()) <= 1, rank["error"]


def test_ranks_have_the_same_bits(results):
    """Replicas stay replicas: outputs and the gradient for hidden states do not depend on the rank."""
    first, *others = results
    for kind, tensors in first["bits"].items():
        for other in others:
            assert all(map(torch.equal, tensors, other["bits"][kind])), kind


def test_a_masked_slice_and_large_logits(results):
    for rank in results:
        assert max(rank["masked"].values()) < 1e-5, rank["masked"]


def test_rows_without_weight_may_hold_nan(results):
    for rank in results:
        hidden, head = rank["poisoned"]["hidden"], rank["poisoned"]["head"]
        assert hidden[:3].abs().min() > 0
        assert hidden[3:].eq(0).all()
        assert head.isfinite().all()


def test_compiles_whole(results):
    for rank in results:
        assert rank["compiled"] == [0, 0]


def test_errors_say_what_is_allowed(results):
    for rank in results:
        below_one, no_int, whole_head, target, kind = rank["errors"]
        assert below_one.startswith("rows must be at least 1 on every rank, got [0, 3")
        assert no_int == "rows must be an int, got 2.0"
        assert "rows that vocab_parallel was made for, got 37" in whole_head
        assert target.startswith("targets must lie in [0, 37)")
        assert kind.startswith("vocab_parallel must be a VocabParallel or None, got ")
