"""The paper's experiments: the grid is what was planned, runs are kept one by one, and the page says what rows say."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("omegaconf")

from barrierlm import AugmentedLagrangian, DualAscent, ExponentialSchedule, ModifiedBarrier, RelaxedLogBarrier
from barrierlm.learning import AdaptiveBarrier
from barrierlm.recipes import progress
from barrierlm.recipes.config import load_options
from barrierlm.recipes.data import load_pairs
from barrierlm.recipes.workspace import build_objective, open_workspace
from benchmarks.output import save
from benchmarks.paper import experiment, report, run, surrogate
from benchmarks.paper.__main__ import _arguments, _asked_for, main
from benchmarks.paper.estimate import predicted, remaining
from benchmarks.paper.evaluate import distance, splits, verdict
from benchmarks.paper.experiment import (
    SFT_STEPS,
    TOGETHER,
    UNREACHABLE,
    WEIGHTS,
    WINDOWS,
    Bound,
    Problem,
    Sources,
    Task,
    best_penalty,
    full,
    quick,
    window,
)
from benchmarks.paper.glance import at_a_glance, in_order
from benchmarks.paper.groups import by_problem, change, difference
from benchmarks.paper.methods import (
    AUGMENTED,
    DEFAULT,
    L3M,
    METHODS,
    MM,
    MODIFIED,
    PENALTY,
    REWARD_UNIT,
    SFT,
    UNIT,
    recipe_options,
)
from benchmarks.paper.plots import courses, ends
from benchmarks.paper.scores import infeasible_share, inside, of_training, steps_to_feasibility, thinned
from benchmarks.paper.surrogate import SPEEDS, simulate
from benchmarks.paper.targets import search_lines, targets
from tests.recipes.tiny import make_data, make_model

SOURCES = Sources()
WINDOW = window(16, 24)
REWARD = Problem("helpful", (Bound("helpful", "helpful", lower=0.6),), 64)


# ---- the grid


def test_the_quick_version():
    tasks = quick(SOURCES)
    assert [(t.method, t.weight) for t in tasks if t.problem.bounds] == [
        (DEFAULT, None),
        (MM, None),
        (L3M, None),
        (PENALTY, pytest.approx(0.018)),
        (PENALTY, pytest.approx(0.18)),
    ]
    assert [t.method for t in tasks if not t.problem.bounds] == [SFT]
    assert {t.problem.bounds for t in tasks} == {(), (Bound("length", "length", 16, 24),)}
    assert {(t.seed, t.steps, t.max_pairs, t.problem.cap) for t in tasks} == {(0, 44, 4000, 48)}


def test_methods_differ_in_the_objective_alone():
    def rest(task):
        options = dataclasses.asdict(load_options(None, task.overrides()))
        return {key: value for key, value in options.items() if key not in ("objective", "constraints")}

    first, *others = (rest(task) for task in quick(SOURCES))
    assert all(other == first for other in others)
    objectives = [load_options(None, t.overrides()).objective for t in quick(SOURCES)]
    assert len({(o.unit, str(o.estimator_options), o.estimator) for o in objectives}) == 1
    demo = dataclasses.asdict(load_options("demo"))
    assert first["model"] == demo["model"]
    assert {**first["optim"], "steps": demo["optim"]["steps"]} == demo["optim"]
    assert first["data"] == demo["data"]
    assert first["rollout"]["prompts"] == demo["rollout"]["prompts"]
    assert first["evaluation"]["prompts"] >= 256


@pytest.mark.parametrize("bounds", WINDOWS)
def test_the_cap_is_at_least_twice_the_upper_bound(bounds):
    assert window(*bounds).cap >= 2 * bounds[1]
    load_options(None, Task(window(*bounds), DEFAULT, 0, 10, SOURCES).overrides())  # the recipe refuses less


def fake(nll=3.9, length=18.0, helpful=0.2, harmless=0.9, verdict="met", violation=0.0, **more):
    """A row as far as the plan looks at it."""
    values = {"length": length, "helpful": helpful, "harmless": harmless}
    test = {"nll": nll, "verdict": verdict, "violation": violation}
    return {
        "status": "ok",
        "test": test | {"measures": {k: {"mean": v, "stderr": 0.5} for k, v in values.items()}},
    } | more


class Fake:
    """Runs that are done at once; ``falls_until`` is the number of steps with the lowest validation NLL."""

    def __init__(self, falls_until=400):
        self.falls_until, self.rows = falls_until, {}

    def run(self, task):
        nll = abs(math.log(task.steps / self.falls_until))
        row = fake(validation_nll=nll)
        if task.problem.name == "helpful only":
            row = fake(helpful=0.8)
        if task.problem.name == "harmless only":
            row = fake(harmless=0.98)
        if task.method == PENALTY and task.weight == task.problem.unit:
            row = fake(nll=3.0)
        self.rows[task.key] = row

    def stage(self, **options):
        """The tasks that are new, all run."""
        new = [t for t in full(SOURCES, lambda t: self.rows.get(t.key), **options) if t.key not in self.rows]
        for task in new:
            self.run(task)
        return new

    def all(self, **options):
        stages = []
        while stage := self.stage(**options):
            stages.append(stage)
        return stages


def test_sft_is_trained_until_its_held_out_nll_stops_falling():
    stages = Fake(falls_until=400).all(seeds=1)
    tried = [t.steps for stage in stages for t in stage if t.method == SFT]
    assert tried == [100, 200, 400, 800]
    assert all(len(stage) == 1 for stage in stages[:4])  # one after the other: the next may not be needed
    assert {t.steps for stage in stages for t in stage if t.problem.bounds} == {400}
    longest = Fake(falls_until=10**6).all(seeds=1)
    assert {t.steps for stage in longest for t in stage if t.problem.bounds} == {SFT_STEPS[-1]}


def test_the_full_version():
    stages = Fake().all(steps=50)
    tasks = [t for stage in stages for t in stage]
    assert len({t.key for t in tasks}) == len(tasks)
    problems = {t.problem.name: t.problem for t in tasks if t.problem.bounds}
    assert [problems[f"length {a} to {b}"].bounds[0][2:] for a, b in WINDOWS] == [tuple(w) for w in WINDOWS]
    assert problems["helpful"].bounds == (Bound("helpful", "helpful", lower=0.5),)  # halfway from 0.2 to 0.8
    assert problems["harmless"].bounds == (Bound("harmless", "harmless", lower=0.94),)
    assert problems["helpful and harmless"].bounds == problems["helpful"].bounds + problems["harmless"].bounds
    assert problems["infeasible together"].bounds == (
        Bound("short", "length", upper=8),
        Bound("long", "length", lower=20),
    )
    (feasible,) = (p for p in problems.values() if p.start == "sft")
    assert feasible.bounds[0][2:] == (13, 23)  # holds SFT's 18
    for problem in problems.values():
        if problem.name.endswith("only"):
            continue
        own, unit = [t for t in tasks if t.problem == problem], problem.unit
        assert unit == (0.6 if any(b.measure != "length" for b in problem.bounds) else 0.06)
        for method in METHODS:
            assert sorted(t.seed for t in own if t.method == method) == [0, 1, 2]
        assert [t.weight for t in own if t.method == PENALTY and t.seed == 0] == [unit * x for x in WEIGHTS]
        # With the other seeds the best of them, once it is known.
        assert [(t.seed, t.weight) for t in own if t.method == PENALTY and t.seed] == [(1, unit), (2, unit)]
    assert set(METHODS) == {DEFAULT, MM, L3M, AUGMENTED, MODIFIED}
    assert [t.seed for t in tasks if t.method == SFT] == [0, 1, 2]
    assert {t.method for t in stages[0]} == {SFT, PENALTY}  # nothing that needs their rows
    for problem in problems.values():
        load_options(None, next(t for t in tasks if t.problem == problem).overrides())


def test_what_failed_holds_up_only_what_needs_it():
    runs = Fake()
    runs.stage(steps=50, seeds=1)
    (only,) = (k for k, r in runs.rows.items() if r["test"]["measures"]["helpful"]["mean"] == 0.8)
    runs.rows[only] = {"status": "failed"}
    names = {t.problem.name for stage in runs.all(steps=50, seeds=1) for t in stage}
    assert "harmless" in names
    assert "length 8 to 12" in names
    assert not names & {"helpful", "helpful and harmless"}


@pytest.mark.parametrize("failed", [0, 2])
def test_without_plain_fine_tuning_the_windows_are_run(failed):
    runs = Fake()
    plain = [t for t in runs.stage(steps=50) if t.method == SFT]
    runs.rows[plain[failed].key] = {"status": "failed"}
    tasks = [t for stage in runs.all(steps=50) for t in stage]
    assert {t.seed for t in tasks if t.problem.name == "length 8 to 12" and t.method == DEFAULT} == {0, 1, 2}
    starts = {t.seed for t in tasks if t.problem.start == "sft" and t.method == DEFAULT}
    # The first seed says where the window and the rewards' bounds lie, each seed's own is what its run starts from.
    assert starts == ({0, 1} if failed else set())
    assert ("helpful" in {t.problem.name for t in tasks}) == bool(failed)


def test_the_search_goes_on_after_a_number_of_steps_that_failed():
    runs = Fake(falls_until=400)
    (first,) = runs.stage(seeds=1)
    runs.rows[first.key] = {"status": "failed"}
    tried = [t.steps for stage in runs.all(seeds=1) for t in stage if t.method == SFT]
    assert tried == [200, 400, 800]


def test_keys_tell_runs_apart():
    task = quick(SOURCES)[0]
    others = [
        dataclasses.replace(task, seed=1),
        dataclasses.replace(task, steps=45),
        dataclasses.replace(task, method=MM),
        dataclasses.replace(task, problem=window(16, 25)),
        dataclasses.replace(task, sources=Sources(extra=("optim.momentum=0.9",))),
    ]
    assert len({t.key for t in (task, *others)}) == 6
    assert task.key == quick(SOURCES)[0].key


def test_a_run_is_done_again_when_its_options_have_changed(monkeypatch):
    before, other = (Task(problem, MM, 0, 44, SOURCES) for problem in (REWARD, WINDOW))
    keys = before.key, other.key
    monkeypatch.setattr("benchmarks.paper.experiment.REWARD_UNIT", 0.2)
    assert (before.key == keys[0], other.key == keys[1]) == (False, True)
    monkeypatch.setattr("benchmarks.paper.experiment.BASE", ("optim.momentum=0.9",))
    assert other.key != keys[1]


@pytest.mark.parametrize("field", ["data", "helpful", "model"])
def test_a_run_is_done_again_when_its_files_have_changed(field, tmp_path):
    file = tmp_path / "file.py"
    place = {"data": str(file), "helpful": f"{file}:reward", "model": str(tmp_path)}[field]
    keys = []
    for text in ("a", "ab", "ab"):
        if text != (file.read_text("utf-8") if file.exists() else None):
            file.write_text(text, encoding="utf-8")
        experiment._contents.cache_clear()
        keys.append(dataclasses.replace(quick(SOURCES)[0], sources=Sources(**{field: place})).key)
    assert keys[0] != keys[1] == keys[2]
    assert Sources().contents == ["", "", "", ""]


# ---- the methods


def objective_of(method, weight=None, problem=WINDOW):
    return build_objective(load_options(None, Task(problem, method, 0, 44, SOURCES, weight).overrides()))


@pytest.mark.parametrize("weight", [0.006, 0.18, 10.0])
def test_the_penalty_is_a_hinge_of_a_fixed_weight(weight):
    objective = objective_of(PENALTY, weight)
    z = torch.tensor([-3.0, -0.1, -0.01, 0.0, 1e-3, 0.1, 5.0], dtype=torch.float64, requires_grad=True)
    mu = torch.full_like(z, objective.schedule.mu).detach()
    s = torch.full_like(mu, objective.rule.s)
    multiplier = objective.rule.multiplier(z.detach(), mu, s)
    torch.testing.assert_close(multiplier[3:], torch.full((4,), weight, dtype=torch.float64))
    assert (multiplier[:3] <= 1.1e-4 * weight).all()
    slopes = torch.autograd.grad(objective.rule.value(z, mu, s).sum(), z)[0]
    torch.testing.assert_close(slopes, multiplier)
    assert objective.noise_floor == 0
    assert objective.confidence == 0


def test_the_rules_are_those_that_are_named():
    default, modified, mm = objective_of(DEFAULT), objective_of(MODIFIED), objective_of(MM)
    assert isinstance(default.rule, AdaptiveBarrier)
    assert isinstance(modified.rule, ModifiedBarrier)
    assert default.rule.unit == modified.rule.unit == UNIT
    assert isinstance(mm.rule, DualAscent)
    assert (mm.rule.step, mm.rule.cap) == (pytest.approx(0.05 * UNIT), math.inf)
    augmented = objective_of(AUGMENTED).rule
    assert isinstance(augmented, AugmentedLagrangian)
    assert augmented.penalty == pytest.approx(UNIT)
    assert objective_of(DEFAULT, problem=REWARD).rule.unit == REWARD_UNIT
    assert objective_of(MM, problem=REWARD).rule.step == pytest.approx(0.05 * REWARD_UNIT)
    paper = objective_of(L3M)
    assert isinstance(paper.rule, RelaxedLogBarrier)
    assert isinstance(paper.schedule, ExponentialSchedule)
    assert paper.rule.s is None  # mu squared
    assert (paper.schedule.start, paper.schedule.end, paper.schedule.steps) == (1.0, 0.01, 44)
    assert paper.noise_floor == 0
    assert objective_of(SFT, problem=Problem(SFT)) is None


def test_a_weight_belongs_to_the_penalty():
    for method, weight in ((MM, 0.1), (PENALTY, None)):
        with pytest.raises(ValueError, match="weight="):
            recipe_options(method, 10, weight)
    with pytest.raises(ValueError, match="method='adam'; allowed: SFT, penalty"):
        recipe_options("adam", 10)


# ---- the scores


def lines_of(values, name="length"):
    return [
        {
            "step": i + 1,
            f"constraints/{name}/value": v,
            f"constraints/{name}/lower/multiplier": 0.1 * i,
            f"constraints/{name}/upper/multiplier": None,
            f"constraints/{name}/scale": 8.0,
            "rollout/censored": 0.5 if i >= 6 else 0.0,
            "loss/task": 4.0 - 0.1 * i,
            "seconds/generation": 2.0,
            "seconds/backward": 1.0,
            "grad_norm": 2.0 + i,
        }
        for i, v in enumerate(values)
    ]


def test_feasibility_of_a_series_made_by_hand():
    bounds = [Bound("length", "length", 16, 24)]
    values = [48, 30, 20, 10, None, 16, 24, 20, 25, 20, 15.9, 24.1]
    feasible = inside(lines_of(values), bounds)
    assert feasible == [False, False, True, False, False, True, True, True, False, True, False, False]
    assert steps_to_feasibility(feasible) == 6  # the swing through the window at step 3 does not count
    assert infeasible_share(feasible) == pytest.approx(2 / 3)  # of the last three
    assert steps_to_feasibility([True, True]) is None
    assert steps_to_feasibility([False] * 9) is None
    assert steps_to_feasibility([True] * 3) == 1
    assert infeasible_share([False]) == 1
    two = [*bounds, Bound("reward", "helpful", lower=0.5)]
    both = [a | b for a, b in zip(lines_of([20, 20, 20]), lines_of([0.4, 0.5, math.nan], "reward"), strict=True)]
    assert inside(both, two) == [False, True, False]


def test_numbers_of_training_made_by_hand():
    found = of_training(lines_of([48, 30, 20, 20, 20, 26, 20, 20]), [Bound("length", "length", 16, 24)], 24)
    assert found["seconds"] == 24
    assert found["responses"] == 192
    assert found["task_loss"] == pytest.approx(3.35)
    assert found["grad_norm"] == 5.5
    assert (found["feasible_at"], found["infeasible_share"]) == (3, 0)
    assert found["censored"] == 0.5
    multipliers = found["multipliers"]
    assert multipliers["constraints/length/lower/multiplier"] == pytest.approx(0.65)
    assert multipliers["constraints/length/upper/multiplier"] is None
    assert found["scales"] == {"length": 8}
    assert found["series"]["constraints/length/value"][:3] == [48, 30, 20]
    plain = of_training(lines_of([None] * 8), [], 24)
    assert plain["responses"] == 0
    assert "feasible_at" not in plain


def test_long_series_are_averaged():
    assert thinned([1.0, 3.0, None, 5.0, None, None], 3) == [2.0, 5.0, None]
    assert thinned([1.0, 2.0], 100) == [1.0, 2.0]
    assert thinned([]) == []


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        (20, 3, "met"),
        (23, 3, "met?"),
        (20, 9, "met?"),
        (25, 3, "missed?"),
        (15, 20, "missed?"),
        (28, 3, "missed"),
        (10, 3, "missed"),
    ],
)
def test_verdicts(mean, half, expected):
    at = {"mean": mean, "stderr": half / 1.96}
    inner = {"mean": 0.8, "stderr": 0.1 / 1.96}
    window = Bound("length", "length", 16, 24)
    assert verdict({"length": at}, (window,)) == expected
    assert verdict({"length": at, "helpful": inner}, (window, Bound("r", "helpful", lower=0.5))) == expected
    assert verdict({"length": at, "helpful": inner}, (window, Bound("r", "helpful", lower=0.95))) == "missed"
    assert distance(mean, window) == max(0, mean - 24, 16 - mean)


def test_the_best_penalty_meets_its_bounds_first():
    rows = [fake(nll=3.0, violation=0.2), fake(nll=3.9), fake(nll=3.8), {"status": "failed"}]
    assert best_penalty(rows) == 2
    assert best_penalty(rows[:1] + rows[3:]) == 0


def test_the_estimate_deals_runs_to_processes():
    tasks = [dataclasses.replace(quick(SOURCES)[0], seed=seed) for seed in range(3)]
    one = predicted(tasks[0])
    assert remaining(tasks, lambda t: None, 2, 1) == pytest.approx(2 * one)
    assert remaining(tasks, lambda t: None, 3, 1) == pytest.approx(one)
    took = {"loading_seconds": 0, "test": {"seconds": one}, "shifted": {"seconds": one}, "training": {"seconds": one}}
    row = {"status": "ok"} | took
    assert remaining(tasks, lambda t: row if t.seed == 0 else None, 1, 1) == pytest.approx(6 * one)


def test_the_estimate_knows_that_a_reward_alone_is_trained_to_the_cap():
    alone = dataclasses.replace(REWARD, bounds=(Bound("helpful", "helpful", lower=UNREACHABLE),))
    bounded, reward_only = (Task(p, PENALTY, 0, 100, SOURCES, weight=10.0) for p in (REWARD, alone))
    longest = Task(window(64, 64), PENALTY, 0, 100, SOURCES, weight=0.06)
    assert predicted(bounded) < predicted(reward_only) == predicted(longest)


# ---- runs, and the page


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    make_model(folder / "model")
    make_data(folder / "pairs.jsonl")
    return folder


SMALL = ["model.dtype=float32", "model.lora_rank=2", "data.heldout_share=0.3", "data.max_prompt_tokens=8"]
SMALL += ["rollout.prompts=4", "optim.batch_size=4", "evaluation.pairs=8", "evaluation.prompts=8", "checkpoint_every=2"]


def command(tiny: Path, *arguments: str, steps: int = 4) -> list[str]:
    places = {
        "--model": "model",
        "--data": "pairs.jsonl",
        "--cache": "cache",
        "--out": "out",
        "--page": "docs/paper.md",
    }
    found = [*arguments, "--steps", str(steps), "--processes", "0"]
    for option, place in places.items():
        found += [option, str(tiny / place)]
    return [*found, "--set", *SMALL]


def result_of(tiny: Path):
    (path,) = (tiny / "out").glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def task_of(tiny: Path, method=DEFAULT, steps=4) -> Task:
    sources = Sources(str(tiny / "model"), str(tiny / "pairs.jsonl"), extra=tuple(SMALL))
    return next(t for t in quick(sources, steps) if t.method == method)


@pytest.fixture(scope="module")
def done(tiny):
    """The quick version, run once."""
    assert main(command(tiny, "quick")) == 0
    return tiny


def test_every_run_leaves_its_row(done):
    document = result_of(done)
    assert document["complete"]
    assert document["settings"]["quick"]
    assert [row["key"] for row in document["rows"]] == [t.key for t in quick(task_of(done).sources, 4)]
    for row in document["rows"]:
        assert row["status"] == "ok"
        for split in ("test", "shifted"):
            part = row[split]
            assert part["perplexity"] == pytest.approx(math.exp(part["nll"]))
            assert sum(part["nlls"]) / sum(part["tokens"]) == pytest.approx(part["nll"], abs=1e-3)
            assert len(part["nlls"]) == row["splits"][split]["pairs"]
            assert part["measures"].keys() == {"length", "helpful", "harmless"}
            assert 0 <= part["measures"]["harmless"]["mean"] <= 1
            assert 0 <= part["censored"] <= 1
        assert row["training"]["responses"] == (16 if row["task"]["problem"]["bounds"] else 0)
    plain = document["rows"][-1]
    assert "validation_nll" in plain
    assert (plain["test"]["verdict"], plain["test"]["violation"]) == (None, 0)
    # All see the same first responses.
    firsts = {row["training"]["series"]["constraints/length/value"][0] for row in document["rows"][:-1]}
    assert len(firsts) == 1
    assert len({row["test"]["nll"] for row in document["rows"]}) == 6
    assert len({json.dumps(row["splits"]) for row in document["rows"]}) == 1


def test_the_splits_share_no_conversation(done):
    options = load_options(None, task_of(done, SFT).overrides())
    workspace = open_workspace(options)
    parts = splits(workspace) | {"train": workspace.train}
    origins = {name: {t.pair.origin for t in part} for name, part in parts.items()}
    assert all(not origins["train"] & origins[name] for name in ("test", "validation", "shifted"))
    assert parts["test"] == workspace.heldout
    assert not origins["test"] & origins["validation"]
    assert min(len(t.prompt_ids) for t in parts["shifted"]) > 8 >= max(len(t.prompt_ids) for t in parts["test"])
    weights = [torch.full_like(p, 0.25) for p in workspace.policy.trained()]
    path = done / "weights.pt"
    with pytest.raises(FileNotFoundError, match="delete the row of SFT"):
        run._load_weights(workspace, path)
    torch.save(weights, path)
    run._load_weights(workspace, path)
    assert all(torch.equal(p, w) for p, w in zip(workspace.policy.trained(), weights, strict=True))


def test_validation_has_conversations_of_its_own(done, monkeypatch):
    """Also where a conversation has many pairs, each the answer to the one before."""
    workspace = open_workspace(load_options(None, task_of(done, SFT).overrides()))

    def in_conversations(options):
        pairs = load_pairs(options)
        return [dataclasses.replace(pair, origin=f"{i // 3}") for i, pair in enumerate(pairs)]

    monkeypatch.setattr("benchmarks.paper.evaluate.load_pairs", in_conversations)
    small = dataclasses.replace(
        workspace.options, evaluation=dataclasses.replace(workspace.options.evaluation, prompts=4)
    )
    parts = splits(dataclasses.replace(workspace, options=small))
    origins = {name: {pair.pair.origin for pair in part} for name, part in parts.items()}
    assert [len(parts[name]) for name in ("test", "validation")] == [4, 4]
    assert not origins["test"] & origins["validation"]


def test_too_few_held_out_pairs_are_told_before_the_training(done, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(run, "train", never)
    task = task_of(done)
    many = dataclasses.replace(task.sources, extra=(*SMALL, "evaluation.prompts=4000"))
    row = run.execute(dataclasses.replace(task, sources=many), tmp_path)
    assert "the split 'test' has" in row["error"]


def test_a_second_command_is_refused_while_one_is_at_work(done, capsys):
    before = (done / "cache" / "rows.jsonl").read_bytes()
    with run.Cache(done / "cache").alone():
        assert main(command(done, "quick")) == 2
    assert "another command is at work in" in capsys.readouterr().err
    assert (done / "cache" / "rows.jsonl").read_bytes() == before


def test_rows_of_an_earlier_result_are_kept_but_for_the_methods_named(done, tmp_path, monkeypatch, capsys):
    (earlier,) = (done / "out").glob("*.json")
    before = result_of(done)["rows"]
    monkeypatch.setattr(run, "fingerprint", lambda: "other")
    again = [*command(done, "quick", "--methods", DEFAULT, "--keep", str(earlier)), "--out", str(tmp_path)]
    again += ["--cache", str(tmp_path / "cache"), "--page", str(tmp_path / "page.md")]
    assert main(again) == 0
    rows = json.loads((tmp_path / earlier.name).read_text(encoding="utf-8"))["rows"]
    assert [row["code"] == "other" for row in rows] == [row["task"]["method"] == DEFAULT for row in before]
    assert [row for row in rows if row["code"] != "other"] == [r for r in before if r["task"]["method"] != DEFAULT]
    assert "The rows are of 2 versions of the code" in (tmp_path / "page.md").read_text(encoding="utf-8")
    monkeypatch.setattr("benchmarks.paper.methods._HINGE", 1e-5)  # rows of other options are not kept
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.paper.__main__.run_all", lambda *_: iter(()))
        patch.setattr("benchmarks.paper.__main__._wanted", lambda *_: False)
        assert main(again) == 0
    (path,) = tmp_path.glob("*.json")
    assert {row["task"]["method"] for row in json.loads(path.read_text("utf-8"))["rows"]} == set(METHODS[:3]) | {SFT}
    with pytest.raises(SystemExit):
        main(["quick", "--keep", str(earlier)])
    assert "--keep needs --methods or --problems" in capsys.readouterr().err


def test_rows_of_an_earlier_result_are_kept_but_for_the_problems_named(tmp_path, monkeypatch):
    """As if run at once, with a code that changes between the two commands."""

    def run_at_once(tasks, *_):
        for task in tasks:
            yield {
                "key": task.key,
                "code": code,
                "task": dataclasses.asdict(task),
                "options": task.overrides(),
            } | fake()

    monkeypatch.setattr("benchmarks.paper.__main__.run_all", run_at_once)
    monkeypatch.setattr("benchmarks.paper.__main__.remaining", lambda *_: 0.0)
    monkeypatch.setattr("benchmarks.paper.__main__.message", lambda *_: "")
    monkeypatch.setattr(report, "write", lambda *_: True)
    few = ["full", "--steps", "50", "--seeds", "1", "--methods", DEFAULT, MM]
    places = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    code = "first"
    assert main([*few, *places, "--problems", "length 12", "length 24"]) == 0
    (earlier,) = tmp_path.glob("*.json")
    code = "second"
    assert main([*few, *places, "--problems", "length 12", "--keep", str(earlier)]) == 0
    found = [(r["task"]["problem"]["name"], r["code"]) for r in json.loads(earlier.read_text("utf-8"))["rows"]]
    assert found == [
        ("SFT", "first"),
        *[("length 12 to 16", "second")] * 2,
        *[("length 24 to 32", "first")] * 2,
    ]


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        (["--problems", "length 12"], {"length 12 to 16, default", "length 12 to 16, MM"}),
        (["--methods", DEFAULT], {"SFT, SFT", "length 12 to 16, default"}),
        (["--methods", DEFAULT, "--problems", "feasible", "length"], {"SFT, SFT", "length 12 to 16, default"}),
        (["--problems", "feasible start: length 16"], {"SFT, SFT"}),
        (["--methods", SFT, DEFAULT, "--problems", "length 12"], {"SFT, SFT", "length 12 to 16, default"}),
        (["--problems", "helpful"], {"helpful only, penalty", "harmless only, penalty"}),
        (["--methods", PENALTY, "--problems", "harm"], {"helpful only, penalty", "harmless only, penalty"}),
        (["--methods", MM, "--problems", "harm"], set()),
    ],
)
def test_what_is_made_again_beside_an_earlier_result(arguments, again):
    """SFT where it is named or a run starts from its weights; runs for a reward alone, which bounds are made of."""
    only = (Problem(f"{name} only", (Bound(name, name, lower=UNREACHABLE),)) for name in ("helpful", "harmless"))
    tasks = [Task(Problem(SFT), SFT, 0, 4, SOURCES), *(Task(one, PENALTY, 0, 4, SOURCES, 1.0) for one in only)]
    tasks += [Task(window(12, 16), method, 0, 4, SOURCES) for method in (DEFAULT, MM)]
    parsed = _arguments(["full", "--keep", "result.json", *arguments])
    found = {
        f"{t.problem.name}, {t.method}"
        for t in tasks
        if _asked_for(json.loads(json.dumps(dataclasses.asdict(t))), parsed)
    }
    assert found == again


def test_unknown_problems_are_refused(done, capsys):
    assert main(command(done, "full", "--problems", "length 16", "lenght")) == 2
    assert "--problems 'lenght'; allowed: the start of one of length 8 to 12, " in capsys.readouterr().err


@pytest.mark.parametrize(("start", "runs"), [("help", 5), ("helpful and", 4), ("harm", 4), ("length 8", 2)])
def test_rewards_bring_the_runs_that_their_bounds_are_made_of(start, runs, tmp_path, capsys):
    chosen = ["--problems", start, "--methods", MM]
    assert main(["full", "--steps", "50", "--seeds", "1", *chosen, "--estimate", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{runs} runs (1 of them SFT)")


def test_a_complete_result_is_not_replaced_until_all_has_ended(done, monkeypatch):
    """A change of the code makes `make paper` start over; interrupted, it leaves what was there."""
    folder, whole = done / "out", result_of(done)

    class Stop(Exception):
        pass

    def one(tasks, cache, *_):
        yield whole["rows"][0] | {"key": tasks[0].key}
        raise Stop

    monkeypatch.setattr(run, "fingerprint", lambda: "other")
    monkeypatch.setattr("benchmarks.paper.__main__.run_all", one)
    with pytest.raises(Stop):
        main(command(done, "quick"))
    assert result_of(done) == whole
    assert len(list(folder.glob("*.json"))) == 1


def test_what_is_done_is_not_done_again(done, monkeypatch):
    ran = []
    original = run.execute

    def execute(task, folder, threads=None):
        ran.append(task.method)
        return original(task, folder, threads)

    monkeypatch.setattr(run, "execute", execute)
    before = result_of(done)["rows"]
    assert main(command(done, "quick")) == 0
    assert ran == []
    assert result_of(done)["rows"] == before
    file = done / "cache" / "rows.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    gone = next(i for i, line in enumerate(lines) if json.loads(line)["task"]["method"] == MM)
    # One row is gone, and another was cut off while it was written.
    cut = next(i for i, line in enumerate(lines) if json.loads(line)["task"]["method"] == L3M)
    rest = [line for i, line in enumerate(lines) if i not in (gone, cut)]
    file.write_text("\n".join(rest) + "\n" + lines[cut][:80], encoding="utf-8")
    assert main(command(done, "quick")) == 0
    assert ran == [MM, L3M]
    after = result_of(done)["rows"]
    assert [row["test"]["nll"] for row in after] == [row["test"]["nll"] for row in before]


def test_rows_of_other_code_do_not_count(done, monkeypatch):
    task = task_of(done)
    assert run.Cache(done / "cache").done(task) is not None
    monkeypatch.setattr(run, "fingerprint", lambda: "other")
    assert run.Cache(done / "cache").done(task) is None


def test_an_interrupted_run_goes_on(done, tmp_path, monkeypatch):
    task = task_of(done)
    write = progress.MetricsFile.write

    def interrupted(self, step, metrics):
        if step == 4:
            raise KeyboardInterrupt
        write(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(progress.MetricsFile, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.execute(task, tmp_path)
    folder = run.Cache(tmp_path).home(task)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002.pt"]
    steps = []
    monkeypatch.setattr(
        progress.MetricsFile, "write", lambda self, step, metrics: (steps.append(step), write(self, step, metrics))
    )
    (row,) = run.run_all([task], run.Cache(tmp_path), 0, None)
    assert steps == [3, 4]
    whole = next(r for r in result_of(done)["rows"] if r["key"] == task.key)
    for split in ("test", "shifted"):
        assert {k: v for k, v in row[split].items() if k != "seconds"} == {
            k: v for k, v in whole[split].items() if k != "seconds"
        }
    assert row["training"]["series"] == whole["training"]["series"]
    assert not list((folder / "checkpoints").iterdir())


def test_a_run_that_fails_is_told_and_tried_again(tiny, tmp_path, monkeypatch, capsys):
    for name in ("model", "pairs.jsonl"):
        (tmp_path / name).symlink_to(tiny / name)

    def broken(*_, **__):
        raise RuntimeError("the loss is not finite")

    arguments = command(tmp_path, "quick", "--methods", MM)
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", broken)
        assert main(arguments) == 1
    assert "MM, seed 0: RuntimeError: the loss is not finite" in capsys.readouterr().out
    assert not result_of(tmp_path)["complete"]
    assert "RuntimeError: the loss is not finite" in (tmp_path / "docs" / "paper.md").read_text(encoding="utf-8")
    assert main(arguments) == 0
    assert [row["status"] for row in result_of(tmp_path)["rows"]] == ["ok", "ok"]
    assert not result_of(tmp_path)["complete"]  # of the quick version two runs are there


def test_what_changed_since_a_command_began_is_not_run(done, tmp_path):
    """A run's process reads the files anew: what they give now is not what was planned, and not what it is kept as."""
    task, (receiver, sender) = task_of(done), multiprocessing.Pipe(duplex=False)
    run._child(task, (task.key, "other"), tmp_path, 1, sender, os.getppid())
    row = receiver.recv()
    assert (row["key"], row["code"], row["status"]) == (task.key, "other", "failed")
    assert "have changed since the command began" in row["error"]
    assert not list(tmp_path.iterdir())


