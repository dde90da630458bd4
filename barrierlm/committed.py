"""What has been committed: estimates, scales, learned multipliers, mu; and how a window changes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .barriers import Force, Reading, Readings, Rule
from .constraints import Bounds
from .diagnostics import BoundState, FeasibilityWatch, Report, verdict, verdict_tolerance
from .estimators import EMA, Column, Scales, wide_dtype
from .positions import PositionBaseline
from .saved import saved_count, saved_tensor, vector
from .schedules import Schedule

#: Of the states that are saved; 5 has ``met`` and ``mean`` of bounds that are not learned yet.
_VERSION = 5
#: The largest number in fp32.
_LARGEST = torch.finfo(torch.float32).max
#: The reading of a bound that was not measured.
_NOTHING = Reading(0.0, 0.0, 0.0, 0.0, False, math.nan)


def numbers(rows: Tensor) -> list[list[float]]:
    """The sums [K, Column.POSITIONS] of a window's reduced rows [K, C]: all but those of positions."""
    return rows[:, : Column.POSITIONS].tolist()


class View(NamedTuple):
    """The committed numbers that a call needs: center [K], baselines [K, NUM_POSITIONS], weights [K], the penalty, 0-d;
    and all but the baselines as one tensor."""

    center: Tensor
    baselines: Tensor
    weights: Tensor
    penalty: Tensor
    packed: Tensor

    @property
    def normalizer(self) -> Tensor:
        """1 / (1 + sum of the multipliers), 0-d."""
        return self.packed[-1]


