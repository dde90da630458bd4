"""What a call of the objective returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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

    _committed_metrics: Callable[[], dict[str, float]]
    #: The two summands of ``loss``, with gradient: task and constraints; None where one pass makes both at once.
    _parts: tuple[Tensor, Tensor] | None = None
    #: What ``normalize`` has multiplied them by.
    _share: float | Tensor = 1.0

    def metrics(self) -> dict[str, float]:
        """Flat floats for a logger: this call's losses, and the objective's numbers as they are now.

        After ``objective.step()`` these are the newly committed ones. Reading the losses waits for the device.
        """
        losses = {"loss/task": self.task_loss.item(), "loss/total": self.loss.item()}
        return losses | self._committed_metrics()
