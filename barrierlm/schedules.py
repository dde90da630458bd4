"""How the barrier parameter mu falls, one tick per committed window."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from .barriers import Readings
from .saved import saved_count, saved_number, saved_tensor


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
        #: Per bound, when it was last measured: its violation, its standard error, and the larger of its noise and
        #: its movement; the windows that its violation has not come down for, and from which violation.
        self._state = dict.fromkeys(("z", "stderr", "coarse", "waited", "waited_at"), torch.zeros(0).double())

    @property
    def mu(self) -> float:
        return self._mu

    def tick(self, readings: Readings) -> None:
        z, known = readings.z, readings.known
        if not known.any():
            return
        if len(self._state["z"]) != len(z):
            self._state = dict.fromkeys(self._state, torch.zeros_like(z)) | {"z": torch.full_like(z, math.nan)}
        old = self._state
        moved = (z - old["z"]).abs().nan_to_num(math.inf)
        violated = z > 2 * readings.stderr
        fresh = violated & ((old["waited"] == 0) | (z < 0.9 * old["waited_at"]))
        new = {
            "z": z,
            "stderr": readings.stderr,
            "coarse": torch.maximum(readings.noise, moved),
            "waited": torch.where(violated, torch.where(fresh, 1.0, old["waited"] + 1), 0.0),
            "waited_at": torch.where(fresh, z, old["waited_at"]),
        }
        self._state = now = {name: torch.where(known, new[name], old[name]) for name in old}
        target = self._mu * self.factor
        # A bound that was never measured (NaN) cannot speak against it.
        if bool((~(now["z"] > -now["stderr"]) & (now["coarse"] <= target**2)).all()):
            self._mu = max(min(self._mu, self.end), target)
        elif bool((now["waited"] >= self.patience).any()):
            self._mu = max(self._mu, min(self.start, self._mu / self.factor))
            self._state = now | {"waited": torch.zeros_like(z)}

    def state_dict(self) -> dict[str, Any]:
        return {"mu": self._mu} | {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mu = float(saved_number(state, "mu", low=5e-324))
        # Empty before the first tick; how many bounds there are is the objective's to say.
        shape = getattr(state.get("z"), "shape", ())
        self._state = {
            name: saved_tensor(state, name, [shape[:1]], allow=[math.nan] if name == "z" else [math.inf])
            for name in self._state
        }
        self._mu = mu
