"""`optim.constraint_max_grad_norm`: task and constraints in passes of their own, and clipped apart."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from barrierlm import SplitGradients
from barrierlm.diagnostics import BoundState, Report
from barrierlm.recipes.check import run_check
from barrierlm.recipes.config import load_options
from barrierlm.recipes.finetune import prepare, train, train_step
from barrierlm.recipes.limit import LimitWatch
from barrierlm.recipes.workspace import build_objective, open_workspace

from .test_finetune import equal, metrics, without_times
from .tiny import launch

#: Multipliers that pull harder than the task.
HARD = ["constraints.length.lower=1", "constraints.length.upper=2", "objective.unit=5", "save_model=false"]


def steps(
    overrides: list[str], *extra: str, number: int = 4, hook: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> list[tuple[dict[str, float], torch.Tensor]]:
    """Metrics of some steps from the same weights, and the gradient that the optimizer saw in each."""
    workspace = open_workspace(load_options(None, [*overrides, *extra]))
    model, optimizer = prepare(workspace)
    objective, weights, seen = build_objective(workspace.options), workspace.policy.trained(), []
    if hook is not None:
        weights[0].register_hook(hook)
    optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in weights])))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    workspace.policy.lm.train()
    rows = without_times([train_step(workspace, model, optimizer, objective, step) for step in range(number)])
    return list(zip(rows, seen, strict=True))


@pytest.mark.parametrize("lora_rank", [2, 0])
def test_without_clipping_two_passes_are_one(overrides: list[str], lora_rank: int):
    """The same gradient and the same metrics, with and without adapters, over two micro-batches."""
    overrides = [*overrides, *HARD, "optim.max_grad_norm=1e9", "optim.gradient_accumulation=2"]
    overrides.append(f"model.lora_rank={lora_rank}")
    together = steps(overrides, "balance_every=1")
    apart = steps(overrides, "optim.constraint_max_grad_norm=1e9")
    assert apart[-1][0]["balance/constraint_norm"] > 0.3 * apart[-1][0]["balance/task_norm"]
    for (one, whole), (two, sum_of_both) in zip(together, apart, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-4, nan_ok=True)
        assert (whole - sum_of_both).norm() <= 1e-4 * whole.norm()


def test_multipliers_leave_the_task_its_part_of_a_step(overrides: list[str]):
    """The optimizer's gradient is the two parts, each within its own norm; clipped together, the task is lost."""
    limits = "optim.max_grad_norm=0.3", "optim.constraint_max_grad_norm=0.1"
    rows = steps([*overrides, *HARD, "balance_every=1"], *limits)
    for row, gradient in rows:
        task, rest, cosine = (row[f"balance/{name}"] for name in ("task_norm", "constraint_norm", "cosine"))
        t, c = min(task, 0.3), min(rest, 0.1)
        expected = (t**2 + c**2 + (2 * t * c * cosine if c else 0.0)) ** 0.5
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-4)
        assert "seconds/balance" not in row
        assert row["grad_norm"] == pytest.approx(
            (task**2 + rest**2 + (2 * task * rest * cosine if c else 0.0)) ** 0.5, rel=1e-4
        )
    assert rows[-1][0]["balance/constraint_norm"] > 3 * rows[-1][0]["balance/task_norm"]


def test_what_is_not_finite_is_told_as_without_it(overrides: list[str]):
    """By the norm, which `barrierlm check` looks at."""
    for extra in ((), ("optim.constraint_max_grad_norm=0.1",)):
        rows = steps(overrides, *extra, number=1, hook=lambda gradient: gradient * math.inf)
        assert not math.isfinite(rows[0][0]["grad_norm"])


#: A run of 12 steps has a patience of 10.
LIMITED = [*HARD, "optim.steps=12", "balance_every=0", "checkpoint_every=0"]


@pytest.mark.parametrize(("limit", "told"), [("1e-3", 1), ("1e9", 0), ("null", 0)])
def test_a_limit_that_keeps_a_bound_violated_is_told(overrides: list[str], capsys, limit: str, told: int):
    """Once, and by name: nothing moves under so small a limit, and with none there is nothing to raise."""
    options = load_options(None, [*overrides, *LIMITED, f"optim.constraint_max_grad_norm={limit}"])
    train(open_workspace(options), Path(options.output_dir))
    shown = capsys.readouterr().out
    warning = (
        "Warning: 'length' <= 2 has been violated for 10 steps, in all of which optim.constraint_max_grad_norm=0.001 "
    )
    assert shown.count(warning + "clipped the constraints' gradient") == shown.count("Warning") == told


