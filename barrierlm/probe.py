"""`GradientProbe`: the task's and the constraints' gradients of some batches, apart from each other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import rows_of_all_ranks, sum_over_ranks
from .estimators import wide_dtype
from .output import ObjectiveOutput, parts_of

#: Elements that are looked at in fp64 at a time.
_CHUNK = 1 << 22


class GradientProbe:
    r"""Takes the task's and the constraints' gradients apart, batch by batch, for `BarrierObjective.certificate`.

    .. math:: t = \mathbb{E}\,\nabla f, \qquad c = \mathbb{E} \sum_i \lambda_i \nabla z_i, \qquad
              t + c = 0 \text{ at a KKT point}

    Two backward passes per batch, and 2 J P numbers on ``device`` for J batches of P parameters; ``.grad`` is left
    alone, and a batch's graph stays alive for a ``backward()`` of its own. Norms and their intervals need batches of
    independent samples, drawn from one policy: no optimizer step in between. Two at least, four or more for intervals
    worth having. A constraint that is missing from a batch counts as 0 there, so every batch should measure all.

    The calls also enter the objective's open window. After a separate measurement call ``objective.discard_window()``;
    within training, probe the micro-batches of a window and take the certificate before ``objective.step()``.

    On several ranks each adds its own batches, and `BarrierObjective.certificate` is called by all: it sums 2 P numbers
    over the ranks, and the batches of all count. The parameters must be whole and equal on every rank (call the
    module that DDP wraps, not the wrapper); sharded ones are not supported.

    Args:
        parameters: Those with respect to which the run is stationary: floating tensors that require grad, which the
            optimizer changes.
        device: Where the gradients are kept, in fp32 or the parameters' wider dtype.

    Raises:
        TypeError: ``parameters`` that are no floating tensors.
        ValueError: No parameter, the same one twice, one that does not require grad.

    Example:
        >>> x = torch.tensor([0.5, 0.5], requires_grad=True)
        >>> objective = BarrierObjective(None, [Constraint("sum", lower=1.0, scale=1.0)])
        >>> objective.calibrate({"sum": x.sum()})
        >>> probe = GradientProbe([x])
        >>> for _ in range(4):
        ...     probe.add(objective.combine((x**2).sum() / 2, {"sum": x.sum()}))
        >>> objective.discard_window()
        >>> round(objective.certificate(probe).stationarity.cosine.value, 4)
        -1.0

    Source: barrierlm; U-statistics, Hoeffding 1948.
    """

    def __init__(self, parameters: Iterable[Tensor], *, device: str | torch.device = "cpu") -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("parameters is empty; allowed: at least one tensor that requires grad")
        for i, p in enumerate(self.parameters):
            if not isinstance(p, Tensor) or not p.is_floating_point():
                given = p.dtype if isinstance(p, Tensor) else type(p).__name__
                raise TypeError(f"parameters[{i}] is {given}; allowed: floating tensors")
            if not p.requires_grad:
                raise ValueError(f"parameters[{i}] does not require grad; allowed: only what the optimizer changes")
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError("parameters holds a tensor twice; allowed: each once")
        self.device = torch.device(device)
        self.dtype = torch.float32
        for p in self.parameters:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.multipliers: list[float] | None = None
        self._batches: list[Tensor] = []

    def __len__(self) -> int:
        """Number of this rank's batches."""
        return len(self._batches)

    def add(self, out: ObjectiveOutput) -> None:
        """Take the gradients of one batch; the graph stays alive.

        Args:
            out: What `BarrierObjective.combine` or calling the objective returned, before ``backward`` freed its graph.

        Raises:
            TypeError: No `ObjectiveOutput`.
            ValueError: One of `BarrierObjective.linear`; one without gradient, or of none of the parameters; one made
                under other multipliers than the batches before.
            FloatingPointError: A gradient with NaN or infinity; the batch is not added.
        """
        parts = parts_of(out, "combine() of the same losses and measurements")
        multipliers = [row.multiplier for row in out.bounds]
        if self.multipliers not in (None, multipliers):
            raise ValueError(
                f"out was made under the multipliers {multipliers}, the batches before under {self.multipliers}; "
                "allowed: batches of one window, with no objective.step() in between"
            )
        found = [self._gradient(part) for part in parts]
        if all(g is None for g in found):
            raise ValueError("out depends on none of the parameters; allowed: those that its losses were made with")
        size = sum(p.numel() for p in self.parameters)
        zero = torch.zeros(size, dtype=self.dtype, device=self.device)
        # In the loss's own unit, whether or not the objective normalizes.
        batch = torch.stack([zero if g is None else g for g in found]) / float(out._share)
        if not bool(batch.isfinite().all()):
            raise FloatingPointError("the batch's gradient has NaN or infinity; it was not added")
        self.multipliers = multipliers
        self._batches.append(batch)

    def _gradient(self, part: Tensor) -> Tensor | None:
        """The flat gradient [P] of one part; None where no parameter is in it."""
        if not part.requires_grad:
            return None
        grads = torch.autograd.grad(part, self.parameters, retain_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            return None
        pairs = zip(self.parameters, grads, strict=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).to(self.device, self.dtype).flatten() for p, g in pairs]
        )

    def products(self, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """``<g_ja, g_jb>`` and ``<S_a, g_jb>`` [J, 2, 2] of all batches, for task and constraints; S sums over j.

        These are all that norms and the jackknife need, so that ranks exchange one sum and never their batches.
        """
        total = torch.zeros(2, sum(p.numel() for p in self.parameters), dtype=self.dtype, device=self.device)
        for batch in self._batches:
            total += batch
        total = sum_over_ranks(total, group).to(self.device)
        rows = torch.zeros(len(self), 2, 2, 2, dtype=torch.float64, device="cpu")
        for j, batch in enumerate(self._batches):
            rows[j, 0], rows[j, 1] = _product(batch, batch), _product(total, batch)
        rows = rows_of_all_ranks(rows.view(-1, 8), group).view(-1, 2, 2, 2)
        return rows[:, 0], rows[:, 1]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T [2, 2] on the CPU, in fp64 a piece at a time."""
    wide = wide_dtype(a.device)
    pieces = zip(a.split(_CHUNK, dim=1), b.split(_CHUNK, dim=1), strict=True)
    return torch.stack([x.to(wide) @ y.to(wide).mT for x, y in pieces]).sum(0).cpu().double()
