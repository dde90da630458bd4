"""Cost functions in TRL's reward signature, called and checked."""

from __future__ import annotations

import inspect
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
        One float per response.

    Raises:
        TypeError: It returned something other than numbers.
        ValueError: It did not return one number per response.

    Example:
        >>> call_cost(lambda completions, **kwargs: [len(c) for c in completions], "size", {"completions": ["ab"]}, 1)
        [2.0]
    """
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        arguments = {key: value for key, value in arguments.items() if key in names}
    values: Any = function(**arguments)
    if isinstance(values, Tensor):
        values = values.tolist()
    try:
        floats = [float(value) for value in values]
    except (TypeError, ValueError):
        raise TypeError(f"cost {name} returned {_brief(values)}; allowed: a list of floats") from None
    if len(floats) != count:
        raise ValueError(f"cost {name} returned {len(floats)} values for {count} responses; allowed: one each")
    return floats


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