def test_steps_in_a_row_are_counted_for_every_bound():
    def told(lower: float, upper: float, norm: float = 2.0, verdict: str = "violated") -> list[str]:
        """By the two slacks; a bound inside is met, or infeasible together with one that is not."""
        verdicts = [verdict if slack < 0 or verdict != "violated" else "met" for slack in (lower, upper)]
        rows = [
            BoundState("length", side, 3.0, 0.0, 0.1, slack, *[0.0] * 4, of)
            for side, slack, of in zip(("lower", "upper"), (lower, upper), verdicts, strict=True)
        ]
        return [line.split(" has")[0] for line in watch.update(norm, Report(rows))]

    watch = LimitWatch(1.0, steps=48)  # a patience of 12
    for _ in range(11):
        assert not told(-1.0, -1.0)
    assert not told(1.0, -1.0, norm=1.0)  # not clipped
    for _ in range(11):
        assert not told(-0.1, -1.0, verdict="active")
        assert not told(1.0, -1.0)
    assert told(1.0, -1.0) == []  # "active" is not violated, and began the count anew
    watch = LimitWatch(1.0, steps=48)
    for _ in range(11):
        assert not told(1.0, -1.0)
    assert told(1.0, -1.0) == ["Warning: 'length' <= 3"]
    for _ in range(24):
        assert not told(1.0, -1.0)  # said already
    for _ in range(11):
        assert not told(-1.0, 1.0, verdict="infeasible together with kl")
    assert not told(-1.0, 1.0, norm=math.nan)
    for _ in range(11):
        assert not told(-1.0, 1.0, verdict="infeasible together with kl")
    assert told(-1.0, 1.0, verdict="infeasible together with kl") == ["Warning: 'length' >= 3"]  # not the one inside
    assert not told(math.nan, math.nan, verdict="unknown")


def test_check_counts_no_pass_for_the_balance(overrides: list[str]):
    extra = ["optim.constraint_max_grad_norm=0.1", "balance_every=1"]
    found = run_check(open_workspace(load_options(None, [*overrides, *extra])), windows=1)
    passes = found.parts["forward"] + found.parts["backward"]
    assert found.step_seconds < sum(found.parts.values()) + passes / 2


def test_without_constraints_it_changes_nothing(overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SplitGradients, "__init__", None)  # would be called
    workspace = open_workspace(load_options(None, [*overrides, "optim.constraint_max_grad_norm=0.1"]))
    model, optimizer = prepare(workspace)
    assert "balance/task_norm" not in train_step(workspace, model, optimizer, None, 0)


@pytest.mark.slow
def test_two_processes_clip_as_one(overrides: list[str], tmp_path: Path):
    """Without clipping both ranks' parts add up to their one pass; with it, they resume to the same weights."""
    small = [*HARD, "optim.batch_size=2", "rollout.prompts=2", "optim.learning_rate=1e-12"]  # weights stay
    rows = []
    for name, extra in (("together", "balance_every=1"), ("apart", "optim.constraint_max_grad_norm=1e9")):
        folder = tmp_path / name
        launch(2, "finetune", "demo", *overrides, *small, "optim.max_grad_norm=1e9", extra, f"output_dir={folder}")
        rows.append(without_times(metrics(folder)))
    assert rows[1][-1]["balance/constraint_norm"] > 0.3 * rows[1][-1]["balance/task_norm"]
    for one, two in zip(
        *([{k: v for k, v in row.items() if v is not None} for row in run] for run in rows), strict=True
    ):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    clipped = [*HARD, "optim.max_grad_norm=0.3", "optim.constraint_max_grad_norm=0.1", "checkpoint_every=2"]
    folder = tmp_path / "clipped"
    launch(2, "finetune", "demo", *overrides, *clipped, f"output_dir={folder}")
    newest = folder / "checkpoints" / "step-000004.pt"
    whole = torch.load(newest, weights_only=True)
    newest.unlink()  # as if stopped after step 2
    launch(2, "finetune", "demo", *overrides, *clipped, f"output_dir={folder}", "resume=true")
    assert equal(torch.load(newest, weights_only=True), whole)
