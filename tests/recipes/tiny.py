"""A tiny language model with its tokenizer and data, options that make a whole run take a second, and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def make_model(folder: Path) -> None:
    """Save the model as `from_pretrained` reads it."""
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


def make_data(path: Path) -> None:
    """Write the pairs."""
    generator = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())

    rows = [{"prompt": f"{words(1, 5)} {i}", "response": words(2, 6), "weight": i} for i in range(120)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def tiny_overrides(model_folder: Path, data_file: Path, output: Path) -> list[str]:
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
        f"output_dir={output}",
    ]


def launch(processes: int, *arguments: str) -> str:
    """What the command printed in that many processes on this CPU."""
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
    command += ["--multi_gpu"] if processes > 1 else []  # its name for torchrun; with --cpu it starts one process
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += ["-m", "barrierlm.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
