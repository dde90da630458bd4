import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from barrierlm.recipes.config import ConfigError
from barrierlm.recipes.costs import FunctionCost, imported_costs, load_costs, measure_rollouts, per_response
from barrierlm.recipes.data import Pair, Tokens
from barrierlm.recipes.model import lay_out
from barrierlm.recipes.options import ConstraintOptions
from barrierlm.recipes.rollout import Rollout

from .tiny import make_tokenizer


def rollout(text: str, ids: list[int], **columns: object) -> Rollout:
    return Rollout(Tokens(Pair("ask", "answer", "o", columns), [2, 7, 3], [8, 1]), ids, text, censored=False)


ROLLOUTS = [rollout("I love this", [8, 9, 1], weight=2), rollout("I hate this damn shit", [8, 1], weight=5)]


def cost(what: str, **kwargs: object):
    return load_costs({"c": ConstraintOptions(cost=what)}, **kwargs)["c"]


def measured(what: str, policy) -> torch.Tensor:
    measurements, sequences = measure_rollouts({"c": cost(what)}, policy, ROLLOUTS, groups=torch.tensor([3, 3]))
    assert sequences.cu_seqlens.tolist() == [0, 3, 5]
    assert measurements["c"].groups.tolist() == [3, 3]
    assert measurements["c"].logps is None
    return per_response(measurements["c"], sequences, policy(sequences))


def test_length_counts_tokens_and_is_credited_per_token(policy_and_tokenizer):
    policy, _ = policy_and_tokenizer
    assert measured("length", policy).tolist() == [3, 2]
    assert measure_rollouts({"c": cost("length")}, policy, ROLLOUTS)[0]["c"].credited_per_token


def test_sentiment_and_profanity(policy_and_tokenizer):
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("profanity_check")
    positive, negative = measured("sentiment", policy_and_tokenizer[0]).tolist()
    assert positive > 0 > negative
    clean, profane = measured("profanity", policy_and_tokenizer[0]).tolist()
    assert 0 <= clean < 0.5 < profane <= 1


def test_kl_is_zero_at_the_start_and_per_token_after(policy_and_tokenizer):
    policy, _ = policy_and_tokenizer
    torch.testing.assert_close(measured("kl", policy).detach(), torch.zeros(2, dtype=torch.float64))
    with torch.no_grad():
        for p in policy.trained():
            p.add_(0.05)
    sequences = lay_out([[2, 7, 3]] * 2, [r.ids for r in ROLLOUTS])
    gap = (policy(sequences) - policy.reference(sequences)).detach()
    expected = torch.stack([gap[:3].sum(), gap[3:].sum()]).double()
    assert expected.abs().min() > 0
    torch.testing.assert_close(measured("kl", policy).detach(), expected)


def test_a_function_in_a_file(tmp_path: Path):
    file = tmp_path / "my_costs.py"
    file.write_text(
        "def shouting(prompts, completions, completion_ids, weight, **columns):\n"
        "    assert prompts == ['ask', 'ask'] and len(completion_ids[0]) == 3\n"
        "    return [w * ('I' in text) for text, w in zip(completions, weight)]\n"
    )
    what = f"{file}:shouting"
    assert imported_costs({"a": ConstraintOptions(cost=what), "b": ConstraintOptions(cost="length")}) == [what]
    function = cost(what)
    assert isinstance(function, FunctionCost)
    assert function(ROLLOUTS) == [2.0, 5.0]


def test_a_function_by_module_and_with_few_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "some_costs.py").write_text("def count(completions):\n    return [len(c) for c in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = cost("some_costs:count")
    assert isinstance(function, FunctionCost)
    assert function(ROLLOUTS) == [11.0, 21.0]


def test_functions_that_do_not_exist(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is not a file; allowed: path/to/file.py:function"):
        cost(f"{tmp_path}/none.py:f")
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        cost("no_such_module:f")
    file = tmp_path / "a.py"
    file.write_text("def good(completions):\n    return [0.0]\n")
    with pytest.raises(ConfigError, match="no function 'bad'; allowed: good"):
        cost(f"{file}:bad")


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "returned 1 values for 2 responses; allowed: one each"),
        (None, TypeError, r"returned None; allowed: a list of floats"),
        (3.0, TypeError, r"returned 3.0; allowed: a list of floats"),
        (["a", "b"], TypeError, r"allowed: a list of floats"),
    ],
)
def test_what_a_function_may_return(returned: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        FunctionCost(lambda completions: returned, "f")(ROLLOUTS)


def test_tensors_are_fine():
    assert FunctionCost(lambda completions: torch.tensor([1, 2]), "f")(ROLLOUTS) == [1.0, 2.0]


@pytest.mark.parametrize("labels", [1, 2])
def test_reward_model(tmp_path: Path, labels: int):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    label = "" if labels == 1 else "#LABEL_1"
    function = cost(f"reward_model:{tmp_path}{label}")
    assert isinstance(function, FunctionCost)
    together = function(ROLLOUTS)
    assert together == pytest.approx([function([r])[0] for r in ROLLOUTS], abs=1e-5)
    if labels == 2:
        assert all(0 < p < 1 for p in together)
        with pytest.raises(ConfigError, match=r"allowed: .*#LABEL with LABEL in LABEL_0, LABEL_1"):
            cost(f"reward_model:{tmp_path}")
    assert json.loads((tmp_path / "config.json").read_text())
