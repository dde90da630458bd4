"""Real processes over gloo: `launch` starts one a rank, and each of them writes its results to a file."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, ROOT / "kernels", ROOT / "tests" / "kernels", ROOT / "tests" / "distributed"]


def start(script: str, ranks: int, folder: Path, *arguments: str) -> list[subprocess.Popen]:
    """One process a rank of ``tests/distributed/<script>``."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)),
        "OMP_NUM_THREADS": "1",
        "RANKS": str(ranks),
        "FOLDER": str(folder),
    }
    # Warnings are errors, as in the suite; in Triton's interpreter infinite differences warn.
    warnings = ["-W", "error", "-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    command = [sys.executable, *warnings, str(ROOT / "tests" / "distributed" / script), *arguments]
    return [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    """Exit status and error output of each; all are stopped when one takes longer than ``timeout`` seconds."""
    try:
        return [(p.returncode, err.decode()) for p in processes for _, err in [p.communicate(timeout=timeout)]]
    finally:
        for p in processes:
            p.kill()


def launch(script: str, ranks: int, folder: Path, *arguments: str, timeout: float = 240) -> list[dict]:
    """What every rank passed to `end`, in rank order; an error if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for status, errors in finish(start(script, ranks, folder, *arguments), timeout):
        assert status == 0, errors[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(ranks)]


# ---- within a process


def join(timeout: float = 120) -> tuple[int, int, Path]:
    """Join the group of all ranks: (rank, number of ranks, folder)."""
    torch.set_num_threads(1)
    rank, ranks, folder = int(os.environ["RANK"]), int(os.environ["RANKS"]), Path(os.environ["FOLDER"])
    store = dist.FileStore(str(folder / "rendezvous"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    return rank, ranks, folder


def end(results: dict, *, leave: bool = True) -> NoReturn:
    """Hand tensors and numbers to `launch`, leave the group (which waits for all ranks), and end the process.

    It ends without torch's own clean-up: a device mesh holds on to its gloo group, and now and then one of its
    threads still runs when the interpreter ends, which aborts ("terminate called without an active exception").
    """
    torch.save(results, Path(os.environ["FOLDER"]) / f"rank-{dist.get_rank()}.pt")
    if leave:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
