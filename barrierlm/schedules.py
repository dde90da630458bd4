"""How the barrier parameter mu falls, one tick per committed window."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from .barriers import Reading, Readings
from .saved import saved_count, saved_number, saved_tensor, vector


def _positive(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{argument}={value!r}; allowed: a finite number > 0")
    return float(value)


class Schedule(ABC):
    """A barrier parameter that changes with the committed windows: `mu`, `tick`, and the state."""

    @property
    @abstractmethod
    def mu(self) -> float:
        """The barrier parameter now in force, in units of the scales."""

    def prepare(self, num_bounds: int) -> None:  # noqa: B027 - most keep nothing by bound
        """How many bounds there will be, so that the state has its final shapes before the first tick."""

    @abstractmethod
    def tick(self, readings: Readings) -> None:
        """One committed window has passed, with these readings of the bounds."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class ConstantSchedule(Schedule):
    """A mu that never changes.

    Args:
        mu: The barrier parameter, > 0, in units of the scales.

    Raises:
        ValueError: ``mu`` not a positive number.

    Example:
        >>> ConstantSchedule(0.1).mu
        0.1
    """

    def __init__(self, mu: float) -> None:
        self._mu = _positive("mu", mu)

    @property
    def mu(self) -> float:
        return self._mu

    def tick(self, readings: Readings) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ExponentialSchedule(Schedule):
    r"""The paper's schedule: mu falls by the same factor each window, then stays.

    .. math:: \mu_t = \text{start} \, (\text{end} / \text{start})^{\min(t, \text{steps}) / \text{steps}}

    Args:
        start: mu of the first window, > 0.
        end: mu from window ``steps`` on, > 0.
        steps: Number of committed windows between the two, >= 1.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> ExponentialSchedule(1.0, 1e-2, steps=1000).mu
        1.0

    Source: L3Ms (arXiv 2410.21533), figure 1 (mu from 1 to 0.01).
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start, self.end = _positive("start", start), _positive("end", end)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}; allowed: an integer >= 1")
        self.steps, self.ticks = steps, 0

    @property
    def mu(self) -> float:
        done = min(self.ticks, self.steps) / self.steps
        return self.start * (self.end / self.start) ** done

    def tick(self, readings: Readings) -> None:
        self.ticks += 1

    def state_dict(self) -> dict[str, Any]:
        return {"ticks": self.ticks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ticks = saved_count(state, "ticks")


class _Seen(NamedTuple):
    """What `AdaptiveSchedule` knows of a bound, from when it was last measured.

    Its violation, its standard error, and the larger of its noise and its movement; the windows that its violation has
    not come down for, and from which violation.
    """

    z: float = math.nan
    stderr: float = 0.0
    coarse: float = 0.0
    waited: float = 0.0
    waited_at: float = 0.0

    def after(self, r: Reading) -> _Seen:
        """What is known after one more reading."""
        moved = math.inf if math.isnan(self.z) else abs(r.z - self.z)
        waited, waited_at = 0.0, self.waited_at
        if r.z > 2 * r.stderr:
            fresh = self.waited == 0 or r.z < 0.9 * self.waited_at
            waited, waited_at = (1.0, r.z) if fresh else (self.waited + 1, self.waited_at)
        return _Seen(r.z, r.stderr, r.noise if r.noise > moved else moved, waited, waited_at)


class AdaptiveSchedule(Schedule):
    r"""mu falls while every bound is met with confidence and the estimates resolve the next width; needs no horizon.

    A tick multiplies mu by ``factor`` if, for every bound measured so far, z is a standard error or more below 0
    and the next :math:`s = \mu^2` is larger than both the noise of z and its last movement: below either of these
    the multiplier would follow the noise (or the optimizer's own steps) instead of the constraint. After
    ``patience`` windows in a row with a bound violated beyond its noise and not coming down, mu rises by as much, at
    most to ``start``: a small mu makes the barrier steep where estimates lag. Otherwise mu holds.

    Args:
        start: First and largest mu, > 0.
        end: Smallest mu, > 0.
        factor: In (0, 1).
        patience: Windows after which a violation that does not come down by a tenth counts as sustained, >= 1.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> AdaptiveSchedule().mu
        1.0

    Source: barrierlm.
    """

    def __init__(self, start: float = 1.0, end: float = 1e-3, factor: float = 0.9, *, patience: int = 20) -> None:
        self._mu, self.end = _positive("start", start), _positive("end", end)
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor!r}; allowed: 0 < factor < 1")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r}; allowed: an integer >= 1")
        self.start, self.factor, self.patience = self._mu, float(factor), patience
        self._seen: list[_Seen] = []

    @property
    def mu(self) -> float:
        return self._mu

    def prepare(self, num_bounds: int) -> None:
        self._seen = [_Seen()] * num_bounds

    def tick(self, readings: Readings) -> None:
        bounds = readings.each()
        if not any(r.known for r in bounds):
            return
        seen = self._seen or [_Seen()] * len(bounds)
        self._seen = seen = [s.after(r) if r.known else s for s, r in zip(seen, bounds, strict=True)]
        target = self._mu * self.factor
        # A bound that was never measured (NaN) cannot speak against it.
        if all(not s.z > -s.stderr and s.coarse <= target**2 for s in seen):
            self._mu = max(min(self._mu, self.end), target)
        elif any(s.waited >= self.patience for s in seen):
            self._mu = max(self._mu, min(self.start, self._mu / self.factor))
            self._seen = [s._replace(waited=0.0) for s in seen]

    def state_dict(self) -> dict[str, Any]:
        columns = list(zip(*self._seen, strict=True)) or [()] * len(_Seen._fields)
        return {"mu": self._mu} | {name: vector(column) for name, column in zip(_Seen._fields, columns, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mu = float(saved_number(state, "mu", low=5e-324))
        # Without an objective that said how many bounds there are, any number of them.
        shape = (len(self._seen),) if self._seen else getattr(state.get("z"), "shape", ())[:1]
        columns = [
            saved_tensor(state, name, [shape], allow=[math.nan] if name == "z" else [math.inf]).tolist()
            for name in _Seen._fields
        ]
        self._mu, self._seen = mu, [_Seen(*numbers) for numbers in zip(*columns, strict=True)]
