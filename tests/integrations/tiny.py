"""A tiny Llama with a real tokenizer, and batches for it."""

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

TOKENIZER = ByT5Tokenizer()


def make_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config)


def make_rows(n):
    """Texts of different lengths, each with a flag and a word."""
    texts = [f"say {i}: " + "ab " * (i % 4) + str(i * i) for i in range(n)]
    return [{**TOKENIZER(text), "flag": i % 2 == 0, "word": str(i)} for i, text in enumerate(texts)]


def collate(rows):
    """Padded batch; the first four tokens are the prompt."""
    batch = TOKENIZER.pad([{k: r[k] for k in ("input_ids", "attention_mask")} for r in rows], return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :4] = -100
    return batch
