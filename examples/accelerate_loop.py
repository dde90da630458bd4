"""A plain loop with Accelerate: the entropy of a model's predictions is kept above a bound.

Runs as it stands in seconds on a CPU; with `accelerate launch --num_processes 2` on several processes. The lines marked
`# barrierlm` are what constraints add.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from barrierlm import BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier  # barrierlm
from barrierlm.integrations.logits import entropy  # barrierlm, used below too

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate"
accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
tokenizer = ByT5Tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = LlamaForCausalLM(  # yours: AutoModelForCausalLM.from_pretrained(...)
    LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
texts = [f"the answer to {i} is {i + 1}" for i in range(128)]


def collate(rows):
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


loader = torch.utils.data.DataLoader(texts, batch_size=8, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=320)
limits = [Constraint("entropy", lower=1.2, scale=1.0)]  # barrierlm
objective = BarrierObjective(None, limits, rule=RelaxedLogBarrier(), schedule=ConstantSchedule(0.05))  # barrierlm
accelerator.register_for_checkpointing(objective)  # barrierlm
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)  # not the objective
done, path = 0, Path(folder)
if (path / "epoch.txt").exists():  # resume
    accelerator.load_state(str(path / "state"))
    done = int((path / "epoch.txt").read_text())

for epoch in range(done, 40):
    for batch in loader:
        with accelerator.accumulate(model):
            outputs = model(**batch)
            loss = outputs.loss
            measurements = {"entropy": entropy(outputs.logits, batch["labels"])}  # barrierlm
            loss = objective.combine(loss, measurements).loss  # barrierlm
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:  # barrierlm
                skipped = accelerator.optimizer_step_was_skipped  # barrierlm
                objective.discard_window() if skipped else objective.step()  # barrierlm
    if epoch % 10 == 9:
        accelerator.save_state(str(path / "state"))
        if accelerator.is_main_process:
            (path / "epoch.txt").write_text(str(epoch + 1))
if accelerator.is_main_process:  # barrierlm
    print(objective.report())  # barrierlm

model.eval()
with torch.no_grad():
    batch = collate(texts).to(accelerator.device)
    outputs = model(**batch)
    accelerator.print(f"entropy = {entropy(outputs.logits, batch['labels']).mean():.3f}")
    accelerator.print(f"loss = {outputs.loss:.3f}")
