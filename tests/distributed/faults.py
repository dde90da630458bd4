"""Run by `launch`: what the others see when a rank stops, or does not take part."""

import os
import sys
import time

import torch
from launch import end, join

from barrierlm import BarrierObjective, Constraint


def main(how):
    rank, _, _ = join(timeout=4)
    objective = BarrierObjective(None, [Constraint("c", upper=1.0, scale=1.0)])
    value = torch.tensor([2.0, 3.0], requires_grad=True)
    objective(measurements={"c": value})
    objective.step()
    before = objective.metrics()
    objective(measurements={"c": value})
    if rank == 1:
        if how == "dies":
            os._exit(7)
        time.sleep(60)  # stays away; the test ends it
    began = time.monotonic()
    try:
        objective.step()
    except RuntimeError as error:
        end(
            {
                "seconds": time.monotonic() - began,
                "message": str(error),
                "unchanged": objective.metrics() == before and objective.windows == 1,
                "window is kept": objective._window.calls,
            },
            leave=False,  # that would wait for the rank that is gone
        )


if __name__ == "__main__":
    main(sys.argv[1])
