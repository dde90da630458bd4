"""The torch implementation of row statistics and gradients, one tile of rows at a time. The specification."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .base import Rows, spans

# exp(x) is exactly 0 below this in fp32 and fp64, so clamping x here changes no sum; it turns 0 * -inf (the
# entropy of a masked vocabulary entry) into 0 * -1000.
_LOWEST = -1000.0


class ReferenceRows(Rows):
    """`Rows` in plain torch operations; the formulas are written there."""

    def __init__(self, rows: int, vocab: int, like: Tensor, **options: Any) -> None:
        super().__init__(rows, vocab, like, **options)
        # Work space (fp32 copies, tanh, exp) is the size of one tile: small beside a chunk of logits, and large
        # enough for the launch (or, on a CPU, the meeting of the threads) that each pass over it costs.
        tile_bytes = 2**22 if like.device.type == "cpu" else 2**26
        self.tile_rows = max(1, min(self.block_rows, tile_bytes // (vocab * self.dtype.itemsize)))
        self._scratch: dict[str, Tensor] = {}

    def measure(
        self,
        logits: Tensor,
        targets: Tensor,
        start: int,
        bias: Tensor | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Fill in the statistics of a block; with `overwrite` it may serve as the work space."""
        for lo, hi in self._tiles(logits if overwrite else None, len(logits)):
            block = logits[lo:hi]
            tile = self._load(block, block if overwrite else None, bias)
            self._measure(tile, targets[lo:hi], start + lo)

    def measure_and_differentiate_(
        self, logits: Tensor, targets: Tensor, start: int, grad_logps: Tensor, bias: Tensor | None = None
    ) -> None:
        """`measure_`, and turn `logits` in place into the gradient for `grad_logps` [k]. Without entropy."""
        for lo, hi in self._tiles(logits, len(logits)):
            block = logits[lo:hi]
            tile = self._load(block, block, bias)
            self._measure(tile, targets[lo:hi], start + lo)
            self._finish(tile, block, targets[lo:hi], start + lo, grad_logps[lo:hi], None)

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
        for lo, hi in self._tiles(out, len(out)):
            source = logits[lo:hi]
            block = source if out is logits else out[lo:hi]
            rows = slice(start + lo, start + hi)
            tile = self._load(source, block, bias)
            tile.sub_(self.peak[rows, None])
            self._temper(tile)
            entropy_part = None
            if grad_entropy is None:
                tile.exp_()
            else:
                entropy_part = grad_entropy[lo:hi]
            self._finish(tile, block, targets[lo:hi], start + lo, grad_logps[lo:hi], entropy_part)

    def _tiles(self, out: Tensor | None, rows: int) -> Iterator[tuple[int, int]]:
        in_place = out is not None and out.dtype == self.dtype
        needs_work_space = not in_place or self.softcap is not None or self.want_entropy
        return spans(rows, self.tile_rows if needs_work_space else max(1, rows))

    def _buffer(self, name: str, rows: int) -> Tensor:
        if name not in self._scratch:
            self._scratch[name] = self._like.new_empty(self.tile_rows, self.vocab, dtype=self.dtype)
        return self._scratch[name][:rows]

    def _load(self, source: Tensor, out: Tensor | None, bias: Tensor | None) -> Tensor:
        """y of the softcap, in `out` if that is given and has the accumulation dtype."""
        if out is None or out.dtype != self.dtype:
            out = self._buffer("tile", len(source))
        tile = out
        if tile is not source:
            tile.copy_(source)
        if bias is not None:
            tile.add_(bias)
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_()
            self._buffer("slope", len(tile)).copy_(tile)
            tile.mul_(self.softcap)
        return tile

    def _temper(self, tile: Tensor) -> None:
        if self.temperature != 1.0:
            tile.div_(self.temperature)

    def _measure(self, tile: Tensor, targets: Tensor, start: int) -> None:
        """Statistics of a tile of y, which becomes exp(x) (or, with entropy, no matter what)."""
        rows = slice(start, start + len(tile))
        peak = torch.amax(tile, 1, out=self.peak[rows])
        tile.sub_(peak[:, None])
        self._temper(tile)
        picked = tile.gather(1, targets[:, None])[:, 0]
        if self.want_entropy:
            work = torch.exp(tile.clamp_(min=_LOWEST), out=self._buffer("work", len(tile)))
            total = torch.sum(work, 1, out=self.total[rows])
            torch.div(work.mul_(tile).sum(1), total, out=self.moment[rows])
        else:
            total = torch.sum(tile.exp_(), 1, out=self.total[rows])
        torch.sub(picked, total.log(), out=self.logps[rows])

    def _finish(
        self,
        tile: Tensor,
        out: Tensor,
        targets: Tensor,
        start: int,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """From exp(x) (or from x, with an entropy gradient) to the gradient with respect to the logits."""
        rows = slice(start, start + len(tile))
        total, grad_logps = self.total[rows], grad_logps / self.temperature
        if grad_entropy is None:
            tile.mul_((-grad_logps / total)[:, None])
        else:
            grad_entropy = grad_entropy / self.temperature
            moment = self.moment[rows]
            work = torch.exp(tile.clamp_(min=_LOWEST), out=self._buffer("work", len(tile)))
            tile.sub_(moment[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_logps[:, None])
            tile.mul_(work.div_(total[:, None]))
        column = targets.clamp(0, self.vocab - 1)[:, None]
        at_target = torch.where(column[:, 0] == targets, grad_logps, 0)
        tile.scatter_(1, column, tile.gather(1, column) + at_target[:, None])  # scatter_add_ may be atomic
        if self.softcap is not None:
            tile.mul_(self._buffer("slope", len(tile)).square_().neg_().add_(1))
        if tile is not out:
            out.copy_(tile)
