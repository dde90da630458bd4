"""Rules that learn their multipliers: `ModifiedBarrier`, and the default, `AdaptiveBarrier`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from .barriers import Force, Reading, Readings, RelaxedLogBarrier, Rule, relaxed_force
from .saved import vector

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
#: `unit="auto"`: where a search begins, what it grows by in a window, where it ends, and the share of the largest unit
#: found for other bounds that it does not begin below.
_UNIT_START, _UNIT_GROWTH, _UNIT_END, _UNIT_SHARE = 0.01, 1.1, 1e3, 0.3
#: The least and the most that the spread of samples, in scales, divides a step by.
_NARROWEST, _WIDEST = 0.25, 10.0
#: Of one that does not come down: how much counts in a step, and the share of the multiplier that the step grows with.
_FAR_STEP, _GROWTH = 0.3, 0.2
#: By how much a learned barrier is wider than the relaxed one that it takes over from in a swing.
_GENTLER = 2.0
#: By how many windows multipliers are ahead of a sampled estimate that moves, and the most that this makes of z.
_AHEAD, _FARTHEST = 4.0, 4.0


def _psi(u: Tensor, curvature: Tensor) -> Tensor:
    """-log(1 - u) for u <= beta, then a parabola of the same value and slope, and of this share of the curvature."""
    beyond = (u - _BETA).relu() / (1 - _BETA)
    return beyond + curvature * beyond * beyond / 2 - torch.log1p(-u.clamp(max=_BETA))


def _psi_slope(u: Tensor, curvature: Tensor) -> Tensor:
    """The derivative of `_psi`; 1 at u = 0."""
    return (1 - u.clamp(max=_BETA)).reciprocal() + curvature * (u - _BETA).relu() / (1 - _BETA) ** 2


def _psi_at(u: float, curvature: float) -> tuple[float, float]:
    """`_psi` and `_psi_slope` of numbers."""
    if u <= _BETA:
        return -math.log1p(-u), 1 / (1 - u)
    beyond = (u - _BETA) / (1 - _BETA)
    return beyond + curvature * beyond * beyond / 2 - math.log1p(-_BETA), (1 + curvature * beyond) / (1 - _BETA)


@dataclass(slots=True)
class _Bound:
    """What was learned of one bound; the last five are of `AdaptiveBarrier` alone. 1 stands for True."""

    units: float  # a single one
    found: float = 0.0
    learned: float = 1.0  # in multiples of its unit
    age: float = 0.0
    side: float = 0.0
    uncrossed: float = 0.0
    average: float = 0.0
    seen: float = 0.0
    lasting: float = 0.0
    noisy: float = 0.0
    previous: float = math.inf  # z; no number: there is none to be compared with
    ahead: float = 0.0
    frozen_mu: float = 0.0
    smallest_seen: float = math.inf
    held: float = 0.0
    met: float = 0.0
    mean: float = 0.0


_fields = attrgetter(*_Bound.__slots__)


class _Column:
    """A field of all bounds as a new tensor [m]: writing into it changes nothing, assigning one sets it in all."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, rule: _Learner, owner: type) -> Tensor:
        return vector([getattr(b, self.name) for b in rule._bounds])

    def __set__(self, rule: _Learner, values: Tensor) -> None:
        rule._bounds = [replace(b, **{self.name: x}) for b, x in zip(rule._bounds, values.tolist(), strict=True)]


