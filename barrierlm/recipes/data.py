"""Prompt/response pairs: where they come from, how they are split, tokenised and ordered."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .config import ConfigError, loading
from .extras import missing_extra
from .options import DataOptions


@dataclass(frozen=True)
class Pair:
    """A prompt and its response, with the row's other columns; ``origin`` decides the split."""

    prompt: str
    response: str
    origin: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """A `Pair` as token ids: the prompt in the chat template, the response with its end of turn."""

    pair: Pair
    prompt_ids: list[int]
    response_ids: list[int]


def load_pairs(options: DataOptions) -> list[Pair]:
    """All pairs of the source, in its own order.

    Raises:
        ConfigError: No such JSONL file, a line that is no JSON object, a row without the prompt or the response
            column, or one of these that is no string.
        ModuleNotFoundError: The package that holds the source is missing.
    """
    if options.source == "dialogues":
        return list(_dialogues())
    if options.source.endswith((".jsonl", ".json")):
        return [_pair(row, place, options) for place, row in _jsonl(Path(options.source))]
    rows = _dataset(options)
    return [_pair(dict(row), f"{options.source}[{i}]", options) for i, row in enumerate(rows)]


def _dialogues() -> Iterator[Pair]:
    """Human conversations of the package chitchat-dataset: each turn is the response to the one before."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("data.source=dialogues", "chitchat-dataset")
    path = Path(spec.submodule_search_locations[0]) / "dataset.json"
    with path.open(encoding="utf-8") as file:
        conversations = json.load(file)
    for name, conversation in conversations.items():
        turns = [" ".join(part["text"].strip() for part in turn).strip() for turn in conversation["messages"]]
        for prompt, response in pairwise(turns):
            if prompt and response:
                yield Pair(prompt, response, origin=name)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ConfigError(f"data.source={str(path)!r} is not a file")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON ({error}); allowed: one object a line") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: a {type(row).__name__}; allowed: one object a line")
            yield f"{path}:{number}", row


def _dataset(options: DataOptions) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise missing_extra(f"data.source={options.source!r}", "datasets") from None
    with loading(f"data.source={options.source!r}", "dialogues, a .jsonl file, or a dataset's folder or name"):
        if not any((Path(options.source) / f).exists() for f in _SAVED_DATASET):
            return datasets.load_dataset(options.source, split=options.split)
        loaded = datasets.load_from_disk(options.source)
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if options.split not in loaded:
        raise ConfigError(f"data.split={options.split!r}; allowed: those of {options.source}, {', '.join(loaded)}")
    return loaded[options.split]


_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")


def _pair(row: dict[str, Any], place: str, options: DataOptions) -> Pair:
    for name in (options.prompt_column, options.response_column):
        if name not in row:
            raise ConfigError(f"{place}: no column {name!r}; it has {', '.join(map(repr, row))}")
        if not isinstance(row[name], str):
            raise ConfigError(f"{place}: {name} is a {type(row[name]).__name__}; allowed: a string")
    prompt, response = row.pop(options.prompt_column), row.pop(options.response_column)
    return Pair(prompt, response, origin=prompt, columns=row)


def split_pairs(pairs: Sequence[Pair], options: DataOptions) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, by a hash of the conversation (or the prompt) and ``split_seed``.

    The same origin is never on both sides, and adding data moves nothing from one side to the other.

    Raises:
        ConfigError: One side is empty.
    """
    train: list[Pair] = []
    heldout: list[Pair] = []
    for pair in pairs:
        (heldout if _draw(pair.origin, options.split_seed) < options.heldout_share else train).append(pair)
    if not train or not heldout:
        origins = len({pair.origin for pair in pairs})
        raise ConfigError(
            f"data.heldout_share={options.heldout_share} of {len(pairs)} pairs gives {len(train)} for training and "
            f"{len(heldout)} held out; allowed: at least one of each (they are of {origins} conversations or prompts, "
            "and pairs of one stay together)"
        )
    return train, heldout


def _draw(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    end_of_turn: int,
    limit: int | None = None,
) -> list[Tokens]:
    """Those pairs that keep to the token limits, as ids, in a fixed random order.

    Args:
        pairs: Pairs of one split.
        tokenizer: With a chat template, or without: then the prompt is taken as it is.
        options: Limits, system prompt, and the seed of the order.
        end_of_turn: Id that ends every response.
        limit: Stop after so many.

    Raises:
        ConfigError: Nothing is left.
    """
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(options.split_seed)).tolist()
    kept: list[Tokens] = []
    for start in range(0, len(order), 1024):
        chunk = [pairs[i] for i in order[start : start + 1024]]
        texts = [render_prompt(pair.prompt, tokenizer, options.system_prompt) for pair in chunk]
        prompts = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
        responses = tokenizer([pair.response for pair in chunk], add_special_tokens=False)["input_ids"]
        for pair, prompt_ids, response_ids in zip(chunk, prompts, responses, strict=True):
            response_ids = [*response_ids, end_of_turn]
            if 0 < len(prompt_ids) <= options.max_prompt_tokens and len(response_ids) <= options.max_response_tokens:
                kept.append(Tokens(pair, prompt_ids, response_ids))
        if limit is not None and len(kept) >= limit:
            break
    if not kept:
        raise ConfigError(
            f"none of {len(pairs)} pairs is within data.max_prompt_tokens={options.max_prompt_tokens} and "
            f"data.max_response_tokens={options.max_response_tokens}"
        )
    return kept[:limit]


def render_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    """The prompt as the model reads it, up to where its answer starts."""
    if tokenizer.chat_template is None:
        return prompt
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages = [*system, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token that the chat template puts after an answer; without one, the end of text.

    Raises:
        ConfigError: The tokenizer knows neither.
    """
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Z"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(text, str)
        after = tokenizer(text[text.rindex("Z") + 1 :], add_special_tokens=False)["input_ids"]
        for token in after:
            if token in tokenizer.all_special_ids:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token and no chat template that ends a turn")
    return int(tokenizer.eos_token_id)


class DataOrder:
    """Which pairs each micro-batch holds: a function of seed and step alone, so that resuming needs no state.

    Epoch after epoch of fresh permutations, cut into global batches and dealt to the processes.

    Args:
        size: Number of pairs.
        seed: Of the permutations; two streams with different seeds are independent.
        per_process: Pairs per micro-batch and process.
        rank: This process.
        world: Number of processes.
    """

    def __init__(self, size: int, seed: int, per_process: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.seed, self.per_process, self.rank, self.world = size, seed, per_process, rank, world
        self._epochs: dict[int, list[int]] = {}

    def __getitem__(self, micro_batch: int) -> list[int]:
        """Indices of this process's pairs in the given micro-batch, counted from the start of training."""
        first = (micro_batch * self.world + self.rank) * self.per_process
        return [self._at(place) for place in range(first, first + self.per_process)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.size)
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epochs = {
                **{e: order for e, order in self._epochs.items() if e >= epoch - 1},
                epoch: torch.randperm(self.size, generator=generator).tolist(),
            }
        return self._epochs[epoch][offset]
