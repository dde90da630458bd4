"""`SplitGradients`: task and constraints clipped apart, so that a large multiplier does not drown the task."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import combine_over_ranks
from .output import ObjectiveOutput, parts_of


class PartNorms(NamedTuple):
    """The two gradients as they were before clipping: 0-d tensors, on the device of the first gradient.

    ``cosine`` is of the angle between them: near -1 where they pull against each other, NaN where one is zero.
    """

    task: Tensor
    constraint: Tensor
    cosine: Tensor

    @property
    def total(self) -> Tensor:
        """Norm of the sum of both, which clipping the sum would go by; to a thousandth of the larger part."""
        dot = torch.where(self.cosine.isnan(), 0.0, self.cosine * self.task * self.constraint)
        return (self.task**2 + self.constraint**2 + 2 * dot).clamp(min=0).sqrt()

    def metrics(self) -> dict[str, float]:
        """Flat floats for a logger: ``balance/...``. Reading them waits for the device."""
        return {
            "balance/task_norm": self.task.item(),
            "balance/constraint_norm": self.constraint.item(),
            "balance/cosine": self.cosine.item(),
        }


class SplitGradients:
    r"""Clips the gradients of task and constraints each to a norm of its own, then adds them up.

    .. math:: g = \min\Big(1, \frac{c}{\|g_L\|}\Big)\, g_L + \min\Big(1, \frac{c'}{\|g_C\|}\Big)\, g_C,
              \qquad g_L = \nabla L, \quad g_C = \nabla \sum_k w_k v_k

    Clipping the sum, as one does, divides both by the norm of the larger: with a multiplier of 100 next to nothing
    of the task is left. Here its share of the step stays above about c / (c + c'). While a part is clipped its
    direction is kept and its size is not: a multiplier then settles at what balances the *clipped* task.

    The task part goes into ``.grad`` as always, in a backward pass of its own. That is the only one that DDP sees,
    so every parameter must be reached by the task as well. The constraint part is kept aside, without DDP's
    averaging, and is combined over the ranks in `clip_`. Whatever else was added to ``.grad`` counts as task.

    Costs: a second backward pass where both parts reach, and one more copy of the gradient (two, while a further
    micro-batch is added to it). Not for sharded parameters (FSDP, DTensor). One pass of `BarrierObjective.linear` makes
    both parts at once: give it the task's sequences and the responses one after the other, and `backward_parts` each.

    Args:
        parameters: Leaf tensors, each once; the optimizer's. Frozen ones are skipped, as long as they are.
        reduction: How the loop combines the ranks' gradients: ``"mean"`` (DDP) or ``"sum"``, as the objective's
            ``gradient_reduction``.
        process_group: The ranks that share a window; default: the default group where there is one.

    Raises:
        TypeError: Something that is no tensor.
        ValueError: No parameter, one twice, one that is no leaf or is sharded; an unknown reduction.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> objective = BarrierObjective(torch.nn.functional.mse_loss, [Constraint("mean", upper=0.5)])
        >>> parts = SplitGradients(model.parameters())
        >>> for _ in range(2):
        ...     prediction = model(torch.randn(8, 3))
        ...     out = objective(prediction, torch.randn(8, 1), measurements={"mean": prediction.mean()})
        ...     parts.backward(out)  # instead of out.loss.backward()
        ...     norms = parts.clip_(max_norm=1.0)  # instead of clip_grad_norm_
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     objective.step()
        >>> sorted(norms.metrics())
        ['balance/constraint_norm', 'balance/cosine', 'balance/task_norm']

    Source: gradient norm clipping (Pascanu et al. 2013, arXiv 1211.5063), applied to each summand.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}; allowed: 'mean' or 'sum'")
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("parameters is empty; allowed: at least one tensor")
        seen: set[int] = set()
        for i, p in enumerate(self._parameters):
            if not isinstance(p, Tensor):
                raise TypeError(f"parameters[{i}] is a {type(p).__name__}; allowed: tensors, as of model.parameters()")
            if not p.is_leaf:
                raise ValueError(f"parameters[{i}] is the result of a computation; allowed: leaf tensors")
            if hasattr(p, "placements"):
                raise ValueError(f"parameters[{i}] is sharded (a DTensor); allowed: whole tensors (plain or DDP)")
            if id(p) in seen:
                raise ValueError(f"parameters[{i}] is there twice; allowed: each tensor once")
            seen.add(id(p))
        self.reduction, self.process_group = reduction, process_group
        self._kept: dict[int, Tensor] = {}  # by position among the parameters
        # Whether there was a backward pass since `clip_`, and the scaler of all of them.
        self._begun = False
        self._scaler: torch.amp.GradScaler | None = None

    def backward(self, out: ObjectiveOutput, *, divisor: float = 1, scaler: torch.amp.GradScaler | None = None) -> None:
        """In place of ``(out.loss / divisor).backward()``: the two parts of its gradient, added up apart.

        Args:
            out: From the objective or its `combine`. A part without gradient (no task, nothing measured) is fine.
            divisor: What the loop divides the loss by (gradient accumulation).
            scaler: For fp16: both parts are multiplied by its scale. Then leave out ``unscale_``: `clip_` knows the
                scale and leaves the gradients scaled for ``scaler.step(optimizer)``, which skips what is not finite.

        Raises:
            TypeError: ``out`` is something else.
            ValueError: ``out`` is of `linear`, or has no gradient at all; a divisor that is no positive number;
                a scaler that is not that of the step's earlier backward passes.
        """
        parts = parts_of(out, "combine(), or calling the objective; or backward_parts() with the losses of two passes")
        self._backward(*parts, divisor, scaler)

    def backward_parts(
        self,
        task: Tensor | None = None,
        constraint: Tensor | None = None,
        *,
        divisor: float = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """As `backward`, of losses that have been kept apart: both, or of two passes one after the other.

        So `BarrierObjective.linear` can be used: one pass over the task's sequences and one over the sampled
        responses go over the rows of the one pass over both.

        Args:
            task: The task's loss (0-d, floating), with gradient: the ``loss`` of an output without measurements, not
                its ``task_loss``. None: nothing is added.
            constraint: What the objective adds to it: the ``loss`` of a call whose task weights are all 0. With DDP, of
                the model without its wrapper.
            divisor: As in `backward`.
            scaler: As in `backward`; the same for both.

        Raises:
            TypeError: Neither a tensor nor None.
            ValueError: A tensor that is no floating scalar or has no gradient; neither of both; a divisor that is no
                positive number; a scaler that is not that of the step's earlier backward passes.

        Example:
            >>> policy = torch.nn.Linear(2, 1)
            >>> parts = SplitGradients(policy.parameters())
            >>> parts.backward_parts(task=policy(torch.ones(2)).sum())
            >>> parts.backward_parts(constraint=-3 * policy(torch.ones(2)).sum())
            >>> print(parts.clip_(max_norm=1.0).constraint.round(decimals=3))
            tensor(5.1960)
        """
        if task is constraint is None:
            raise ValueError("task and constraint are None; allowed: at least one loss")
        for name, loss in (("task", task), ("constraint", constraint)):
            if loss is None:
                continue
            if not isinstance(loss, Tensor):
                raise TypeError(f"{name} is a {type(loss).__name__}; allowed: a loss (0-d floating tensor) or None")
            if loss.dim() != 0 or not loss.is_floating_point():
                given = f"{loss.dtype} of shape {tuple(loss.shape)}"
                raise ValueError(f"{name} is {given}; allowed: a loss (0-d floating tensor)")
            if not loss.requires_grad:
                raise ValueError(
                    f"{name} has no gradient; allowed: a loss of a pass with gradients on (an output's loss, not its "
                    "task_loss), or None"
                )
        self._backward(task, constraint, divisor, scaler)

    def _backward(
        self, task: Tensor | None, constraint: Tensor | None, divisor: float, scaler: torch.amp.GradScaler | None
    ) -> None:
        if not (isinstance(divisor, int | float) and 0 < divisor < math.inf):
            raise ValueError(f"divisor={divisor!r}; allowed: a finite number > 0")
        used = scaler if scaler is not None and scaler.is_enabled() else None
        if self._begun and self._scaler is not used:
            had = "none" if self._scaler is None else "another" if used else "one"
            given = "given" if used else "None or disabled"
            raise ValueError(
                f"scaler is {given}, and an earlier backward pass of this step had {had}; allowed: the same in all of "
                "them (a step ends with clip_ or discard_window)"
            )
        if used is not None:
            task, constraint = (None if loss is None else used.scale(loss) for loss in (task, constraint))
        if constraint is not None and constraint.requires_grad:
            self._keep(constraint / divisor, retain_graph=task is not None and task.requires_grad)
        if task is not None and task.requires_grad:
            (task / divisor).backward()
        self._begun, self._scaler = True, used

    def clip_(
        self, max_norm: float, constraint_max_norm: float | None = None, *, error_if_nonfinite: bool = True
    ) -> PartNorms:
        """Clip both parts and add the constraints' to ``.grad``: once per optimizer step, on every rank.

        Where task and constraints pull against each other, equal norms could cancel and leave a violated bound
        violated, however large its multiplier. So the constraints get twice the task's norm unless told otherwise.

        Args:
            max_norm: Largest L2 norm of the task's gradient, > 0; ``math.inf`` only adds up.
            constraint_max_norm: Of the constraints' gradient; default: ``2 * max_norm``.
            error_if_nonfinite: Raise for a NaN or an infinity, which waits for the device. False, or a ``scaler`` in
                `backward`: it stays in ``.grad``. (With several ranks the device is waited for in any case.)

        Returns:
            Norms and cosine of the two gradients before clipping, over all ranks and without a scaler's scale.

        Raises:
            ValueError: A norm that is not positive; a part that is not finite, which it names. Nothing is added
                then: `discard_window` and ``optimizer.zero_grad()`` forget both.
        """
        for argument, value in (("max_norm", max_norm), ("constraint_max_norm", constraint_max_norm)):
            if value is None and argument == "constraint_max_norm":
                continue
            if not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{argument}={value!r}; allowed: a number > 0 (math.inf: no clipping)")
        limits = (max_norm, 2 * max_norm if constraint_max_norm is None else constraint_max_norm)
        trained = [i for i, p in enumerate(self._parameters) if p.requires_grad]
        parameters = [self._parameters[i] for i in trained]
        kept = combine_over_ranks(
            [self._kept.get(i) for i in trained], parameters, self.process_group, mean=self.reduction == "mean"
        )
        task = [p.grad for p in parameters]
        device = parameters[0].device if parameters else torch.device("cpu")
        norms, cosine = (_norm(task, device), _norm(kept, device)), _dot(task, kept, device)
        cosine = (cosine / norms[0] / norms[1]).clamp(-1, 1)
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=device))
            norms = (norms[0] / scale, norms[1] / scale)
        elif error_if_nonfinite:
            for name, norm in zip(("task", "constraint"), norms, strict=True):
                if not math.isfinite(norm):
                    raise ValueError(
                        f"the {name} part of the gradient has norm {norm.item()}; allowed: finite gradients. Nothing "
                        "was added: discard_window() and optimizer.zero_grad() forget them, error_if_nonfinite=False "
                        "lets them pass"
                    )
        with torch.no_grad():
            # A norm of 0 gives an infinite factor, which the clamp turns into 1.
            factors = [(limit / norm).clamp(max=1.0) for limit, norm in zip(limits, norms, strict=True)]
            for p, grad, extra in zip(parameters, task, kept, strict=True):
                if grad is not None:
                    grad.mul_(factors[0].to(grad.device, non_blocking=True))
                if extra is not None:
                    extra = extra * factors[1].to(extra.device, non_blocking=True)
                    p.grad = extra if grad is None else grad.add_(extra)
        self.discard_window()
        return PartNorms(*norms, cosine)

    def discard_window(self) -> None:
        """Forget the constraint part kept so far, as when the objective's window is discarded; ``.grad`` stays."""
        self._kept, self._begun, self._scaler = {}, False, None

    def _keep(self, loss: Tensor, *, retain_graph: bool) -> None:
        trained = [i for i, p in enumerate(self._parameters) if p.requires_grad]
        gradients = torch.autograd.grad(
            loss, [self._parameters[i] for i in trained], retain_graph=retain_graph, allow_unused=True
        )
        if all(g is None for g in gradients):
            warnings.warn(
                "the constraint part reaches none of the parameters: its gradient is lost. Give SplitGradients the "
                "parameters that the measurements depend on (sharded ones are not among them).",
                RuntimeWarning,
                stacklevel=4,
            )
        for i, g in zip(trained, gradients, strict=True):
            if g is not None:
                # Never in place: autograd may hand out one tensor twice, or one of the caller's.
                self._kept[i] = self._kept[i] + g if i in self._kept else g


def _norm(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """L2 norm over all of them, accumulated in fp32 at least."""
    norms = [torch.linalg.vector_norm(g, dtype=_wide(g)).to(device) for g in gradients if g is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Inner product of two gradients; None is zero."""
    total = torch.zeros((), device=device)
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            total = total + torch.dot(x.reshape(-1).to(_wide(x)), y.reshape(-1).to(_wide(y))).to(device)
    return total


def _wide(gradient: Tensor) -> torch.dtype:
    return gradient.dtype if gradient.dtype == torch.float64 else torch.float32
