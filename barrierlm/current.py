"""``multiplier="current"``: the barrier of a call's own means, for exact work in one process."""

from __future__ import annotations

import torch
from torch import Tensor

from .committed import Committed
from .estimators import Column
from .sampling import Measured
from .saved import vector


def barrier_terms(committed: Committed, measured: dict[int, Measured]) -> tuple[list[Tensor], Tensor]:
    """B(z) of this call's own means, differentiable; without a scale yet, a connected zero."""
    terms = [m.total * 0 for m in measured.values()]
    penalty = vector(0.0)
    scale = vector(committed.scales.value)
    for k, m in measured.items():
        if bool(scale[k].isnan()) and m.row[Column.EXACT] > 0:
            scale[k] = 1.0
    rows = [
        i
        for i, (k, _) in enumerate(committed.bounds.sides)
        if k in measured and measured[k].count and not bool(scale[k].isnan()) and not measured[k].row[Column.NONFINITE]
    ]
    if rows:
        at = committed.bounds.index[rows].tolist()
        mean = torch.stack([measured[k].total / measured[k].count for k in at])
        sign, bound, unit = (x.to(mean) for x in (committed.bounds.sign[rows], committed.bounds.value[rows], scale[at]))
        full = torch.zeros(len(committed.bounds), dtype=mean.dtype, device=mean.device)
        drawn_in = vector(committed.shifts())[rows].to(mean)
        z = full.index_put((torch.tensor(rows, device=mean.device),), sign * (mean - bound) / unit + drawn_in)
        mu, s = vector(committed.mu).to(full), vector(committed.s).to(full)
        value = committed.rule.value(z, mu, s)[rows].sum()
        terms.append(value)
        penalty = value.detach()
    return terms, penalty
