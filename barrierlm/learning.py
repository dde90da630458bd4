"""Rules that learn their multipliers: `ModifiedBarrier`, and the default, `AdaptiveBarrier`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .barriers import Readings, RelaxedLogBarrier, Rule

#: Where the modified barrier's log is continued by a parabola, as a share of mu.
_BETA = 0.5
#: Learned multipliers stay below this, so that bounds that cannot be met do not end in infinities.
_MAX_MULTIPLIER = 1e4
#: |z| within which an estimate may be at its bound, and above which it is surely violated, in standard errors.
_NEAR, _FAR = 3.0, 4.0
#: A violation is coming down while it is below this share of its slow average.
_PROGRESS = 0.95
#: A violation that has not come down for this many times `patience` windows starts the age over.
_RESTART = 5
#: Of one that does not come down: how much counts in a step, and the share of the multiplier that the step grows with.
_FAR_STEP, _GROWTH = 0.3, 0.2


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

    .. math:: \hat\lambda \leftarrow \hat\lambda + \frac{\gamma}{1 + t/\tau} \, g \, z_\text{window}, \qquad
              \mu_t = \mu \sqrt{1 + t/\tau}

    This is for sampled bounds. The newest window's z is used because the sum over steps averages by itself; an
    averaged z would only add delay. What keeps it steady:

    - Averaging is what a decaying step is for, and the noise that the barrier's own slope lets through, 1/mu, has to
      fall with it. Age t counts the windows up to the estimate's last crossing of the bound: what stays on one side
      still has something to learn, what crosses swings around it, from noise or from delay (Kesten's rule).
    - While a violation is coming down (it is a twentieth, and a standard error, below its average over the last
      `patience` windows) its multiplier waits: an optimizer takes its time, and what adds up meanwhile would overshoot,
      which a policy that has collapsed never undoes. Otherwise a step counts at most 0.3 of it.
    - g = max(1, lambda), so that large multipliers learn in proportion, but a fifth of that for violations that do not
      come down: they may not be able to. Within 3 standard errors of the bound none of these limits hold.
    - A violation that has lasted for 5 `patience` windows without coming down starts the age over.

    Exact bounds take :math:`g = \max(1, \hat\lambda)` and the full step: there is nothing to average. A step of 1 is
    the classical update, :math:`\hat\lambda \psi'(z/\mu)`, for solved inner problems; anywhere else it overshoots
    from an infeasible start, and cannot grow back from nearly 0 after that.
    """

    confidence = 0.5
    learned: Tensor  # in multiples of `unit`
    age: Tensor
    side: Tensor
    uncrossed: Tensor
    average: Tensor
    seen: Tensor
    lasting: Tensor
    _learned: tuple[str, ...] = ("learned", "age", "side", "uncrossed", "average", "seen", "lasting")
    _nonnegative: tuple[str, ...] = ("learned", "age", "uncrossed", "seen", "lasting")

    def __init__(self, step: float, decay: float, patience: int, unit: float) -> None:
        if not (unit > 0 and math.isfinite(unit)):
            raise ValueError(f"unit={unit!r}; allowed: unit > 0")
        if not 0 < step <= 1:
            raise ValueError(f"step={step!r}; allowed: 0 < step <= 1")
        if not decay > 0:
            raise ValueError(f"decay={decay!r}; allowed: decay > 0 windows")
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r}; allowed: an integer >= 1")
        self.step, self.decay, self.patience, self.unit = float(step), float(decay), patience, float(unit)

    @property
    def kind(self) -> str:
        return super().kind + (f"(unit={self.unit:g})" if self.unit != 1 else "")

    def start(self, num_bounds: int) -> None:
        self.learned = torch.ones(num_bounds, dtype=torch.float64)
        for name in ("age", "side", "uncrossed", "average", "seen", "lasting"):
            setattr(self, name, torch.zeros_like(self.learned))

    def _grown(self, mu: Tensor) -> Tensor:
        """mu [m] of bounds of this age."""
        return mu * (1 + self.age.to(mu) / self.decay).sqrt()

    def _coming_down(self, readings: Readings) -> Tensor:
        """Take z into its slow average; which violations [m] are clearly below theirs."""
        z, known, share = readings.z, readings.known, 1 / self.patience
        self.seen = torch.where(known, (1 - share) * self.seen + share, self.seen)
        step = share / self.seen.clamp(min=share) * (z - self.average)
        self.average = torch.where(known, self.average + step, self.average)
        coming = (z > 0) & (self.average - z > torch.maximum(readings.stderr, (1 - _PROGRESS) * z))
        lasting = torch.where((z > 2 * readings.stderr) & ~coming, self.lasting + 1, 0.0)
        self.lasting = torch.where(known, lasting, self.lasting)
        return coming

    def _learn(self, readings: Readings, mask: Tensor, coming: Tensor, slope: Tensor) -> None:
        """One damped step of the bounds in ``mask`` [m].

        ``coming`` [m] are the violations that come down; ``slope`` [m] is psi' at the newest window's z.
        """
        z, stderr, noisy = readings.z, readings.stderr, readings.stderr > 0
        near = noisy & (z.abs() < _NEAR * stderr)
        restart = mask & (self.lasting >= _RESTART * self.patience)
        age = torch.where(restart, 0.0, self.age)
        drive = torch.minimum(readings.window_z, torch.where(near, 1.0, _FAR_STEP)).clamp(min=-1)
        drive = torch.where((z > _FAR * stderr) & coming, 0.0, drive)
        # By the estimate's side, not the window's: else noise alone would pull the multiplier of a violation down.
        share = torch.where(near | (z < 0), 1.0, _GROWTH)
        gain = 1 + share * (self.learned - 1).clamp(min=0)
        sampled_move = self.step / (1 + age / self.decay) * gain * drive
        if self.step == 1:
            exact_move = self.learned * (slope - 1)
        else:
            exact_move = self.step * self.learned.clamp(min=1) * readings.window_z.clamp(-1, 1)
        learned = (self.learned + torch.where(noisy, sampled_move, exact_move)).clamp(0, _MAX_MULTIPLIER)
        self.learned = torch.where(mask, learned, self.learned)
        uncrossed = torch.where(restart, 0.0, self.uncrossed + noisy)
        crossed = mask & noisy & (z.sign() * self.side < 0)
        self.age = torch.where(crossed, age + uncrossed, age)
        self.uncrossed = torch.where(mask, torch.where(crossed, 0.0, uncrossed), self.uncrossed)
        self.side = torch.where(mask, z.sign(), self.side)


