"""What a call or a window has against it, found before any state changes; a call's without a host sync."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .estimators import Column
from .sampling import Sampled


def check_call(
    names: tuple[str, ...], measurements: Any, num_samples: Any, loss_divisor: Any, *, how: str = "combine"
) -> None:
    """Everything about a call that shapes, names and types tell, before any state changes.

    ``how`` is what a `Sampled` is for: "combine", "calibrate" and "measure" (no gradient) or "linear" (which makes
    logps itself).
    """
    for argument, mapping in (("measurements", measurements), ("num_samples_in_window", num_samples)):
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{argument} is a {type(mapping).__name__}; allowed: a mapping by constraint name")
        unknown = [name for name in mapping if name not in names]
        if unknown:
            raise ValueError(f"{argument} has {unknown[0]!r}; allowed: the constraints {', '.join(map(repr, names))}")
    grad = torch.is_grad_enabled()
    for name, value in measurements.items():
        _check_measurement(name, value, how, grad)
    for name, n in num_samples.items():
        if isinstance(n, Tensor):
            if n.dim() != 0:
                raise ValueError(f"num_samples_in_window[{name!r}] has shape {tuple(n.shape)}; allowed: 0-d")
        elif isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
            raise ValueError(f"num_samples_in_window[{name!r}]={n!r}; allowed: an integer >= 0")
    if isinstance(loss_divisor, bool) or not isinstance(loss_divisor, Real) or not 0 < float(loss_divisor) < math.inf:
        raise ValueError(f"loss_divisor={loss_divisor!r}; allowed: a finite number > 0")


def check_sums(names: tuple[str, ...], sums: list[list[float]], *, raise_nonfinite: bool) -> None:
    """What the sums of a reduced window [K, Column.POSITIONS] say against committing them, before anything changes."""
    for name, row in zip(names, sums, strict=True):
        if row[Column.BAD_GROUPS] and not row[Column.NONFINITE]:
            raise ValueError(f"groups of {name!r}: a prompt has one response; allowed: at least 2 per group")
    for name, row in zip(names, sums, strict=True):
        if raise_nonfinite and row[Column.NONFINITE]:
            raise FloatingPointError(
                f"{int(row[Column.NONFINITE])} NaN or infinite value(s) measured for {name!r}; no estimate was "
                "changed. discard_window() forgets this window; nonfinite='skip' drops such windows by itself"
            )


def _check_sampled(name: str, value: Sampled, how: str, grad: bool) -> None:
    if how == "linear":
        if value.logps is not None and value.logps.requires_grad:
            raise ValueError(
                f"measurements[{name!r}]: logps require grad, and linear() makes the gradient itself; allowed: leave "
                "logps out, or logps.detach() where their numbers are needed (old_logps, reference_kl)"
            )
        return
    if value.logps is None and (how == "combine" or value.needs_logps):
        raise ValueError(
            f"measurements[{name!r}]: logps is missing; allowed: the policy's log-probabilities, with gradient (only "
            "linear() makes them itself)"
        )
    if value.credited_per_token and value.cu_seqlens is None:
        raise ValueError(
            f"measurements[{name!r}]: cu_seqlens is missing; allowed: the responses' offsets [B+1] (only linear() has "
            "them from its batch)"
        )
    # An empty micro-batch has no gradient to give.
    if grad and value.logps is not None and not value.logps.requires_grad and value.logps.numel():
        raise ValueError(
            f"measurements[{name!r}]: logps do not require grad; allowed: log-probabilities that the policy "
            "computed with gradients on"
        )


def _check_measurement(name: str, value: Any, how: str, grad: bool) -> None:
    if isinstance(value, Sampled):
        _check_sampled(name, value, how, grad)
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"measurements[{name!r}] is a {type(value).__name__}; allowed: Sampled, a tensor [n] or a 0-d tensor"
        )
    if not value.is_floating_point():
        raise TypeError(f"measurements[{name!r}] has dtype {value.dtype}; allowed: a floating dtype")
    if value.dim() > 1:
        raise ValueError(f"measurements[{name!r}] has shape {tuple(value.shape)}; allowed: [n] or 0-d")
    if grad and not value.requires_grad and value.numel():
        raise ValueError(
            f"measurements[{name!r}] is a tensor without gradient: a constraint that does nothing. Did you mean "
            "Sampled(values=..., logps=...)? allowed: a tensor with gradient, or Sampled"
        )
