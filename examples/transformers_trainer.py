"""transformers' Trainer with two constraints: one on a dataset column, one on the logits.

A model is fine-tuned on common and rare texts. The rare ones must be learnt as well (an average over chosen rows), and
its predictions must not become overconfident (an entropy). Runs as it stands, in seconds on a CPU and without a
download. The lines marked `# barrierlm` are what constraints add to an ordinary script.
"""

import sys

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from barrierlm import EMA, BarrierObjective, Constraint  # barrierlm
from barrierlm.integrations.logits import entropy, nll
from barrierlm.integrations.transformers import BarrierTrainer  # barrierlm

torch.manual_seed(0)
tokenizer = ByT5Tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = LlamaForCausalLM(  # yours: AutoModelForCausalLM.from_pretrained(...)
    LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
common = [f"the answer to {i} is {i + 1}" for i in range(248)]
rare = ["Zebras sleep upright", "Who owns 3 fish?", "Owls hunt voles", "Yes, in July"] * 2
dataset = [{**tokenizer(text), "rare": text in rare} for text in common + rare]


def collate(rows):
    batch = tokenizer.pad(rows, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def measure(model, inputs, outputs):  # barrierlm
    logits, labels, rare = outputs.logits, inputs["labels"], inputs["rare"]  # barrierlm
    return {"rare": nll(logits, labels)[rare], "entropy": entropy(logits, labels)}  # barrierlm


args = TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/trainer",
    max_steps=300,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    logging_steps=100,
    disable_tqdm=True,
    report_to="tensorboard",
)
constraints = [Constraint("rare", upper=0.5, scale=1.0), Constraint("entropy", lower=1.2, scale=1.0)]  # barrierlm
objective = BarrierObjective(None, constraints, estimator=EMA(0.3))  # barrierlm
trainer = BarrierTrainer(  # barrierlm, instead of: trainer = Trainer(
    model,
    args,
    train_dataset=dataset,
    data_collator=collate,
    objective=objective,  # barrierlm
    measure=measure,  # barrierlm
    columns=["rare"],  # barrierlm
)
trainer.train()
print(objective.report())  # barrierlm

model.eval()
with torch.no_grad():
    batch = collate([{k: v for k, v in row.items() if k != "rare"} for row in dataset])
    logits = model(**batch).logits
    mask = torch.tensor([row["rare"] for row in dataset])
    print(f"rare = {nll(logits, batch['labels'])[mask].mean():.3f}")
    print(f"entropy = {entropy(logits, batch['labels']).mean():.3f}")
    print(f"loss = {nll(logits, batch['labels']).mean():.3f}")
