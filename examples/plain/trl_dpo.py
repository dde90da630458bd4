from datasets import Dataset
from tiny_model import tiny_model
from trl import DPOConfig, DPOTrainer

prompts = ["is it red", "is it blue"]
chosen = [" yes yes no no", " no no yes yes"]
rejected = [" yes no yes no", " no yes no yes"]
known = [*chosen, *rejected, *[" maybe"] * 4]  # what the small model answers before DPO
name = tiny_model([p + a for p, a in zip(prompts * 4, known, strict=True)])  # or "HuggingFaceTB/SmolLM2-135M-Instruct"
args = DPOConfig(
    output_dir="dpo",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=5e-3,
    max_steps=80,
    logging_steps=10,
    save_steps=40,
    bf16=False,
    report_to="none",
)
trainer = DPOTrainer(
    model=name,
    args=args,
    train_dataset=Dataset.from_dict({"prompt": prompts * 100, "chosen": chosen * 100, "rejected": rejected * 100}),
)
trainer.train()
