"""Real processes over gloo: bytes and time of a window's all-reduce, and of a head that is split over ranks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from barrierlm_kernels import VocabParallel, linear_weighted_logprob
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from barrierlm import BarrierObjective, Constraint

#: Rows, hidden size, vocabulary of the head; rows of a chunk.
HEAD, CHUNK = (512, 256, 16384), 128
CONSTRAINTS = (1, 4, 16, 64)


class _Payload(TorchDispatchMode):
    """Bytes handed to collectives by operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


@contextmanager
def payload() -> Iterator[dict[str, int]]:
    """Calls and bytes handed to `all_reduce` and `all_gather` by this package."""
    counted = {"calls": 0, "bytes": 0}
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            counted["calls"] += 1
            counted["bytes"] += tensor.numel() * tensor.element_size()
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield counted
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median; all ranks begin together."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def windows(repeats: int) -> list[dict[str, Any]]:
    """`objective.step()` by number of constraints: what it sends, and how long it takes with and without the others."""
    rows = []
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    for count in CONSTRAINTS:
        row: dict[str, Any] = {"constraints": count}
        for name, group in (("seconds", None), ("seconds alone", alone)):
            objective = BarrierObjective(
                None, [Constraint(str(k), upper=0.0, scale=1.0) for k in range(count)], process_group=group
            )
            value = torch.zeros(8, requires_grad=True)

            def measure(objective: BarrierObjective = objective, value: torch.Tensor = value) -> None:
                objective(measurements=dict.fromkeys((c.name for c in objective.constraints), value))

            times = []
            for _ in range(repeats):
                measure()
                times.append(seconds(objective.step, 1))
            row[name] = statistics.median(times)
            if group is None:
                measure()
                with payload() as counted:
                    objective.step()
                row |= counted
        rows.append(row)
    return rows


def head(repeats: int) -> list[dict[str, Any]]:
    """A head over ranks: gathered whole, gathered for every chunk of rows, or left in slices of the vocabulary."""
    rows, hidden_size, vocab = HEAD
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, hidden_size) / 16, torch.randn(vocab, hidden_size)
    targets, weights = torch.randint(vocab, (rows,)), torch.randn(8)
    ends = torch.arange(0, rows + 1, rows // 8)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    own: torch.Tensor = sharded.detach().to_local().clone().requires_grad_()  # type: ignore[attr-defined]
    vocabulary = VocabParallel(len(own))
    budget = CHUNK * vocab * 4
    row_weights = weights.repeat_interleave(rows // 8)

    def gathered(step: int) -> None:
        states = hidden.clone().requires_grad_()
        for lo in range(0, rows, step):
            part = slice(lo, lo + step)
            whole = sharded.full_tensor(grad_placements=[Partial()])  # type: ignore[attr-defined]
            packing = (targets[part], torch.tensor([0, step]))
            out = linear_weighted_logprob(
                states[part], whole, *packing, row_weights[part], weights_per="token", memory_budget=budget
            )
            out.total.backward()
        sharded.grad = None

    def sliced() -> None:
        states = hidden.clone().requires_grad_()
        out = linear_weighted_logprob(
            states, own, targets, ends, weights, vocab_parallel=vocabulary, memory_budget=budget // mesh.size()
        )
        out.total.backward()
        own.grad = None

    results = []
    for name, function in (
        ("gathered whole", lambda: gathered(rows)),
        ("gathered per chunk", lambda: gathered(CHUNK)),
        ("vocabulary slices", sliced),
    ):
        function()
        mode = _Payload()
        with payload() as counted, mode:
            function()
        results.append({"head": name, "bytes": counted["bytes"] + mode.bytes, "seconds": seconds(function, repeats)})
    return results


def _worker(rank: int, ranks: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    results = {"ranks": ranks, "windows": windows(repeats)}
    if ranks <= 4:
        results["head"] = head(max(3, repeats // 10))
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, repeats: int) -> dict[str, Any]:
    """All of it on so many processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(ranks, folder, repeats), nprocs=ranks)  # type: ignore[attr-defined,no-untyped-call]
        results: dict[str, Any] = torch.load(Path(folder) / "results.pt", weights_only=True)
    return results
