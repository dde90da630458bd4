"""Numbers of the state as tensors, and what a saved state must be like to be loaded, found before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def vector(numbers: Any) -> Tensor:
    """A number, or (nested) list of them, in fp64 on the CPU; what a later call differentiates with, in any mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return vector(numbers)
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")  # whatever the default device is


def saved_tensor(
    state: Any, name: str, shapes: Sequence[Sequence[int]], *, allow: Sequence[float] = (), low: float = -math.inf
) -> Tensor:
    """The fp64 tensor ``state[name]`` as a copy on the CPU.

    Args:
        state: What the part's `state_dict` gave.
        name: Its key.
        shapes: Those it may have.
        allow: Of NaN and infinity, those that it may hold.
        low: Smallest value.

    Raises:
        ValueError: It is missing or something else; names it.
    """
    value = _entry(state, name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} is a {type(value).__name__}; allowed: a tensor")
    if value.dtype != torch.float64 or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{name!r} is a {value.dtype} tensor on {value.device}; allowed: a dense torch.float64 one")
    allowed = [tuple(shape) for shape in shapes]
    if tuple(value.shape) not in allowed:
        raise ValueError(f"{name!r} has shape {tuple(value.shape)}; allowed: {' or '.join(map(str, allowed))}")
    value = value.detach().cpu().clone()
    fine = value.isfinite() & (value >= low)
    for number in allow:
        fine = fine | (value.isnan() if math.isnan(number) else value == number)
    if not bool(fine.all()):
        first = value[~fine].flatten()[0].item()
        limit = "" if low == -math.inf else f" >= {low:g}"
        raise ValueError(f"{name!r} holds {first}; allowed: {', '.join(['finite numbers' + limit, *map(str, allow)])}")
    return value


def saved_number(state: Any, name: str, *, low: float) -> float:
    """The finite number ``state[name]`` >= low; see `saved_tensor`."""
    value = _entry(state, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
        raise ValueError(f"{name!r} is {value!r}; allowed: a finite number >= {low:g}")
    return value


def saved_count(state: Any, name: str) -> int:
    """The integer ``state[name]`` >= 0; see `saved_tensor`."""
    value = _entry(state, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name!r} is {value!r}; allowed: an integer >= 0")
    return value


def _entry(state: Any, name: str) -> Any:
    if not isinstance(state, Mapping):
        raise ValueError(f"it is a {type(state).__name__}; allowed: a mapping")
    if name not in state:
        raise ValueError(f"it lacks {name!r}; allowed: all that state_dict() gives")
    return state[name]
