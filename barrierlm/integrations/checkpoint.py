"""The objective's state in a Trainer's checkpoint folder, saved and loaded with the optimizer's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from barrierlm import BarrierObjective
from barrierlm.files import replacing

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object  # a mixin: the trainer comes after it

#: The file in a checkpoint folder.
STATE_FILE = "objective.pt"


def save_objective(objective: BarrierObjective, folder: str) -> None:
    """Write the state to ``folder``: whole, or not at all."""
    with replacing(Path(folder, STATE_FILE)) as file:
        torch.save(objective.state_dict(), file)


def load_objective(objective: BarrierObjective, folder: str) -> None:
    """Restore what `save_objective` wrote to ``folder``.

    Raises:
        FileNotFoundError: The checkpoint has none.
        ValueError: It is of other constraints.
    """
    file = Path(folder, STATE_FILE)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: the checkpoint is of a run without these constraints, or with save_only_model; allowed: one that "
            "this trainer saved (for a new run load the weights with from_pretrained)"
        )
    objective.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


class SavesObjective(_Base):
    """Mixin before a transformers Trainer that has an ``objective``."""

    objective: BarrierObjective
    args: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_objective(self.objective, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_objective(self.objective, checkpoint)
