"""What a run needs, loaded once: model, data, costs; and the objective of the options."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import barrierlm
from barrierlm import EMA, AdaptiveBarrier, BarrierObjective, Constraint, ModifiedBarrier, Rule, Schedule

from .config import ConfigError
from .costs import Cost, imported_costs, load_costs
from .data import Tokens, end_of_turn_id, load_pairs, split_pairs, tokenize_pairs
from .model import Policy, load_policy, precision, quiet_transformers
from .options import Options
from .rollout import Rollout, sample_responses

#: `objective.confidence` of the rules that learn on a barrier.
_CONFIDENCE = 6.0


@dataclass
class Workspace:
    """Model, data and costs; several runs may use them one after the other."""

    options: Options
    accelerator: Accelerator
    console: Console
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    end_of_turn: int
    train: list[Tokens]
    heldout: list[Tokens]
    costs: dict[str, Cost]
    start: list[Tensor]

    def reset(self) -> None:
        """Put the trained weights back to where they started."""
        with torch.no_grad():
            for p, start in zip(self.policy.trained(), self.start, strict=True):
                p.copy_(start)

    def sample(self, prompts: list[Tokens]) -> list[Rollout]:
        """One response per entry of ``prompts``, from the model as it is."""
        return sample_responses(
            self.policy,
            self.tokenizer,
            prompts,
            end_of_turn=self.end_of_turn,
            max_new_tokens=self.options.rollout.max_new_tokens,
        )


def open_workspace(options: Options) -> Workspace:
    """Load model, data and costs as the options say; names the cost functions it imports before it does.

    Raises:
        ModuleNotFoundError: A package that an option needs is missing; names the extra.
        ConfigError: Data or cost functions that do not fit; says what is allowed.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=options.optim.gradient_accumulation,
        mixed_precision="no",  # `Policy` has its own autocast, the same in training and in sampling
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=options.rank_timeout))],
    )
    # From here on a number of the run: what is resumed on another kind of processor is another run.
    dtype = precision(options.model.dtype, accelerator.device)
    options = replace(options, model=replace(options.model, dtype=dtype))
    # Into a file or a pipe, tables get room: there is no terminal whose width they must fit.
    console = Console(quiet=not accelerator.is_main_process, width=None if sys.stdout.isatty() else 130)
    for cost in imported_costs(options.constraints):
        console.print(
            f"Importing cost function {cost} (this runs its module)", markup=False, highlight=False, soft_wrap=True
        )
    costs = load_costs(options.constraints, options.costs, device=accelerator.device)
    quiet_transformers()
    with console.status("Loading the model"):
        policy, tokenizer = load_policy(options.model, seed=options.seed)
    policy.to(accelerator.device)
    end_of_turn = end_of_turn_id(tokenizer)
    with console.status("Preparing the data"):
        train_pairs, heldout_pairs = split_pairs(load_pairs(options.data), options.data)
        most = max(options.evaluation.pairs, options.evaluation.prompts)
        train = tokenize_pairs(
            train_pairs, tokenizer, options.data, end_of_turn=end_of_turn, limit=options.data.max_pairs
        )
        heldout = tokenize_pairs(heldout_pairs, tokenizer, options.data, end_of_turn=end_of_turn, limit=most)
    console.print(
        f"{options.model.name}: {sum(p.numel() for p in policy.trained()):,} of "
        f"{sum(p.numel() for p in policy.parameters()):,} weights trained, forward pass in {dtype}; "
        f"{len(train):,} training and {len(heldout):,} held-out pairs",
        highlight=False,
        soft_wrap=True,
    )
    start = [p.detach().clone() for p in policy.trained()]
    return Workspace(options, accelerator, console, policy, tokenizer, end_of_turn, train, heldout, costs, start)


def build_objective(options: Options) -> BarrierObjective | None:
    """The objective of the options; None without constraints.

    Raises:
        ConfigError: An unknown part, or options that it does not take.
    """
    if not options.constraints:
        return None
    given = options.objective
    # The task loss is a token's NLL, which a bound moves by a few percent; the rules' own unit is 1.
    learns = given.rule in (AdaptiveBarrier.__name__, ModifiedBarrier.__name__)
    rule_options = {"unit": given.unit} | given.rule_options if learns else given.rule_options
    # A run of the recipe has few responses and few windows, so half of its last estimates would be outside.
    confidence = _CONFIDENCE if learns and given.confidence is None else given.confidence
    return BarrierObjective(
        None,
        [Constraint(name, lower=c.lower, upper=c.upper, scale=c.scale) for name, c in options.constraints.items()],
        rule=_part("rule", given.rule, rule_options, Rule),
        schedule=_part("schedule", given.schedule, given.schedule_options, Schedule),
        estimator=_part("estimator", given.estimator, given.estimator_options, EMA),
        noise_floor=given.noise_floor,
        confidence=confidence,
        nonfinite="skip" if options.costs.on_error == "skip" else "raise",
    )


def _part(kind: str, name: str, arguments: dict[str, Any], base: type) -> Any:
    """An instance of the exported class ``name``, a concrete ``base``."""
    exported = {key: getattr(barrierlm, key) for key in barrierlm.__all__}
    allowed = {
        key: value
        for key, value in exported.items()
        if isinstance(value, type) and issubclass(value, base) and not getattr(value, "__abstractmethods__", None)
    }
    if name not in allowed:
        raise ConfigError(f"objective.{kind}={name!r}; allowed: {', '.join(sorted(allowed))}")
    try:
        return allowed[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"objective.{kind}_options={arguments} of {name}: {error}") from None
