"""Argument checks. Each error names the argument, what was given and what is allowed.

Shapes, dtypes, devices and option names are checked always. Values are checked on the CPU only: elsewhere
reading them would make the host wait for the device.
"""

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
NUMBERS = (int, float)  # torch.compile before 2.9 cannot trace int | float


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def check_tensor(
    name: str, value: Any, shape: tuple[str, ...], dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> None:
    """Type, number of dimensions, dtype and device of one tensor argument."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != len(shape):
        raise ValueError(f"{name} must have shape [{', '.join(shape)}], got {list(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {_names(dtypes)}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} as the first argument is, got {value.device}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} must be a Python number (a tensor would have to be read back), got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_options(*, ignore_index: Any, temperature: Any, softcap: Any, impl: Any, memory_budget: Any = None) -> None:
    """The options that all operations share."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    if memory_budget is not None and (isinstance(memory_budget, bool) or not isinstance(memory_budget, int)):
        raise TypeError(f"memory_budget must be an int (bytes) or None, got {memory_budget!r}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    check_choice("impl", impl, ("auto", "triton", "reference"))


def check_packing(targets: Any, cu_seqlens: Any, rows: int, vocab: int, device: torch.device) -> None:
    """Shapes and dtypes of targets [N] and cu_seqlens [B+1]; the values are for `check_packing_values`."""
    if vocab < 1:
        raise ValueError("the vocabulary (V) must have at least one entry, got 0")
    check_tensor("targets", targets, ("N",), INTEGERS, device)
    if len(targets) != rows:
        raise ValueError(f"targets must have one entry for each of the {rows} rows, got {len(targets)}")
    check_tensor("cu_seqlens", cu_seqlens, ("B+1",), INTEGERS, device)
    if len(cu_seqlens) < 1:
        raise ValueError("cu_seqlens must have B+1 entries, so at least one, got none")
    if len(cu_seqlens) == 1 and rows:
        raise ValueError(f"cu_seqlens holds no sequence (B=0), but there are {rows} rows")


def check_packing_values(targets: Tensor, cu_seqlens: Tensor, vocab: int, ignore: int) -> None:
    """Offsets that do not decrease from 0 to the number of rows, targets in the vocabulary. Reads them."""
    rows = len(targets)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != rows:
        first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
        raise ValueError(f"cu_seqlens must start at 0 and end at the {rows} rows, got {first} to {last}")
    if (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
    wrong = (targets != ignore) & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        raise ValueError(
            f"targets must lie in [0, {vocab}) or be ignore_index ({ignore}), got {targets[wrong][0].item()}"
        )


def check_head(hidden: Any, weight: Any, bias: Any, autocast: torch.dtype | None) -> None:
    """hidden [N, H], weight [V, H] and bias [V] or None; `autocast` is autocast's dtype, None if it is off."""
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            "weight must be an ordinary tensor, got a DTensor, of which this rank holds a part; call this inside the "
            "forward of the module that FSDP wraps, where the head is whole, or give weight.full_tensor(), or "
            "weight.to_local() with vocab_parallel"
        )
    check_tensor("weight", weight, ("V", "H"), FLOATS, hidden.device)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must have shape [V, H] with H = {hidden.shape[1]} as in hidden, got {list(weight.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias, ("V",), FLOATS, hidden.device)
        if len(bias) != len(weight):
            raise ValueError(f"bias must have V = {len(weight)} entries, got {len(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == hidden.dtype:
            continue
        if autocast is None or torch.float64 in (hidden.dtype, tensor.dtype):
            raise TypeError(
                f"{name} must have hidden's dtype ({hidden.dtype}), got {tensor.dtype}; "
                "only autocast mixes dtypes, and never with torch.float64"
            )
