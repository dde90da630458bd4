"""PEFT: the KL to the starting model stays below a bound; the reference is the same model with its adapter off.

Runs as it stands in seconds on a CPU: the start is a tiny model that has seen other texts. The lines marked
`# barrierlm` are what constraints add.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from barrierlm import BarrierObjective, BatchMean, ConstantSchedule, Constraint, RelaxedLogBarrier  # barrierlm
from barrierlm.integrations.logits import kl  # barrierlm, used below too
from barrierlm.integrations.models import reference_logits  # barrierlm, used below too
from barrierlm.integrations.transformers import BarrierTrainer  # barrierlm

torch.manual_seed(0)
tokenizer = ByT5Tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
base = LlamaForCausalLM(  # yours: AutoModelForCausalLM.from_pretrained(...)
    LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)


def collate(rows):
    batch = tokenizer.pad(rows, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def arguments(steps):
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/peft"
    return TrainingArguments(
        folder, max_steps=steps, learning_rate=1e-2, disable_tqdm=True, report_to="none", save_strategy="no"
    )


old = [tokenizer(f"{i} plus one is {i + 1}") for i in range(128)]
new = [tokenizer(f"the answer to {i} is {i + 1}") for i in range(128)]
Trainer(base, arguments(100), train_dataset=old, data_collator=collate).train()  # stands for a pretrained model
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
model = get_peft_model(base, lora)


def measure(model, inputs, outputs):  # barrierlm
    return {"kl": kl(outputs.logits, reference_logits(model, inputs), inputs["labels"])}  # barrierlm


limits = [Constraint("kl", upper=0.3, scale=0.1)]  # barrierlm
# Whole distributions, so one window tells the KL: averaged over more it would lag, and swing.
rule, schedule = RelaxedLogBarrier(), ConstantSchedule(0.05)  # barrierlm
objective = BarrierObjective(None, limits, rule=rule, schedule=schedule, estimator=BatchMean())  # barrierlm
trainer = BarrierTrainer(  # barrierlm, instead of: trainer = Trainer(
    model,
    arguments(150),
    train_dataset=new,
    data_collator=collate,
    objective=objective,  # barrierlm
    measure=measure,  # barrierlm
)
trainer.train()

model.eval()
with torch.no_grad():
    batch = collate(new)
    outputs = model(**batch)
    print(f"kl = {kl(outputs.logits, reference_logits(model, batch), batch['labels']).mean():.3f}")
    print(f"loss = {outputs.loss:.3f}")
