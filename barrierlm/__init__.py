"""Constrained fine-tuning of language models: minimise a loss, keep averages within bounds.

`BarrierObjective` wraps any loss in any PyTorch loop; `Constraint` names an average and its bounds; a rule
(`AdaptiveBarrier` unless told otherwise) turns violations into multipliers. Needs torch alone.
"""

from .balance import SplitGradients
from .barriers import LogBarrier, Readings, RelaxedLogBarrier, Rule
from .baselines import AugmentedLagrangian, DualAscent
from .best import BestFeasible
from .certificate import Certificate
from .constraints import Constraint
from .diagnostics import BoundState, Report
from .estimators import EMA, BatchMean
from .learning import AdaptiveBarrier, ModifiedBarrier
from .objective import BarrierObjective
from .output import ObjectiveOutput
from .packing import PackedBatch
from .probe import GradientProbe
from .sampling import Sampled
from .schedules import AdaptiveSchedule, ConstantSchedule, ExponentialSchedule, Schedule

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "AdaptiveBarrier",
    "AdaptiveSchedule",
    "AugmentedLagrangian",
    "BarrierObjective",
    "BatchMean",
    "BestFeasible",
    "BoundState",
    "Certificate",
    "ConstantSchedule",
    "Constraint",
    "DualAscent",
    "ExponentialSchedule",
    "GradientProbe",
    "LogBarrier",
    "ModifiedBarrier",
    "ObjectiveOutput",
    "PackedBatch",
    "Readings",
    "RelaxedLogBarrier",
    "Report",
    "Rule",
    "Sampled",
    "Schedule",
    "SplitGradients",
]
