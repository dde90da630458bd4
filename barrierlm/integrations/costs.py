"""Cost functions in TRL's reward signature, called and checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

#: ``(prompts, completions, completion_ids, **columns) -> list of floats``, as TRL's reward functions.
CostFunction = Callable[..., Sequence[float]]


def call_cost(function: CostFunction, name: str, arguments: Mapping[str, Any], count: int) -> list[float]:
    """The costs of ``count`` responses, from a function that is given those of the arguments that it names.

    Args:
        function: A function in TRL's reward signature; one with ``**kwargs`` is given all arguments.
        name: For error messages.
        arguments: ``prompts``, ``completions``, ``completion_ids`` and dataset columns, a list each.
        count: Number of responses.

    Returns:
        One float per response; NaN for None.

    Raises:
        TypeError: It returned something other than numbers.
        ValueError: It did not return one number per response.

    Example:
        >>> call_cost(lambda completions, **kwargs: [len(c) for c in completions], "size", {"completions": ["ab"]}, 1)
        [2.0]
    """
    return checked_costs(function(**accepted(function, arguments)), name, count)


def accepted(function: CostFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function names; all of them if it takes ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    return {key: value for key, value in arguments.items() if everything or key in names}


def checked_costs(values: Any, name: str, count: int) -> list[float]:
    """What a cost function returned, as ``count`` floats; NaN where it had None.

    Raises:
        TypeError: Something other than numbers.
        ValueError: Another number of them.
    """
    if isinstance(values, Tensor):
        values = values.tolist()
    try:
        floats = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise TypeError(f"cost {name} returned {brief(values)}; allowed: a list of floats") from None
    if len(floats) != count:
        raise ValueError(f"cost {name} returned {len(floats)} values for {count} responses; allowed: one each")
    return floats


def brief(value: Any) -> str:
    """Its repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
