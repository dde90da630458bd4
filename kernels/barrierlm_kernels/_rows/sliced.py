"""Rows whose logits are spread over ranks: each holds the same rows, and a slice of the vocabulary."""

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Rows


class SlicedRows(Rows):
    """`Rows` of the whole vocabulary, from an implementation that sees one slice of it.

    With P_r, S_r, e_r the statistics of slice r and P the largest P_r, d_r = (P_r - P) / T:

        s = sum_r S_r exp(d_r)      e = sum_r S_r exp(d_r) (e_r + d_r) / s      log p_t = (y_t - P) / T - log s

    One all-gather a block, of three numbers a row (four with entropy), from which every rank computes the same bits.
    The gradient of a slice then needs nothing but these. Targets are numbers of the whole vocabulary.
    """

    def __init__(self, own: Rows, group: dist.ProcessGroup, first: int) -> None:
        super().__init__(
            len(own.peak),
            own.vocab,
            own.peak,
            block_rows=own.block_rows,
            temperature=own.temperature,
            softcap=own.softcap,
            entropy=own.want_entropy,
        )
        self._own, self._group, self._first = own, group, first
        self.skips_dead_rows = own.skips_dead_rows
        self._share_statistics()

    def resume(
        self, statistics: list[Tensor], counted: Tensor, grad_logps: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As in `Rows`; the statistics are those of the whole vocabulary, so nothing is exchanged."""
        result = super().resume(statistics, counted, grad_logps, grad_entropy)
        self._share_statistics()
        return result

    def measure(
        self, logits: Tensor, targets: Tensor, start: int, bias: Tensor | None = None, *, overwrite: bool = False
    ) -> None:
        """Fill in the statistics of a block; with `overwrite` it may serve as the work space."""
        local = targets - self._first
        index = local.clamp(0, self.vocab - 1)
        picked = logits.gather(1, index[:, None])[:, 0].to(self.dtype)  # before the logits are written over
        if bias is not None:
            picked = picked + bias[index]
        if self.softcap is not None:
            picked = torch.tanh(picked / self.softcap) * self.softcap
        picked = torch.where(index == local, picked, 0)
        self._own.measure(logits, index, start, bias, overwrite=overwrite)
        self._combine(slice(start, start + len(logits)), picked)

    def measure_and_differentiate_(
        self, logits: Tensor, targets: Tensor, start: int, grad_logps: Tensor, bias: Tensor | None = None
    ) -> None:
        """`measure`, and turn `logits` in place into the gradient for `grad_logps` [k]. Without entropy."""
        self.measure(logits, targets, start, bias)
        self.differentiate(logits, logits, targets, start, grad_logps, None, bias)

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
        """Write the gradient of a measured block into `out`, which may be `logits` itself."""
        self._own.differentiate(logits, out, targets - self._first, start, grad_logps, grad_entropy, bias)

    def _share_statistics(self) -> None:
        """One set of tensors: what is written on either side is read on both."""
        self._own.peak, self._own.total = self.peak, self.total
        self._own.moment, self._own.logps = self.moment, self.logps

    def _combine(self, rows: slice, picked: Tensor) -> None:
        """Statistics of one slice to those of all; `picked` is the target's y where this slice has it, else 0."""
        mine = [self.peak[rows], self.total[rows], picked]
        if self.want_entropy:
            mine.append(self.moment[rows])
        block = torch.stack(mine)
        everyone = [torch.empty_like(block) for _ in range(self._group.size())]
        dist.all_gather(everyone, block, group=self._group)
        peaks, totals, targets, *moments = torch.stack(everyone).unbind(1)
        peak = peaks.amax(0)
        x = (peaks - peak) / self.temperature
        # A slice that is masked altogether has a peak of -inf and no sum.
        shares = torch.where(peaks == -torch.inf, 0, totals * x.exp())
        total = shares.sum(0)
        self.peak[rows], self.total[rows] = peak, total
        self.logps[rows] = (targets.sum(0) - peak) / self.temperature - total.log()
        if moments:
            self.moment[rows] = torch.where(shares == 0, 0, shares * (moments[0] + x)).sum(0) / total
