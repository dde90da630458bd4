from datasets import Dataset
from tiny_model import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

name = tiny_model()  # or "HuggingFaceTB/SmolLM2-135M-Instruct"
args = SFTConfig(
    output_dir="sft",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    max_length=16,
    learning_rate=5e-3,
    max_steps=80,
    logging_steps=10,
    save_steps=40,
    bf16=False,
    report_to="none",
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    processing_class=AutoTokenizer.from_pretrained(name),
    args=args,
    train_dataset=Dataset.from_dict({"text": ["say one two three", "it was red", "the four is green and blue"] * 200}),
)
trainer.train()
