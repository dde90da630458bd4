"""Constraints in TRL's trainers: bounds next to rewards (GRPO, RLOO) or next to a loss (SFT, DPO)."""

try:
    from trl import SFTTrainer  # noqa: F401
except (ModuleNotFoundError, RuntimeError) as error:  # what TRL itself needs shows as the latter
    name = getattr(error, "name", None) or getattr(error.__cause__, "name", None) or "trl"
    raise ModuleNotFoundError(
        f"barrierlm.integrations.trl needs the package {name!r}, which is not installed; get it with: "
        "pip install 'barrierlm[trl]'"
    ) from error

from .batch import Batch, PreferenceBatch
from .losses import BarrierDPOTrainer, BarrierSFTTrainer, ConstrainedLoss
from .rewards import BarrierGRPOTrainer, BarrierRLOOTrainer, ConstrainedRewards

__all__ = [
    "BarrierDPOTrainer",
    "BarrierGRPOTrainer",
    "BarrierRLOOTrainer",
    "BarrierSFTTrainer",
    "Batch",
    "ConstrainedLoss",
    "ConstrainedRewards",
    "PreferenceBatch",
]
