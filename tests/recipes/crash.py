"""Kill a fine-tuning run at random moments, resume it, and compare with the run that was never stopped.

    python -m tests.recipes.crash --kills 30

Every run is a child forked from a process that has imported everything, and dies by SIGKILL: at a random moment of its
life, or just before one of the file operations that it does (each of them once, with ``--operations``; a kill within
``torch.save`` leaves the file half-written). It is then resumed, or started again where there was no checkpoint yet.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from barrierlm.recipes.config import load_options
from barrierlm.recipes.finetune import finetune

from .tiny import make_data, make_model, tiny_overrides

STEPS = 6
#: The cost draws from Python's generator, so that its state is part of what must come back.
COST = "import random\n\n\ndef cost(completions):\n    return [len(c) + random.random() for c in completions]\n"


def run(folder: Path, output: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start the recipe in a child; it resumes where ``output`` has a checkpoint. Returns the child's id."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        log = os.open(folder / f"{output.name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        before()
        resume = any((output / "checkpoints").glob("step-*.pt"))
        more = [f"constraints.noise.cost={folder / 'noise.py'}:cost", "constraints.noise.upper=20", "keep_best=true"]
        more += [f"optim.steps={STEPS}", "checkpoint_every=1", f"resume={str(resume).lower()}"]
        finetune(load_options(None, tiny_overrides(folder / "model", folder / "pairs.jsonl", output) + more))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(child: int) -> int:
    """The child's exit status; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(action: Callable[[], None]) -> None:
    """Do it in a child: a process that has used tokenizers or autograd should not be forked."""
    child = os.fork()
    if not child:
        action()
        os._exit(0)
    assert wait(child) == 0


def make_all(folder: Path) -> None:
    """Model and data."""
    make_model(folder / "model")
    make_data(folder / "pairs.jsonl")


def trace(at: int | None, names: Path | None = None) -> None:
    """In a child: before file operation number ``at`` (from 0), die; ``names`` collects them all, one a line."""
    done = 0

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if names is not None:
                with names.open("a") as file:
                    file.write(name + "\n")
            if done == at:
                if name == "save":
                    whole = io.BytesIO()
                    real(args[0], whole)
                    args[1].write(whole.getvalue()[: whole.tell() // 2])
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "unlink"), (torch, "save")):
        setattr(owner, name, watched(name, getattr(owner, name)))


def result(output: Path) -> dict[str, Any]:
    """Everything that a run ends with, apart from times."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())["runs"]
    checkpoints = {path.name: torch.load(path, weights_only=True) for path in (output / "checkpoints").iterdir()}
    weights = {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.glob("*/adapter_model.safetensors"))}
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows],
        "summary": {name: {k: v for k, v in run.items() if k != "seconds"} for name, run in summary.items()},
        "checkpoints": checkpoints,
        "weights": weights,
    }


def equal(a: Any, b: Any) -> bool:
    """Whether two results are the same, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    return bool(a == b) or (a != a and b != b)


def trial(folder: Path, name: str, expected: dict[str, Any], *, after: float | None, at: int | None) -> Counter[str]:
    """Kill one run ``after`` so many seconds, or ``at`` a file operation, resume it, and say what became of it."""
    output = folder / name
    child = run(folder, output, lambda: trace(at) if at is not None else None)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    if wait(child) != -signal.SIGKILL:
        return Counter(finished=1)
    counts = Counter(kills=1)
    whole = [path.name for path in (output / "checkpoints").glob("step-*.pt")]
    half = [*output.rglob(".unfinished-*")]
    counts["before the first checkpoint"] += not whole
    counts["with a file half-written"] += bool(half)
    status = wait(run(folder, output))
    log = (folder / f"{name}.log").read_text()
    if status != 0 or "Warning: damaged" in log:
        print(f"{name}: resumed run ended with {status}\n{log[-2000:]}")
        return counts + Counter(lost=1)
    if not equal(result(output), expected) or [*output.rglob(".unfinished-*")]:
        print(f"{name}: the resumed run differs")
        return counts + Counter(corrupt=1)
    return counts + Counter({"bit-equal": 1})


def summary(where: str, counts: Counter[str]) -> bool:
    """Print them; whether something went wrong."""
    print(
        f"killed {where}: {counts['kills']} ({counts['before the first checkpoint']} before the first checkpoint, "
        f"{counts['with a file half-written']} with a file half-written); resumed bit-equal: "
        f"{counts['bit-equal']}, lost: {counts['lost']}, corrupt: {counts['corrupt']}",
        flush=True,
    )
    return bool(counts["lost"] or counts["corrupt"]) or counts["bit-equal"] != counts["kills"]


def main(argv: list[str] | None = None) -> int:
    """Print the counts; 0 if nothing was lost and nothing corrupt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=30, help="at random moments")
    parser.add_argument("--operations", action="store_true", help="and before every file operation of a run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "noise.py").write_text(COST)
        in_child(lambda: make_all(folder))
        names = folder / "operations"
        assert wait(run(folder, folder / "traced", lambda: trace(None, names))) == 0, (
            folder / "traced.log"
        ).read_text()
        began = time.perf_counter()
        assert wait(run(folder, folder / "whole")) == 0
        seconds = time.perf_counter() - began
        expected = result(folder / "whole")
        assert len(expected["metrics"]) == STEPS
        assert equal(result(folder / "traced"), expected), "two uninterrupted runs differ"
        operations = names.read_text().split()
        print(f"uninterrupted run: {seconds:.1f} s, {STEPS} checkpoints, {len(operations)} file operations", flush=True)
        counts: Counter[str] = Counter()
        while counts["kills"] < arguments.kills:
            moment = generator.uniform(0, seconds)
            counts += trial(folder, f"moment-{sum(counts.values())}", expected, after=moment, at=None)
        failed = summary("at random moments", counts)
        if arguments.operations:
            counts = Counter()
            for i in range(len(operations)):
                counts += trial(folder, f"operation-{i}", expected, after=None, at=i)
            failed |= summary("before file operations", counts)
    return int(failed)


if __name__ == "__main__":
    import torch.utils.tensorboard
    import transformers.models.llama.modeling_llama  # noqa: F401 - what a run imports, once for all of them

    sys.exit(main())
