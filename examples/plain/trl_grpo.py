from datasets import Dataset
from tiny_model import tiny_model
from trl import GRPOConfig, GRPOTrainer


def quality(completions, **columns):
    """Reward: the response's number of different words, over 8."""
    return [len(set(text.split())) / 8 for text in completions]


args = GRPOConfig(
    output_dir="grpo",
    per_device_train_batch_size=32,
    num_generations=8,
    max_completion_length=16,
    beta=0.3,
    learning_rate=5e-3,
    max_steps=300,
    logging_steps=10,
    save_steps=100,
    bf16=False,
    report_to="none",
)
trainer = GRPOTrainer(
    model=tiny_model(),  # or "HuggingFaceTB/SmolLM2-135M-Instruct"
    reward_funcs=[quality],
    args=args,
    train_dataset=Dataset.from_dict({"prompt": ["say one", "say two", "is it red", "is it blue"] * 64}),
)
trainer.train()
