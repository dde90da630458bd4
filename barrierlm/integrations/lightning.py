"""Lightning with constraints: `BarrierCallback` commits, saves, restores and logs; the loss is yours."""

from __future__ import annotations

from typing import Any

from barrierlm import BarrierObjective

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "barrierlm.integrations.lightning needs the package 'lightning', which is not installed; get it with: "
        "pip install 'barrierlm[lightning]'"
    ) from error


class BarrierCallback(Callback):
    """Does for an objective what Lightning does for an optimizer.

    ``training_step`` returns ``objective.combine(loss, measurements).loss``. This callback calls ``objective.step()``
    after each optimizer step (after the window's last micro-batch with ``accumulate_grad_batches``), forgets the window
    of a step that the fp16 scaler skipped, logs ``objective.metrics()``, and keeps the objective's state in
    Lightning's checkpoint: plain tensors, which load with ``weights_only=True``. Validation changes nothing, nor does
    a step that ``training_step`` skips by returning None.

    Args:
        objective: The one that ``training_step`` calls.

    Raises:
        TypeError: Something that is no `BarrierObjective`.

    Example:
        >>> callback = BarrierCallback(BarrierObjective(None, [Constraint("entropy", lower=1.0)]))
        >>> callback.state_dict()["windows"]
        0

    Source: Lightning's `Callback` hooks.
    """

    def __init__(self, objective: BarrierObjective) -> None:
        if not isinstance(objective, BarrierObjective):
            raise TypeError(f"objective is a {type(objective).__name__}; allowed: a BarrierObjective")
        self.objective = objective
        self._steps = 0
        self._scale: float | None = None
        self._skipped = True  # nothing of the window has been returned yet

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Where the run stands: 0, or what a checkpoint says."""
        self._steps = trainer.global_step
        self._skipped = True
        self.objective.discard_window()  # of a run that was interrupted

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The fp16 scale before the step, which falls when the step is skipped."""
        self._scale = _scale(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Commits the window if the optimizer has stepped since the last one."""
        self._skipped = self._skipped and not outputs
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        skipped, self._skipped = self._skipped, True
        scale = _scale(trainer)
        if scale is not None and self._scale is not None and scale < self._scale:
            self.objective.discard_window()
            return
        # A step whose every training_step returned None, which Lightning allows in one process, and counts.
        if skipped and pl_module.automatic_optimization and trainer.world_size == 1:
            self.objective.discard_window()
            return
        self.objective.step()
        pl_module.log_dict(self.objective.metrics())

    def state_dict(self) -> dict[str, Any]:
        """The objective's, for Lightning's checkpoint."""
        return self.objective.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The objective's, from Lightning's checkpoint."""
        self.objective.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on from a checkpoint that would leave the objective at its start.

        Raises:
            ValueError: The checkpoint is of a run without this callback.
        """
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                "the checkpoint is of a run without BarrierCallback, so the objective has no state to go on from; "
                "allowed: a checkpoint saved with it (for a new run load the weights alone)"
            )


def _scale(trainer: Any) -> float | None:
    """The fp16 loss scale; None without a scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
