"""Run by `accelerate launch`: a loop with accumulation, a checkpoint in the middle, and a resumption."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from barrierlm import BarrierObjective, Constraint

SAMPLES, ACCUMULATION = 12, 2


def main(folder, name, first, last):
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    objective = BarrierObjective(torch.nn.functional.mse_loss, [Constraint("mean", upper=-0.3, scale=0.5)])
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(objective)
    checkpoint = Path(folder) / f"{name}-checkpoint"
    if first:
        accelerator.load_state(str(checkpoint))
    for window in range(first, last):
        generator = torch.Generator().manual_seed(window)
        x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
        y = x.sum(1)
        for micro in x.chunk(ACCUMULATION * ranks)[rank::ranks]:
            with accelerator.accumulate(model):
                rows = (x[:, None] == micro[None]).all(2).any(1)
                prediction = model(micro)[:, 0]
                out = objective(
                    prediction,
                    y[rows],
                    measurements={"mean": prediction},
                    num_samples_in_window={"mean": SAMPLES},
                    loss_divisor=ACCUMULATION,
                )
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    objective.step()
    accelerator.save_state(str(checkpoint))
    torch.save(
        {
            "model": accelerator.unwrap_model(model).state_dict(),
            "objective": objective.state_dict(),
            "metrics": objective.metrics(),
        },
        Path(folder) / f"{name}-{rank}.pt",
    )
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