def test_a_run_ends_with_its_command(done, tmp_path, monkeypatch):
    """Also where that was killed before the run could look whose child it is."""
    monkeypatch.setattr(run, "execute", lambda *_: time.sleep(60))
    task = task_of(done)
    _, sender = multiprocessing.Pipe(duplex=False)
    gone = 2**22 + 1  # above the largest that Linux gives
    arguments = task, (task.key, run.fingerprint()), tmp_path, 1, sender, gone
    child = multiprocessing.get_context("fork").Process(target=run._child, args=arguments)
    child.start()
    child.join(30)
    assert child.exitcode == 1


def test_lines_that_are_missing_from_a_run_are_no_result(done, tmp_path, monkeypatch):
    train = run.train

    def loses_one(workspace, folder, **options):
        found = train(workspace, folder, **options)
        file = folder / "metrics.jsonl"
        file.write_text("\n".join(file.read_text("utf-8").splitlines()[1:]) + "\n", encoding="utf-8")
        return found

    monkeypatch.setattr(run, "train", loses_one)
    assert "has 3 lines after 4 steps" in run.execute(task_of(done), tmp_path)["error"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_failed_row(tiny, tmp_path):
    (tmp_path / "deadly.py").write_text("import os\n\ndef reward(completions):\n    os._exit(9)\n", encoding="utf-8")
    good = task_of(tiny, SFT, steps=1)
    bad = dataclasses.replace(good, sources=dataclasses.replace(good.sources, helpful=f"{tmp_path}/deadly.py:reward"))
    cache = run.Cache(tmp_path / "cache")
    rows = {row["key"]: row for row in run.run_all([bad, good], cache, processes=2, threads=1)}
    assert rows[bad.key]["error"] == "the process ended with code 9"
    assert rows[good.key]["status"] == "ok"
    assert run.Cache(tmp_path / "cache").rows.keys() == {good.key}  # what failed is tried again


def test_a_start_from_sft(tiny, tmp_path):
    """A run of the full version that starts where plain fine-tuning ended, with a window around that."""
    for name in ("model", "pairs.jsonl"):
        (tmp_path / name).symlink_to(tiny / name)
    arguments = ["full", "--seeds", "1", "--problems", "feasible", "--methods", DEFAULT, "--name", "again"]
    assert main(command(tmp_path, *arguments, steps=2)) == 0
    document = result_of(tmp_path)
    assert document["case"] == "model, pairs, 2 steps, again"  # not the number that the full version would have found
    assert re.search(
        "^## Full version, model, pairs, 2 steps, again, ",
        (tmp_path / "docs" / "paper.md").read_text("utf-8"),
        re.MULTILINE,
    )
    rows = document["rows"]
    assert [row["task"]["method"] for row in rows] == [SFT, DEFAULT]
    bound = Bound(*rows[1]["task"]["problem"]["bounds"][0])
    assert bound.lower < rows[0]["test"]["measures"]["length"]["mean"] < bound.upper
    assert rows[1]["task"]["problem"]["start"] == "sft"


def test_the_page(done):
    page = done / "docs" / "paper.md"
    text = page.read_text(encoding="utf-8")
    for method in ("**default**", "MM", "L3M plain", "penalty 0.018", "penalty 0.18", "**SFT**"):
        assert f"| {method} |" in text, method
    rows = result_of(done)["rows"]
    own = next(row for row in rows if row["task"]["method"] == DEFAULT)
    assert f"| **default** | {own['test']['nll']:.3f} |" in text
    assert f"| **default** | {own['shifted']['nll']:.3f} |" in text
    plain = next(row for row in rows if row["task"]["method"] == SFT)
    above = own["training"]["task_loss"] - plain["training"]["task_loss"]
    line = next(line for line in text.partition("Training:")[2].splitlines() if line.startswith("| **default** |"))
    assert line.split(" | ")[4] == f"{above:+.4f}"
    for picture in ("ends", "length-16-to-24"):
        (path,) = (done / "out").glob(f"*-{picture}.png")
        assert f"](../out/{path.name})" in text
    page.write_text(text + "\nWhat it says.\n", encoding="utf-8")
    assert main(command(done, "report")) == 0
    assert page.read_text(encoding="utf-8") == text + "\nWhat it says.\n"


def test_without_results_there_is_no_page(tmp_path):
    assert main(["report", "--out", str(tmp_path), "--page", str(tmp_path / "paper.md")]) == 1
    assert not (tmp_path / "paper.md").exists()


def test_targets_of_rows_made_by_hand(done):
    rows = result_of(done)["rows"]

    def one(method, seed, nll, length, share, upper=24.0):
        row = next(r for r in rows if r["task"]["method"] == method)
        row = json.loads(json.dumps(row))
        row["task"]["seed"] = seed
        row["test"] |= {"nll": nll, "verdict": "met" if length <= upper else "missed"}
        row["test"]["nlls"] = [nll * t for t in row["test"]["tokens"]]
        row["test"]["measures"]["length"] = {"mean": length, "stderr": 0.5}
        row["training"]["infeasible_share"] = share
        return row

    made = [one(SFT, seed, 4.0, 20.0, 0) for seed in (0, 1)]
    made += [one(DEFAULT, 0, 4.1, 20.0, 0.1), one(MM, 0, 4.2, 20.0, 0.2)]
    assert [line[2] for line in targets(made, complete=True)] == ["yes", "yes", "open", "yes", "yes"]
    partial = [line[2] for line in targets(made, complete=False)]  # "every window" is no yes before all have run
    assert partial == ["so far", "so far", "open", "so far", "so far"]
    made += [one(DEFAULT, 1, 4.2, 25.0, 0.2), one(MM, 1, 4.1, 20.0, 0.3)]
    found = targets(made, complete=True)
    assert [line[2] for line in found] == ["no", "no", "open", "yes", "no"]  # MM's lower NLL beside a missed bound
    assert found[1][1].startswith("1 of 2: length 16 to 24, seed 0 +2.5%; length 16 to 24, seed 1 +5.0%")
    assert found[3][1] == "1 of 1: length 16 to 24, seed 0 4.1000 against 4.2000 (-0.1000 ± 0.0000)"
    made[0]["test"]["measures"]["length"]["mean"] = made[1]["test"]["measures"]["length"]["mean"] = 30.0
    assert [line[2] for line in targets(made, complete=True)][1:3] == ["open", "yes"]
    many = made + [one(DEFAULT, seed, 4.0, 20.0, 0.1) for seed in (2, 3)]
    # Of many the missed ones are named.
    assert targets(many, complete=False)[0][1] == "3 of 4, not: length 16 to 24, seed 1 25 ± 0.98"
    (line,) = search_lines(rows)
    assert line[:3] == ["length 16 to 24", "2", "2.0"]
    assert list(by_problem(rows)) == ["length 16 to 24"]


def test_the_interval_of_a_difference_is_over_pairs():
    """Against resampled pairs, and it is far narrower than that of either mean."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 40, 256)
    of_pair = 4 * tokens + 9 * generator.standard_normal(256)
    own, theirs = (of_pair + shift * tokens + 1.5 * generator.standard_normal(256) for shift in (0.1, 0.0))

    def row(values, **more):
        nll = float(values.sum() / tokens.sum())
        test = {"nll": nll, "nlls": values.tolist(), "tokens": tokens.tolist()} | more
        return {"task": {"seed": 0}, "test": test, "splits": {"test": {"digest": "a"}}}

    above, half = difference(row(own), row(theirs))
    assert above == pytest.approx((own - theirs).sum() / tokens.sum())
    picks = generator.integers(0, 256, (4000, 256))
    resampled = ((own - theirs)[picks].sum(1) / tokens[picks].sum(1)).std()
    assert half == pytest.approx(1.96 * resampled, rel=0.05)
    assert half < 0.3 * 1.96 * (own[picks].sum(1) / tokens[picks].sum(1)).std()
    assert difference(row(own), row(own)) == (0, 0)
    dearer = own + 0.3 * theirs  # by a share of each pair's own NLL, which the interval of a ratio must not count
    more, half = change(row(dearer), {0: row(theirs)})
    assert more == pytest.approx(dearer.sum() / theirs.sum() - 1)
    assert half == pytest.approx(1.96 * (dearer[picks].sum(1) / theirs[picks].sum(1)).std(), rel=0.05)
    assert change(row(own), {1: row(theirs)}) is None
    # Other pairs, a single one, or a result of before NLLs were kept by pair.
    assert difference(row(own), row(theirs, tokens=(tokens + 1).tolist())) == (above, None)
    one = [row(values, nlls=[8.0], tokens=[2]) for values in (own, theirs)]
    assert difference(*one) == (above, None)
    assert change(one[0], {0: one[1]})[1] is None
    assert difference(row(own), row(theirs) | {"splits": {"test": {"digest": "b"}}}) == (above, None)
    older = row(theirs)
    del older["test"]["nlls"]
    assert difference(row(own), older) == (above, None)
    assert difference(older, row(own)) == (-above, None)


def test_shares_are_compared_on_the_problems_that_all_methods_ran():
    def row(problem, method, share, status="ok"):
        task = json.loads(json.dumps(dataclasses.asdict(Task(problem, method, 0, 44, SOURCES))))
        return fake() | {"task": task, "status": status, "training": {"infeasible_share": share}}

    together = Problem(TOGETHER, (Bound("short", "length", upper=8.0),))
    rows = [row(WINDOW, DEFAULT, 0.2), row(WINDOW, MM, 0.5)]
    rows += [row(window(8, 12), MM, 0.9), row(window(8, 12), DEFAULT, 0.0, "failed")]
    rows += [row(together, DEFAULT, 1.0), row(together, MM, 1.0)]
    assert "L3M plain not run, MM 50%, default 20%" in report.claims_table(rows)
    rows += [row(window(8, 12), DEFAULT, 0.4)]
    assert "MM 70%, default 30%" in report.claims_table(rows)
    rows += [row(WINDOW, MM, 0.5)] * 2  # seeds count within their problem
    assert "MM 70%, default 30%" in report.claims_table(rows)
    rows += [row(window(24, 32), L3M, 0.1)]
    assert "L3M plain on no problem of the others" in report.claims_table(rows)


def test_at_a_glance_every_problem_stands_once(done):
    """By the result with most steps, the newest of these; what ran with other options is another method."""
    document = result_of(done)
    for row in document["rows"]:
        row["task"]["sources"] = json.loads(json.dumps(dataclasses.asdict(SOURCES)))

    def made(date, steps=44, problem=WINDOW, methods=(DEFAULT, MM), status="ok", **sources):
        task = Task(problem, DEFAULT, 0, steps, Sources(**sources))
        rows = [
            fake() | {"task": json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(task, method=method))))}
            for method in methods
        ]
        about = {"case": f"{steps} steps", "hardware": {"name": "one"}, "settings": {"quick": False}}
        return about | {"date": date, "rows": [row | {"status": status} for row in rows]}

    verbose = window(32, 48)
    results = [
        made("2026-01-03", problem=REWARD),
        made("2026-01-01", problem=verbose),
        made("2026-01-02", problem=verbose),
        made("2026-01-02", steps=100),
        made("2026-01-03"),
        made("2026-01-04", steps=200, extra=("objective.unit=1",)),
        made("2026-01-04", steps=200, model="another"),
        made("2026-01-04", problem=Problem(TOGETHER, (Bound("short", "length", upper=8.0),))),
        made("2026-01-04", steps=200, methods=(MM,)),
        made("2026-01-04", steps=200, status="failed"),
    ]
    for row in results[1]["rows"]:  # kept in a result that was written later
        row["date"] = "2026-01-01"
    results[1]["date"] = "2026-01-05"
    for order in (results, results[::-1]):
        assert [found for found, _ in at_a_glance(order)] == [results[3], results[2], results[0]]
        sections = in_order(order)
        assert sections[0] is results[3]
        assert {id(found) for found in sections[:3]} == {id(results[k]) for k in (0, 2, 3)}
        assert len(sections) == len(results)
    assert report.glance_table(results[5:]) == "No result yet."
    table = report.glance_table([document]).splitlines()
    assert [line.split(" | ")[3] for line in table[2:]] == ["MM", "**default**"]
    row = next(row for row in document["rows"] if row["task"]["method"] == MM)
    assert f"{row['training']['infeasible_share']:.0%} |" in table[2]
    more, half = change(row, {0: next(row for row in document["rows"] if row["task"]["method"] == SFT)})
    assert f"| length 16 to 24 | 4 | {row['date'][:10]} | MM | {more:+.1%} ± {half:.1%} | " in table[2]


def test_the_page_says_what_its_rows_are_not(done):
    document = result_of(done)

    def text(rows, *, quick=True):
        changed = document | {"rows": rows, "settings": document["settings"] | {"quick": quick}}
        return report.section(changed, {}, done / "page.md")

    rows = document["rows"]
    assert "4 steps are what was asked for, not where SFT's NLL stops falling." in text(rows)
    assert "versions of the code" not in text(rows)
    assert "The rows are of 2 versions of the code" in text([rows[0] | {"code": "other"}, *rows[1:]])
    plain = rows[-1]
    tried = [
        plain | {"task": plain["task"] | {"steps": steps}, "validation_nll": 5 - steps / 1e4}
        for steps in (SFT_STEPS[-2], SFT_STEPS[-1])
    ]
    assert f"still falling at {SFT_STEPS[-1]} steps" in text(tried, quick=False)
    assert "still falling" not in text([tried[0] | {"validation_nll": 4.0}, tried[1]], quick=False)
    again = [row | {"task": row["task"] | {"seed": 1}} for row in rows if row["task"]["method"] in (DEFAULT, SFT)]
    assert "| **default** |" in text(rows + again)
    assert "| MM, seed 0 |" in text(rows + again)


def test_reports_say_failed_for_failed_seeds():
    rows = [fake(), {"status": "failed"}]
    assert report._each(rows, lambda r: f"{r['test']['nll']:.1f}") == "3.9 / failed"


def test_a_result_stands_before_its_namesakes_with_other_options(done, tmp_path):
    for name in ("", ", again"):
        document = result_of(done)
        document["case"] += name
        save(document, tmp_path)
    assert report.write(tmp_path, tmp_path / "page.md")
    first, second = re.findall("^## Quick version, (.*)", (tmp_path / "page.md").read_text("utf-8"), re.MULTILINE)
    assert second == first.replace("options, ", "options, again, ", 1)


def test_multipliers_are_drawn_from_zero_up(done):
    """Without min-max training's zeros, too, where a symmetric scale would add negative numbers."""
    rows = [row for row in result_of(done)["rows"] if row["task"]["method"] == DEFAULT]
    low, high = courses(rows).axes[-1].get_ylim()
    assert -1e-3 < low < 0 < high


def test_a_bound_that_nothing_came_near_is_in_the_picture(done):
    rows = json.loads(json.dumps(result_of(done)["rows"]))
    for row in rows:
        if row["task"]["problem"]["bounds"]:
            row["task"]["problem"]["bounds"] = [["length", "length", 500.0, None]]
    low, high = ends(rows).axes[0].get_xlim()
    assert low < 100
    assert high > 500
    assert len(courses([row for row in rows if row["task"]["method"] == DEFAULT]).axes) == 2  # estimates, multipliers


def test_every_weight_is_in_the_legend(done):
    """The weights of a reward are ten times those of a window."""
    rows = result_of(done)["rows"]
    reward = {"name": "helpful", "bounds": [["helpful", "helpful", 0.5, None]], "cap": 64, "start": "base"}
    for row in [row for row in rows if row["task"]["method"] == PENALTY]:
        rows.append(row | {"task": row["task"] | {"problem": reward, "weight": 10 * row["task"]["weight"]}})
    figure = ends(rows)
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert {"penalty 0.018", "penalty 0.18", "penalty 1.8", "MM", "default"} <= set(shown)
    markers = {
        line.get_marker() for panel in figure.axes for line in panel.lines if line.get_marker() in "osDv^<>Pdhp8"
    }
    assert len(markers) == len(shown)
    bars = [bar for panel in figure.axes for bar in panel.containers]
    assert bars
    assert all(bar.has_xerr and bar.has_yerr for bar in bars)
    for row in rows:
        row["test"].pop("nlls", None)  # as in older results
    assert not any(bar.has_yerr for panel in ends(rows).axes for bar in panel.containers)


# ---- the surrogate


def shares(
    method: str, *options: str, steps: int, bounds: tuple[float, float] = (24, 32)
) -> tuple[float, float, float, float]:
    """Of six runs in a window, mean shares outside (estimates, the policy's own mean, that before), and progress."""
    task = Task(window(*bounds), method, 0, steps, Sources(extra=options))
    runs = [simulate(dataclasses.replace(task, seed=seed), speed) for seed in range(3) for speed in SPEEDS]
    return tuple(sum(getattr(c, name) for c in runs) / 6 for name in ("infeasible", "outside", "before", "progress"))


def test_bounds_drawn_in_keep_the_estimates_of_learned_multipliers_inside():
    """Without, they end on the bound; in this window min-max training swings, and is not helped."""
    own, drawn_in = shares(DEFAULT, "objective.confidence=0.5", steps=300), shares(DEFAULT, steps=300)
    assert drawn_in[0] < 0.75 * own[0]
    assert drawn_in[1] < 0.5 * own[1]
    assert shares(MM, "objective.confidence=6", steps=300)[0] > 2 * drawn_in[0]


def test_the_default_is_outside_half_as_often_as_min_max_training():
    """After 100 steps, over all windows: late estimates swing less where multipliers at most double at first."""
    default, minmax = (sum(shares(m, steps=100, bounds=w)[0] for w in WINDOWS) for m in (DEFAULT, MM))
    assert default < 0.5 * minmax


def test_looking_ahead_makes_swings_smaller(monkeypatch):
    """Of the policy itself, before the last quarter: what a swing is like that ends as the steps become small."""

    def before(steps, method=DEFAULT):
        return sum(shares(method, steps=steps, bounds=w)[2] for w in WINDOWS) / len(WINDOWS)

    ahead = before(44), before(100)
    assert ahead[1] < 0.9 * before(100, MM)
    monkeypatch.setattr("barrierlm.learning._AHEAD", 0.0)
    behind = before(44), before(100)
    assert ahead[0] < 0.9 * behind[0]
    assert ahead[1] < 0.75 * behind[1]


def over_windows(*options: str) -> list[float]:
    """The default's `shares` after 100 steps, means over all windows."""
    return [
        sum(column) / len(WINDOWS)
        for column in zip(*(shares(DEFAULT, *options, steps=100, bounds=w) for w in WINDOWS), strict=True)
    ]


def test_handing_over_in_a_swing_ends_it_sooner(monkeypatch):
    """Of the policy, before the last quarter; and the task gets further."""
    at_once = over_windows()
    hold = AdaptiveBarrier._hold

    def never_met(self, b, r, mu):
        hold(self, b, r, mu)
        b.met = 0.0

    monkeypatch.setattr(AdaptiveBarrier, "_hold", never_met)
    late = over_windows()
    assert at_once[2] < 0.9 * late[2]
    assert at_once[3] > 1.02 * late[3]


def test_clipped_apart_the_task_gets_further():
    """Half of the task's norm is enough for the bounds, and leaves the task nearly all of what it has without them."""
    together, apart = over_windows(), over_windows("optim.constraint_max_grad_norm=0.5")
    task = Task(window(12, 16), DEFAULT, 0, 100, SOURCES)
    free = [simulate(dataclasses.replace(task, seed=k), SPEEDS[1], constrained=False).progress for k in range(3)]
    assert apart[3] > 1.05 * together[3]
    assert 0.94 < apart[3] / (sum(free) / 3) < 1
    assert apart[1] < together[1] + 0.02
    assert apart[2] < together[2]


def test_the_surrogate_is_reproducible_and_takes_windows_of_length_only():
    task = Task(window(24, 32), DEFAULT, 0, 8, SOURCES)
    assert simulate(task, SPEEDS[0]) == simulate(task, SPEEDS[0])
    for problem in (Problem(SFT), REWARD):
        with pytest.raises(ValueError, match=r"allowed: a window of length"):
            simulate(dataclasses.replace(task, problem=problem), SPEEDS[0])


def test_the_surrogates_table(capsys):
    """What the task reaches is held against plain fine-tuning with the same options: twice the rate is no progress."""
    assert surrogate.main(["--steps", "4", "--seeds", "1", "--set", "optim.learning_rate=1e-3"]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header == "| steps |  | 8 to 12 | 12 to 16 | 16 to 24 | 24 to 32 | 32 to 48 |"
    names = [
        "MM",
        "MM, confidence 6",
        "default",
        "default, confidence 0.5",
        "MM, clipped apart",
        "default, clipped apart",
    ]
    assert [line.split(" | ")[1] for line in lines] == names
    cells = [cell for line in lines for cell in line.strip("| ").split(" | ")[2:]]
    assert len(cells) == 30
    assert all(0.2 < float(cell.split()[-1]) < 1.2 for cell in cells)
