"""The objective's state in a Trainer's checkpoint folder, saved and loaded with the optimizer's."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from barrierlm import BarrierObjective
from barrierlm.distributed import world_size
from barrierlm.files import damage, replacing

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
        ValueError: It is of other constraints, or damaged.
    """
    file = Path(folder, STATE_FILE)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: the checkpoint is of a run without these constraints, or with save_only_model; allowed: one that "
            "this trainer saved (for a new run load the weights with from_pretrained)"
        )
    if (what := damage(file)) is not None:
        raise ValueError(f"{file} is damaged ({what}); allowed: an older checkpoint")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{file} holds something else than an objective's state; allowed: what was saved") from error
    objective.load_state_dict(state)


class SavesObjective(_Base):
    """Mixin before a transformers Trainer that has an ``objective``."""

    objective: BarrierObjective
    args: Any

    def _check_ranks(self) -> None:
        """A Trainer that takes itself for the only one trains a model in every process, with one estimate of all.

        Raises:
            ValueError: It does, as transformers' does on CPUs that it was not told of.
        """
        ranks = world_size(self.objective.process_group)
        if self.args.world_size == 1 and ranks > 1:
            raise ValueError(
                f"the Trainer runs as one process (args.world_size is 1) in a group of {ranks}; allowed: on CPUs "
                "use_cpu=True in its arguments, which makes it one of them, or an objective with a process_group of "
                "this process alone"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_objective(self.objective, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_objective(self.objective, checkpoint)
