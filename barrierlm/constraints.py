"""What is constrained: named averages, their bounds, and the sign convention of violations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from .saved import vector


def _finite(name: str, argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"Constraint {name!r}: {argument}={value!r}; allowed: a finite number or None")
    return float(value)


@dataclass(frozen=True)
class Constraint:
    r"""A named average that must stay within bounds.

    .. math:: \text{lower} \le \mathbb{E}[\text{value}] \le \text{upper}

    One bound may be missing. A bound's violation is :math:`z = (\text{estimate} - \text{upper}) /
    \text{scale}` or :math:`z = (\text{lower} - \text{estimate}) / \text{scale}`; feasible is :math:`z \le 0`.

    Args:
        name: Key of the measurement and of the metrics; not empty.
        lower: Smallest allowed average, in the unit of the measurement.
        upper: Largest allowed average, same unit.
        scale: Positive number that one unit of violation stands for, same unit. Default: the width of a
            two-sided window; otherwise the standard deviation of the first window's samples, frozen then
            (where they are equal, or differ by round-off beside their distance from the bound, this distance, or 1);
            1 for exact (0-d) measurements.

    Raises:
        ValueError: No bound, ``lower >= upper``, a bound that is not finite, or ``scale <= 0``.

    Example:
        >>> Constraint("length", lower=50, upper=100).sides
        ('lower', 'upper')

    Source: L3Ms (arXiv 2410.21533), section 3.
    """

    name: str
    lower: float | None = field(default=None, kw_only=True)
    upper: float | None = field(default=None, kw_only=True)
    scale: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Constraint name={self.name!r}; allowed: a non-empty string")
        for argument in ("lower", "upper", "scale"):
            value = getattr(self, argument)
            if value is not None:
                object.__setattr__(self, argument, _finite(self.name, argument, value))
        if self.lower is None and self.upper is None:
            raise ValueError(f"Constraint {self.name!r}: lower=None, upper=None; allowed: at least one finite bound")
        if self.lower is not None and self.upper is not None and self.lower >= self.upper:
            raise ValueError(
                f"Constraint {self.name!r}: lower={self.lower}, upper={self.upper}; allowed: lower < upper"
            )
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"Constraint {self.name!r}: scale={self.scale}; allowed: scale > 0")

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the finite bounds, lower first."""
        return tuple(side for side in ("lower", "upper") if getattr(self, side) is not None)

    def known_scale(self) -> float:
        """The scale as far as the definition alone gives it; NaN when the first window has to tell."""
        if self.scale is not None:
            return self.scale
        if self.lower is not None and self.upper is not None:
            return self.upper - self.lower
        return math.nan


class Bounds:
    """All finite bounds of several constraints as vectors of length m, in fp64 on the CPU.

    ``index`` [m] is the constraint of each bound, ``sign`` [m] is +1 for an upper and -1 for a lower bound,
    ``value`` [m] the bound itself, so that ``z = sign * (estimate[index] - value) / scale[index]``.
    """

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        self.constraints = tuple(constraints)
        for c in self.constraints:
            if not isinstance(c, Constraint):
                raise TypeError(f"constraints holds a {type(c).__name__}; allowed: Constraint objects")
        names = [c.name for c in self.constraints]
        duplicates = sorted({n for n in names if names.count(n) > 1})
        if duplicates:
            raise ValueError(
                f"constraints: duplicate name {duplicates[0]!r}; allowed: each name once (one Constraint may "
                "have both bounds)"
            )
        self.names = tuple(names)
        self.sides = tuple((k, side) for k, c in enumerate(self.constraints) for side in c.sides)
        #: Of each constraint; infinite with one bound.
        self.widths = [math.inf if c.lower is None or c.upper is None else c.upper - c.lower for c in self.constraints]
        self.index = vector([k for k, _ in self.sides]).long()
        self.sign = vector([1.0 if s == "upper" else -1.0 for _, s in self.sides])
        self.values = tuple(getattr(self.constraints[k], s) for k, s in self.sides)
        self.value = vector(self.values)
        self.labels = tuple(f"{names[k]} ({side})" for k, side in self.sides)

    def __len__(self) -> int:
        return len(self.sides)

    def violations(self, estimate: list[float], scale: list[float]) -> list[float]:
        """z [m] of the estimates [K] in units of the scales [K]."""
        return [
            (estimate[k] - bound if side == "upper" else bound - estimate[k]) / scale[k]
            for (k, side), bound in zip(self.sides, self.values, strict=True)
        ]

    def fingerprint(self) -> list[list[Any]]:
        """What a saved state must agree with: plain values, safe for ``torch.load(weights_only=True)``."""
        return [[c.name, c.lower, c.upper, c.scale] for c in self.constraints]
