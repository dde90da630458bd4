"""Run by `test_trl_processes.py` in each of two processes: kind, model folder, output folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from barrierlm import Constraint
from tests.integrations.trl_tools import Gradients, chosen, entropy, make_trainer

#: Factor of the reference's weights.
REFERENCE = 1.2


def main(kind, model, folder):
    torch.set_num_threads(1)
    recorded, window, scored = Gradients(), [], []
    settings = {"max_steps": 2, "max_grad_norm": 0.0, "use_cpu": True, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 4 if kind in ("grpo", "rloo") else 2, "gradient_checkpointing": False}
    arguments = {"callbacks": [recorded], "settings": settings}
    if kind in ("grpo", "rloo"):
        settings["num_generations"] = 8  # so that a group is spread over both
    else:
        measure = entropy if kind == "sft" else chosen
        arguments["constraints"] = [Constraint("value", lower=5, scale=1)]
        arguments["measurements"] = {"value": lambda batch: (window.append(batch.inputs), measure(batch))[1]}
        arguments["rows"] = 6
    trainer = make_trainer(kind, model, folder, **arguments)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.0)
    if kind == "dpo":  # a reference that differs, so that rewards are not 0
        with torch.no_grad():
            for p in trainer.ref_model.parameters():
                p.mul_(REFERENCE)
    commit, weights = trainer._commit, []
    trainer._commit = lambda: (weights.append(trainer.objective.weights), commit())
    if kind in ("grpo", "rloo"):
        calculate = trainer._calculate_rewards
        trainer._calculate_rewards = lambda *a: (scored.append(calculate(*a)), scored[-1])[1]
    trainer.train()
    rows = trainer._buffered_inputs if kind in ("grpo", "rloo") else window
    batches = [{k: v for k, v in batch.items() if torch.is_tensor(v)} for batch in rows]
    out = {"gradients": recorded.steps, "weights": weights, "batches": batches, "rewards": scored}
    out["state"], out["report"] = trainer.objective.state_dict(), trainer.objective.report()[0].estimate
    out["tokens"] = [int(batch["completion_mask"].sum()) for batch in batches] if kind in ("grpo", "rloo") else []
    torch.save(out, Path(folder, f"{kind}-{dist.get_rank()}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
