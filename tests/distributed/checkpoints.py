"""Run by `launch`: torch.distributed.checkpoint with any number of ranks, and a fp16 step that one rank must skip."""

import math
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import end, join
from torch.distributed.fsdp import fully_shard

from barrierlm import BarrierObjective, Constraint, Sampled

RESPONSES = 8


def make():
    """With the default rule and schedule, which learn."""
    return BarrierObjective(None, [Constraint("length", lower=2.0, upper=2.2), Constraint("c", upper=-0.2)])


def advance(objective, steps, rank, ranks):
    """Windows of the same responses, whoever has them."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        lengths = torch.randint(1, 5, (RESPONSES,), generator=generator)
        costs = torch.randn(RESPONSES, generator=generator)
        mine = slice(RESPONSES * rank // ranks, RESPONSES * (rank + 1) // ranks)
        ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths[mine].cumsum(0)])
        logps = torch.randn(int(ends[-1]), requires_grad=True)
        measured = {
            "length": Sampled.per_token(torch.ones(len(logps)), logps, ends),
            "c": Sampled(costs[mine], torch.segment_reduce(logps, "sum", offsets=ends, axis=0)),
        }
        objective.combine(None, measured)
        objective.step()


def precision():
    """fp16 with FSDP2: gradients that overflow on one rank's shard alone skip the step on all of them."""
    torch.manual_seed(0)
    model = fully_shard(torch.nn.Linear(4, 2 * dist.get_world_size(), bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    objective = BarrierObjective(None, [Constraint("c", upper=0.0, scale=1.0)])
    skipped = []
    for overflow in (False, True, False):
        out = model(torch.ones(3, 4))
        poison = torch.tensor([math.inf if overflow else 1.0, *[1.0] * (out.shape[1] - 1)])
        loss = objective.combine((out * poison).mean(), {"c": out.mean(1)}).loss
        scaler.scale(loss).backward()
        bad = not model.weight.grad.to_local().isfinite().all()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() < before:
            objective.discard_window()
        else:
            objective.step()
        skipped.append((bad, scaler.get_scale() < before))
    return {"skipped": skipped, "windows": objective.windows, "metrics": objective.metrics()}


def main(action):
    rank, ranks, folder = join()
    objective, results = make(), {}
    place = {"checkpoint_id": folder.parent / "checkpoint"}
    if action == "save":
        advance(objective, range(6), rank, ranks)
        dcp.save({"objective": objective}, **place)
        results["precision"] = precision()
    else:
        dcp.load({"objective": objective}, **place)
    results["state"] = objective.state_dict()
    advance(objective, range(6, 10), rank, ranks)
    results["metrics"] = objective.metrics()
    end(results)


if __name__ == "__main__":
    main(sys.argv[1])
