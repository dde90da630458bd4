"""Lightning: the entropy of a model's predictions is kept above a bound.

Runs as it stands in seconds on a CPU. The lines marked `# barrierlm` are what constraints add.
"""

import sys

import lightning
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from barrierlm import BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier  # barrierlm
from barrierlm.integrations.lightning import BarrierCallback  # barrierlm
from barrierlm.integrations.logits import entropy  # barrierlm, used below too

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"
tokenizer = ByT5Tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
texts = [f"the answer to {i} is {i + 1}" for i in range(128)]


def collate(rows):
    batch = dict(tokenizer(rows, padding=True, return_tensors="pt"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM(  # yours: AutoModelForCausalLM.from_pretrained(...)
            LlamaConfig(
                vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
            )
        )

    def training_step(self, batch, batch_idx):
        outputs = self.model(**batch)
        loss = outputs.loss
        measurements = {"entropy": entropy(outputs.logits, batch["labels"])}  # barrierlm
        loss = objective.combine(loss, measurements).loss  # barrierlm
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=320)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


lightning.seed_everything(0, verbose=False)
module = Module()
limits = [Constraint("entropy", lower=1.2, scale=1.0)]  # barrierlm
objective = BarrierObjective(None, limits, rule=RelaxedLogBarrier(), schedule=ConstantSchedule(0.05))  # barrierlm
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=40,
    accumulate_grad_batches=2,
    default_root_dir=folder,
    logger=lightning.pytorch.loggers.CSVLogger(folder),
    log_every_n_steps=8,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[BarrierCallback(objective)],  # barrierlm
)
trainer.fit(module, torch.utils.data.DataLoader(texts, batch_size=8, shuffle=True, collate_fn=collate))
print(objective.report())  # barrierlm

module.eval()
with torch.no_grad():
    batch = collate(texts)
    outputs = module.model(**batch)
    print(f"entropy = {entropy(outputs.logits, batch['labels']).mean():.3f}")
    print(f"loss = {outputs.loss:.3f}")
