import json
import math
import re
from pathlib import Path

import pytest
import torch

from barrierlm.cli import main
from barrierlm.recipes.check import STEP_NOISE, WIDTH, run_check
from barrierlm.recipes.config import load_options
from barrierlm.recipes.data import Tokens
from barrierlm.recipes.rollout import Rollout
from barrierlm.recipes.workspace import Workspace, open_workspace

from .tiny import launch


def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 0\n")
    return str(path)


def fixed_lengths(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """Responses whose lengths repeat the given ones, whatever the model says."""

    def sample(self: Workspace, prompts: list[Tokens]) -> list[Rollout]:
        ids = [[7] * lengths[i % len(lengths)] for i in range(len(prompts))]
        return [Rollout(p, x, "w0", False) for p, x in zip(prompts, ids, strict=True)]

    monkeypatch.setattr(Workspace, "sample", sample)


def test_estimates_and_noise_are_those_of_the_responses(overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    fixed_lengths(monkeypatch, [2, 4, 6, 12])
    options = load_options(None, [*overrides, "optim.gradient_accumulation=2", "objective.noise_floor=1.0"])
    found = run_check(open_workspace(options), windows=3)
    lower, upper = found.bounds
    assert [(row.side, row.bound, row.verdict) for row in found.bounds] == [("lower", 3, "met"), ("upper", 6, "active")]
    assert found.responses_per_step == 8
    assert lower.estimate == upper.estimate == 6.0
    variance = torch.tensor([2.0, 4, 6, 12] * 2).var().item()
    stderr = math.sqrt(variance / 8)
    assert upper.noise == pytest.approx(stderr / 3)  # one scale is the window's width
    assert upper.stderr == pytest.approx(stderr / math.sqrt(3))
    assert upper.violation == 0
    assert upper.needed == 20  # 8 (√2 / 3 / 0.3)² = 19.75
    assert found.ok
    assert "8 responses a step are too few: take 20 with rollout.prompts=10" in upper.advice
    assert "responses a step" not in lower.advice


def test_a_fixed_width_asks_for_the_estimate_to_resolve_it(overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    fixed_lengths(monkeypatch, [4, 5])
    needed = []
    for s in (None, 0.01):
        rule = [] if s is None else ["objective.rule=RelaxedLogBarrier", f"objective.rule_options.s={s}"]
        options = load_options(None, [*overrides, *rule, "objective.estimator_options.smoothing=0.5"])
        row = run_check(open_workspace(options), windows=2).bounds[0]
        needed.append(row.needed)
        averaged = row.noise * math.sqrt(0.5 / 1.5)
        limit = max((row.noise / STEP_NOISE) ** 2, (averaged / (s or WIDTH)) ** 2)
        assert row.needed == math.ceil(4 * limit - 1e-9)
    assert needed[0] <= 4 < needed[1]


def test_what_cannot_work(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "costs.py"
    file.write_text(
        "def constant(completions, **_):\n    return [1.0] * len(completions)\n"
        "def broken(completions, **_):\n    return [float('nan')] * len(completions)\n"
    )
    for name, message in (
        ("constant", "c ≤ 0.5 is violated, and every response has the same value (1): there is no gradient"),
        ("broken", f"cost {file}:broken gave nan for response 0 of 4"),
    ):
        extra = [f"constraints.c.cost={file}:{name}", "constraints.c.upper=0.5"]
        assert main(["check", config(tmp_path), *overrides, *extra]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert f"Cannot work: {message}" in out
        assert f"Code of yours that a run imports: {file}:{name}." in out
    # The same constant is no obstacle where it is allowed.
    assert main(["check", config(tmp_path), *overrides, f"constraints.c.cost={file}:constant"]) == 2  # no bound
    extra = [f"constraints.c.cost={file}:constant", "constraints.c.upper=1.5"]
    assert main(["check", config(tmp_path), *overrides, *extra]) == 0
    assert "the noise is not known yet" in " ".join(capsys.readouterr().out.split())


def test_json_is_alone_on_stdout_and_nothing_is_written(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "loud.py"
    file.write_text("print('imported')\ndef cost(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    extra = [f"constraints.c.cost={file}:cost", "constraints.c.upper=3", "constraints.kl.upper=1", "balance_every=3"]
    folder = Path(next(o for o in overrides if o.startswith("output_dir=")).removeprefix("output_dir="))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("mine\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["check", config(tmp_path), "--json", "--windows", "2", *overrides, *extra]) == 0
    captured = capsys.readouterr()
    assert "imported" in captured.err
    found = json.loads(captured.out)
    assert found["ok"] is True
    assert found["windows"] == 2
    assert found["imported"] == [f"{file}:cost"]
    assert [row["constraint"] for row in found["bounds"]] == ["length", "length", "c", "kl"]
    assert found["bounds"][3]["estimate"] == 0  # adapters start as nothing
    assert found["bounds"][3]["needed"] is None
    assert found["step_seconds"] > 0
    assert found["training_seconds"] == pytest.approx(4 * found["step_seconds"])
    assert found["peak_memory"] > 2**26
    assert 0 <= found["censored"] <= 1
    new = {path for path in tmp_path.rglob("*") if path not in before and "__pycache__" not in path.parts}
    assert new == {tmp_path / "config.yaml"}
    assert (folder / "metrics.jsonl").read_text() == "mine\n"


def test_the_weights_are_as_before(overrides: list[str]):
    workspace = open_workspace(load_options(None, overrides))
    before = [p.detach().clone() for p in workspace.policy.trained()]
    run_check(workspace, windows=1)
    assert all(torch.equal(a, b) for a, b in zip(before, workspace.policy.trained(), strict=True))


def test_the_token_cap(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", config(tmp_path), *overrides, "rollout.prompts=16"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    share = re.search(r"(\d+)% of the responses end at max_new_tokens=12, so the true mean is longer", out)
    assert share
    assert int(share[1]) > 30  # this model seldom ends a response


def test_lengths_that_the_cap_hides_are_taken_to_differ_as_the_data_do(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    def sample(self: Workspace, prompts: list[Tokens]) -> list[Rollout]:
        return [Rollout(p, [7] * (12 - (i == 0)), "w0", i > 0) for i, p in enumerate(prompts)]

    monkeypatch.setattr(Workspace, "sample", sample)
    workspace = open_workspace(load_options(None, overrides))
    upper = run_check(workspace, windows=1).bounds[1]
    lengths = torch.tensor([len(t.response_ids) for t in workspace.train]).double()
    assert upper.noise_of == "data"
    assert upper.noise == pytest.approx((lengths.std() / lengths.mean()).item() * 6 / 3 / math.sqrt(4))
    assert "(The cap hides how lengths differ; taken from the data's: a spread of" in upper.advice
    assert upper.stderr == pytest.approx(0.25)  # of what was measured


def test_without_constraints_time_and_memory_are_left(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    none = [o for o in overrides if not o.startswith("constraints.")]
    assert main(["check", config(tmp_path), *none]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Time: .* s a step .* Memory: peak [\d.]+ GiB", out)
    with pytest.raises(SystemExit):
        main(["check", config(tmp_path), "--windows", "0"])


@pytest.mark.slow
def test_two_processes_are_one_check(overrides: list[str], tmp_path: Path):
    """Printed once, of the responses of both; nothing is written."""
    found = json.loads(launch(2, "check", config(tmp_path), "--json", "--windows=1", *overrides))
    assert found["ok"]
    assert found["responses_per_step"] == 8
    shown = launch(2, "check", config(tmp_path), "--windows=1", *overrides)
    assert shown.count("The starting model: 8 responses, 8 a step") == 1
    assert shown.count("No reason found why this run could not work.") == 1
    assert not (tmp_path / "run").exists()