class _Learner(Rule):
    r"""Learned multipliers: what `ModifiedBarrier` and `AdaptiveBarrier` share.

    .. math:: \hat\lambda \leftarrow \hat\lambda + \frac{\gamma}{1 + t/\tau} \, g \, \frac{z_\text{window}}{\sigma},
              \qquad \mu_t = \mu \sqrt{1 + t/\tau}

    This is for sampled bounds. The newest window's z is used because the sum over steps averages by itself; an
    averaged z would only add delay. What keeps it steady:

    - z counts in standard deviations sigma of single samples, which default scales are already; with more than 16
      samples in 4 standard errors of a window's mean; within 1/4 and 10 scales. In the unit of a narrow window the same
      z is a larger number and the same multiplier a smaller one, so a step of z would shake it.
    - Averaging is what a decaying step is for, and the noise that the barrier's own slope lets through, 1/mu, has to
      fall with it. Age t counts the windows up to the estimate's last crossing of the bound: what stays on one side
      still has something to learn, what crosses swings around it, from noise or from delay (Kesten's rule).
    - Estimates, optimizer and policy all lag, and a barrier that answers to what was makes a swing of it. So the
      multipliers in force answer to z four windows ahead: its last change, less a standard error, times four; at most 4
      scales. In the noise around a bound that is nearly always 0.
    - While a violation is coming down (it is a twentieth, and a standard error, below its average over the last
      `patience` windows) its multiplier waits: an optimizer takes its time, and what adds up meanwhile would overshoot,
      which a policy that has collapsed never undoes. Otherwise a step counts at most 0.3 of it.
    - g = max(1, lambda), so that large multipliers learn in proportion, but a fifth of that for violations that do not
      come down: they may not be able to. Within 3 standard errors of the bound none of these limits hold.
    - The parabola beyond half of mu has no curvature at first, so the multiplier in force is at most twice the learned
      one; else it is twelve times that at 3 mu, where late estimates and momentum take a swing. While a violation lasts
      the curvature comes, all of it within `patience` windows: learning alone would take too long.
    - A violation that has lasted for 5 `patience` windows without coming down starts the age over.

    ``unit="auto"`` looks for the unit of each bound: from 0.01 it grows by a tenth a window, to at most 1,000, while
    the bound is violated by 2 standard errors and does not come down by 2 (and a tenth). The first time that it is met
    after that, its unit is found.

    Exact bounds take :math:`g = \max(1, \hat\lambda)`, the full step and the whole curvature: there is nothing to
    average, and it is what holds two bounds that cannot be met together. A step of 1 is
    the classical update, :math:`\hat\lambda \psi'(z/\mu)`, for solved inner problems; anywhere else it overshoots
    from an infeasible start, and cannot grow back from nearly 0 after that.
    """

    confidence = 0.5
    #: Numbers, which a step decides about one by one. The list is replaced by every step, never changed.
    _bounds: list[_Bound]
    units, found, learned = _Column(), _Column(), _Column()
    age, side, uncrossed = _Column(), _Column(), _Column()
    average, seen, lasting, noisy = _Column(), _Column(), _Column(), _Column()
    previous, ahead = _Column(), _Column()
    _nonnegative: tuple[str, ...] = ("units", "found", "learned", "age", "uncrossed", "seen", "lasting", "noisy")
    _learned: tuple[str, ...] = (*_nonnegative, "side", "average", "previous", "ahead")
    _unbounded: tuple[str, ...] = ("previous",)

    def __init__(self, step: float, decay: float, patience: int, unit: float | str) -> None:
        if unit != "auto" and not (isinstance(unit, int | float) and unit > 0 and math.isfinite(unit)):
            raise ValueError(f"unit={unit!r}; allowed: unit > 0, or 'auto'")
        if not 0 < step <= 1:
            raise ValueError(f"step={step!r}; allowed: 0 < step <= 1")
        if not decay > 0:
            raise ValueError(f"decay={decay!r}; allowed: decay > 0 windows")
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r}; allowed: an integer >= 1")
        self.step, self.decay, self.patience = float(step), float(decay), patience
        self.unit = unit if isinstance(unit, str) else float(unit)
        self._made: tuple[list[_Bound], Tensor] | None = None

    @property
    def kind(self) -> str:
        if self.unit == 1:
            return super().kind
        return super().kind + f"(unit={self.unit if isinstance(self.unit, str) else f'{self.unit:g}'})"

    def start(self, num_bounds: int) -> None:
        unit = _UNIT_START if isinstance(self.unit, str) else self.unit
        self._bounds = [_Bound(unit) for _ in range(num_bounds)]

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:
        """See `Rule.update`."""
        self._step(readings, mu.tolist())

    def _update_numbers(self, readings: Readings, mu: list[float], s: list[float]) -> None:
        """See `Rule._update_numbers`."""
        self._step(readings, mu)

    @abstractmethod
    def _step(self, readings: Readings, mu: list[float]) -> None:
        """One window's step of every bound."""

    def _copies(self) -> list[_Bound]:
        """The bounds, to be changed by a step and put in their place when it is done."""
        return [_Bound(*_fields(b)) for b in self._bounds]

    def _growth(self, b: _Bound) -> float:
        """What a bound of this age multiplies mu by."""
        return math.sqrt(1 + b.age / self.decay)

    def _own(self, b: _Bound) -> float:
        """The last of `_tensors`."""
        return self._growth(b)

    def _tensors(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Units, learned multipliers, `_own`, `_curvature` and how far ahead [m], like z; made once for a step."""
        if self._made is None or self._made[0] is not self._bounds:
            each = ((b.units, b.learned, self._own(b), self._curvature(b), b.ahead) for b in self._bounds)
            self._made = self._bounds, vector([x for row in zip(*each, strict=True) for x in row]).view(5, -1)
        units, learned, own, curvature, ahead = self._made[1].to(z).unbind()
        return units, learned, own, curvature, ahead

    def _curvature(self, b: _Bound) -> float:
        """The share of the parabola's curvature: all of it for exact bounds, else as long as a violation has lasted."""
        return min(1.0, b.lasting / self.patience) if b.noisy > 0 else 1.0

    def _modified(self, b: _Bound, z: float, mu: float) -> Force:
        """The modified barrier of one bound, whose mu in force is ``mu``; ``z``: as it is ahead."""
        psi, slope = _psi_at(z / mu, self._curvature(b))
        return Force(b.units * (b.learned * slope), b.units * (mu * b.learned * psi), b.units * mu, mu * mu)

    def _take(self, b: _Bound, r: Reading) -> bool:
        """Take a reading in, z into its slow average; whether a violation is clearly below that."""
        change = 0.0 if math.isinf(b.previous) else r.z - b.previous
        beyond = _AHEAD * max(abs(change) - r.stderr, 0.0) if r.stderr > 0 else 0.0
        b.previous, b.ahead = r.z, math.copysign(min(beyond, _FARTHEST), change)
        b.noisy = max(b.noisy, float(r.stderr > 0))  # samples that are all equal do not make a bound exact
        share = 1 / self.patience
        b.seen = (1 - share) * b.seen + share
        b.average += share / b.seen * (r.z - b.average)
        fallen = b.average - r.z
        coming = r.z > 0 and fallen > r.stderr and fallen > (1 - _PROGRESS) * r.z
        b.lasting = b.lasting + 1 if r.z > 2 * r.stderr and not coming else 0.0
        return coming

    def _search(self, b: _Bound, r: Reading, largest: float, *, coming: bool) -> None:
        """One window of a bound's search for its unit; ``largest``: of all bounds."""
        if self.unit != "auto" or b.found:
            return
        if r.z <= 0:
            b.found = float(b.units > _UNIT_START)
        elif r.z > 2 * r.stderr and not coming:
            b.units = min(max(b.units, _UNIT_SHARE * largest) * _UNIT_GROWTH, _UNIT_END)

    def _learn(self, b: _Bound, r: Reading, mu: float, *, coming: bool) -> None:
        """One damped step of a bound; ``coming``: it is a violation that comes down."""
        noisy = r.stderr > 0
        near = noisy and abs(r.z) < _NEAR * r.stderr
        restart = b.lasting >= _RESTART * self.patience
        age = 0.0 if restart else b.age
        if noisy:
            told = r.window_z if math.isnan(r.typical) else r.window_z / min(max(r.typical, _NARROWEST), _WIDEST)
            drive = max(min(told, 1.0 if near else _FAR_STEP), -1.0)
            if r.z > _FAR * r.stderr and coming:
                drive = 0.0
            # By the estimate's side, not the window's: else noise alone would pull the multiplier of a violation down.
            share = 1.0 if near or r.z < 0 else _GROWTH
            gain = 1 + share * (b.learned - 1) if b.learned > 1 else 1.0
            move = self.step / (1 + age / self.decay) * gain * drive
        elif self.step == 1:
            move = b.learned * (_psi_at(r.window_z / mu, 1.0)[1] - 1)
        else:
            move = self.step * max(b.learned, 1.0) * max(min(r.window_z, 1.0), -1.0)
        b.learned = min(max(b.learned + move, 0.0), _MAX_MULTIPLIER)
        uncrossed = 0.0 if restart else b.uncrossed + noisy
        crossed = noisy and r.z * b.side < 0
        b.age, b.uncrossed = (age + uncrossed, 0.0) if crossed else (age, uncrossed)
        b.side = float((r.z > 0) - (r.z < 0))


class ModifiedBarrier(_Learner):
    r"""Learned multipliers on a shifted log barrier: exact at a fixed mu, with no m mu bias.

    .. math:: B(z) = \mu \hat\lambda \, \psi(z/\mu), \quad \psi(u) = -\log(1-u), \qquad
              \hat\lambda \leftarrow \hat\lambda + \gamma_t \, g \, \frac{z}{\sigma}, \quad
              \gamma_t = \gamma_0 / (1 + t/\tau)

    continued by a parabola for u > 1/2 (relaxed extrapolation). Needs no schedule. With noise (sigma is the standard
    deviation of single samples, or 4 standard errors of a window, in units of the scale) it is continued by a line,
    which bends while a violation lasts, the step decays and mu grows with the age t of a bound,
    :math:`\mu \sqrt{1 + t/\tau}`; ARCHITECTURE.md, "The default rule hands over", has the measurements.

    Args:
        mu: The barrier parameter, in units of the scale.
        step: :math:`\gamma_0` in (0, 1]; 1 is the classical update of exact bounds, for solved inner problems.
        decay: :math:`\tau`, in windows up to the last crossing of the bound, after which the step has halved.
        patience: Windows of the slow average against which a violation has to come down.
        unit: An ordinary multiplier, in task loss per unit of violation: learning starts from it, and B is a multiple
            of it. Smaller where the loss changes little (a mean of small numbers) across a wide window. "auto": found
            while a bound is violated, which takes some 50 windows.

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
        unit: float | str = 1.0,
    ) -> None:
        super().__init__(step, decay, patience, unit)
        if not (mu > 0 and math.isfinite(mu)):
            raise ValueError(f"mu={mu!r}; allowed: mu > 0")
        self.mu = float(mu)

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """mu lambda psi(z/mu) [m], of z as it is ahead."""
        units, learned, growth, curvature, ahead = self._tensors(z)
        mu = mu * growth
        return units * mu * learned * _psi((z + ahead) / mu, curvature)

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """lambda psi'(z/mu) [m], of z as it is ahead."""
        units, learned, growth, curvature, ahead = self._tensors(z)
        return units * learned * _psi_slope((z + ahead) / (mu * growth), curvature)

    def _step(self, readings: Readings, mu: list[float]) -> None:
        """The damped multiplier step of every measured bound."""
        bounds = self._copies()
        largest = max(b.units for b in bounds)
        for b, r, own in zip(bounds, readings.each(), mu, strict=True):
            if r.known:
                coming = self._take(b, r)
                self._search(b, r, largest, coming=coming)
                self._learn(b, r, own, coming=coming)
        self._bounds = bounds

    def in_force(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The mu that noise has let grow."""
        units, _, growth, _, _ = self._tensors(mu)
        mu = mu * growth
        return units * mu, mu**2

    def _forces(self, z: list[float], mu: list[float], s: list[float]) -> list[Force]:
        """See `Rule._forces`."""
        given = zip(self._bounds, z, mu, strict=True)
        return [self._modified(b, at + b.ahead, m * self._growth(b)) for b, at, m in given]


class AdaptiveBarrier(_Learner):
    r"""The default: a relaxed log barrier that hands over to learned multipliers when mu stops falling.

    Each bound starts as `RelaxedLogBarrier` (linear extension), which reaches feasibility from anywhere
    without overshoot. Its plug-in multiplier mu/(-z) is only as good as z is precise, so mu cannot fall past
    the noise of the estimates, and a bias of mu per bound would stay; and a small mu is stiff (gain lambda/mu),
    so that it swings when estimates or the optimizer lag. So when noise stops mu, when mu has come down to
    ``smallest_mu``, when a sampled bound has not seen it fall for `patience` windows, or when an exact one's violation
    does not come down (its multiplier, at most mu/s, is too small), the bound keeps its mu and becomes a
    `ModifiedBarrier` that starts from the multiplier then in force, which therefore does not
    jump but by what the objective's ``confidence`` then draws the bound in. It has no horizon.

    A sampled bound that has been met and is violated again, at the same mu, swings: mu falls only where all bounds are
    met, so it would stand there, and the swing last. Such a bound is handed over at once, and since where it stands
    says nothing in a swing, it starts from its mean multiplier since it was met, at twice the mu.

    Args:
        smallest_mu: mu at which tightening ends even without noise, > 0.
        step: Initial step of the learned multipliers, in (0, 1].
        decay: Windows up to the last crossing of the bound after which the step has halved.
        patience: Windows without a smaller mu after which bounds are handed over that do not swing, and windows of the
            slow average against which a violation has to come down.
        unit: An ordinary multiplier, in task loss per unit of violation: learning starts from it, and B is a multiple
            of it. Smaller where the loss changes little (a mean of small numbers) across a wide window. "auto": found
            while a bound is violated, which takes some 50 windows.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> AdaptiveBarrier().patience
        20

    Source: barrierlm; the two halves are L3Ms (arXiv 2410.21533) and Polyak 1992.
    """

    frozen_mu, smallest_seen, held, met, mean = _Column(), _Column(), _Column(), _Column(), _Column()
    _own_fields = ("frozen_mu", "smallest_seen", "held", "met", "mean")
    _learned = (*_Learner._learned, *_own_fields)
    _nonnegative = (*_Learner._nonnegative, *_own_fields)
    _unbounded = (*_Learner._unbounded, "smallest_seen")

    #: The share of s from which on the noise counts as having stopped mu: just under one AdaptiveSchedule step.
    _STOPPED = 0.8

    def __init__(
        self,
        smallest_mu: float = 0.5,
        *,
        step: float = 0.05,
        decay: float = 100.0,
        patience: int = 20,
        unit: float | str = 1.0,
    ) -> None:
        super().__init__(step, decay, patience, unit)
        if not (smallest_mu > 0 and math.isfinite(smallest_mu)):
            raise ValueError(f"smallest_mu={smallest_mu!r}; allowed: smallest_mu > 0")
        self.smallest_mu = float(smallest_mu)
        self._relaxed = RelaxedLogBarrier()

    @property
    def learning(self) -> Tensor:
        """Which bounds [m] have been handed over."""
        return self.frozen_mu > 0

    def draws_in(self, bound: int) -> bool:
        """Where it has been handed over: learned multipliers end on their bound, relaxed ones at a distance from it."""
        return self._bounds[bound].frozen_mu > 0

    def _own(self, b: _Bound) -> float:
        """The frozen mu as noise let it grow; 1 where the bound has not been handed over."""
        return b.frozen_mu * self._growth(b) if b.frozen_mu > 0 else 1.0

    def _mix(self, modified: Callable[[], Tensor], relaxed: Callable[[], Tensor], device: torch.device) -> Tensor:
        handed_over = [b.frozen_mu > 0 for b in self._bounds]
        if all(handed_over):
            return modified()
        if not any(handed_over):
            return relaxed()
        return torch.where(torch.tensor(handed_over, device=device), modified(), relaxed())

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """The penalty [m] of whichever half is in force, of z as it is ahead."""
        units, learned, own, curvature, ahead = self._tensors(z)
        z = z + ahead
        relaxed = partial(self._relaxed.value, z, mu, s)
        return units * self._mix(lambda: own * learned * _psi(z / own, curvature), relaxed, z.device)

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """The multiplier [m] of whichever half is in force, of z as it is ahead."""
        units, learned, own, curvature, ahead = self._tensors(z)
        z = z + ahead
        relaxed = partial(self._relaxed.multiplier, z, mu, s)
        return units * self._mix(lambda: learned * _psi_slope(z / own, curvature), relaxed, z.device)

    def _step(self, readings: Readings, mu: list[float]) -> None:
        """Learn where handed over; hand over where mu has stopped."""
        bounds = self._copies()
        given = list(zip(readings.each(), mu, strict=True))
        largest = max(b.units for b in bounds)
        # One bound's noise, or its end, holds the others' mu too.
        stopped = any(r.known and (r.noise >= self._STOPPED * m * m or m <= self.smallest_mu) for r, m in given)
        for b, (r, m) in zip(bounds, given, strict=True):
            if not r.known:
                continue
            coming = self._take(b, r)
            self._search(b, r, largest, coming=coming)
            if b.frozen_mu > 0:
                self._learn(b, r, self._own(b), coming=coming)
                continue
            self._hold(b, r, m)
            swings = not stopped and b.met > 1 and r.z > 0 and r.stderr > 0
            if not (stopped or swings or b.lasting >= self.patience or (b.held > self.patience and r.stderr > 0)):
                continue
            # A bound that is new, or has just become noisier, must not keep a mu below its own noise.
            b.frozen_mu = max(m, math.sqrt(r.noise))
            if swings:
                b.frozen_mu, b.learned = max(_GENTLER * m, b.frozen_mu), b.mean
            else:  # the modified barrier goes on with the multiplier that the relaxed one stands at
                at = r.z + b.ahead
                slope = _psi_at(at / b.frozen_mu, self._curvature(b))[1]
                now = relaxed_force(at, b.frozen_mu, b.frozen_mu * b.frozen_mu).multiplier
                b.learned = now / slope if slope > 0 else 0.0  # 0 where z / mu is no number
            b.previous = math.inf  # the bound may be drawn in from here on, which is no change of the estimate
        self._bounds = bounds

    def _hold(self, b: _Bound, r: Reading, mu: float) -> None:
        """Count the windows at this mu, and those since the bound was first met at it, with their mean multiplier."""
        if mu < 0.999 * b.smallest_seen:
            b.held = b.met = 0.0
        b.smallest_seen = min(mu, b.smallest_seen)
        b.held += 1
        if b.met > 0 or r.z <= 0:
            b.met += 1
            b.mean += (relaxed_force(r.z + b.ahead, mu, mu * mu).multiplier - b.mean) / b.met

    def in_force(self, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen mu, as noise has let it grow, where the bound has been handed over."""
        units, _, own, _, _ = self._tensors(mu)
        return (
            units * self._mix(lambda: own, lambda: mu, mu.device),
            self._mix(lambda: own * own, lambda: s, mu.device),
        )

    def _forces(self, z: list[float], mu: list[float], s: list[float]) -> list[Force]:
        """See `Rule._forces`."""
        return [self._force(*given) for given in zip(self._bounds, z, mu, s, strict=True)]

    def _force(self, b: _Bound, z: float, mu: float, s: float) -> Force:
        z += b.ahead
        if b.frozen_mu > 0:
            return self._modified(b, z, self._own(b))
        relaxed = relaxed_force(z, mu, s)
        return Force(b.units * relaxed.multiplier, b.units * relaxed.value, b.units * mu, s)
