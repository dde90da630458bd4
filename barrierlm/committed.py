"""What has been committed: estimates, scales, learned multipliers, mu; and how a window changes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .barriers import Readings, Rule
from .constraints import Bounds
from .diagnostics import BoundState, FeasibilityWatch, Report, verdict, verdict_tolerance
from .estimators import EMA, Column, Scales, wide_dtype
from .positions import PositionBaseline
from .saved import saved_count, saved_tensor
from .schedules import Schedule


class View(NamedTuple):
    """The committed numbers that a call needs: center [K], baselines [K, NUM_POSITIONS], weights [K], and 0-d:
    the penalty, and 1 / (1 + sum of the multipliers)."""

    center: Tensor
    baselines: Tensor
    weights: Tensor
    penalty: Tensor
    normalizer: Tensor


class Committed:
    """The state between two windows, on the CPU in fp64, and everything the next window reads from it.

    ``weights`` [K] are the constraints' weights in the loss, ``baselines`` [K, NUM_POSITIONS] those of
    per-token costs, ``penalty`` the rule's value, ``report`` the rows of all bounds. Parts replace their tensors
    instead of changing them, so that a shallow copy of each is a snapshot and a failed commit leaves no trace.
    """

    #: Windows of the long average whose standard errors draw the bounds in.
    LONG = 200

    def __init__(
        self,
        bounds: Bounds,
        rule: Rule,
        schedule: Schedule,
        estimator: EMA,
        noise_floor: float,
        confidence: float = 0.0,
    ) -> None:
        self.bounds, self.rule, self.schedule, self.estimator = bounds, rule, schedule, estimator
        self.noise_floor, self.confidence = noise_floor, confidence
        self.windows = 0
        num_constraints = len(bounds.constraints)
        rule.start(len(bounds))
        # A bound is the natural origin: sums of squares of first samples lose no digits to a large offset.
        origin = torch.tensor(
            [c.upper if c.lower is None else c.lower for c in bounds.constraints], dtype=torch.float64
        )
        estimator.start(origin)
        self.scales = Scales(bounds, origin)
        self.positions = PositionBaseline(num_constraints, estimator.smoothing)
        self.watch = FeasibilityWatch(len(bounds))
        self.nonfinite = torch.zeros(num_constraints, dtype=torch.float64)
        self.baselines = self.positions.table()
        self._refresh(*self._read())

    @property
    def base_mu(self) -> float:
        """mu before the noise floor: the rule's own, or the schedule's."""
        return self.schedule.mu if self.rule.mu is None else self.rule.mu

    def commit(self, rows: Tensor, *, tick: bool) -> bool:
        """Take in a window's reduced rows [K, NUM_COLUMNS]; False, and no change, if it had no samples.

        Rows with NaN or infinite measurements are counted and left out. ``tick=False`` is a calibration: rule
        and schedule do not move.
        """
        nonfinite = rows[:, Column.NONFINITE]
        rows = torch.where(nonfinite[:, None] > 0, 0.0, rows)
        with self._undo_on_error():
            self.nonfinite = self.nonfinite + nonfinite
            if not bool((rows[:, Column.COUNT] > 0).any()):
                return False
            mu, s = self.mu, self.s
            window_mean = self.estimator.center + rows[:, Column.SUM] / rows[:, Column.COUNT]
            self.scales.update(rows, self.estimator.center)
            measured = self.estimator.update(rows)
            if self.positions.update(rows):
                self.baselines = self.positions.table()
            readings, near = self._read()
            if tick:
                known = readings.known & measured[self.bounds.index]
                window_z = self.bounds.violation(window_mean, self.scales.value) + self.shift
                z, window_z, stderr, noise = (
                    torch.where(known, x, 0.0) for x in (readings.z, window_z, readings.stderr, readings.noise)
                )
                news = Readings(z, window_z, stderr, noise, known)
                self.rule.update(news, mu, s)
                self.schedule.tick(news)
                self.watch.update(self.z, near)
                self.windows += 1
            self._refresh(readings, near)
        return True

    def _parts(self) -> dict[str, Any]:
        return {
            "estimator": self.estimator,
            "rule": self.rule,
            "schedule": self.schedule,
            "scales": self.scales,
            "positions": self.positions,
            "watch": self.watch,
        }

    def _methods(self) -> list[str]:
        return [self.rule.kind, *(type(part).__name__ for part in (self.schedule, self.estimator))]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and names, deep-copied."""
        return {
            "version": 1,
            "constraints": self.bounds.fingerprint(),
            "methods": self._methods(),
            "windows": self.windows,
            "nonfinite": self.nonfinite.clone(),
        } | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, or raise and change nothing."""
        if not isinstance(state, Mapping) or repr(state.get("version")) != "1":  # a tensor has no plain !=
            given = f"version {state.get('version')!r}" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state is {given}; allowed: version 1, as made by state_dict()")
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state lacks {min(missing)!r}; allowed: a state made by state_dict()")
        for key, own in (("constraints", self.bounds.fingerprint()), ("methods", self._methods())):
            saved = state[key]
            if isinstance(saved, list):
                saved = [list(item) if isinstance(item, tuple) else item for item in saved]
            if repr(saved) != repr(own):
                raise ValueError(f"state was saved for {key} {saved}; allowed: this objective's {own}")
        with self._undo_on_error():
            for name, part in self._parts().items():
                try:
                    if isinstance(part.state_dict(), Mapping) and not isinstance(state[name], Mapping):
                        raise ValueError(f"it is a {type(state[name]).__name__}; allowed: a mapping")
                    part.load_state_dict(state[name])
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise ValueError(f"state of the {name} does not fit: {error}") from error
            self.windows = saved_count(state, "windows")
            self.nonfinite = saved_tensor(state, "nonfinite", [self.nonfinite.shape], low=0.0)
            self.baselines = self.positions.table()
            self._refresh(*self._read())

    def _read(self) -> tuple[Readings, Tensor]:
        """The bounds' readings, drawn in by ``shift``, and how far from a bound an estimate still counts as at it [m].

        ``z`` [m] are the violations of the bounds as the user gave them.
        """
        index, scale = self.bounds.index, self.scales.value
        self.mean, self.stderr = self.estimator.mean, self.estimator.stderr
        self.z = self.bounds.violation(self.mean, scale)
        known = self.z.isfinite()
        stderr = (self.stderr / scale)[index]
        self.shift = self.confidence * (self.estimator.stderr_over(self.LONG) / scale)[index].nan_to_num(0.0)
        z = torch.where(known, self.z + self.shift, 0.0)
        noise = torch.where(known, stderr.nan_to_num(1.0), 0.0)  # not known yet: counts as one scale
        return Readings(z, z, noise, self.noise_floor * noise, known), verdict_tolerance(stderr)

    def _refresh(self, readings: Readings, near: Tensor) -> None:
        """Multipliers, weights and rows for the next window, from the committed estimates."""
        z, noise, known = readings.z, readings.noise, readings.known
        base = torch.full_like(z, self.base_mu)
        if self.rule.s is None:
            mu = torch.maximum(base, noise.sqrt())
            s = mu**2
        else:
            mu, s = base, noise.clamp(min=self.rule.s)
        multiplier = torch.where(known, self.rule.multiplier(z, mu, s), 0.0)
        value = torch.where(known, self.rule.value(z, mu, s), 0.0)
        for i in torch.nonzero(~(multiplier.isfinite() & value.isfinite())).flatten().tolist():
            raise ValueError(
                f"{type(self.rule).__name__} has no finite multiplier for {self.bounds.labels[i]} at violation "
                f"z={float(z[i]):.4g}, mu={float(mu[i]):.4g}; allowed: z < 0 for LogBarrier; use RelaxedLogBarrier "
                "(linear extension) or a larger mu"
            )
        scale = self.scales.value[self.bounds.index]
        weights = torch.zeros(len(self.bounds.constraints), dtype=torch.float64).index_add_(
            0, self.bounds.index, torch.where(known, self.bounds.sign * multiplier / scale, 0.0)
        )
        self.mu, self.s, self.weights, self.penalty = mu, s, weights, value.sum()
        self.normalizer = 1 / (1 + multiplier.sum())
        self.report = self._rows_of(readings, near, multiplier, scale)
        self._views: dict[torch.device, View] = {}

    def view(self, device: torch.device) -> View:
        """What a call reads, on ``device``: copied there once per window, without waiting for it."""
        if device not in self._views:
            wide = wide_dtype(device)
            parts = (self.estimator.center, self.baselines, self.weights, self.penalty, self.normalizer)
            self._views[device] = View(*(x.to(device, wide, non_blocking=True) for x in parts))
        return self._views[device]

    def _rows_of(self, readings: Readings, near: Tensor, multiplier: Tensor, scale: Tensor) -> Report:
        mean, stderr = self.mean.tolist(), self.stderr.tolist()
        together = self.watch.together()
        z = self.z.tolist()
        in_force = self.rule.in_force(self.mu, self.s)
        columns = [x.tolist() for x in (self.bounds.value, multiplier, *in_force, scale, near)]
        rows = []
        for i, (k, side) in enumerate(self.bounds.sides):
            bound, lam, mu, s, unit, tolerance = (column[i] for column in columns)
            others = [self.bounds.labels[j] for j in together if j != i] if i in together else []
            slack = (mean[k] - bound) if side == "lower" else (bound - mean[k])
            rows.append(
                BoundState(
                    constraint=self.bounds.names[k],
                    side=side,
                    bound=bound,
                    estimate=mean[k],
                    stderr=stderr[k],
                    slack=slack,
                    multiplier=lam,
                    mu=mu,
                    s=s,
                    scale=unit,
                    verdict=verdict(z[i], tolerance, others),
                )
            )
        return Report(rows)

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        objects = [self, *self._parts().values()]
        saved = [copy.copy(vars(part)) for part in objects]
        try:
            yield
        except BaseException:
            for part, attributes in zip(objects, saved, strict=True):
                vars(part).clear()
                vars(part).update(attributes)
            raise
