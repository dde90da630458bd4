"""Small things that the tests of the objective share."""

import copy

import torch

from barrierlm import BarrierObjective, BatchMean, ConstantSchedule, Constraint, RelaxedLogBarrier

F64 = torch.float64
C = Constraint("c", upper=1.0)


def exact(x):
    return torch.tensor(x, dtype=F64, requires_grad=True)


def relaxed(constraints, mu=0.1, **kwargs):
    defaults = {"rule": RelaxedLogBarrier(), "schedule": ConstantSchedule(mu), "estimator": BatchMean()}
    return BarrierObjective(None, constraints, **(defaults | kwargs))


def state_of(objective):
    return copy.deepcopy(objective.state_dict())


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(-7e77), b.nan_to_num(-7e77))
    return a == b
