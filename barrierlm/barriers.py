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


class Readings(NamedTuple):
    """What a committed window says about each bound, as vectors [m] in units of the constraints' scales.

    ``z`` is the violation at the estimate, ``window_z`` at the mean of the newest window alone, ``stderr`` the
    estimate's standard error (0 when exact, 1 when not known yet), and ``noise`` that times the noise floor.
    ``known`` tells which bounds the window has measured; the others hold 0.
    """

    z: Tensor
    window_z: Tensor
    stderr: Tensor
    noise: Tensor
    known: Tensor


class Rule(ABC):
    """How a violation becomes a penalty and a multiplier; the common interface of all methods.

    Subclasses define `value` and `multiplier`; those that learn also `start`, `update` and the state. ``mu``
    is the rule's own barrier parameter, or None to take the schedule's; ``s`` a fixed relaxation width, or
    None for ``s = mu**2``.
    """

    mu: float | None = None
    s: float | None = None
    _learned: tuple[str, ...] = ()

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

    def state_dict(self) -> dict[str, Any]:
        """A deep copy of what was learned: tensors only."""
        return {name: getattr(self, name).clone() for name in self._learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in self._learned:
            setattr(self, name, state[name].detach().cpu().clone())


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


#: Where the modified barrier's log gives way to a parabola, as a share of mu.
_BETA = 0.5
#: Learned multipliers stay below this, so that bounds that cannot be met do not end in infinities.
_MAX_MULTIPLIER = 1e4


def _psi(u: Tensor) -> Tensor:
    """-log(1 - u) for u <= beta, then the parabola that matches value, slope and curvature."""
    inner = -torch.log1p(-u.clamp(max=_BETA))
    v = u.clamp(min=_BETA)
    outer = (v * v / 2 + (1 - 2 * _BETA) * v - _BETA * (2 - 3 * _BETA) / 2) / (1 - _BETA) ** 2
    return torch.where(u <= _BETA, inner, outer - math.log(1 - _BETA))


def _psi_slope(u: Tensor) -> Tensor:
    """The derivative of `_psi`; 1 at u = 0."""
    inner = 1 / (1 - u.clamp(max=_BETA))
    return torch.where(u <= _BETA, inner, (u.clamp(min=_BETA) + 1 - 2 * _BETA) / (1 - _BETA) ** 2)


class _Learner(Rule):
    r"""Learned multipliers: what `ModifiedBarrier` and `AdaptiveBarrier` share.

    .. math:: \hat\lambda \leftarrow \hat\lambda + \frac{\gamma}{1 + t/\tau} \max(1, \hat\lambda) \,
              \operatorname{clamp}(z_\text{window}, -1, 1)

    The classical update, :math:`\hat\lambda \psi'(z/\mu)`, is for solved inner problems: undamped it overshoots
    from an infeasible start, and purely multiplicative it cannot grow back from nearly 0. The newest window's z
    is used because the sum over steps averages by itself; an averaged z would only add delay. A bound's age t
    counts its noisy windows, since averaging is what a decaying step is for: exact constraints keep the full
    step. The age restarts after a sustained violation: beyond its noise for `patience` windows in a row that
    brought it down by less than a tenth.
    """

    learned: Tensor
    age: Tensor
    stalled: Tensor
    stalled_at: Tensor
    _learned: tuple[str, ...] = ("learned", "age", "stalled", "stalled_at")

    def __init__(self, step: float, decay: float, patience: int) -> None:
        if not 0 < step <= 1:
            raise ValueError(f"step={step!r}; allowed: 0 < step <= 1")
        if not decay > 0:
            raise ValueError(f"decay={decay!r}; allowed: decay > 0 windows")
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r}; allowed: an integer >= 1")
        self.step, self.decay, self.patience = float(step), float(decay), patience

    def start(self, num_bounds: int) -> None:
        self.learned = torch.ones(num_bounds, dtype=torch.float64)
        self.age = torch.zeros(num_bounds, dtype=torch.float64)
        self.stalled = torch.zeros(num_bounds, dtype=torch.float64)
        self.stalled_at = torch.zeros(num_bounds, dtype=torch.float64)

    def _sustained(self, readings: Readings) -> Tensor:
        """Count the windows in which a violation does not come down; which bounds [m] have used up patience."""
        violated = readings.known & (readings.z > 2 * readings.stderr)
        fresh = violated & ((self.stalled == 0) | (readings.z < 0.9 * self.stalled_at))
        self.stalled_at = torch.where(fresh, readings.z, self.stalled_at)
        count = torch.where(fresh, 1.0, self.stalled + violated)
        count = torch.where(readings.known & ~violated, 0.0, count)
        sustained = count >= self.patience
        self.stalled = torch.where(sustained, 0.0, count)
        return sustained

    def _learn(self, readings: Readings, mask: Tensor, restart: Tensor) -> None:
        """One damped step for the bounds in ``mask`` [m], at full size where ``restart`` [m]."""
        age = torch.where(restart, 0.0, self.age)
        move = self.step / (1 + age / self.decay) * self.learned.clamp(min=1) * readings.window_z.clamp(-1, 1)
        learned = (self.learned + move).clamp(0, _MAX_MULTIPLIER)
        self.learned = torch.where(mask, learned, self.learned)
        self.age = torch.where(mask & (readings.stderr > 0), age + 1, age)


