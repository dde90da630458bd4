"""A warning where `optim.constraint_max_grad_norm` is what keeps a bound violated."""

from __future__ import annotations

from barrierlm.diagnostics import Report, bound_text

#: Steps in a row, and at least this share of the run.
_LEAST, _SHARE = 10, 0.25


class LimitWatch:
    """Counts the steps in which a bound was violated and the constraints' gradient was clipped.

    While it is clipped a larger multiplier makes it no longer, so that a bound which takes more stays violated. A run
    that is resumed counts anew.

    Args:
        limit: ``optim.constraint_max_grad_norm``.
        steps: Of the run.
    """

    def __init__(self, limit: float, steps: int) -> None:
        self.limit, self.patience = limit, max(_LEAST, int(_SHARE * steps))
        self._counts: dict[tuple[str, str], int] = {}

    def update(self, norm: float, report: Report) -> list[str]:
        """What is to be said after a step, once while it lasts, by the norm before clipping and the bounds."""
        told = []
        for row in report:
            bound = row.constraint, row.side
            # "infeasible together" is said of all of a group, those that are met included.
            outside = row.slack < 0 and row.verdict.startswith(("violated", "infeasible"))
            self._counts[bound] = self._counts.get(bound, 0) + 1 if outside and norm > self.limit else 0
            if self._counts[bound] == self.patience:
                told.append(
                    f"Warning: {row.constraint!r} {bound_text(row.side, row.bound)} has been violated for "
                    f"{self.patience} steps, in all of which optim.constraint_max_grad_norm={self.limit:g} clipped the "
                    f"constraints' gradient ({norm:.3g} in the last): a larger multiplier pulls no harder. If it does "
                    "not come down, raise the limit or set it to null"
                )
        return told
