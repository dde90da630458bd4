"""torch.compile with constraints: model and measurements are compiled, the objective runs between the graphs.

Runs as it stands on a CPU with a C++ compiler. The lines marked `# barrierlm` are what constraints add.
"""

import os

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from barrierlm import BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier  # barrierlm
from barrierlm.integrations.logits import entropy  # barrierlm, used below too

torch.manual_seed(0)
tokenizer = ByT5Tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = LlamaForCausalLM(  # yours: AutoModelForCausalLM.from_pretrained(...)
    LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
texts = [f"the answer to {i} is {i + 1}" for i in range(100, 228)]
ids = tokenizer(texts, return_tensors="pt")["input_ids"]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=160)
limits = [Constraint("entropy", lower=1.2, scale=1.0)]  # barrierlm
objective = BarrierObjective(None, limits, rule=RelaxedLogBarrier(), schedule=ConstantSchedule(0.05))  # barrierlm
combine = torch.compiler.disable(objective.combine)  # barrierlm


@torch.compile(backend=os.environ.get("BACKEND", "inductor"))
def loss_of(batch):
    outputs = model(input_ids=batch, labels=batch)
    loss = outputs.loss
    measurements = {"entropy": entropy(outputs.logits, batch)}  # barrierlm
    loss = combine(loss, measurements).loss  # barrierlm
    return loss


for _ in range(20):
    for batch in ids[torch.randperm(128)].split(16):
        loss_of(batch).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        objective.step()  # barrierlm
print(objective.report())  # barrierlm

model.eval()
with torch.no_grad():
    outputs = model(input_ids=ids, labels=ids)
    print(f"entropy = {entropy(outputs.logits, ids).mean():.3f}")
    print(f"loss = {outputs.loss:.3f}")
