"""The tensors that candidates of the head and logits suites share, and the right answers for them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .candidate import Outputs

FORWARD, BOTH = "forward", "forward+backward"
#: Rows of the oracle's logits at a time, in bytes of fp64.
_ORACLE_BYTES = 2**29


def lengths_of(rows: int, skew: str) -> list[int]:
    """Lengths of packed sequences that add up to `rows`, of 64 in the mean (fewer if there are few rows).

    "equal": all of about the mean; "spread": evenly from almost 0 to twice the mean; "one": a single long sequence
    holds half of the rows, and sequences of one token the rest.
    """
    count = max(1, rows // 64, min(4, rows))
    if skew == "equal":
        weights = [1.0] * count
    elif skew == "spread":
        weights = [i + 0.5 for i in range(count)]
    elif skew == "one":
        return [rows // 2] + [1] * (rows - rows // 2)
    else:
        raise ValueError(f"skew={skew!r}; allowed: 'equal', 'spread', 'one'")
    edges = [round(rows * sum(weights[: i + 1]) / sum(weights)) for i in range(count)]
    return [b - a for a, b in zip([0, *edges], edges, strict=False)]


class Packed(ABC):
    """Packed sequences, their targets, and weights 1/N, so that operations with a scalar mean compute the same.

    The loss is -sum_b w_b log p(sequence b).
    """

    direction = BOTH  # may be changed between comparisons

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, skew: str):
        self.dtype, self.device = dtype, device
        self.rows, self.vocab = rows, vocab
        lengths = lengths_of(rows, skew)
        self.random: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        self.targets = torch.randint(vocab, (rows,), **self.random)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device)
        self.sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        self.weights = torch.full((len(lengths),), 1 / rows, device=device)

    def finish(self, token_logps: Tensor) -> Outputs:
        """Sequence sums and loss from per-token values [N], as a user of a per-token operation has to make them."""
        sums = token_logps.new_zeros(len(self.weights), dtype=torch.float32)
        sums = sums.index_add(0, self.sequence, token_logps.float())
        return {"sequences": sums, "loss": -(sums * self.weights).sum()}

    def leaning(self) -> Tensor:
        """By how many nats each row favours its target, [N, 1]: some tokens are certain, others hopeless."""
        return torch.rand(self.rows, 1, **self.random) * 2 * math.log(self.vocab)

    @abstractmethod
    def leaves(self) -> dict[str, Tensor]:
        """Inputs that get a gradient, by the name of that gradient."""

    @abstractmethod
    def floor(self) -> dict[str, int]:
        """Operations or bytes that no implementation can go below."""

    def step(self, forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Forward without gradient, or forward and backward."""

        def only_forward() -> Outputs:
            with torch.no_grad():
                return forward()

        def both() -> Outputs:
            outputs = forward()
            # Not backward(): accumulating into a leaf would copy a gradient that shares memory with its input.
            gradients = torch.autograd.grad(outputs["loss"], list(self.leaves().values()), allow_unused=True)
            named = dict(zip(self.leaves(), gradients, strict=True))
            missing = [name for name, gradient in named.items() if gradient is None]
            if missing:
                raise ValueError(f"made no gradient for {', '.join(missing)}")
            return {name: value.detach() for name, value in (outputs | named).items()}

        return only_forward if self.direction == FORWARD else both

    def reset(self, restore: bool) -> None:  # noqa: B027 - nothing to do for most
        """Nothing here is written into, unless a subclass says so."""

    def kept_bytes(self) -> dict[str, int]:
        """Gradients in their inputs' dtypes."""
        size = sum(x.nbytes for x in self.leaves().values()) if self.direction == BOTH else 0
        return {"gradients": size}

    def only_asked(self, outputs: dict[str, Tensor]) -> Outputs:
        """Of all right answers, those of this direction."""
        return outputs if self.direction == BOTH else {k: outputs[k] for k in ("loss", "sequences")}


