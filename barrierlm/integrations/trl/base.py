"""What all constrained trainers share: an objective that steps, is logged, and is saved with the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from barrierlm import BarrierObjective, Constraint

from ..checkpoint import SavesObjective

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object  # a mixin: the trainer comes after it


class ConstrainedTrainer(SavesObjective, _Base):
    """Mixin before a transformers Trainer: commits its ``objective`` after each optimizer step that measured something.

    The objective's numbers are in the Trainer's logs, its state in each checkpoint's folder.
    """

    objective: BarrierObjective
    _measured = False

    def _commit(self) -> None:
        if not self._measured:
            return
        if self.accelerator.optimizer_step_was_skipped:
            self.objective.discard_window()
        else:
            self.objective.step()
        self._measured = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the objective's metrics while training."""
        if self.model.training:
            logs.update({name: value for name, value in self.objective.metrics().items() if not math.isnan(value)})
        super().log(logs, *args, **kwargs)


class Commit(TrainerCallback):
    """Calls the trainer's ``_commit`` after each optimizer step, before the Trainer logs, evaluates or saves."""

    def __init__(self, trainer: ConstrainedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's hook."""
        self.trainer._commit()


def make_objective(constraints: Sequence[Constraint] | BarrierObjective, what: str, given: Mapping) -> BarrierObjective:
    """The objective of the trainer, and whether what it measures, ``given`` as argument ``what``, fits."""
    objective = constraints if isinstance(constraints, BarrierObjective) else BarrierObjective(None, constraints)
    if objective.loss_fn is not None or objective.multiplier != "committed":
        raise ValueError(
            f"constraints is a BarrierObjective with loss_fn={objective.loss_fn!r}, multiplier={objective.multiplier!r}"
            "; allowed: loss_fn=None (the trainer has the loss) and multiplier='committed'"
        )
    names = [c.name for c in objective.constraints]
    if not isinstance(given, Mapping) or set(given) != set(names):
        keys = list(given) if isinstance(given, Iterable) else given
        raise ValueError(f"{what} has {keys}; allowed: one function for each constraint, by name: {names}")
    return objective
