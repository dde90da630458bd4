"""A small random Llama and a tokenizer with a word per token, saved in a folder: examples run anywhere."""

import tempfile
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = """
    <pad> <eos> <unk> yes no maybe red green blue one two three four the a is it was of and to say more
"""
VOCABULARY = WORDS.split()


def tiny_model(texts: Sequence[str] = ()) -> str:
    """The folder, to be given wherever a model's name is; of a model that was first trained on ``texts``, if any."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    if texts:
        batch = tokenizer([text + " <eos>" for text in texts], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            model(batch["input_ids"], batch["attention_mask"], labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tempfile.mkdtemp(prefix="tiny-model-")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
