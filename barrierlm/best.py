"""`BestFeasible`: which state of a run to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .diagnostics import BoundState, Report


class _State(NamedTuple):
    """A state as it is compared and saved. ``violation`` is the largest over the bounds, ``bound`` the one it is of."""

    step: int
    violation: float
    task_loss: float
    bound: str
    bounds: int

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: what meets all bounds counts as equally good, up to its task loss."""
        return max(self.violation, 0.0), self.task_loss


class BestFeasible:
    r"""Keeps track of the best state: all bounds met with confidence, and then the smallest task loss.

    .. math:: \text{violation} = \max_i \Big(z_i + c\, \frac{\text{stderr}_i}{\text{scale}_i}\Big), \qquad
              z_i = \pm \frac{\text{estimate}_i - \text{bound}_i}{\text{scale}_i}

    is how far, in scales, the worst confidence limit is outside its bound. A state with a violation of at most 0 meets
    its bounds with confidence and beats every other. Among these the smoothed task loss decides; among the others the
    violation does, then the loss. Of equal ones the first stays.

    Estimates and task loss are averages over the recent windows, both of them: a single window is too noisy to pick a
    winner among hundreds. So it is stretches of a run that are compared, and a state that changes fast is
    judged by where it was a few windows ago. What is kept still needs an evaluation of its own: the smallest of many
    noisy numbers looks better than it is.

    Args:
        confidence: c, standard errors by which an estimate must be inside; 0 takes estimates at face value.
        smoothing: Weight of the newest task loss in its exponential average (corrected for its start), in (0, 1].

    Raises:
        ValueError: An argument outside its range.

    Example:
        >>> objective = BarrierObjective(None, [Constraint("mean", upper=0.5, scale=1.0)])
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> best = BestFeasible()
        >>> for value in (1.0, 0.8):
        ...     out = objective.combine((x - 2) ** 2, {"mean": x * value})
        ...     objective.step()
        ...     if best.update(objective.report(), out.task_loss):
        ...         kept = x.detach().clone()  # for a model: torch.save(model.state_dict(), "best.pt")
        >>> print(best)
        step 2: no state met all bounds with confidence; least violated: mean (upper) by 0.395 scale

    Source: model selection by a validation metric, with feasibility before the objective (Deb 2000, rules for
    constrained tournament selection).
    """

    def __init__(self, confidence: float = 2.0, smoothing: float = 0.1) -> None:
        if not (isinstance(confidence, int | float) and 0 <= confidence < math.inf):
            raise ValueError(f"confidence={confidence!r}; allowed: a finite number >= 0")
        if not (isinstance(smoothing, int | float) and 0 < smoothing <= 1):
            raise ValueError(f"smoothing={smoothing!r}; allowed: 0 < smoothing <= 1")
        self.confidence, self.smoothing = float(confidence), float(smoothing)
        self._updates = 0
        self._loss = self._weight = 0.0
        self._best: _State | None = None

    def update(self, report: Report, task_loss: float | Tensor) -> bool:
        """The state after one more committed window; call it after every ``objective.step()``.

        A window after which an estimate, or a standard error that is asked for, is still unknown never counts.

        Args:
            report: From `BarrierObjective.report`.
            task_loss: Of the window: a finite number or 0-d tensor (which is waited for). On several ranks give
                each the average over the ranks, so that all decide alike.

        Returns:
            Whether this state is the best so far.

        Raises:
            TypeError: ``report`` is something else.
            ValueError: A report without rows, a task loss that is no finite number. Nothing is changed then.
        """
        if not isinstance(report, Report):
            raise TypeError(f"report is a {type(report).__name__}; allowed: a Report, as of objective.report()")
        if not report:
            raise ValueError("report has no rows; allowed: one per bound, as of objective.report()")
        if isinstance(task_loss, Tensor) and task_loss.numel() != 1:
            raise ValueError(f"task_loss has shape {tuple(task_loss.shape)}; allowed: a number or a 0-d tensor")
        loss = float(task_loss)
        if not math.isfinite(loss):
            raise ValueError(f"task_loss={loss}; allowed: a finite number")
        a = self.smoothing
        self._updates += 1
        self._loss, self._weight = (1 - a) * self._loss + a * loss, (1 - a) * self._weight + a
        violations = [self._violation(row) for row in report]
        if any(math.isnan(v) for v in violations):
            return False
        worst = max(range(len(report)), key=violations.__getitem__)
        label = f"{report[worst].constraint} ({report[worst].side})"
        state = _State(self._updates, violations[worst], self._loss / self._weight, label, len(report))
        if self._best is not None and state.rank >= self._best.rank:
            return False
        self._best = state
        return True

    @property
    def feasible(self) -> bool:
        """Whether the best state met all bounds with confidence."""
        return self._best is not None and self._best.violation <= 0

    @property
    def step(self) -> int | None:
        """The number of the `update` that was the best, from 1; None before any counted."""
        return None if self._best is None else self._best.step

    @property
    def task_loss(self) -> float:
        """The smoothed task loss of the best state; NaN before any counted."""
        return math.nan if self._best is None else self._best.task_loss

    @property
    def violation(self) -> float:
        """The best state's largest violation, in scales and with confidence: at most 0 if it is feasible; or NaN."""
        return math.nan if self._best is None else self._best.violation

    def __str__(self) -> str:
        if self._best is None:
            return f"no state yet: none of {self._updates} window(s) had all estimates and their standard errors"
        best = self._best
        if self.feasible:
            bounds = "the bound" if best.bounds == 1 else f"all {best.bounds} bounds"
            return f"step {best.step}: {bounds} met with confidence, task loss {best.task_loss:.4g}"
        return (
            f"step {best.step}: no state met all bounds with confidence; least violated: {best.bound} by "
            f"{best.violation:.3g} scale"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later updates depend on: plain numbers and strings."""
        return {
            "version": 1,
            "confidence": self.confidence,
            "smoothing": self.smoothing,
            "updates": self._updates,
            "loss": self._loss,
            "weight": self._weight,
            "best": None if self._best is None else list(self._best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Args:
            state: From a `BestFeasible` with the same arguments.

        Raises:
            ValueError: Something else, or of other arguments. Nothing is changed then.
        """
        if not isinstance(state, Mapping) or repr(state.get("version")) != "1":
            given = f"version {state.get('version')!r}" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state is {given}; allowed: version 1, as made by state_dict()")
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state lacks {sorted(missing)[0]!r}; allowed: a mapping as made by state_dict()")
        for name in ("confidence", "smoothing"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state was saved for {name}={state[name]}; allowed: {getattr(self, name)}")
        try:
            best = None if state["best"] is None else _State(*state["best"])
            if best is not None and not all(map(isinstance, best, (int, int | float, int | float, str, int))):
                raise TypeError(f"its best state is {tuple(best)}")
            numbers = int(state["updates"]), float(state["loss"]), float(state["weight"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"state is damaged ({error}); allowed: a mapping as made by state_dict()") from error
        (self._updates, self._loss, self._weight), self._best = numbers, best

    def _violation(self, row: BoundState) -> float:
        """How far the confidence limit is outside, in scales; NaN where it is not known."""
        # Without the case, a standard error that is not known would matter where nobody asks for it.
        margin = self.confidence * row.stderr if self.confidence else 0.0
        return (margin - row.slack) / row.scale
