"""Costs that raise, hang, or give no number; responses that are all empty."""

import math
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from barrierlm.recipes.attempts import CostError
from barrierlm.recipes.config import load_options
from barrierlm.recipes.costs import FunctionCost
from barrierlm.recipes.finetune import finetune, train
from barrierlm.recipes.options import CostOptions
from barrierlm.recipes.rollout import Rollout
from barrierlm.recipes.workspace import Workspace, open_workspace

from .test_costs import ROLLOUTS
from .test_finetune import metrics

HANG = threading.Event()


def failing(times: int, then=(1.0, 2.0)):
    """A function that raises so many times, and its calls."""
    calls = []

    def cost(completions):
        calls.append(completions)
        if len(calls) <= times:
            raise ConnectionError(f"call {len(calls)}")
        return list(then)

    return cost, calls


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_function_that_exits_has_failed(timeout: float | None):
    cost = FunctionCost(lambda completions: exit(0), "leaves", CostOptions(timeout=timeout, on_error="stop"))
    with pytest.raises(CostError, match=r"cost leaves failed 1 time.*SystemExit: 0"):
        cost(ROLLOUTS)


def test_an_answer_that_held_all_threads_up_is_late():
    """A backtracking regular expression does not let the clock's thread run until it is through."""

    def slow(completions):
        re.match(r"(a+)+$", "a" * 24 + "b")
        return [1.0, 2.0]

    began = time.monotonic()
    slow([])
    alone = time.monotonic() - began
    cost = FunctionCost(slow, "slow", CostOptions(timeout=alone / 50, on_error="stop"))
    with pytest.raises(CostError, match="TimeoutError: no answer within"):
        cost(ROLLOUTS)


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_retries(timeout: float | None):
    function, calls = failing(2)
    cost = FunctionCost(function, "shaky", CostOptions(timeout=timeout, retries=2, retry_delay=0.0))
    assert cost(ROLLOUTS) == [1.0, 2.0]
    assert len(calls) == 3


def test_the_delay_doubles(monkeypatch: pytest.MonkeyPatch):
    delays: list[float] = []
    monkeypatch.setattr("time.sleep", delays.append)
    FunctionCost(failing(3)[0], "shaky", CostOptions(retries=3, retry_delay=0.5))(ROLLOUTS)
    assert delays == [0.5, 1.0, 2.0]


def test_stop_or_skip_after_the_last():
    function, calls = failing(9)
    message = (
        r"cost shaky failed 2 time\(s\), the last with ConnectionError: call 2; costs.retries .* costs.on_error=skip"
    )
    with pytest.raises(CostError, match=message) as caught:
        FunctionCost(function, "shaky", CostOptions(retries=1, retry_delay=0.0))(ROLLOUTS)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert len(calls) == 2
    skipped = FunctionCost(function, "shaky", CostOptions(on_error="skip"))(ROLLOUTS)
    assert [math.isnan(value) for value in skipped] == [True, True]


def test_a_function_that_hangs_is_given_up():
    HANG.clear()
    cost = FunctionCost(lambda completions: HANG.wait(30), "slow", CostOptions(timeout=0.05))
    began = time.perf_counter()
    with pytest.raises(CostError, match=r"TimeoutError: no answer within costs.timeout=0.05 s"):
        cost(ROLLOUTS)
    assert time.perf_counter() - began < 5
    cost.options.on_error = "skip"
    for _ in range(7):
        assert math.isnan(cost(ROLLOUTS)[0])
    with pytest.raises(CostError, match=r"8 calls hang .*the run stops whatever costs.on_error says"):
        cost(ROLLOUTS)
    HANG.set()
    deadline = time.perf_counter() + 10
    while any(thread.name == "cost slow" for thread in threading.enumerate()) and time.perf_counter() < deadline:
        time.sleep(0.01)
    with pytest.raises(TypeError, match="cost slow returned True; allowed: a list of floats"):
        cost(ROLLOUTS)  # the hanging ones are gone, so it is called again


