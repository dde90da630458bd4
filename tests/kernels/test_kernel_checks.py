# ruff: noqa: E501
"""Wrong arguments are refused with their name, what was given and what is allowed; imports stay light."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from barrierlm_kernels import (
    linear_sequence_logprob,
    linear_weighted_logprob,
    padded_to_packed,
    sequence_logprob,
)
from kernel_oracle import Batch

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[2] / "kernels"), "PATH": ""}
T = torch.tensor
N, H, V = 5, 3, 6


def call(name, **changes):
    batch = Batch([2, 0, 3], H, V, dtype=torch.float32, ignored=0)
    arguments = {"targets": batch.targets, "cu_seqlens": batch.cu_seqlens}
    if name == "sequence_logprob":
        arguments["logits"] = batch.logits
    else:
        arguments |= {"hidden": batch.hidden, "weight": batch.weight}
    if name == "linear_weighted_logprob":
        arguments["weights"] = batch.weights
    functions = {f.__name__: f for f in (sequence_logprob, linear_sequence_logprob, linear_weighted_logprob)}
    return functions[name](**(arguments | changes))


ALL = ["sequence_logprob", "linear_sequence_logprob", "linear_weighted_logprob"]
LINEAR = ALL[1:]
SEQUENCE = ALL[:2]
LOGITS, WEIGHTED = ALL[:1], ALL[2:]
META = {"device": "meta"}
FLOATS = "torch.float16, torch.bfloat16, torch.float32, torch.float64"

# operations, changed arguments, error, message
REFUSED = [
    (LOGITS, {"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
    (LOGITS, {"logits": torch.zeros(5)}, ValueError, "logits must have shape [N, V], got [5]"),
    (LOGITS, {"logits": torch.zeros(5, 6).long()}, TypeError, f"logits must have one of the dtypes {FLOATS}, got torch.int64"),
    (LOGITS, {"logits": torch.zeros(5, 0)}, ValueError, "the vocabulary (V) must have at least one entry, got 0"),
    (LINEAR, {"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
    (LINEAR, {"hidden": torch.zeros(1, 5, 3)}, ValueError, "hidden must have shape [N, H], got [1, 5, 3]"),
    (LINEAR, {"hidden": torch.zeros(5, 3).int()}, TypeError, "hidden must have one of the dtypes"),
    (LINEAR, {"weight": "w"}, TypeError, "weight must be a torch.Tensor, got str"),
    (LINEAR, {"weight": torch.zeros(6)}, ValueError, "weight must have shape [V, H], got [6]"),
    (LINEAR, {"weight": torch.zeros(3, 6)}, ValueError, "weight must have shape [V, H] with H = 3 as in hidden, got [3, 6]"),
    (LINEAR, {"weight": torch.zeros(0, 3)}, ValueError, "the vocabulary (V) must have at least one entry, got 0"),
    (LINEAR, {"weight": torch.zeros(6, 3, **META)}, ValueError, "weight must be on cpu as the first argument is, got meta"),
    (LINEAR, {"weight": torch.zeros(6, 3).double()}, TypeError, "weight must have hidden's dtype (torch.float32), got torch.float64"),
    (LINEAR, {"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
    (LINEAR, {"bias": torch.zeros(6, 1)}, ValueError, "bias must have shape [V], got [6, 1]"),
    (LINEAR, {"bias": torch.zeros(5)}, ValueError, "bias must have V = 6 entries, got 5"),
    (LINEAR, {"bias": torch.zeros(6).half()}, TypeError, "bias must have hidden's dtype (torch.float32), got torch.float16"),
    (ALL, {"targets": [0] * N}, TypeError, "targets must be a torch.Tensor, got list"),
    (ALL, {"targets": torch.zeros(1, 5).long()}, ValueError, "targets must have shape [N], got [1, 5]"),
    (ALL, {"targets": torch.zeros(4).long()}, ValueError, "targets must have one entry for each of the 5 rows, got 4"),
    (ALL, {"targets": torch.zeros(5)}, TypeError, "targets must have one of the dtypes torch.int32, torch.int64, got torch.float32"),
    (ALL, {"targets": torch.zeros(5, **META).long()}, ValueError, "targets must be on cpu as the first argument is, got meta"),
    (ALL, {"targets": T([0, 1, 2, 3, 6])}, ValueError, "targets must lie in [0, 6) or be ignore_index (-100), got 6"),
    (ALL, {"targets": T([0, 1, -1, 3, 4])}, ValueError, "targets must lie in [0, 6) or be ignore_index (-100), got -1"),
    (ALL, {"cu_seqlens": (0, 5)}, TypeError, "cu_seqlens must be a torch.Tensor, got tuple"),
    (ALL, {"cu_seqlens": T([[0, 5]])}, ValueError, "cu_seqlens must have shape [B+1], got [1, 2]"),
    (ALL, {"cu_seqlens": T([0.0, 5.0])}, TypeError, "cu_seqlens must have one of the dtypes torch.int32, torch.int64, got torch.float32"),
    (ALL, {"cu_seqlens": T([]).long()}, ValueError, "cu_seqlens must have B+1 entries, so at least one, got none"),
    (ALL, {"cu_seqlens": T([0])}, ValueError, "cu_seqlens holds no sequence (B=0), but there are 5 rows"),
    (ALL, {"cu_seqlens": torch.zeros(4, **META).long()}, ValueError, "cu_seqlens must be on cpu as the first argument is, got meta"),
    (ALL, {"cu_seqlens": T([1, 2, 2, 5])}, ValueError, "cu_seqlens must start at 0 and end at the 5 rows, got 1 to 5"),
    (ALL, {"cu_seqlens": T([0, 2, 2, 4])}, ValueError, "cu_seqlens must start at 0 and end at the 5 rows, got 0 to 4"),
    (ALL, {"cu_seqlens": T([0, 3, 2, 5])}, ValueError, "cu_seqlens must not decrease, got [0, 3, 2, 5]"),
    (SEQUENCE, {"reduction": "none"}, ValueError, "reduction must be one of 'sum', 'mean', got 'none'"),
    (ALL, {"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    (ALL, {"ignore_index": True}, TypeError, "ignore_index must be an int, got True"),
    (ALL, {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    (ALL, {"temperature": float("nan")}, ValueError, "temperature must be positive and finite, got nan"),
    (ALL, {"temperature": T(1.0)}, TypeError, "temperature must be a Python number"),
    (ALL, {"softcap": -30}, ValueError, "softcap must be positive and finite, got -30"),
    (ALL, {"softcap": True}, TypeError, "softcap must be a Python number"),
    (LINEAR, {"memory_budget": 0}, ValueError, "memory_budget must be a positive number of bytes, got 0"),
    (LINEAR, {"memory_budget": 1e6}, TypeError, "memory_budget must be an int (bytes) or None, got 1000000.0"),
    (ALL, {"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
    (WEIGHTED, {"weights": [1.0, 1.0, 1.0]}, TypeError, "weights must be a torch.Tensor, got list"),
    (WEIGHTED, {"weights": T(1.0)}, ValueError, "weights must have shape [B or N], got []"),
    (WEIGHTED, {"weights": T([1, 1, 1])}, TypeError, "weights must have one of the dtypes"),
    (WEIGHTED, {"weights": torch.zeros(3, **META)}, ValueError, "weights must be on cpu as the first argument is, got meta"),
    (WEIGHTED, {"weights": torch.zeros(4)}, ValueError, "weights must have length B = 3 (one for each sequence) or N = 5"),
    (WEIGHTED, {"weights": torch.zeros(5), "weights_per": "sequence"}, ValueError, "weights_per='sequence'; got 5"),
    (WEIGHTED, {"weights": torch.zeros(3), "weights_per": "token"}, ValueError, "weights_per='token'; got 3"),
    (WEIGHTED, {"weights_per": "row"}, ValueError, "weights_per must be one of 'auto', 'sequence', 'token', got 'row'"),
    (WEIGHTED, {"weights": torch.zeros(3, requires_grad=True)}, ValueError, "weights must not require gradient: none flows to them"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        pytest.param(name, changes, error, message, id=f"{name}-{'-'.join(changes)}-{number}")
        for number, (names, changes, error, message) in enumerate(REFUSED)
        for name in names
    ],
)
def test_refused(name, changes, error, message):
    with pytest.raises(error) as caught:
        call(name, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_accepted(name):
    assert call(name)[0].isfinite().all()
    explicit = call(name, impl="reference", temperature=2, softcap=30, ignore_index=-1)
    assert explicit[0].isfinite().all()


X = torch.zeros(2, 3, 4)
IDS, MASK = torch.zeros(2, 3).long(), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1], IDS, MASK), TypeError, "x must be a torch.Tensor, got list"),
        ((X, [1], MASK), TypeError, "targets must be a torch.Tensor, got list"),
        ((X, IDS, None), TypeError, "mask must be a torch.Tensor, got NoneType"),
        ((X[0, 0], IDS, MASK), ValueError, "x must have shape [B, T, ...], got [4]"),
        ((X, IDS[:, 1:], MASK), ValueError, "targets must have shape [B, T] = [2, 3], got [2, 2]"),
        ((X, IDS, MASK.T), ValueError, "mask must have shape [B, T] = [2, 3], got [3, 2]"),
        ((X, IDS, MASK.to("meta")), ValueError, "mask must be on cpu as x is, got meta"),
    ],
)
def test_padded_refused(arguments, error, message):
    with pytest.raises(error) as caught:
        padded_to_packed(*arguments)
    assert message in str(caught.value)


def test_import_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import barrierlm_kernels;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "heavy = new & {'triton', 'transformers', 'numpy', 'barrierlm'};"
        "assert 'barrierlm_kernels' in new and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=120)


def test_runs_where_triton_cannot_be_imported():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, barrierlm_kernels as k;"
        "out = k.sequence_logprob(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0, 1]));"
        "assert abs(out.logps.item() + 0.6931) < 1e-3, out"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=120)
