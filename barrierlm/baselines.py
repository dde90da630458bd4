"""The other methods behind the same interface, for comparison on equal terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .barriers import Readings, Rule
from .saved import vector


class DualAscent(Rule):
    r"""Min-max training: gradient ascent on the multipliers, as in constrained RLHF.

    .. math:: \lambda \leftarrow \min(\max(\lambda + \eta z, 0), \text{cap}) \qquad\text{or}\qquad
              \lambda \leftarrow \min(\lambda e^{\eta z}, \text{cap})

    Args:
        step: :math:`\eta` > 0, per window.
        cap: Largest multiplier.
        start_at: Initial multiplier: >= 0, and > 0 for the log parametrisation. Default: 0, or 1.
        parametrisation: ``"linear"``, or ``"log"`` (ascent on the logarithm, as in PPO-Lagrangian), which keeps
            multipliers positive.
        delay: Windows before the first step, >= 0, in which the multiplier stays where it starts.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> DualAscent(0.05).step
        0.05

    Source: Moskovitz et al. 2023 (constrained RLHF), the min-max baseline of L3Ms (arXiv 2410.21533); Dai et al. 2023
    (Safe RLHF) for the logarithm, the cap and the delay.
    """

    learned: Tensor
    windows: Tensor
    _learned = ("learned", "windows")
    _nonnegative = _learned

    def __init__(
        self,
        step: float = 0.05,
        *,
        cap: float = math.inf,
        start_at: float | None = None,
        parametrisation: str = "linear",
        delay: int = 0,
    ) -> None:
        if parametrisation not in ("linear", "log"):
            raise ValueError(f"parametrisation={parametrisation!r}; allowed: 'linear' or 'log'")
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(f"delay={delay!r}; allowed: an integer >= 0")
        if start_at is None:
            start_at = 0.0 if parametrisation == "linear" else min(1.0, cap)
        if not (step > 0 and math.isfinite(step)):
            raise ValueError(f"step={step!r}; allowed: step > 0")
        if not cap > 0:
            raise ValueError(f"cap={cap!r}; allowed: cap > 0")
        if not 0 <= start_at <= cap or not math.isfinite(start_at):
            raise ValueError(f"start_at={start_at!r}; allowed: 0 <= start_at <= cap")
        if parametrisation == "log" and start_at == 0:
            raise ValueError(f"start_at={start_at!r} with parametrisation='log'; allowed: start_at > 0")
        self.step, self.cap, self.start_at = float(step), float(cap), float(start_at)
        self.parametrisation, self.delay = parametrisation, delay

    @property
    def kind(self) -> str:
        return super().kind + ("" if self.parametrisation == "linear" else f"({self.parametrisation})")

    def start(self, num_bounds: int) -> None:
        self.learned = vector([self.start_at] * num_bounds)
        self.windows = vector(0.0)

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """lambda z [m], the Lagrangian's term."""
        return self.learned.to(z) * z

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """lambda [m], whatever z is."""
        return self.learned.to(z)

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:
        """One ascent step of every measured bound."""
        self.windows = self.windows + 1
        if self.windows <= self.delay:
            return
        if self.parametrisation == "linear":
            self.learned = (self.learned + self.step * readings.z).clamp(0.0, self.cap)
        else:
            # The logarithm moves by at most 1 a window: e^z of a far start would overflow.
            self.learned = (self.learned * (self.step * readings.z).clamp(-1, 1).exp()).clamp(1e-12, self.cap)


class AugmentedLagrangian(Rule):
    r"""The Powell-Hestenes-Rockafellar augmented Lagrangian for inequalities.

    .. math:: B(z) = \frac{\max(\hat\lambda + \rho z, 0)^2 - \hat\lambda^2}{2\rho}, \qquad
              \lambda = \max(\hat\lambda + \rho z, 0), \qquad
              \hat\lambda \leftarrow \hat\lambda + \gamma (\lambda - \hat\lambda)

    Args:
        penalty: :math:`\rho` > 0, per unit of violation.
        step: :math:`\gamma` in (0, 1]; 1 is the classical update after an inner solve.

    Raises:
        ValueError: A parameter outside its range.

    Example:
        >>> AugmentedLagrangian(penalty=2.0).penalty
        2.0

    Source: Rockafellar 1973; Nocedal and Wright, Numerical Optimization, chapter 17.
    """

    learned: Tensor
    _learned = ("learned",)
    _nonnegative = _learned

    def __init__(self, penalty: float = 1.0, *, step: float = 0.1) -> None:
        if not (penalty > 0 and math.isfinite(penalty)):
            raise ValueError(f"penalty={penalty!r}; allowed: penalty > 0")
        if not 0 < step <= 1:
            raise ValueError(f"step={step!r}; allowed: 0 < step <= 1")
        self.penalty, self.step = float(penalty), float(step)

    def start(self, num_bounds: int) -> None:
        self.learned = vector([0.0] * num_bounds)

    def value(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """The augmented term [m]."""
        learned = self.learned.to(z)
        return ((learned + self.penalty * z).clamp(min=0) ** 2 - learned**2) / (2 * self.penalty)

    def multiplier(self, z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        """max(lambda + rho z, 0) [m]."""
        return (self.learned.to(z) + self.penalty * z).clamp(min=0)

    def update(self, readings: Readings, mu: Tensor, s: Tensor) -> None:
        """A damped multiplier step of every measured bound."""
        move = self.step * (self.multiplier(readings.z, mu, s) - self.learned)
        self.learned = self.learned + torch.where(readings.known, move, 0.0)
