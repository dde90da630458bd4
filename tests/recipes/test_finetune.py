import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from barrierlm.cli import main
from barrierlm.recipes.best import BestWeights
from barrierlm.recipes.config import ConfigError, load_options
from barrierlm.recipes.data import Tokens
from barrierlm.recipes.demo import demo
from barrierlm.recipes.evaluate import _in_order, evaluate
from barrierlm.recipes.finetune import finetune, learning_rate, train
from barrierlm.recipes.identity import same_run
from barrierlm.recipes.options import OptimOptions, Options
from barrierlm.recipes.rollout import Rollout
from barrierlm.recipes.workspace import Workspace, open_workspace

from .crash import equal
from .tiny import launch

RESULT_KEYS = {"mean", "stderr", "lower", "upper", "satisfied", "censored"}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]


def test_a_whole_run(overrides: list[str], tmp_path: Path):
    file = tmp_path / "my_costs.py"
    file.write_text("def w1_share(completions, **columns):\n    return [text.count('w1') / 9 for text in completions]")
    extra = [f"constraints.w1.cost={file}:w1_share", "constraints.w1.upper=0.2", "constraints.kl.upper=0.5"]
    options = load_options(None, [*overrides, *extra])
    evaluation = finetune(options)
    folder = Path(options.output_dir)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for key in (
        "lr",
        "loss/task",
        "loss/total",
        "grad_norm",
        "barrier/mu",
        "barrier/penalty",
        "constraints/length/value",
        "constraints/length/lower/multiplier",
        "constraints/w1/upper/slack",
        "constraints/kl/upper/s",
        "rollout/mean_tokens",
        "rollout/censored",
        "seconds/generation",
        "seconds/costs",
        "seconds/forward",
        "seconds/backward",
        "seconds/optimizer",
    ):
        assert all(key in row for row in rows), key
    assert rows[0]["constraints/length/value"] == rows[0]["rollout/mean_tokens"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["runs"]["final"]["nll"] == evaluation.nll
    assert (folder / "figure.png").stat().st_size > 10_000
    assert (folder / "model" / "adapter_config.json").exists()
    assert (folder / "model" / "tokenizer_config.json").exists()
    assert list((folder / "tensorboard").iterdir())
    assert load_options(folder / "config.yaml") == options


@pytest.mark.parametrize("changes", [["keep_best=true"], ["model.lora_rank=0", "optim.gradient_accumulation=2"]])
def test_a_resumed_run_is_bit_equal(overrides: list[str], tmp_path: Path, changes: list[str]):
    overrides = [*overrides, *changes, "checkpoint_every=2", "save_model=false"]
    whole = load_options(None, [*overrides, f"output_dir={tmp_path / 'whole'}"])
    finetune(whole)
    cut = load_options(None, [*overrides, f"output_dir={tmp_path / 'cut'}"])
    stop = RuntimeError("power cut")

    def fail(step: int, *args: object) -> float:
        if step == 3:
            raise stop
        return learning_rate(step, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("barrierlm.recipes.finetune.learning_rate", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            finetune(cut)
    assert len(metrics(tmp_path / "cut")) == 3
    torch.manual_seed(99)
    finetune(load_options(None, [*overrides, f"output_dir={tmp_path / 'cut'}", "resume=true"]))
    assert without_times(metrics(tmp_path / "cut")) == without_times(metrics(tmp_path / "whole"))
    states = [
        torch.load(tmp_path / run / "checkpoints" / "step-000004.pt", weights_only=True) for run in ("whole", "cut")
    ]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["weights"], states[1]["weights"], strict=True))
    summaries = [json.loads((tmp_path / run / "summary.json").read_text())["runs"] for run in ("whole", "cut")]
    assert list(summaries[0]) == list(summaries[1]) == (["final", "best"] if whole.keep_best else ["final"])
    for name, result in summaries[0].items():
        assert result["nll"] == summaries[1][name]["nll"]
        assert result["constraints"] == summaries[1][name]["constraints"]
    if whole.keep_best:
        best = [state["best"] for state in states]
        assert best[0]["choice"] == best[1]["choice"]
        assert best[0]["choice"]["best"][0] < 4  # made before the end, and kept through the cut
        assert all(torch.equal(a, b) for a, b in zip(best[0]["copy"], best[1]["copy"], strict=True))


@pytest.mark.parametrize(("lower", "upper", "met"), [(1, 16, True), (10, 12, False)])
def test_the_best_state_is_kept(
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lower: int,
    upper: int,
    met: bool,
):
    """Training that goes wrong after step 5: what is kept are the weights of the state before, chosen by then."""
    weights, choices, update = [], [], BestWeights.update

    def record(self: BestWeights, *args: object) -> None:
        update(self, *args)  # type: ignore[arg-type]
        weights.append([p.detach().clone() for p in self.weights])
        choices.append(self.choice)

    monkeypatch.setattr(BestWeights, "update", record)
    monkeypatch.setattr("barrierlm.recipes.finetune.learning_rate", lambda step, _: 0.1 if step < 5 else -0.1)
    bounds = [f"constraints.length.lower={lower}", f"constraints.length.upper={upper}", "objective.unit=1"]
    more = ["keep_best=true", "rollout.max_new_tokens=32", "rollout.prompts=16", "optim.steps=8"]
    options = load_options(None, [*overrides, *bounds, *more])
    final = finetune(options)
    folder, choice = Path(options.output_dir), choices[-1]
    assert len(weights) == 8
    assert choice.feasible == met
    assert choice.step < 8
    assert f"best: {choice}\n" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())["runs"]
    assert list(summary) == ["final", "best"]
    assert summary["final"]["nll"] == final.nll
    if met:  # else it is the violation that decides
        assert summary["best"]["nll"] < final.nll
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {"final", "best"}
    saved = [load_file(folder / name / "adapter_model.safetensors") for name in ("best", "model")]
    for tensors, expected in zip(saved, (weights[choice.step - 1], weights[-1]), strict=True):
        assert len(tensors) == len(expected)
        assert sorted(t.double().sum().item() for t in tensors.values()) == sorted(
            t.double().sum().item() for t in expected
        )