class ModifiedBarrier(_Learner):
    r"""Learned multipliers on a shifted log barrier: exact at a fixed mu, with no m mu bias.

    .. math:: B(z) = \mu \hat\lambda \, \psi(z/\mu), \quad \psi(u) = -\log(1-u), \qquad
              \hat\lambda \leftarrow \hat\lambda + \gamma_t \, g \, z, \quad \gamma_t = \gamma_0 / (1 + t/\tau)

    continued by a parabola for u > 1/2 (relaxed extrapolation). Needs no schedule. With noise the step decays and mu
    grows with the age t of a bound, :math:`\mu \sqrt{1 + t/\tau}`; ARCHITECTURE.md, "The default rule hands over",
    has the measurements.

    Args:
        mu: The barrier parameter, in units of the scale.
        step: :math:`\gamma_0` in (0, 1]; 1 is the classical update of exact bounds, for solved inner problems.
        decay: :math:`\tau`, in windows up to the last crossing of the bound, after which the step has halved.
        patience: Windows of the slow average against which a violation has to come down.
        unit: An ordinary multiplier, in task loss per unit of violation: learning starts from it, and B is a multiple
            of it. Smaller where the loss changes little (a mean of small numbers) across a wide window.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> ModifiedBarrier(mu=0.5).mu
        0.5

    Source: Polyak 1992; Nash, Polyak and Sofer 1994 (extrapolation).
    """

    def __init__(
        self,
        mu: float = 0.5,
        *,
        step: float = 0.05,
        decay: float = 100.0,
        patience: int = 20,
        unit: float = 1.0,
    ) -> None:
        super().__init__(step, decay, patience, unit)
        if not (mu > 0 and math.isfinite(mu)):
            raise ValueError(f"mu={mu!r}; allowed: mu > 0")
        self.mu = float(mu)

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """mu lambda psi(z/mu) [m]."""
        mu = self._grown(mu)
        return self.unit * mu * self.learned.to(z) * _psi(z / mu)

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """lambda psi'(z/mu) [m]."""
        return self.unit * self.learned.to(z) * _psi_slope(z / self._grown(mu))

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:
        """The damped multiplier step of every measured bound."""
        slope = _psi_slope(readings.window_z / mu)
        self._learn(readings, readings.known, self._coming_down(readings), slope)

    def in_force(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The mu that noise has let grow."""
        mu = self._grown(mu)
        return self.unit * mu, mu**2


class AdaptiveBarrier(_Learner):
    r"""The default: a relaxed log barrier that hands over to learned multipliers when mu stops falling.

    Each bound starts as `RelaxedLogBarrier` (linear extension), which reaches feasibility from anywhere
    without overshoot. Its plug-in multiplier mu/(-z) is only as good as z is precise, so mu cannot fall past
    the noise of the estimates, and a bias of mu per bound would stay; and a small mu is stiff (gain lambda/mu),
    so that it swings when estimates or the optimizer lag. So when noise stops mu, when mu has come down to
    ``smallest_mu``, when a sampled bound has not seen it fall for `patience` windows, or when an exact one's violation
    does not come down (its multiplier, at most mu/s, is too small), the bound keeps its mu and becomes a
    `ModifiedBarrier` that starts from the multiplier then in force, which therefore does not
    jump. It has no horizon.

    Args:
        smallest_mu: mu at which tightening ends even without noise, > 0.
        step: Initial step of the learned multipliers, in (0, 1].
        decay: Windows up to the last crossing of the bound after which the step has halved.
        patience: Windows without a smaller mu after which bounds are handed over, and windows of the slow average
            against which a violation has to come down.
        unit: An ordinary multiplier, in task loss per unit of violation: learning starts from it, and B is a multiple
            of it. Smaller where the loss changes little (a mean of small numbers) across a wide window.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> AdaptiveBarrier().patience
        20

    Source: barrierlm; the two halves are L3Ms (arXiv 2410.21533) and Polyak 1992.
    """

    frozen_mu: Tensor
    smallest_seen: Tensor
    held: Tensor
    _learned = (*_Learner._learned, "frozen_mu", "smallest_seen", "held")
    _nonnegative = (*_Learner._nonnegative, "frozen_mu", "smallest_seen", "held")
    _unbounded = ("smallest_seen",)

    #: The share of s from which on the noise counts as having stopped mu: just under one AdaptiveSchedule step.
    _STOPPED = 0.8

    def __init__(
        self,
        smallest_mu: float = 0.5,
        *,
        step: float = 0.05,
        decay: float = 100.0,
        patience: int = 20,
        unit: float = 1.0,
    ) -> None:
        super().__init__(step, decay, patience, unit)
        if not (smallest_mu > 0 and math.isfinite(smallest_mu)):
            raise ValueError(f"smallest_mu={smallest_mu!r}; allowed: smallest_mu > 0")
        self.smallest_mu = float(smallest_mu)
        self._relaxed = RelaxedLogBarrier()

    def start(self, num_bounds: int) -> None:
        super().start(num_bounds)
        self.frozen_mu, self.held = torch.zeros_like(self.learned), torch.zeros_like(self.learned)
        self.smallest_seen = torch.full_like(self.learned, math.inf)

    @property
    def learning(self) -> Tensor:
        """Which bounds [m] have been handed over."""
        return self.frozen_mu > 0

    def _mix(self, relaxed: Tensor, modified: Tensor) -> Tensor:
        return torch.where(self.learning.to(relaxed.device), modified, relaxed)

    def _own_mu(self, mu: Tensor) -> Tensor:
        return self._grown(torch.where(self.learning, self.frozen_mu, 1.0).to(mu))

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """The penalty [m] of whichever half is in force."""
        own = self._own_mu(mu)
        return self.unit * self._mix(self._relaxed.value(z, mu, s), own * self.learned.to(z) * _psi(z / own))

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """The multiplier [m] of whichever half is in force."""
        learned = self.learned.to(z) * _psi_slope(z / self._own_mu(mu))
        return self.unit * self._mix(self._relaxed.multiplier(z, mu, s), learned)

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:
        """Learn where handed over; hand over where mu has stopped."""
        learning, known = self.learning, readings.known
        coming = self._coming_down(readings)
        falling = mu < 0.999 * self.smallest_seen
        self.smallest_seen = torch.where(known, torch.minimum(mu, self.smallest_seen), self.smallest_seen)
        self.held = torch.where(known, torch.where(falling, 1.0, self.held + 1), self.held)
        # One bound's noise, or its end, holds the others' mu too.
        stopped = (known & ((readings.noise >= self._STOPPED * mu**2) | (mu <= self.smallest_mu))).any()
        held = (self.held > self.patience) & (readings.stderr > 0)
        stuck = self.lasting >= self.patience
        hand_over = known & ~learning & (stopped | stuck | held)
        # A bound that is new, or has just become noisier, must not keep a mu below its own noise.
        own = torch.maximum(mu, readings.noise.sqrt())
        implied = self.multiplier(readings.z, own, own**2) / self.unit / _psi_slope(readings.z / own)
        slope = _psi_slope(readings.window_z / self._own_mu(mu))
        self._learn(readings, learning & known, coming, slope)
        self.learned = torch.where(hand_over, implied, self.learned)
        self.frozen_mu = torch.where(hand_over, own, self.frozen_mu)

    def in_force(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen mu, as noise has let it grow, where the bound has been handed over."""
        own = torch.where(self.learning, self._own_mu(mu), mu)
        return self.unit * own, torch.where(self.learning, own**2, s)
