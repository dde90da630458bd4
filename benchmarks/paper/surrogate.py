r"""`python -m benchmarks.paper.surrogate`: the runs with windows of length, on a policy that takes seconds.

The real objective, options and estimates, on a policy whose responses end at every token with the same probability,
:math:`p = \sigma(h_0 + a \cdot \theta)`. It has many parameters, gradients as noisy as sampled ones, and Adam, so it
swings for the same reasons as the model does: estimates are late, and steps have their size whatever the gradient's.
Beside the length the task has a direction of its own, in which it is to get as far as it can. What it says of a
setting is a guess to be tried on the model, and no result.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import fmean

import numpy as np
import torch

from barrierlm import Sampled
from barrierlm.recipes.config import load_options
from barrierlm.recipes.finetune import learning_rate
from barrierlm.recipes.workspace import build_objective

from ..tables import markdown_table
from .experiment import WINDOWS, Sources, Task, window
from .methods import DEFAULT, MM
from .scores import infeasible_share, inside

_PARAMETERS = 400
#: Mean lengths of the model at the start, and of the data.
_START, _DATA = 55.0, 18.5
#: Spread of a token's gradient in all other directions together: of a sampled response, and of the data.
_SAMPLED_NOISE, _DATA_NOISE = 0.35 / math.sqrt(_PARAMETERS), 1.5 / math.sqrt(_PARAMETERS)
#: What gradients are multiplied by to be clipped as often as the model's: the task's norm is then about 1, and that of
#: a net multiplier w at 14 tokens about 70 w (the model's, in a run of 12 to 16: 90 w).
_SIZE = 6.0
#: The task's gradient where it has nothing to do with the length, before that.
_SLOPE = 0.1
#: By how much a step moves the logit, over the learning rate: the slower and the faster of two policies.
SPEEDS = (1000.0, 2000.0)
#: Lines of the table: a name, the method, and options of the recipe.
_COMPARED = (
    ("MM", MM, ()),
    ("MM, confidence 6", MM, ("objective.confidence=6",)),
    ("default", DEFAULT, ()),
    ("default, confidence 0.5", DEFAULT, ("objective.confidence=0.5",)),
    ("MM, clipped apart", MM, ("optim.constraint_max_grad_norm=0.5",)),
    ("default, clipped apart", DEFAULT, ("optim.constraint_max_grad_norm=0.5",)),
)


@dataclass(frozen=True)
class Course:
    """Shares of a run's steps: with an estimate outside, with the policy's own mean outside.

    ``infeasible`` and ``outside`` are of the last quarter, where steps have become small; ``before`` is the policy's of
    the two quarters before that, in which a run may swing that ends well. ``progress`` is how far the task got in the
    direction of its own.
    """

    infeasible: float
    outside: float
    before: float
    progress: float


def simulate(task: Task, speed: float, *, constrained: bool = True) -> Course:
    """A task of one window of length, on the surrogate.

    Args:
        task: As for the model.
        speed: One of `SPEEDS`.
        constrained: False: the task alone.
    """
    options = load_options(None, task.overrides())
    objective, rng, cap = build_objective(options), np.random.default_rng(task.seed), options.rollout.max_new_tokens
    if objective is None or list(objective.weights) != ["length"]:
        raise ValueError(f"task={task.label!r}; allowed: a window of length")
    (bound,), value = task.problem.bounds, "constraints/length/value"
    own = np.abs(rng.normal(size=_PARAMETERS))  # of each parameter, in the logit
    own /= np.linalg.norm(own)
    aside = rng.normal(size=_PARAMETERS)  # what the task learns beside the length
    aside -= own * (own @ aside)
    aside /= np.linalg.norm(aside)
    parameters = torch.zeros(_PARAMETERS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameters], betas=(options.optim.momentum, 0.999), weight_decay=0.0)
    estimates, means = [], []
    for step in range(task.steps):
        moved = speed / own.sum() * float(own @ parameters.detach().numpy())
        p = 1 / (1 + math.exp(-min(max(moved - math.log(_START - 1), -8.0), 3.0)))
        lengths = np.minimum(rng.geometric(p, size=options.rollout.prompts), cap).astype(float)
        ended = lengths < cap
        pairs = rng.geometric(1 / _DATA, size=options.optim.batch_size).astype(float)
        # Of the token mean of the NLL, and of a cost's score-function estimate.
        task_slope = (p * (pairs.sum() - len(pairs)) - (1 - p) * len(pairs)) / pairs.sum()
        advantages = lengths - objective.report()[0].estimate if objective.windows else lengths - lengths.mean()
        slope = (advantages * (ended * (1 - p) - p * (lengths - ended))).mean()
        other = rng.normal(size=(len(lengths), _PARAMETERS))
        gradient = task_slope * own + _DATA_NOISE / math.sqrt(pairs.sum()) * rng.normal(size=_PARAMETERS)
        gradient -= _SLOPE * aside
        pull = slope * own + _SAMPLED_NOISE * ((advantages * np.sqrt(lengths))[:, None] * other).mean(0)
        pull *= objective.weights["length"] if constrained else 0.0
        limit, own_limit = options.optim.max_grad_norm, options.optim.constraint_max_grad_norm
        if own_limit is None:
            gradient = _clipped(_SIZE * (gradient + pull), limit)
        else:
            gradient = _clipped(_SIZE * gradient, limit) + _clipped(_SIZE * pull, own_limit)
        parameters.grad = torch.from_numpy(gradient)
        optimizer.param_groups[0]["lr"] = learning_rate(step, options.optim)
        optimizer.step()
        objective.measure({"length": Sampled(torch.from_numpy(lengths))})
        objective.step()
        estimates.append({value: objective.report()[0].estimate})
        means.append({value: (1 - (1 - p) ** cap) / p})
    own = inside(means, [bound])
    middle = own[task.steps // 4 : task.steps - max(1, task.steps // 4)]
    return Course(
        infeasible_share(inside(estimates, [bound])),
        infeasible_share(own),
        1 - fmean(middle) if middle else math.nan,
        float(aside @ parameters.detach().numpy()),
    )


def _clipped(gradient: np.ndarray, norm: float) -> np.ndarray:
    return gradient * min(1.0, norm / max(float(np.linalg.norm(gradient)), 1e-30))


def _one(job: tuple[Task, float, bool]) -> Course:
    torch.set_num_threads(1)
    task, speed, constrained = job
    return simulate(task, speed, constrained=constrained)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of methods.

    Steps outside: estimates in the last quarter (the policy there; in the two before); progress of the task, by that
    of plain fine-tuning.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.paper.surrogate", description=main.__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of the recipe, for all")
    arguments = parser.parse_args(argv)
    header = ["steps", "", *(f"{low} to {high}" for low, high in WINDOWS)]
    table = []
    # A process that has used torch's threads must not fork.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:

        def courses(task: Task, *, constrained: bool = True) -> list[Course]:
            seeds = [replace(task, seed=k) for k in range(arguments.seeds)]
            return list(pool.map(_one, [(one, speed, constrained) for one in seeds for speed in SPEEDS]))

        for steps in arguments.steps:
            free = courses(
                Task(window(*WINDOWS[0]), DEFAULT, 0, steps, Sources(extra=tuple(arguments.set))), constrained=False
            )
            alone = fmean(c.progress for c in free)
            for name, method, options in _COMPARED:
                cells = []
                for bounds in WINDOWS:
                    sources = Sources(extra=(*options, *arguments.set))
                    found = courses(Task(window(*bounds), method, 0, steps, sources))
                    means = [fmean(getattr(c, key) for c in found) for key in ("infeasible", "outside", "before")]
                    progress = fmean(c.progress for c in found) / alone
                    cells.append("{:.0%} ({:.0%}; {:.0%}) {:.2f}".format(*means, progress))
                table.append([str(steps), name, *cells])
    print(markdown_table(header, table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