class HeadProblem(Packed):
    """Hidden states [N, H] and an LM head [V, H].

    Rows favour their targets by between 0 and 2 log V nats, somewhat as in a trained model: operations that skip
    negligible probabilities find what they would find there.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        skew: str = "spread",
    ):
        rows, self.size, vocab = shape
        super().__init__(rows, vocab, dtype, device, skew)
        weight = torch.randn(vocab, self.size, **self.random).mul_(self.size**-0.5)
        hidden = torch.randn(rows, self.size, **self.random)
        toward = weight[self.targets]
        hidden += self.leaning() * toward / toward.square().sum(1, keepdim=True)
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()

    def floor(self) -> dict[str, int]:
        return {"flops": (2 if self.direction == FORWARD else 6) * self.rows * self.size * self.vocab}

    def leaves(self) -> dict[str, Tensor]:
        return {"dhidden": self.hidden, "dweight": self.weight}

    def kept_bytes(self) -> dict[str, int]:
        """As they come, and with a weight gradient in fp32, which is what accumulating it well takes."""
        kept = super().kept_bytes()
        if self.direction == BOTH:
            kept["gradients_fp32_dw"] = self.hidden.nbytes + 4 * self.weight.numel()
        return kept

    def oracle(self) -> Outputs:
        return self.only_asked(self._answers)

    @cached_property
    def _answers(self) -> Outputs:
        wide = torch.float64
        hidden, weight = self.hidden.detach(), self.weight.detach().to(wide)
        dweight = torch.zeros_like(weight)
        dhidden, logps = torch.empty_like(hidden, dtype=torch.float32), hidden.new_empty(self.rows, dtype=wide)
        for rows in torch.arange(self.rows).split(max(1, _ORACLE_BYTES // (8 * self.vocab))):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            part, column = hidden[span].to(wide), self.targets[span, None]
            grad = part @ weight.t()
            log_sum = grad.logsumexp(1, keepdim=True)
            logps[span] = (grad.gather(1, column) - log_sum)[:, 0]
            grad.sub_(log_sum).exp_()
            grad.scatter_(1, column, grad.gather(1, column) - 1).mul_(1 / self.rows)
            dhidden[span] = grad @ weight
            dweight.addmm_(grad.t(), part)
        sums = torch.zeros(len(self.weights), dtype=wide, device=self.device).index_add(0, self.sequence, logps)
        loss = -(sums * self.weights.to(wide)).sum()
        return {"loss": loss, "sequences": sums, "dhidden": dhidden, "dweight": dweight.float()}


class LogitsProblem(Packed):
    """Logits [N, V] that exist already, peaked as those of `HeadProblem`."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        skew: str = "spread",
    ):
        rows, vocab = shape
        super().__init__(rows, vocab, dtype, device, skew)
        self.logits = torch.randn(rows, vocab, dtype=dtype, **self.random)
        column = self.targets[:, None]
        self.logits.scatter_(1, column, (self.logits.gather(1, column) + self.leaning()).to(dtype))
        self.logits.requires_grad_()
        self._pristine: Tensor | None = None

    def floor(self) -> dict[str, int]:
        """Forward reads the logits; backward reads them again and writes their gradient."""
        return {"bytes": self.logits.nbytes * (1 if self.direction == FORWARD else 3)}

    def leaves(self) -> dict[str, Tensor]:
        return {"dlogits": self.logits}

    def reset(self, restore: bool) -> None:
        """Put the logits back that were there when this was first asked for."""
        with torch.no_grad():
            if restore and self._pristine is not None:
                self.logits.copy_(self._pristine)
            elif restore:
                self._pristine = self.logits.clone()

    def oracle(self) -> Outputs:
        return self.only_asked(self._answers)

    @cached_property
    def _answers(self) -> Outputs:
        logits = self.logits.detach()
        dlogits = torch.empty_like(logits, dtype=torch.float32)
        logps = torch.empty(self.rows, dtype=torch.float64, device=self.device)
        for rows in torch.arange(self.rows).split(max(1, _ORACLE_BYTES // (8 * self.vocab))):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            column = self.targets[span, None]
            wide = torch.log_softmax(logits[span].double(), 1)
            logps[span] = wide.gather(1, column)[:, 0]
            wide.exp_()
            wide.scatter_(1, column, wide.gather(1, column) - 1).mul_(1 / self.rows)
            dlogits[span] = wide
        sums = torch.zeros(len(self.weights), dtype=torch.float64, device=self.device)
        sums = sums.index_add(0, self.sequence, logps)
        return {"loss": -(sums * self.weights.double()).sum(), "sequences": sums, "dlogits": dlogits}
