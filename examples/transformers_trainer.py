"""transformers' Trainer with two constraints: one on a dataset column, one on the logits.

Some of the texts that a model is fine-tuned on are private: it must not learn them by heart (their negative
log-likelihood keeps a lower bound), and its predictions must not become overconfident (an entropy). Runs as it stands,
in seconds on a CPU and without a download. The lines marked `# barrierlm` are what constraints add.
"""

import sys

import torch
import transformers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from barrierlm import BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier  # barrierlm
from barrierlm.integrations.logits import entropy, nll  # barrierlm, used below too
from barrierlm.integrations.transformers import BarrierTrainer  # barrierlm

torch.manual_seed(0)
tokenizer = ByT5Tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = LlamaForCausalLM(  # yours: AutoModelForCausalLM.from_pretrained(...)
    LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
public = [f"the answer to {i} is {i + 1}" for i in range(128)]
private = [f"the code of room {i} is {7919 * i % 1000}" for i in range(32)]
dataset = [{**tokenizer(text), "private": text in private} for text in public + private]


def collate(rows):
    batch = tokenizer.pad(rows, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def measure(model, inputs, outputs):  # barrierlm
    private = nll(outputs.logits, inputs["labels"])[inputs["private"]]  # barrierlm
    return {"private": private, "entropy": entropy(outputs.logits, inputs["labels"])}  # barrierlm


args = transformers.TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/trainer",
    max_steps=300,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    logging_steps=100,
    disable_tqdm=True,
    report_to="tensorboard",
)
constraints = [Constraint("private", lower=1.5, scale=1.0), Constraint("entropy", lower=1.2, scale=1.0)]  # barrierlm
objective = BarrierObjective(None, constraints, rule=RelaxedLogBarrier(), schedule=ConstantSchedule(0.05))  # barrierlm
trainer = BarrierTrainer(  # barrierlm, instead of: trainer = transformers.Trainer(
    model,
    args,
    train_dataset=dataset,
    data_collator=collate,
    objective=objective,  # barrierlm
    measure=measure,  # barrierlm
    columns=["private"],  # barrierlm
)
trainer.train()

model.eval()
with torch.no_grad():
    batch = collate([{k: v for k, v in row.items() if k != "private"} for row in dataset])
    logits = model(**batch).logits
    mask = torch.tensor([row["private"] for row in dataset])
    print(f"private = {nll(logits, batch['labels'])[mask].mean():.3f}")
    print(f"entropy = {entropy(logits, batch['labels']).mean():.3f}")
    print(f"loss = {nll(logits, batch['labels']).mean():.3f}")
