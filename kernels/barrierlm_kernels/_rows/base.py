"""What both implementations of row statistics share: the numbers they keep, and how backward takes them up."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spans(total: int, at_most: int) -> Iterator[tuple[int, int]]:
    """Cut range(total) into the fewest spans of at most `at_most`, of nearly equal length."""
    count = -(-total // at_most)
    for i in range(count):
        yield total * i // count, total * (i + 1) // count


class Rows(ABC):
    """Log-softmax statistics of `rows` rows of logits, and the gradient with respect to those logits.

    For one row z, with c the softcap and T the temperature (softcap first, temperature second):

        x_j = (y_j - max y) / T,   y = c tanh(z / c)      s = sum_j exp(x_j)
        log p_t = x_t - log s                             H = log s - e,   e = sum_j exp(x_j) x_j / s
        d log p_t / d y_j = (1[j = t] - p_j) / T          dH / d y_j = -p_j (x_j - e) / T
        dy_j / dz_j = 1 - (y_j / c)^2

    The maximum and log s are never added up: for logits around 1e4 their fp32 sum has lost the digits that
    log p_t needs. All of this is done in fp32 (fp64 for fp64 logits), whatever dtype holds the logits.

    Rows are handed over in blocks of at most `block_rows`. A block is a matrix [k, V] in any floating dtype,
    `start` the number of its first row. The statistics stay here, [rows] each, for a backward pass to pick up:
    `peak` is max y, `total` s, `moment` e (only with entropy), `logps` log p of the targets.
    """

    #: Whether the gradient of dead rows is 0 whatever they hold: they are not read.
    skips_dead_rows = False

    def __init__(
        self,
        rows: int,
        vocab: int,
        like: Tensor,
        *,
        block_rows: int,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> None:
        self.dtype = accumulation_dtype(like.dtype)
        self.vocab, self.block_rows = vocab, block_rows
        self.temperature, self.softcap, self.want_entropy = temperature, softcap, entropy
        self._like = like
        self.peak = like.new_zeros(rows, dtype=self.dtype)
        self.total = torch.ones_like(self.peak)
        self.logps = torch.zeros_like(self.peak)
        self.moment = torch.zeros_like(self.peak)

    def entropies(self) -> Tensor:
        """Entropy of each row, nats."""
        return self.total.log() - self.moment

    def resume(
        self, statistics: list[Tensor], counted: Tensor, grad_logps: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take up (peak, total, moment) of an earlier pass, for the given upstream gradients [N].

        Returns which rows are live (counted, with an upstream gradient), and the gradients, 0 elsewhere. Dead
        rows get an infinite peak: their softmax, hence their gradient, is 0 for any finite logits.
        """
        if grad_logps is None:
            grad_logps = torch.zeros_like(statistics[0])
        live = counted & (grad_logps != 0)
        if grad_entropy is not None:
            live = live | (counted & (grad_entropy != 0))
        peak, total, moment = statistics
        self.peak = torch.where(live, peak, torch.inf)
        self.total = torch.where(live, total, 1)
        self.moment = torch.where(live, moment, 0)
        grad_logps = torch.where(live, grad_logps, 0)
        return live, grad_logps, None if grad_entropy is None else torch.where(live, grad_entropy, 0)

    @abstractmethod
    def measure(
        self, logits: Tensor, targets: Tensor, start: int, bias: Tensor | None = None, *, overwrite: bool = False
    ) -> None:
        """Fill in the statistics of a block; with `overwrite` it may serve as the work space."""

    @abstractmethod
    def measure_and_differentiate_(
        self, logits: Tensor, targets: Tensor, start: int, grad_logps: Tensor, bias: Tensor | None = None
    ) -> None:
        """`measure`, and turn `logits` in place into the gradient for `grad_logps` [k]. Without entropy."""

    @abstractmethod
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
        """Write the gradient of a measured block into `out`, which may be `logits` itself.

        What dead rows get (see `resume`) is 0 if they hold finite numbers, or if `skips_dead_rows`. A target
        outside of [0, V) is in no column: it is in another slice of the vocabulary.
        """