def test_the_demo_keeps_the_best_state_too(overrides: list[str]):
    evaluations = demo(load_options(None, [*overrides, "keep_best=true", "save_model=false"]))
    assert list(evaluations) == ["start", "sft", "constrained", "best"]


def test_keeping_the_best_needs_constraints(overrides: list[str]):
    none = [o for o in overrides if not o.startswith("constraints.")]
    with pytest.raises(ConfigError, match="keep_best=True without constraints; allowed"):
        load_options(None, [*none, "keep_best=true"])


def test_resuming_what_does_not_fit(overrides: list[str]):
    with pytest.raises(ConfigError, match="resume=true: no checkpoint in"):
        finetune(load_options(None, [*overrides, "resume=true"]))
    finetune(load_options(None, [*overrides, "checkpoint_every=4", "save_model=false"]))
    with pytest.raises(ConfigError, match=r"was made with model.lora_rank=2, this run has 3; allowed: the same"):
        finetune(load_options(None, [*overrides, "resume=true", "model.lora_rank=3"]))
    with pytest.raises(ConfigError, match="was made with keep_best=False, this run has True; allowed: the same"):
        finetune(load_options(None, [*overrides, "resume=true", "keep_best=true"]))


def test_a_checkpoint_of_before_an_option_resumes_with_its_default(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    new, options = "optim.constraint_max_grad_norm", [*overrides, "checkpoint_every=2", "save_model=false"]

    def older(*given: Any) -> dict[str, Any]:
        return {name: value for name, value in same_run(*given).items() if name != new}

    with monkeypatch.context() as patch:
        patch.setattr("barrierlm.recipes.finetune.same_run", older)
        finetune(load_options(None, options))
    with pytest.raises(ConfigError, match=rf"was made with {new}=None, this run has 0\.5; allowed: the same"):
        finetune(load_options(None, [*options, f"{new}=0.5", "resume=true"]))
    finetune(load_options(None, [*options, "optim.steps=6", "resume=true"]))
    assert len(metrics(Path(load_options(None, options).output_dir))) == 6


def test_a_run_keeps_the_precision_it_began_in(overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    """ "auto" is resolved once: the same run on a processor that has bfloat16 would be another one."""
    asked = "barrierlm.recipes.model._processor_has_bfloat16"
    options = [*overrides, "model.dtype=auto", "save_model=false"]
    monkeypatch.setattr(asked, lambda: False)
    finetune(load_options(None, [*options, "checkpoint_every=4"]))
    saved = Path(load_options(None, options).output_dir) / "config.yaml"
    assert load_options(saved).model.dtype == "float32"
    monkeypatch.setattr(asked, lambda: True)
    with pytest.raises(ConfigError, match=r"with model\.dtype='float32', this run has 'bfloat16'; allowed"):
        finetune(load_options(None, [*options, "resume=true"]))


def test_a_new_run_does_not_touch_the_checkpoints_of_an_older_one(overrides: list[str]):
    options = load_options(None, [*overrides, "checkpoint_every=2", "save_model=false"])
    finetune(options)
    before = sorted((Path(options.output_dir) / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run; allowed: resume=true"):
        finetune(options)
    assert sorted((Path(options.output_dir) / "checkpoints").iterdir()) == before


def test_resuming_after_a_half_written_line(overrides: list[str]):
    options = [*overrides, "checkpoint_every=2", "save_model=false"]
    finetune(load_options(None, options))
    file = Path(load_options(None, options).output_dir) / "metrics.jsonl"
    complete = file.read_text()
    file.write_text(complete + '{"step": 5, "lo')
    finetune(load_options(None, [*options, "resume=true"]))
    assert file.read_text() == complete


def test_random_states_of_cost_functions_are_restored():
    from barrierlm.recipes.random_state import random_state, set_random_state

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    draw()
    state = random_state()
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first


def test_options_may_follow_the_flag(overrides: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["finetune", "demo", "--resume", *overrides]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["finetune", "demo", "--resumed", "optim.steps=2"])


def test_only_complete_checkpoints_count_and_two_are_kept(overrides: list[str]):
    options = load_options(None, [*overrides, "checkpoint_every=1", "save_model=false"])
    finetune(options)
    names = sorted(path.name for path in (Path(options.output_dir) / "checkpoints").iterdir())
    assert names == ["step-000003.pt", "step-000004.pt"]


def test_gradient_accumulation_is_one_large_batch(overrides: list[str], tmp_path: Path):
    """Plain fine-tuning on 2 x 4 pairs equals 1 x 8, whatever the pairs' lengths."""
    rows = []
    for micro, size in ((2, 4), (1, 8)):
        options = load_options(
            None,
            [
                *overrides,
                f"optim.gradient_accumulation={micro}",
                f"optim.batch_size={size}",
                f"output_dir={tmp_path / str(micro)}",
            ],
        )
        train(open_workspace(options), Path(options.output_dir), constrained=False)
        rows.append(metrics(Path(options.output_dir)))
    for a, b in zip(*rows, strict=True):
        assert a["loss/task"] == pytest.approx(b["loss/task"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_demo(overrides: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["demo", *overrides, "save_model=false", "evaluation.samples=2"]) == 0
    folder = Path(next(o for o in overrides if o.startswith("output_dir=")).removeprefix("output_dir="))
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["runs"]
    assert list(summary["runs"]) == ["start", "sft", "constrained"]
    for run in summary["runs"].values():
        assert set(run) == {"nll", "seconds", "constraints"}
        assert math.isfinite(run["nll"])
        (result,) = run["constraints"].values()
        assert set(result) == RESULT_KEYS
        assert (result["lower"], result["upper"]) == (3, 6)
        assert result["satisfied"] == (3 <= result["mean"] <= 6)
    assert "constraints/length/value" in metrics(folder)[0]
    assert "constraints/length/value" not in metrics(folder / "sft")[0]
    assert (folder / "figure.png").exists()
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 6
    shown = capsys.readouterr().out
    assert "Held-out evaluation" in shown
    assert "Sample responses" in shown


def test_the_runs_of_the_demo_start_alike(options: Options):
    workspace = open_workspace(options)
    start = evaluate(workspace)
    train(workspace, Path(options.output_dir))
    changed = evaluate(workspace)
    workspace.reset()
    again = evaluate(workspace)
    assert (again.nll, again.constraints, again.samples) == (start.nll, start.constraints, start.samples)
    assert changed.nll != start.nll


def test_an_evaluation_has_the_nll_of_every_pair(options: Options):
    options.evaluation.pairs = 7
    workspace = open_workspace(options)
    found = evaluate(workspace)
    pairs = workspace.heldout[:7]
    assert found.tokens == [len(pair.response_ids) for pair in pairs]
    for pair, nll in zip(pairs, found.nlls, strict=True):
        ids = torch.tensor([[*pair.prompt_ids, *pair.response_ids]])
        with torch.no_grad():
            logps = workspace.policy.lm(ids).logits[0, :-1].log_softmax(-1)
        first = len(pair.prompt_ids) - 1
        own = logps[first:].gather(1, ids[0, first + 1 :, None])
        assert nll == pytest.approx(-own.sum().item(), rel=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_what_was_dealt_to_ranks_is_put_in_order(world):
    values = [float(i) for i in range(7)]
    assert _in_order([values[rank::world] for rank in range(world)]) == values


def test_groups_of_responses(options: Options):
    options.rollout.responses_per_prompt = 2
    options.constraints["length"].lower = None
    train(open_workspace(options), Path(options.output_dir))
    assert len(metrics(Path(options.output_dir))) == 4


def test_learning_rate():
    optim = OptimOptions(steps=10, warmup_steps=2, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, optim) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] > 0.1
    optim.decay = "constant"
    assert learning_rate(9, optim) == 1.0


def test_parts_of_the_objective_that_do_not_exist(overrides: list[str]):
    for wrong, message in (
        ("objective.rule=Magic", "objective.rule='Magic'; allowed: AdaptiveBarrier"),
        ("objective.rule_options.muu=1", r"objective.rule_options=\{.*'muu': 1\} of AdaptiveBarrier: .*muu"),
        ("objective.schedule=EMA", "objective.schedule='EMA'; allowed: AdaptiveSchedule"),
    ):
        with pytest.raises(ConfigError, match=message):
            finetune(load_options(None, [*overrides, wrong]))


def test_command_line_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], overrides: list[str]):
    assert main(["finetune", "none.yaml"]) == 2
    assert main(["finetune", "demo", "optim.stepz=3"]) == 2
    assert main(["demo", "constraints=null"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("barrierlm: ") for line in errors)
    assert main(["options"]) == 0
    assert "| `optim.steps` |" in capsys.readouterr().out


def test_the_command_says_which_functions_it_imports(
    overrides: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = tmp_path / "loud.py"
    file.write_text("print('imported')\ndef cost(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    open_workspace(load_options(None, [*overrides, f"constraints.c.cost={file}:cost", "constraints.c.upper=1"]))
    out = capsys.readouterr().out
    assert out.index(f"Importing cost function {file}:cost") < out.index("imported\n")


def test_the_core_does_not_import_the_recipe():
    code = (
        "import sys, barrierlm, barrierlm.cli\n"
        "heavy = {'transformers', 'accelerate', 'peft', 'omegaconf', 'rich', 'matplotlib', 'barrierlm.recipes'}\n"
        "print(heavy & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_constraints_under_accumulation_are_one_large_window(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the same responses, 2 x 4 prompts give the multipliers, estimates and gradient of 1 x 8, step by step."""

    def reference_responses(self: Workspace, prompts: list[Tokens]) -> list[Rollout]:
        return [Rollout(p, p.response_ids, p.pair.response, False) for p in prompts]

    monkeypatch.setattr(Workspace, "sample", reference_responses)
    rows = []
    for micro, size in ((2, 4), (1, 8)):
        extra = [f"optim.gradient_accumulation={micro}", f"optim.batch_size={size}", f"rollout.prompts={size}"]
        extra += [f"output_dir={tmp_path / str(micro)}", "constraints.length.lower=1", "constraints.length.upper=2"]
        extra.append("objective.unit=1")
        options = load_options(None, [*overrides, *extra])
        train(open_workspace(options), Path(options.output_dir))
        rows.append(without_times(metrics(Path(options.output_dir))))
    assert rows[0][-1]["constraints/length/upper/multiplier"] > 0.5
    for split, whole in zip(*rows, strict=True):
        assert split == {key: pytest.approx(value, rel=2e-4, abs=1e-6) for key, value in whole.items()}


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [2, 0])
def test_two_processes_train_as_one(overrides: list[str], tmp_path: Path, lora_rank: int):
    """Two gloo processes with half the batch each see the same pairs; rollouts differ, so only the task is compared.

    With every weight trained the head's gradient, made inside the model's forward, must be averaged as well.
    """
    rows = []
    overrides = [*overrides, f"model.lora_rank={lora_rank}", f"keep_best={'true' if lora_rank else 'false'}"]
    for processes, size in ((2, 2), (1, 4)):
        folder = tmp_path / str(processes)
        extra = [f"optim.batch_size={size}", f"rollout.prompts={size}", f"output_dir={folder}", "save_model=false"]
        launch(processes, "finetune", "demo", *overrides, *extra, "checkpoint_every=2")
        rows.append(metrics(folder))
    assert len(rows[0]) == len(rows[1]) == 4
    # The first window only measures: its gradient is the task's alone.
    for key in ("loss/task", "grad_norm"):
        assert rows[0][0][key] == pytest.approx(rows[1][0][key], rel=1e-4)
    newest = tmp_path / "2" / "checkpoints" / "step-000004.pt"
    whole, logged = torch.load(newest, weights_only=True), without_times(rows[0])
    assert len(whole["random"]) == 2
    newest.unlink()  # as if stopped after step 2
    extra = ["optim.batch_size=2", "rollout.prompts=2", f"output_dir={tmp_path / '2'}", "save_model=false"]
    launch(2, "finetune", "demo", *overrides, *extra, "checkpoint_every=2", "resume=true")
    assert equal(torch.load(newest, weights_only=True), whole)
    assert without_times(metrics(tmp_path / "2")) == logged


@pytest.mark.slow
def test_the_packaged_model_end_to_end(tmp_path: Path):
    pytest.importorskip("gguf")
    extra = ["optim.steps=2", "rollout.prompts=4", "evaluation.prompts=4", "evaluation.pairs=4", "data.max_pairs=50"]
    evaluations = demo(load_options("demo", [*extra, f"output_dir={tmp_path}", "save_model=true"]))
    assert evaluations["sft"].nll < evaluations["start"].nll
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert saved.num_parameters() == 134_515_008
