import json
from pathlib import Path

import pytest

from barrierlm.recipes.config import ConfigError
from barrierlm.recipes.data import (
    DataOrder,
    Pair,
    end_of_turn_id,
    load_pairs,
    render_prompt,
    split_pairs,
    tokenize_pairs,
)
from barrierlm.recipes.options import DataOptions

from .tiny import make_tokenizer


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_jsonl_keeps_the_other_columns(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", json.dumps({"q": "hi", "a": "yo", "topic": 3}), "")
    options = DataOptions(source=source, prompt_column="q", response_column="a")
    assert load_pairs(options) == [Pair("hi", "yo", origin="hi", columns={"topic": 3})]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", ConfigError, r"a.jsonl:1: not JSON"),
        ("[1]", ConfigError, r"a.jsonl:1: a list; allowed: one object a line"),
        ('{"prompt": "x"}', ConfigError, r"a.jsonl:1: no column 'response'; it has 'prompt'"),
        ('{"prompt": "x", "response": 3}', ConfigError, r"a.jsonl:1: response is a int; allowed: a string"),
    ],
)
def test_bad_rows_say_where(tmp_path: Path, line: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        load_pairs(DataOptions(source=write(tmp_path / "a.jsonl", line)))


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a file"):
        load_pairs(DataOptions(source=str(tmp_path / "none.jsonl")))


def test_a_saved_dataset(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a", "response": "b", "x": 1}]).save_to_disk(tmp_path / "set")
    assert load_pairs(DataOptions(source=str(tmp_path / "set"))) == [Pair("a", "b", "a", {"x": 1})]


def test_split_is_by_origin_and_stable():
    pairs = [Pair(f"p{i}", "r", origin=f"talk{i // 5}") for i in range(500)]
    options = DataOptions(heldout_share=0.2)
    train, heldout = split_pairs(pairs, options)
    assert {p.origin for p in train}.isdisjoint(p.origin for p in heldout)
    assert 0.1 < len(heldout) / len(pairs) < 0.3
    more = [*pairs, *(Pair("new", "r", origin=f"other{i}") for i in range(100))]
    assert [p for p in split_pairs(more, options)[1] if p.origin.startswith("talk")] == heldout
    assert split_pairs(pairs, DataOptions(heldout_share=0.2, split_seed=1))[1] != heldout


def test_split_with_an_empty_side():
    with pytest.raises(ConfigError, match=r"heldout_share=0.1 of 1 pairs gives .*they are of 1 conversations"):
        split_pairs([Pair("a", "b", "a")], DataOptions(heldout_share=0.1))


def test_tokens_end_with_the_end_of_turn_and_keep_to_the_limits():
    tokenizer = make_tokenizer()
    end = end_of_turn_id(tokenizer)
    assert end == tokenizer.convert_tokens_to_ids("<end>")
    pairs = [Pair("w1", "w2 w3", "a"), Pair("w1", "w2 " * 9, "b"), Pair("w1 " * 9, "w2", "c")]
    options = DataOptions(max_prompt_tokens=8, max_response_tokens=4, system_prompt=None)
    (kept,) = tokenize_pairs(pairs, tokenizer, options, end_of_turn=end)
    assert tokenizer.decode(kept.prompt_ids) == "<user> w1 <end> <bot>"
    assert tokenizer.decode(kept.response_ids) == "w2 w3 <end>"
    with pytest.raises(ConfigError, match=r"none of 3 pairs is within data.max_prompt_tokens=1"):
        tokenize_pairs(pairs, tokenizer, DataOptions(max_prompt_tokens=1), end_of_turn=end)


def test_system_prompt_and_no_template():
    tokenizer = make_tokenizer()
    assert render_prompt("w1", tokenizer, "w9") == "<sys> w9 <end> <user> w1 <end> <bot> "
    tokenizer.chat_template = None
    assert render_prompt("w1", tokenizer, "w9") == "w1"
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


def test_order_covers_every_epoch_and_deals_to_processes():
    order = DataOrder(10, seed=3, per_process=2)
    epoch = [i for k in range(5) for i in order[k]]
    assert sorted(epoch) == list(range(10))
    assert [i for k in range(5, 10) for i in order[k]] != epoch
    ranks = [DataOrder(10, seed=3, per_process=1, rank=r, world=2) for r in range(2)]
    assert [ranks[0][k] + ranks[1][k] for k in range(5)] == [order[k] for k in range(5)]
    assert DataOrder(10, seed=3, per_process=2)[7] == order[7]


def test_packaged_dialogues():
    pytest.importorskip("chitchat_dataset")
    pairs = load_pairs(DataOptions())
    assert len(pairs) > 100_000
    train, heldout = split_pairs(pairs, DataOptions())
    assert len(heldout) > 1_000
    assert {p.origin for p in train}.isdisjoint(p.origin for p in heldout)
