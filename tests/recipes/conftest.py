"""A tiny language model with its tokenizer, as a folder that `from_pretrained` reads."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from barrierlm.recipes.config import load_options
from barrierlm.recipes.model import load_policy
from barrierlm.recipes.options import Options

WORDS = [f"w{i}" for i in range(24)]
SPECIAL = ["<pad>", "<end>", "<user>", "<bot>", "<sys>", "<unk>", "<eos>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {% elif m['role'] == 'system' %}<sys> "
    "{% else %}<bot> {% endif %}{{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<end>", "<user>", "<bot>", "<sys>"],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    # Defaults that would change the distribution, as real models ship them; rollouts must not follow them.
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.3, repetition_penalty=1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-data") / "pairs.jsonl"
    generator = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())

    rows = [{"prompt": f"{words(1, 5)} {i}", "response": words(2, 6), "weight": i} for i in range(120)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def overrides(model_folder: Path, data_file: Path, tmp_path: Path) -> list[str]:
    """Overrides that make a whole run take a second."""
    return [
        f"model.name={model_folder}",
        "model.dtype=float32",
        "model.lora_rank=2",
        f"data.source={data_file}",
        "data.heldout_share=0.3",
        "constraints.length.upper=6",
        "constraints.length.lower=3",
        "rollout.prompts=4",
        "rollout.max_new_tokens=12",
        "optim.steps=4",
        "optim.batch_size=4",
        "evaluation.pairs=8",
        "evaluation.prompts=8",
        "evaluation.batch_size=4",
        f"output_dir={tmp_path / 'run'}",
    ]


@pytest.fixture
def options(overrides: list[str]) -> Options:
    return load_options(None, overrides)


@pytest.fixture
def policy_and_tokenizer(options: Options):
    return load_policy(options.model)
