"""Stand-ins for reward models: numbers per response that need no download."""

from functools import lru_cache

from barrierlm.integrations.costs import CostFunction
from barrierlm.recipes.costs import profanity_cost


@lru_cache
def _profanity() -> CostFunction:
    return profanity_cost()


def harmless(completions: list[str]) -> list[float]:
    """One minus the probability of profanity."""
    return [1 - p for p in _profanity()(completions)]
