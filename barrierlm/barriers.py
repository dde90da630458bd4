"""Rules: how a violation becomes a multiplier.

A rule sees vectors over all bounds: violations z (feasible is z <= 0), the barrier parameter mu and the
relaxation width s, each of length m. It never changes a tensor in place, so that a failed step can be undone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .saved import saved_tensor, vector


class Reading(NamedTuple):
    """One bound's `Readings`, as numbers."""

    z: float
    window_z: float
    stderr: float
    noise: float
    known: bool
    typical: float


class Readings:
    """What a committed window says about each bound, as vectors [m] in units of the constraints' scales.

    ``known`` tells which bounds the window has measured; the others hold 0. An update that decides about each bound
    apart takes `each`: for as few as there are bounds numbers are faster, and vectors are made when they are asked for.

    Args:
        z: Violations at the estimate [m], of bounds as the objective's ``confidence`` draws them in (`Rule.draws_in`).
        window_z: The same at the mean of the newest window alone [m].
        stderr: Standard errors of the estimate [m]: 0 when exact, 1 when not known yet.
        noise: The same, times the noise floor [m].
        known: Which bounds were measured [m], bool.
        typical: `EMA.typical` in scales [m], from before the newest window; NaN where not known, the default.

    Raises:
        ValueError: Vectors of different lengths.

    Example:
        >>> z, noise = torch.tensor([-0.2]), torch.tensor([0.1])
        >>> Readings(z, z, noise, noise, torch.tensor([True])).each()[0].known
        True
    """

    def __init__(
        self,
        z: Tensor,
        window_z: Tensor,
        stderr: Tensor,
        noise: Tensor,
        known: Tensor,
        typical: Tensor | None = None,
    ) -> None:
        vectors = (z, window_z, stderr, noise, known, torch.full_like(z, math.nan) if typical is None else typical)
        self._bounds = [Reading(*numbers) for numbers in zip(*(x.tolist() for x in vectors), strict=True)]

    @classmethod
    def of(cls, bounds: list[Reading]) -> Readings:
        """What is given bound by bound."""
        made = cls.__new__(cls)
        made._bounds = bounds
        return made

    def each(self) -> list[Reading]:
        """Bound by bound, as numbers."""
        return self._bounds

    def __repr__(self) -> str:
        return f"Readings.of({self._bounds})"

    def __getattr__(self, name: str) -> Tensor:
        if name not in Reading._fields:
            raise AttributeError(name)
        dtype = torch.bool if name == "known" else torch.float64
        return torch.tensor([getattr(r, name) for r in self._bounds], dtype=dtype, device="cpu")


class Force(NamedTuple):
    """What a rule makes of one bound, as numbers: lambda, B(z), and the mu and s that it really uses."""

    multiplier: float
    value: float
    mu: float
    s: float


#: The methods with numbers, and those with vectors that each of them is a faster form of.
_STANDS_FOR = {"_forces": ("value", "multiplier", "in_force"), "_update_numbers": ("update",)}


