"""Row statistics and gradients as Triton kernels: one program a row, or a block of a row."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import Rows

_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tanh(x):
    """tanh to about 2 units in the last place: a polynomial near 0 (Cephes' coefficients), exp elsewhere."""
    q = x * x
    p = -5.70498872745e-3
    p = p * q + 2.06390887954e-2
    p = p * q - 5.37397155531e-2
    p = p * q + 1.33314422036e-1
    p = p * q - 3.33332819422e-1
    near = x + x * q * p
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(z, bias, columns, inside, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """(y, tanh) of a block of raw logits; tanh is y itself where there is no softcap."""
    y = z.to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    t = y
    if HAS_SOFTCAP:
        t = _tanh(y / softcap)
        y = t * softcap
    return y, t


@triton.jit
def _statistics(
    row, z, bias, target, V, stride_v, scale, inverse_t, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(max y, sum exp(x), sum exp(x) x / sum exp(x), x of the target) of one row, in one read of V logits.

    A lane is WIDTH neighbouring logits, which one thread loads at once. Each keeps a maximum and a sum of its own; they
    meet once, at the end. So the loop holds no exchange between threads, and a sum moves to a new maximum once a lane.
    """
    LANES: tl.constexpr = BLOCK // WIDTH
    peak = tl.full([LANES], _LOWEST, dtype=tl.float32)
    total = tl.zeros([LANES], dtype=tl.float32)
    moment = tl.zeros([LANES], dtype=tl.float32)  # sum of exp2(x) x, with x = (y - peak) / T in units of log 2
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = columns < V
        raw = tl.load(z + row + columns.to(tl.int64) * stride_v, mask=inside, other=0.0)
        y, _ = _logits(raw, bias, columns, inside, softcap, HAS_BIAS, HAS_SOFTCAP)
        y = tl.where(inside, y, float("-inf"))
        higher = tl.maximum(peak, tl.max(y, axis=1))
        x = (y - higher[:, None]) * scale
        e = tl.exp2(x)
        move = (peak - higher) * scale
        kept = tl.exp2(move)
        if ENTROPY:
            # An exponential of 0 comes with an x that may be infinite, and 0 * inf is NaN.
            moved = tl.where(kept > 0, (moment + move * total) * kept, 0.0)
            moment = moved + tl.sum(tl.where(e == 0, 0.0, e * x), axis=1)
        total = total * kept + tl.sum(e, axis=1)
        peak = higher
    top = tl.max(peak, axis=0)
    x = (peak - top) * scale
    e = tl.exp2(x)
    sum_all = tl.sum(total * e, axis=0)
    mean = 0.0
    if ENTROPY:
        lane = tl.where(e > 0, (moment + x * total) * e, 0.0)
        mean = tl.sum(lane, axis=0) / sum_all * _LN2
    raw = tl.load(z + row + target * stride_v)
    y = raw.to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + target).to(tl.float32)
    if HAS_SOFTCAP:
        y = _tanh(y / softcap) * softcap
    return top, sum_all, mean, (y - top) * inverse_t


@triton.jit
def _gradient(
    y, t, columns, target, peak, inverse_total, moment, grad_logp, grad_entropy, scale, inverse_t,
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to a block of raw logits."""
    x = (y - peak) * scale
    p = tl.exp2(x) * inverse_total
    slope = grad_logp
    if ENTROPY:
        # p = 0 comes with an x that may be infinite.
        slope = grad_logp + tl.where(p > 0, grad_entropy * (x * _LN2 - moment), 0.0)
    g = (tl.where(columns == target, grad_logp, 0.0) - p * slope) * inverse_t
    if HAS_SOFTCAP:
        g *= 1.0 - t * t
    return g


@triton.jit
def measure_kernel(
    z, bias, targets, peak, total, moment, logps, V, stride_n, stride_v, scale, inverse_t, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics: one program a row."""
    index = tl.program_id(0)
    row = index.to(tl.int64) * stride_n
    target = tl.load(targets + index).to(tl.int64)
    top, sum_all, mean, x = _statistics(
        row, z, bias, target, V, stride_v, scale, inverse_t, softcap, HAS_BIAS, HAS_SOFTCAP, ENTROPY, BLOCK, WIDTH
    )
    tl.store(peak + index, top)
    tl.store(total + index, sum_all)
    if ENTROPY:
        tl.store(moment + index, mean)
    tl.store(logps + index, x - tl.log(sum_all))


@triton.jit
def differentiate_kernel(
    z, out, bias, targets, peak, total, moment, grad_logps, grad_entropy,
    V, stride_n, stride_v, out_stride_n, out_stride_v, scale, inverse_t, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of measured rows: one program a block of a row. `out` may be `z`."""
    index = tl.program_id(0)
    row = index.to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g_logp = tl.load(grad_logps + index)
    g_entropy = 0.0
    mean = 0.0
    alive = g_logp != 0
    if ENTROPY:
        g_entropy = tl.load(grad_entropy + index)
        mean = tl.load(moment + index)
        alive = alive | (g_entropy != 0)
    inside = columns < V
    # A dead row is not read: it may hold anything.
    readable = columns < tl.where(alive, V, 0)
    raw = tl.load(z + row * stride_n + columns.to(tl.int64) * stride_v, mask=readable, other=0.0)
    y, t = _logits(raw, bias, columns, inside, softcap, HAS_BIAS, HAS_SOFTCAP)
    g = _gradient(
        y, t, columns, tl.load(targets + index), tl.load(peak + index), 1.0 / tl.load(total + index), mean,
        g_logp, g_entropy, scale, inverse_t, HAS_SOFTCAP, ENTROPY,
    )  # fmt: skip
    g = tl.where(alive, g, 0.0)
    tl.store(out + row * out_stride_n + columns.to(tl.int64) * out_stride_v, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def measure_and_differentiate_kernel(
    z, bias, targets, peak, total, logps, grad_logps, V, stride_n, scale, inverse_t, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics, then the gradient over the logits: one program a row, whose second read comes from the cache."""
    index = tl.program_id(0)
    row = index.to(tl.int64) * stride_n
    target = tl.load(targets + index).to(tl.int64)
    g_logp = tl.load(grad_logps + index)
    top, sum_all, _, x = _statistics(
        row, z, bias, target, V, 1, scale, inverse_t, softcap, HAS_BIAS, HAS_SOFTCAP, False, BLOCK, WIDTH
    )
    tl.store(peak + index, top)
    tl.store(total + index, sum_all)
    tl.store(logps + index, x - tl.log(sum_all))
    inverse_total = 1.0 / sum_all
    tl.debug_barrier()  # all threads have read the target's logit before one of them writes over it
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        raw = tl.load(z + row + columns, mask=inside, other=0.0)
        y, t = _logits(raw, bias, columns, inside, softcap, HAS_BIAS, HAS_SOFTCAP)
        g = _gradient(y, t, columns, target, top, inverse_total, 0.0, g_logp, 0.0, scale, inverse_t, HAS_SOFTCAP, False)
        # A row without weight may hold anything; 0 times that would not be 0.
        g = tl.where(g_logp != 0, g, 0.0)
        tl.store(z + row + columns, g.to(z.dtype.element_ty), mask=inside)


def _block(vocab: int) -> tuple[int, int]:
    """Columns and warps of a program: 16 elements a thread, which keeps the lanes' numbers in registers."""
    block = min(4096, max(256, triton.next_power_of_2(vocab)))
    return block, max(1, block // 512)


def _width(dtype: torch.dtype) -> int:
    """Logits that a thread loads at once: 16 bytes."""
    return max(1, 16 // dtype.itemsize)


class TritonRows(Rows):
    """`Rows` as Triton kernels; the formulas are written there."""

    skips_dead_rows = True

    def __init__(self, rows: int, vocab: int, like: Tensor, **options: Any) -> None:
        super().__init__(rows, vocab, like, **options)
        self.block, self.num_warps = _block(vocab)
        self._scalars = {
            "scale": math.log2(math.e) / self.temperature,
            "inverse_t": 1 / self.temperature,
            "softcap": self.softcap or 1.0,
        }

    def measure(
        self, logits: Tensor, targets: Tensor, start: int, bias: Tensor | None = None, *, overwrite: bool = False
    ) -> None:
        if not len(logits):
            return
        rows = slice(start, start + len(logits))
        with torch.cuda.device_of(logits):
            measure_kernel[(len(logits),)](
                logits,
                bias,
                targets,
                self.peak[rows],
                self.total[rows],
                self.moment[rows],
                self.logps[rows],
                self.vocab,
                *logits.stride(),
                **self._flags(bias),
                WIDTH=_width(logits.dtype),
                ENTROPY=self.want_entropy,
            )

    def measure_and_differentiate_(
        self, logits: Tensor, targets: Tensor, start: int, grad_logps: Tensor, bias: Tensor | None = None
    ) -> None:
        if not len(logits):
            return
        rows = slice(start, start + len(logits))
        with torch.cuda.device_of(logits):
            measure_and_differentiate_kernel[(len(logits),)](
                logits,
                bias,
                targets,
                self.peak[rows],
                self.total[rows],
                self.logps[rows],
                grad_logps,
                self.vocab,
                logits.stride(0),
                **self._flags(bias),
                WIDTH=_width(logits.dtype),
            )

    def differentiate(
        self,
        logits: Tensor,
        out: Tensor,
        targets: Tensor,
        start: int,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        if not len(logits):
            return
        rows = slice(start, start + len(logits))
        with torch.cuda.device_of(logits):
            differentiate_kernel[(len(logits), triton.cdiv(self.vocab, self.block))](
                logits,
                out,
                bias,
                targets,
                self.peak[rows],
                self.total[rows],
                self.moment[rows],
                grad_logps,
                grad_entropy,
                self.vocab,
                *logits.stride(),
                *out.stride(),
                **self._flags(bias),
                ENTROPY=grad_entropy is not None,
            )

    def _flags(self, bias: Tensor | None) -> dict[str, Any]:
        return self._scalars | {
            "HAS_BIAS": bias is not None,
            "HAS_SOFTCAP": self.softcap is not None,
            "BLOCK": self.block,
            "num_warps": self.num_warps,
        }


def _configs() -> list[dict[str, Any]]:
    """Every kernel at the smallest and the largest block, with few and with all options, as a real head calls it."""
    rows = {"targets": "*i64", "peak": "*fp32", "total": "*fp32", "moment": "*fp32", "logps": "*fp32"}
    upstream = {"grad_logps": "*fp32", "grad_entropy": "*fp32"}
    scalars = {"V": "i32", "stride_n": "i64", "scale": "fp32", "inverse_t": "fp32", "softcap": "fp32"}
    configs = []
    for vocab, dtype in ((256, "bf16"), (49152, "bf16"), (49152, "fp32")):
        block, num_warps = _block(vocab)
        width = {"WIDTH": _width(torch.float32 if dtype == "fp32" else torch.bfloat16)}
        for full in (False, True):
            flags = {"HAS_BIAS": full, "HAS_SOFTCAP": full, "BLOCK": block}
            bias = {"bias": f"*{dtype}"} if full else {}
            no_bias = {} if full else {"bias": None}
            kernels: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
                (measure_kernel, rows | scalars, {"stride_v": 1, "ENTROPY": full} | width),
                (
                    differentiate_kernel,
                    rows | upstream | scalars | {"out": f"*{dtype}", "out_stride_n": "i64"},
                    {"stride_v": 1, "out_stride_v": 1, "ENTROPY": full} | ({} if full else {"grad_entropy": None}),
                ),
                (measure_and_differentiate_kernel, rows | upstream | scalars, width),
            ]
            for kernel, types, constants in kernels:
                name = f"{kernel.__name__.removesuffix('_kernel')} {dtype} {block}"
                constexprs = flags | no_bias | constants
                signature = {"z": f"*{dtype}"} | bias | types
                signature = {k: v for k, v in signature.items() if k in kernel.arg_names and k not in constexprs}
                configs.append(
                    {
                        "name": name + ", all options" * full,
                        "kernel": kernel,
                        "signature": signature,
                        "constexprs": constexprs,
                        "divisible": [k for k, v in signature.items() if v.startswith("*") or k.startswith("stride")]
                        + ["V"]
                        + (["out_stride_n"] if "out_stride_n" in signature else []),
                        "num_warps": num_warps,
                    }
                )
    return configs


#: Every compile-time configuration, for the resource report.
CONFIGS = _configs()
