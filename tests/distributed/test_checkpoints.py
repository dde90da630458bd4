"""torch.distributed.checkpoint, mixed precision, and Accelerate: a resumed run is the run that never stopped."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import advance, make
from launch import FOLDERS, launch
from torch.distributed.checkpoint.stateful import Stateful

from barrierlm import BarrierObjective, Constraint, Sampled


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(-7e77), b.nan_to_num(-7e77))
    return a == b


@pytest.fixture
def quiet_checkpoints():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def test_distributed_checkpoint_in_one_process(tmp_path, quiet_checkpoints):
    """From any number of windows into a new objective, also before the first."""
    for windows in (0, 1, 4):
        objective, loaded = make(), make()
        advance(objective, range(windows), 0, 1)
        assert isinstance(objective, Stateful)
        dcp.save({"objective": objective}, checkpoint_id=tmp_path / str(windows))
        dcp.load({"objective": loaded}, checkpoint_id=tmp_path / str(windows))
        assert same(objective.state_dict(), loaded.state_dict())
        for one in (objective, loaded):
            advance(one, range(20, 24), 0, 1)
        assert same(objective.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("targets", [(1,), pytest.param((4,), marks=pytest.mark.slow)])
def test_saved_on_two_ranks_loaded_on_others(tmp_path, targets):
    two = launch("checkpoints.py", 2, tmp_path / "2", "save")
    assert same(two[0]["state"], two[1]["state"])
    assert two[0]["metrics"]["constraints/c/upper/multiplier"] > 0
    for ranks in targets:
        for rank in launch("checkpoints.py", ranks, tmp_path / str(ranks), "load"):
            assert same(rank["state"], two[0]["state"])
            assert rank["metrics"] == pytest.approx(two[0]["metrics"], rel=1e-12)
    for rank, outcome in enumerate(two):
        precision = outcome["precision"]
        assert precision["skipped"] == [(False, False), (rank == 0, True), (False, False)]
        assert precision["windows"] == 2
        assert repr(precision["metrics"]) == repr(two[0]["precision"]["metrics"])


# ---- mixed precision


def fp16_run(overflows, discard=True):
    """Weights and objective after the windows of a GradScaler loop; ``overflows``: whose gradients are too large."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    objective = BarrierObjective(None, [Constraint("mean", upper=-0.5, scale=1.0)])
    for window, overflow in enumerate(overflows):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(window - sum(overflows[:window])))
        with torch.autocast("cpu", torch.float16):
            logits = model(x)
            assert logits.dtype == torch.float16
            task = (logits.float() ** 2).mean() * (1e8 if overflow else 1)
            out = objective.combine(task, {"mean": logits[:, 0]})
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped = scaler.get_scale() < before
        assert skipped == overflow
        optimizer.zero_grad()
        if skipped and discard:
            objective.discard_window()
        else:
            objective.step()
    return model.state_dict(), objective.state_dict()


def test_a_skipped_step_is_as_if_it_had_never_been():
    skipping = fp16_run([False, False, True, False, True, False])
    smooth = fp16_run([False] * 4)
    assert same(skipping[0], smooth[0])
    assert same(skipping[1], smooth[1])
    assert smooth[1]["windows"] == 4
    assert not same(fp16_run([False, False, True, False, True, False], discard=False)[1], smooth[1])


def test_bf16_autocast_leaves_the_objective_alone():
    """Inside autocast or outside: the same numbers in, the same bits out."""
    outcomes = []
    for inside in (False, True):
        objective = make()
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            logps = -torch.rand(6, generator=generator).bfloat16()
            logps.requires_grad_()
            costs, ends = torch.randn(6, generator=generator).bfloat16(), torch.tensor([0, 2, 6])
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                measured = {"length": Sampled.per_token(torch.ones(6), logps, ends), "c": Sampled(costs, logps)}
                out = objective.combine((logps.float() ** 2).mean(), measured)
            (gradient,) = torch.autograd.grad(out.loss, logps)
            objective.step()
            outcomes.append((inside, out.loss.detach(), gradient, objective.state_dict()))
    outside = [o[1:] for o in outcomes if not o[0]]
    within = [o[1:] for o in outcomes if o[0]]
    for a, b in zip(outside, within, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert same(a[2], b[2])


# ---- Accelerate


def accelerate(ranks, *arguments):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={ranks}"]
    command += ["--multi_gpu"] if ranks > 1 else []  # its name for torchrun; with --cpu it starts one process
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += [str(Path(__file__).parent / "accelerated.py"), *arguments]
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_accelerate_resumes_from_disk(tmp_path):
    """Two processes, two micro-batches a window: stopped after window 4 and resumed, the same bits as never stopped.

    One process with the same data gives the same numbers: `accumulate` and the ranks divide as the objective expects.
    """
    pytest.importorskip("accelerate")
    accelerate(2, str(tmp_path), "whole", "0", "8")
    accelerate(2, str(tmp_path), "half", "0", "4")
    accelerate(2, str(tmp_path), "half", "4", "8")
    accelerate(1, str(tmp_path), "alone", "0", "8")
    outcomes = {
        (name, rank): torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        for name in ("whole", "half")
        for rank in range(2)
    }
    for outcome in outcomes.values():
        assert same(outcome["objective"], outcomes["whole", 0]["objective"])
        assert same(outcome["model"], outcomes["whole", 0]["model"])
    assert outcomes["whole", 0]["objective"]["windows"] == 8
    alone = torch.load(tmp_path / "alone-0.pt", weights_only=True)
    for name, value in alone["model"].items():
        torch.testing.assert_close(value, outcomes["whole", 0]["model"][name], rtol=0, atol=1e-10)
    assert alone["metrics"] == pytest.approx(outcomes["whole", 0]["metrics"], abs=1e-10)
    assert alone["metrics"]["constraints/mean/upper/multiplier"] > 0.1


def test_accelerate_says_that_a_step_was_skipped():
    """The documented pattern: `optimizer_step_was_skipped` decides between `discard_window` and `step`."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    # What mixed_precision="fp16" puts there; Accelerate offers that on accelerators only.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = torch.nn.Linear(2, 1)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    objective = BarrierObjective(None, [Constraint("mean", upper=0.0, scale=1.0)])
    decisions = []
    for factor in (1.0, torch.inf, 1.0):
        prediction = model(torch.ones(4, 2))
        out = objective.combine(factor * prediction.mean(), {"mean": prediction[:, 0]})
        accelerator.scaler.scale(out.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        decisions.append(accelerator.optimizer_step_was_skipped)
        if accelerator.optimizer_step_was_skipped:
            objective.discard_window()
        else:
            objective.step()
    assert decisions == [False, True, False]
    assert objective.windows == 2