class ModifiedBarrier(_Learner):
    r"""Learned multipliers on a shifted log barrier: exact at a fixed mu, with no m mu bias.

    .. math:: B(z) = \mu \hat\lambda \, \psi(z/\mu), \quad \psi(u) = -\log(1-u), \qquad
              \hat\lambda \leftarrow \hat\lambda + \gamma_t \max(1, \hat\lambda) \, z, \quad
              \gamma_t = \gamma_0 / (1 + t/\tau)

    continued by a parabola for u > 1/2 (relaxed extrapolation). Needs no schedule.

    Args:
        mu: The fixed barrier parameter, in units of the scale.
        step: :math:`\gamma_0` in (0, 1].
        decay: :math:`\tau`, in noisy windows, after which the step has halved.
        patience: Windows in a row with a violation that does not come down, after which the step starts over.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> ModifiedBarrier(mu=0.5).mu
        0.5

    Source: Polyak 1992; Nash, Polyak and Sofer 1994 (extrapolation).
    """

    def __init__(self, mu: float = 0.5, *, step: float = 0.05, decay: float = 100.0, patience: int = 20) -> None:
        super().__init__(step, decay, patience)
        if not (mu > 0 and math.isfinite(mu)):
            raise ValueError(f"mu={mu!r}; allowed: mu > 0")
        self.mu = float(mu)

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """mu lambda psi(z/mu) [m]."""
        return mu * self.learned.to(z) * _psi(z / mu)

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """lambda psi'(z/mu) [m]."""
        return self.learned.to(z) * _psi_slope(z / mu)

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:
        """The damped multiplier step of every measured bound."""
        self._learn(readings, readings.known, self._sustained(readings))


class AdaptiveBarrier(_Learner):
    r"""The default: a relaxed log barrier that hands over to learned multipliers when noise stops mu.

    Each bound starts as `RelaxedLogBarrier` (linear extension), which reaches feasibility from anywhere
    without overshoot. Its plug-in multiplier mu/(-z) is only as good as z is precise, so mu cannot fall past
    the noise of the estimates, and a bias of mu per bound would stay; and a small mu is stiff (gain lambda/mu),
    so that it swings when estimates or the optimizer lag. So when noise stops mu, when mu has come down to
    ``smallest_mu``, or when a violation does not come down for `patience` windows (its multiplier, at most
    mu/s, is too small), the bound keeps its mu and becomes a `ModifiedBarrier` that starts from the multiplier
    then in force, which therefore does not jump. A learning bound that stays violated learns at full step again.

    Args:
        smallest_mu: mu at which tightening ends even without noise, > 0.
        step: Initial step of the learned multipliers, in (0, 1].
        decay: Noisy windows after which the step has halved.
        patience: Windows in a row with a violation that does not come down: a sustained violation.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> AdaptiveBarrier().patience
        20

    Source: barrierlm; the two halves are L3Ms (arXiv 2410.21533) and Polyak 1992.
    """

    frozen_mu: Tensor
    _learned = ("learned", "age", "stalled", "stalled_at", "frozen_mu")

    #: The share of s from which on the noise counts as having stopped mu: just under one AdaptiveSchedule step.
    _STOPPED = 0.8

    def __init__(
        self, smallest_mu: float = 0.5, *, step: float = 0.05, decay: float = 100.0, patience: int = 20
    ) -> None:
        super().__init__(step, decay, patience)
        if not (smallest_mu > 0 and math.isfinite(smallest_mu)):
            raise ValueError(f"smallest_mu={smallest_mu!r}; allowed: smallest_mu > 0")
        self.smallest_mu = float(smallest_mu)
        self._relaxed = RelaxedLogBarrier()

    def start(self, num_bounds: int) -> None:
        super().start(num_bounds)
        self.frozen_mu = torch.zeros(num_bounds, dtype=torch.float64)

    @property
    def learning(self) -> Tensor:
        """Which bounds [m] have been handed over."""
        return self.frozen_mu > 0

    def _mix(self, relaxed: Tensor, modified: Tensor) -> Tensor:
        return torch.where(self.learning.to(relaxed.device), modified, relaxed)

    def _own_mu(self, mu: Tensor) -> Tensor:
        return torch.where(self.learning, self.frozen_mu, 1.0).to(mu)

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """The penalty [m] of whichever half is in force."""
        own = self._own_mu(mu)
        return self._mix(self._relaxed.value(z, mu, s), own * self.learned.to(z) * _psi(z / own))

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """The multiplier [m] of whichever half is in force."""
        own = self._own_mu(mu)
        return self._mix(self._relaxed.multiplier(z, mu, s), self.learned.to(z) * _psi_slope(z / own))

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:
        """Learn where handed over; hand over where noise or a sustained violation says so."""
        learning, known = self.learning, readings.known
        sustained = self._sustained(readings)
        stopped = (known & ((readings.noise >= self._STOPPED * mu**2) | (mu <= self.smallest_mu))).any()
        hand_over = known & ~learning & (sustained | stopped)
        # A bound that is new, or has just become noisier, must not keep a mu below its own noise.
        own = torch.maximum(mu, readings.noise.sqrt())
        implied = self.multiplier(readings.z, own, own**2) / _psi_slope(readings.z / own)
        self._learn(readings, learning & known, sustained)
        self.learned = torch.where(hand_over, implied, self.learned)
        self.frozen_mu = torch.where(hand_over, own, self.frozen_mu)

    def in_force(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen mu where the bound has been handed over."""
        own = torch.where(self.learning, self.frozen_mu, mu)
        return own, torch.where(self.learning, own**2, s)