class Rule(ABC):
    """How a violation becomes a penalty and a multiplier; the common interface of all methods.

    Subclasses define `value` and `multiplier`; those that learn also `start`, `update` and the state. ``mu``
    is the rule's own barrier parameter, or None to take the schedule's; ``s`` a fixed relaxation width, or
    None for ``s = mu**2``.
    """

    mu: float | None = None
    s: float | None = None
    #: Standard errors of a long average by which bounds are drawn in, unless the objective is told otherwise.
    confidence: float = 0.0
    _learned: tuple[str, ...] = ()
    #: Of the learned tensors, those that may be infinite, and those that are never negative.
    _unbounded: tuple[str, ...] = ()
    _nonnegative: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for fast, names in _STANDS_FOR.items():
            if fast in vars(cls):
                vars(cls)[fast].made_beside = [(name, getattr(cls, name)) for name in names]

    def _ask(self, fast: str, *given: Any) -> Any:
        """What ``_forces`` or ``_update_numbers`` says; `Rule`'s own one, where what it stands for has been replaced.

        By a subclass, a mixin, or an assignment to the class or the object.
        """
        own = getattr(type(self), fast)
        for name, method in getattr(own, "made_beside", ()):
            if getattr(getattr(self, name), "__func__", None) is not method:
                own = getattr(Rule, fast)
                break
        return own(self, *given)

    @property
    def kind(self) -> str:
        """What a saved state must agree with: the class, and the options that give its numbers their meaning."""
        return type(self).__name__

    @abstractmethod
    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """Penalty B(z) [m], differentiable in z."""

    @abstractmethod
    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """lambda = dB/dz [m], never negative."""

    def start(self, num_bounds: int) -> None:  # noqa: B027 - memoryless rules have nothing to prepare
        """Prepare for m bounds and forget everything; called by the objective."""

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:  # noqa: B027
        """Learn from a committed window (mu and s as the schedule and the noise floor had them during it)."""

    def in_force(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The mu and s [m] that the rule really uses, for the report."""
        return mu, s

    def draws_in(self, bound: int) -> bool:
        """Whether the objective's ``confidence`` draws bound 0 <= ``bound`` < m in, as the rule now stands.

        A rule that wraps another one forwards this, too.
        """
        return True

    # A step asks these two, which take numbers. A rule has its own only to be faster: for as few as there are bounds,
    # a dozen small tensors cost more than all else in a step.

    def _update_numbers(self, readings: Readings, mu: list[float], s: list[float]) -> None:
        """`update` with numbers."""
        self.update(readings, vector(mu), vector(s))

    def _forces(self, z: list[float], mu: list[float], s: list[float]) -> list[Force]:
        """`multiplier`, `value` and `in_force` bound by bound."""
        at, own_mu, own_s = vector(z), vector(mu), vector(s)
        vectors = (self.multiplier(at, own_mu, own_s), self.value(at, own_mu, own_s), *self.in_force(own_mu, own_s))
        return [Force(*numbers) for numbers in zip(*(x.tolist() for x in vectors), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of what was learned: tensors only."""
        return {name: getattr(self, name).clone() for name in self._learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in self._learned:
            own = getattr(self, name)
            allow = [math.inf] if name in self._unbounded else []
            low = 0.0 if name in self._nonnegative else -math.inf
            setattr(self, name, saved_tensor(state, name, [own.shape], allow=allow, low=low))


class LogBarrier(Rule):
    r"""The classical barrier, for strictly feasible, noise-free problems.

    .. math:: B(z) = -\mu \log(-z), \qquad \lambda = \mu / (-z)

    It is infinite for z >= 0; ``objective.step()`` raises there rather than go on with an infinite multiplier.

    Example:
        >>> one = torch.ones(1)
        >>> LogBarrier().multiplier(torch.tensor([-0.5]), one, one)
        tensor([2.])

    Source: Fiacco and McCormick 1968.
    """

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """B(z) [m]; +inf where z >= 0."""
        inside = z < 0
        # The inner where keeps the unused branch's gradient finite: 0 * inf would be NaN.
        return torch.where(inside, -mu * torch.where(inside, -z, 1.0).log(), math.inf)

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """mu / (-z) [m]; +inf where z >= 0."""
        inside = z < 0
        return torch.where(inside, mu / torch.where(inside, -z, 1.0), math.inf)


#: How the log is continued for r = z/s > -1, as functions V and V' of r (and the order): B = mu (V - log s).
_EXTENSIONS = {
    "linear": (lambda r, k: r + 1, lambda r, k: torch.ones_like(r)),
    "quadratic": (lambda r, k: ((r + 2) ** 2 - 1) / 2, lambda r, k: r + 2),
    "polynomial": (
        lambda r, k: (k - 1) / k * (((r + k) / (k - 1)) ** k - 1),
        lambda r, k: ((r + k) / (k - 1)) ** (k - 1),
    ),
    "exponential": (lambda r, k: torch.expm1(1 + r), lambda r, k: torch.exp(1 + r)),
}


class RelaxedLogBarrier(Rule):
    r"""The log barrier, continued smoothly past z = -s so that it works from an infeasible start.

    .. math:: B(z) = -\mu \log(-z) \;\; (z \le -s), \qquad
              B(z) = \mu \, (V(z/s) - \log s) \;\; (z > -s)

    with V(r) = r + 1 (linear), ((r+2)^2 - 1)/2 (quadratic), (k-1)/k (((r+k)/(k-1))^k - 1) (polynomial of even
    order k), or e^(1+r) - 1 (exponential). The linear one is C1 and caps the multiplier at mu/s, which is the
    kindest to noise; the others are C2.

    Args:
        extension: ``"linear"``, ``"quadratic"``, ``"polynomial"`` or ``"exponential"``.
        order: Even order >= 2 of the polynomial.
        s: Fixed relaxation width in units of the scale; default ``mu**2``.

    Raises:
        ValueError: An unknown extension, an order that is odd or given to another extension, s <= 0.

    Example:
        >>> mu, s = torch.tensor([0.1]), torch.tensor([0.01])
        >>> RelaxedLogBarrier().multiplier(torch.tensor([0.3]), mu, s)
        tensor([10.])

    Source: L3Ms (arXiv 2410.21533); Kervadec et al. 2019; Hauser and Saccon 2006; Feller and Ebenbauer 2015.
    """

    def __init__(self, extension: str = "linear", *, order: int | None = None, s: float | None = None) -> None:
        if extension not in _EXTENSIONS:
            raise ValueError(f"extension={extension!r}; allowed: {', '.join(map(repr, _EXTENSIONS))}")
        if order is not None and extension != "polynomial":
            raise ValueError(f"order={order!r} with extension={extension!r}; allowed: only with 'polynomial'")
        if extension == "polynomial" and (not isinstance(order or 4, int) or (order or 4) < 2 or (order or 4) % 2):
            raise ValueError(f"order={order!r}; allowed: an even integer >= 2")
        if s is not None and not (s > 0 and math.isfinite(s)):
            raise ValueError(f"s={s!r}; allowed: s > 0, or None for mu**2")
        self.extension, self.order, self.s = extension, order or 4, s

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """B(z) [m], finite everywhere."""
        r = z / s
        # Each branch sees only arguments of its own side: a log of a positive r would give NaN gradients.
        inner = -torch.log(-r.clamp(max=-1))
        outer = _EXTENSIONS[self.extension][0](r.clamp(min=-1), self.order)
        return mu * (torch.where(r <= -1, inner, outer) - torch.log(s))

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """B'(z) [m]: mu / (-z) inside, (mu/s) V'(z/s) beyond."""
        r = z / s
        inner = -1 / r.clamp(max=-1)
        outer = _EXTENSIONS[self.extension][1](r.clamp(min=-1), self.order)
        return mu / s * torch.where(r <= -1, inner, outer)

    def _forces(self, z: list[float], mu: list[float], s: list[float]) -> list[Force]:
        """See `Rule._forces`."""
        if self.extension != "linear":
            return super()._forces(z, mu, s)
        return [relaxed_force(*numbers) for numbers in zip(z, mu, s, strict=True)]


def relaxed_force(z: float, mu: float, s: float) -> Force:
    """`RelaxedLogBarrier` with the linear extension, at one bound."""
    if s == 0:  # a mu whose square is no number
        return Force(math.inf, math.inf, mu, s)
    r = z / s
    slope, value = (-1 / r, -math.log(-r)) if r <= -1 else (1.0, r + 1)
    return Force(mu / s * slope, mu * (value - math.log(s)), mu, s)
