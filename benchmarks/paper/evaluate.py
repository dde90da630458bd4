"""Held-out evaluation of a run: every measure, on the prompts it was trained for and on longer ones."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

from barrierlm.recipes.costs import load_costs
from barrierlm.recipes.data import Tokens, load_pairs, split_pairs, tokenize_pairs
from barrierlm.recipes.evaluate import evaluate
from barrierlm.recipes.options import ConstraintOptions
from barrierlm.recipes.workspace import Workspace

from .experiment import Bound, Sources

#: The shifted split: prompts that are longer than any in training, up to so many times.
_LONGER = 2.4


def splits(workspace: Workspace) -> dict[str, list[Tokens]]:
    """Held-out pairs: ``test``; ``validation``, on which the number of steps is chosen; ``shifted``, with long prompts.

    All are of conversations that training never saw, and those of ``validation`` none of ``test``'s.

    Raises:
        ValueError: There are too few.
    """
    data, count = workspace.options.data, workspace.options.evaluation.prompts
    _, heldout = split_pairs(load_pairs(data), data)
    end = {"end_of_turn": workspace.end_of_turn}
    known = tokenize_pairs(heldout, workspace.tokenizer, data, **end)
    wider = dataclasses.replace(data, max_prompt_tokens=int(_LONGER * data.max_prompt_tokens))
    longer = tokenize_pairs(heldout, workspace.tokenizer, wider, **end)
    longer = [pair for pair in longer if len(pair.prompt_ids) > data.max_prompt_tokens]
    test = known[:count]
    tested = {pair.pair.origin for pair in test}
    others = [pair for pair in known[count:] if pair.pair.origin not in tested]
    found = {"test": test, "validation": others[:count], "shifted": longer[:count]}
    for name, pairs in found.items():
        if len(pairs) < count:
            raise ValueError(f"the split {name!r} has {len(pairs)} pairs; evaluation.prompts={count} needs as many")
    return found


def described(pairs: list[Tokens]) -> dict[str, Any]:
    """Size and content of a split, so that another run can be held against it."""
    digest = hashlib.sha256("\n".join(repr((p.prompt_ids, p.response_ids)) for p in pairs).encode())
    return {
        "pairs": len(pairs),
        "conversations": len({p.pair.origin for p in pairs}),
        "mean_response": round(sum(len(p.response_ids) for p in pairs) / len(pairs), 2),
        "digest": digest.hexdigest()[:12],
    }


def evaluate_on(
    workspace: Workspace, pairs: list[Tokens], sources: Sources, bounds: tuple[Bound, ...], scales: dict[str, Any]
) -> dict[str, Any]:
    """NLL and every measure on a split, and what that says about the bounds.

    Args:
        workspace: The trained model; its cap and its numbers of pairs and prompts are taken.
        pairs: The split.
        sources: Say what the measures are.
        bounds: Of the problem.
        scales: A unit of violation of every bound.
    """
    measures = {name: ConstraintOptions(cost=cost) for name, cost in sources.costs.items()}
    options = dataclasses.replace(workspace.options, constraints=measures)
    costs = load_costs(measures, options.costs, device=workspace.accelerator.device)
    found = evaluate(dataclasses.replace(workspace, options=options, heldout=pairs, costs=costs))
    values = {name: {"mean": r.mean, "stderr": r.stderr} for name, r in found.constraints.items()}
    return {
        "nll": found.nll,
        "nlls": [round(nll, 3) for nll in found.nlls],
        "tokens": found.tokens,
        "perplexity": math.exp(found.nll),
        "seconds": round(found.seconds, 1),
        "censored": found.censored,
        "measures": values,
        "verdict": verdict(values, bounds) if bounds else None,
        "violation": sum(distance(values[b.measure]["mean"], b) / (scales.get(b.name) or 1.0) for b in bounds),
    }


def distance(value: float, bound: Bound) -> float:
    """How far a value is outside of its bounds, in its own unit; 0 within."""
    below = 0.0 if bound.lower is None else bound.lower - value
    above = 0.0 if bound.upper is None else value - bound.upper
    return max(0.0, below, above)


#: From best to worst.
VERDICTS = ("met", "met?", "missed?", "missed")


def verdict(values: dict[str, dict[str, float]], bounds: tuple[Bound, ...]) -> str:
    """The worst over all bounds: whether the mean is within; a question mark: its 95% interval reaches over."""
    found = []
    for bound in bounds:
        mean, error = values[bound.measure]["mean"], 1.96 * values[bound.measure]["stderr"]
        low, high = (
            (-math.inf if bound.lower is None else bound.lower),
            (math.inf if bound.upper is None else bound.upper),
        )
        if low <= mean <= high:
            sure = low <= mean - error and mean + error <= high
            found.append("met" if sure else "met?")
        else:
            found.append("missed" if mean + error < low or mean - error > high else "missed?")
    return max(found, key=VERDICTS.index)
