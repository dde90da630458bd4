"""Run by `launch`: many steps of a small loop; memory, and the bits of the state, every so often."""

import hashlib
import io
import sys
import tracemalloc

import torch
from launch import end, join
from torch.nn.parallel import DistributedDataParallel

from barrierlm import BarrierObjective, Constraint, Sampled


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def digest(value):
    """Of a nested state, as bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def main(steps):
    rank, _, _ = join()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(5, 7))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    objective = BarrierObjective(None, [Constraint("length", lower=1.5, upper=2.0), Constraint("c", upper=2.5)])
    torch.manual_seed(rank)
    history = []
    for step in range(1, steps + 1):
        count = int(torch.randint(int(rank == 0), 6, ()))  # uneven, and at times nothing on the second rank
        lengths = torch.randint(1, 4, (count,))
        ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        logp = model(torch.randn(int(ends[-1]), 5)).log_softmax(-1)
        tokens = torch.multinomial(logp.detach().exp(), 1)[:, 0] if len(logp) else torch.zeros(0, dtype=torch.long)
        logps = logp.gather(1, tokens[:, None])[:, 0]
        whole = torch.segment_reduce(logps, "sum", offsets=ends, axis=0)
        cost = torch.segment_reduce(tokens.float(), "sum", offsets=ends, axis=0) / lengths
        measured = {"length": Sampled.per_token(torch.ones(len(logps)), logps, ends), "c": Sampled(cost, whole)}
        objective.combine(logp.square().sum() * 1e-3, measured).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.step()
        if step == steps // 10:
            tracemalloc.start()
        if step % (steps // 10) == 0:
            traced = tracemalloc.get_traced_memory()[0]
            history.append((step, resident(), traced, digest(objective.state_dict()), digest(model.state_dict())))
    end({"history": history, "metrics": objective.metrics(), "windows": objective.windows})


if __name__ == "__main__":
    main(int(sys.argv[1]))