class Committed:
    """The state between two windows, on the CPU in fp64, and everything the next window reads from it.

    ``weights`` [K] are the constraints' weights in the loss, ``baselines`` [K, NUM_POSITIONS] those of
    per-token costs, ``penalty`` the rule's value, ``report`` the rows of all bounds. Parts replace their tensors
    instead of changing them, so that a shallow copy of each is a snapshot and a failed commit leaves no trace.
    """

    #: Bounds are drawn in by standard errors of an average over 200 windows; a window's over this.
    _LONG = math.sqrt(200)
    #: Of a window's width, the most that either of its bounds is drawn in by, so that half of it is left.
    _LARGEST_MARGIN = 0.25

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
        schedule.prepare(len(bounds))
        # A bound is the natural origin: sums of squares of first samples lose no digits to a large offset.
        origin = vector([c.upper if c.lower is None else c.lower for c in bounds.constraints])
        estimator.start(origin)
        self.scales = Scales(bounds, origin)
        self.positions = PositionBaseline(num_constraints, estimator.smoothing)
        self.watch = FeasibilityWatch(len(bounds))
        self.nonfinite = vector([0.0] * num_constraints)
        self.baselines = self.positions.table()
        self._read()
        self._refresh()

    @property
    def base_mu(self) -> float:
        """mu before the noise floor: the rule's own, or the schedule's."""
        return self.schedule.mu if self.rule.mu is None else self.rule.mu

    def commit(self, rows: Tensor, sums: list[list[float]], *, tick: bool) -> bool:
        """Take in a window's reduced rows [K, C], and as numbers; False, and no change, if it had no samples.

        Rows with NaN or infinite measurements are counted and left out. ``tick=False`` is a calibration: rule
        and schedule do not move.
        """
        with self._undo_on_error():
            if any(row[Column.NONFINITE] for row in sums):
                nonfinite = rows[:, Column.NONFINITE]
                self.nonfinite = self.nonfinite + nonfinite
                rows = torch.where(nonfinite[:, None] > 0, 0.0, rows)
                sums = numbers(rows)
            measured = [row[Column.COUNT] > 0 for row in sums]
            if not any(measured):
                return False
            center = self.estimator.center
            window_mean = [
                c + row[Column.SUM] / (row[Column.COUNT] or 1.0) for c, row in zip(center, sums, strict=True)
            ]
            # From before the window: a factor that knows the window's own noise would bias what it multiplies.
            typical = self.estimator.typical
            self.scales.update(sums, center)
            self.estimator.update(sums)
            if self.positions.update(rows):
                self.baselines = self.positions.table()
            self._read()
            if tick:
                scale = self.scales.value
                window_z = self.bounds.violations(window_mean, scale)
                news = [
                    Reading(r.z + shift, z + shift, r.stderr, r.noise, True, typical[k] / scale[k])
                    if r.known and measured[k]
                    else _NOTHING
                    for r, z, shift, (k, _) in zip(
                        self._readings, window_z, self.shifts(), self.bounds.sides, strict=True
                    )
                ]
                readings = Readings.of(news)
                self.rule._ask("_update_numbers", readings, self.mu, self.s)
                self.schedule.tick(readings)
                self.watch.update(self._z, [r.stderr for r in self._readings], self._multiplier)
                self.windows += 1
            self._refresh()
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
            "version": _VERSION,
            "constraints": self.bounds.fingerprint(),
            "methods": self._methods(),
            "windows": self.windows,
            "nonfinite": self.nonfinite.clone(),
        } | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, or raise and change nothing."""
        if not isinstance(state, Mapping) or repr(state.get("version")) != repr(_VERSION):  # a tensor has no plain !=
            given = f"version {state.get('version')!r}" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state is {given}; allowed: version {_VERSION}, as made by state_dict()")
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
            self._read()
            self._refresh()

    def _read(self) -> None:
        """The bounds' readings, their margins, and how far from a bound an estimate still counts as at it.

        All of the bounds as the user gave them. Numbers, not tensors: a commit looks at all of
        them, and for as few as there are bounds that costs a tenth.
        """
        scale, mean, stderrs = self.scales.value, self.estimator.mean, self.estimator.stderrs()
        self.mean, self.stderr, self._z = mean, [own for own, _ in stderrs], self.bounds.violations(mean, scale)
        self._margins, self._near, self._readings = [], [], []
        for (k, _), z in zip(self.bounds.sides, self._z, strict=True):
            own, window = stderrs[k]
            own /= scale[k]
            known, reading = not math.isnan(window), _NOTHING
            margin = min(self.confidence * window / self._LONG, self._LARGEST_MARGIN * self.bounds.widths[k])
            self._margins.append(margin / scale[k] if known else 0.0)
            self._near.append(verdict_tolerance(own))
            if math.isinf(z):
                raise ValueError(
                    f"Constraint {self.bounds.names[k]!r}: estimate {mean[k]:.4g} is too many scales of {scale[k]:.4g} "
                    "from its bound for a number; allowed: a larger scale"
                )
            if not math.isnan(z):
                own = own if known else 1.0  # counts as one scale
                reading = Reading(z, z, own, self.noise_floor * own, True, math.nan)
            self._readings.append(reading)

    def metrics(self) -> dict[str, float]:
        """See `BarrierObjective.metrics`."""
        metrics = {"barrier/mu": self.base_mu, "barrier/penalty": self.penalty}
        mean, stderr = self.mean, self.stderr
        for k, name in enumerate(self.bounds.names):
            metrics[f"constraints/{name}/value"] = mean[k]
            metrics[f"constraints/{name}/stderr"] = stderr[k]
            metrics[f"constraints/{name}/scale"] = float(self.scales.value[k])
            metrics[f"constraints/{name}/nonfinite"] = float(self.nonfinite[k])
        for row in self.report:
            prefix = f"constraints/{row.constraint}/{row.side}"
            metrics[f"{prefix}/slack"] = row.slack
            metrics[f"{prefix}/multiplier"] = row.multiplier
            metrics[f"{prefix}/mu"] = row.mu
            metrics[f"{prefix}/s"] = row.s
        return metrics

    def shifts(self) -> list[float]:
        """By how much the rule, as it stands, has each bound drawn in."""
        return [margin if self.rule.draws_in(i) else 0.0 for i, margin in enumerate(self._margins)]

    def _refresh(self) -> None:
        """Multipliers, weights and rows for the next window, from the committed estimates."""
        noise, base = [r.noise for r in self._readings], self.base_mu
        if self.rule.s is None:
            mu = [max(base, math.sqrt(x)) for x in noise]
            s = [m * m for m in mu]
        else:
            mu, s = [base] * len(noise), [max(x, self.rule.s) for x in noise]
        self.mu, self.s = mu, s
        z = [r.z + shift for r, shift in zip(self._readings, self.shifts(), strict=True)]
        forces = self.rule._ask("_forces", z, mu, s)
        scale, weights, penalty, multiplier = self.scales.value, [0.0] * len(self.bounds.constraints), 0.0, []
        for i, ((k, side), r, force) in enumerate(zip(self.bounds.sides, self._readings, forces, strict=True)):
            if not r.known:
                multiplier.append(0.0)
                continue
            pull = force.multiplier / scale[k]
            # In fp32, which is what losses are made in.
            if not (pull < _LARGEST and force.multiplier < _LARGEST and abs(force.value) < _LARGEST):
                raise ValueError(
                    f"{type(self.rule).__name__} has no finite multiplier for {self.bounds.labels[i]} at violation "
                    f"z={z[i]:.4g}, mu={mu[i]:.4g}; allowed: z < 0 for LogBarrier; use RelaxedLogBarrier "
                    "(linear extension) or a larger mu or scale"
                )
            multiplier.append(force.multiplier)
            penalty += force.value
            weights[k] += pull if side == "upper" else -pull
        self.weights, self.penalty, self._multiplier = weights, penalty, multiplier
        self.report = self._rows_of(multiplier, forces)
        self._packed = vector([*self.estimator.center, *weights, penalty, 1 / (1 + sum(multiplier))])
        self._views: dict[torch.device, View] = {}

    def view(self, device: torch.device) -> View:
        """What a call reads, on ``device``: copied there once per window, without waiting for it."""
        found = self._views.get(device)
        if found is None:
            # A later call may differentiate with it.
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                found = self._views[device] = self._view(device)
        return found

    def _view(self, device: torch.device) -> View:
        count, packed, baselines = len(self.weights), self._packed, self.baselines
        if device.type != "cpu":
            packed, baselines = (x.to(device, wide_dtype(device), non_blocking=True) for x in (packed, baselines))
        center, weights = packed[:count], packed[count : 2 * count]
        return View(center, baselines, weights, packed[-2], packed)

    def _rows_of(self, multiplier: list[float], forces: list[Force]) -> Report:
        bounds, mean, scale, together = self.bounds, self.mean, self.scales.value, self.watch.together()
        rows = []
        for i, ((k, side), bound, force) in enumerate(zip(bounds.sides, bounds.values, forces, strict=True)):
            others = [bounds.labels[j] for j in together if j != i] if i in together else []
            rows.append(
                BoundState(
                    bounds.names[k],
                    side,
                    bound,
                    mean[k],
                    self.stderr[k],
                    mean[k] - bound if side == "lower" else bound - mean[k],
                    multiplier[i],
                    force.mu,
                    force.s,
                    scale[k],
                    verdict(self._z[i], self._near[i], others),
                )
            )
        return Report(rows)

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        objects = [self, *self._parts().values()]
        saved = [vars(part).copy() for part in objects]
        try:
            yield
        except BaseException:
            for part, attributes in zip(objects, saved, strict=True):
                vars(part).clear()
                vars(part).update(attributes)
            raise