def test_within_a_timeout_gradients_stay_as_they_are():
    seen = []
    cost = FunctionCost(
        lambda completions: seen.append(torch.is_grad_enabled()) or [0.0, 0.0], "c", CostOptions(timeout=9)
    )
    with torch.no_grad():
        cost(ROLLOUTS)
    cost(ROLLOUTS)
    assert seen == [False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_costs_that_are_no_number(bad: float | None):
    def function(completions):
        return [1.0, bad]

    with pytest.raises(
        CostError, match=rf"cost c gave {bad} for response 1 of 2, 'I hate this.*allowed: a finite number"
    ):
        FunctionCost(function, "c")(ROLLOUTS)
    values = FunctionCost(function, "c", CostOptions(on_error="skip"))(ROLLOUTS)
    assert values[0] == 1.0
    assert not math.isfinite(values[1])


def test_a_mistake_is_not_skipped():
    with pytest.raises(ValueError, match="returned 1 values for 2 responses"):
        FunctionCost(lambda completions: [1.0], "c", CostOptions(on_error="skip"))(ROLLOUTS)


FAULTS = {
    "raise": "raise RuntimeError('no service')",
    "nan": "return [float('nan')] * len(completions)",
    "missing": "return [None] * len(completions)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_goes_on_without_the_cost(overrides: list[str], tmp_path: Path, fault: str):
    """The second step's cost fails: its window counts for nothing; the other constraint's does."""
    file = tmp_path / f"{fault}.py"
    file.write_text(
        "calls = []\n\n\ndef cost(completions):\n    calls.append(1)\n    if len(calls) in (2, 6):\n"
        f"        {FAULTS[fault]}\n    return [float(len(c)) for c in completions]\n"
    )
    more = [f"constraints.shaky.cost={file}:cost", "constraints.shaky.upper=20", "costs.on_error=skip"]
    evaluation = finetune(load_options(None, [*overrides, *more, "save_model=false"]))
    rows = metrics(tmp_path / "run")
    value = [row["constraints/shaky/value"] for row in rows]
    assert value[0] == value[1] != value[2]
    assert rows[1]["constraints/shaky/nonfinite"] > 0 == rows[0]["constraints/shaky/nonfinite"]
    assert rows[0]["constraints/length/value"] != rows[1]["constraints/length/value"]
    assert all(math.isfinite(row["loss/total"]) for row in rows)
    assert math.isfinite(evaluation.constraints["shaky"].mean)  # over the other batch of the evaluation


def test_a_run_stops_and_goes_on_where_it_was(overrides: list[str], tmp_path: Path):
    file = tmp_path / "down.py"
    up = "def cost(completions):\n    return [float(len(c)) for c in completions]\n"
    file.write_text(
        f"calls = []\n\n\n{up}".replace("    return", "    calls.append(1)\n    assert len(calls) < 4\n    return")
    )
    more = [*overrides, f"constraints.down.cost={file}:cost", "constraints.down.upper=20", "checkpoint_every=1"]
    with pytest.raises(CostError, match=r"cost .*down.py:cost failed 1 time"):
        finetune(load_options(None, [*more, "save_model=false"]))
    file.write_text(up)
    finetune(load_options(None, [*more, "save_model=false", "resume=true"]))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_all_responses_are_empty(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every response is its end of turn alone, and every text empty."""

    def nothing(self: Workspace, prompts):
        return [Rollout(p, [self.end_of_turn], "", False) for p in prompts]

    monkeypatch.setattr(Workspace, "sample", nothing)
    file = tmp_path / "chars.py"
    file.write_text(
        "def cost(completions):\n    assert set(completions) == {''}\n    return [0.0] * len(completions)\n"
    )
    more = [f"constraints.chars.cost={file}:cost", "constraints.chars.lower=2", "constraints.kl.upper=1"]
    options = load_options(None, [*overrides, *more])
    train(open_workspace(options), tmp_path / "run")
    last = metrics(tmp_path / "run")[-1]
    assert last["constraints/length/value"] == 1
    assert last["constraints/chars/value"] == 0
    assert all(
        math.isfinite(last[f"constraints/{name}/multiplier"]) for name in ("length/lower", "chars/lower", "kl/upper")
    )
