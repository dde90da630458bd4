"""What a call of the objective returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .diagnostics import Report


class _Output(NamedTuple):
    loss: Tensor
    task_loss: Tensor
    penalty: Tensor
    bounds: Report


class ObjectiveOutput(_Output):
    """What one call returns; only ``loss`` carries gradient.

    ``loss`` is what to back-propagate, ``task_loss`` the user's own loss, ``penalty`` the rule's value at the
    estimate, ``bounds`` one `BoundState` per bound, as they were when the call was made.
    """

    #: The two summands of ``loss``, with gradient: task and constraints; None where one pass makes both at once, and
    #: nothing in what a wrapper has put together again.
    _parts: tuple[Tensor, ...] | None = ()
    #: What ``normalize`` has multiplied them by.
    _share: float | Tensor = 1.0

    def metrics(self) -> dict[str, float]:
        """Flat floats for a logger: this call's losses, and the objective's numbers as they are now.

        After ``objective.step()`` these are the newly committed ones. Reading the losses waits for the device.
        """
        losses = {"loss/task": self.task_loss.item(), "loss/total": self.loss.item()}
        return losses | self.bounds._metrics()


def parts_of(out: Any, instead: str) -> tuple[Tensor, Tensor]:
    """The summands of ``out.loss``, task and constraints, to be differentiated apart; or why there are none.

    Args:
        out: What a user gave as an `ObjectiveOutput`.
        instead: What is allowed in place of one of `BarrierObjective.linear`.

    Raises:
        TypeError, ValueError: They cannot be told apart, or none has a gradient.
    """
    if not isinstance(out, ObjectiveOutput):
        raise TypeError(f"out is a {type(out).__name__}; allowed: the ObjectiveOutput of a call of the objective")
    if out._parts is None:
        raise ValueError(f"out comes from linear(), whose one pass makes both gradients at once; allowed: {instead}")
    if out._parts == ():
        raise ValueError(
            "out was taken apart and put together again by what wraps the model (DDP, Accelerate's mixed precision); "
            "allowed: what the objective itself returned, called outside of the wrapped forward"
        )
    task, constraint = out._parts
    if not (task.requires_grad or constraint.requires_grad):
        raise ValueError("out has no gradient; allowed: the output of a call with gradients on")
    return task, constraint
