"""Which implementation runs, and why."""

import importlib.util
import os
from typing import NamedTuple

import torch

from ._checks import check_choice

IMPLEMENTATIONS = ("auto", "triton", "reference")
# Looked up once, here: a cached function is one that torch.compile warns of.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class Choice(NamedTuple):
    """Which implementation runs, and why.

    Attributes:
        impl: "triton" or "reference".
        reason: one sentence.

    Example:
        >>> import torch
        >>> from barrierlm_kernels import which_impl
        >>> which_impl("auto", device="cpu").reason
        "impl='auto' on cpu: Triton kernels are for CUDA devices"
    """

    impl: str
    reason: str


def which_impl(
    impl: str = "auto", *, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Choice:
    """Tell which implementation an operation would run for tensors on `device` of `dtype`, and why.

    "auto" is Triton on a CUDA (or ROCm) device where Triton is installed, and the torch reference elsewhere and
    for fp64, which the kernels do not compute in. The Triton interpreter (TRITON_INTERPRET=1) runs the kernels on
    the CPU, slowly, for impl="triton" only.

    Args:
        impl: "auto", "triton" or "reference", as given to the operation.
        device: where the tensors are.
        dtype: of the logits or hidden states.

    Returns:
        `Choice(impl, reason)`.

    Raises:
        RuntimeError: impl="triton" cannot run; says why.
        ValueError: `impl` is none of the three.

    Example:
        >>> from barrierlm_kernels import which_impl
        >>> which_impl("reference").impl
        'reference'

    Source: barrierlm. An explicit choice never falls back.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    device = torch.device(device)
    if impl == "reference":
        return Choice("reference", "impl='reference' was asked for")
    obstacle = _obstacle(device.type, dtype, explicit=impl == "triton")
    if obstacle is None:
        return Choice("triton", f"impl={impl!r} on {device.type}: Triton is installed")
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {obstacle}. impl='reference' and impl='auto' run the reference")
    return Choice("reference", f"impl='auto' on {device.type}: {obstacle}")


def choose(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation's name alone; `impl` has been checked."""
    return which_impl(impl, device=device, dtype=dtype).impl


def _obstacle(device: str, dtype: torch.dtype, *, explicit: bool) -> str | None:
    """What keeps the Triton kernels from running; None if nothing does."""
    interpreted = explicit and os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not (interpreted and device == "cpu"):
        return "Triton kernels are for CUDA devices"
    if dtype == torch.float64:
        return "the Triton kernels compute in fp32, not in fp64"
    if not _TRITON_INSTALLED:
        return "the package triton is not installed (pip install 'barrierlm[triton]')"
    return None
