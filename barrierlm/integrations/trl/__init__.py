"""Constraints in TRL's trainers: bounds next to rewards (GRPO, RLOO) or next to a loss (SFT, DPO)."""

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"barrierlm.integrations.trl needs the package {error.name!r}, which is not installed; get it with: "
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
