"""Which rule holds under sampling noise: `python -m benchmarks.noise` prints one row per rule.

Problem 4 of tests/problems.py: minimise KL(p || q) over 50 outcomes with E[c] <= 0 and a true multiplier of
0.69, from 16 samples a step (Adam 0.02, EMA 0.1). Numbers are over the last quarter of the run; E[c] should be 0.
"""

import argparse

import torch

from barrierlm import (
    AdaptiveBarrier,
    DualAscent,
    ExponentialSchedule,
    ModifiedBarrier,
    RelaxedLogBarrier,
)
from tests.problems import sampled_run

RULES = {
    "RelaxedLogBarrier, mu 1 to 0.01, no noise floor": lambda n: {
        "rule": RelaxedLogBarrier(),
        "schedule": ExponentialSchedule(1.0, 1e-2, n),
        "noise_floor": 0.0,
    },
    "RelaxedLogBarrier, mu 1 to 0.01": lambda n: {
        "rule": RelaxedLogBarrier(),
        "schedule": ExponentialSchedule(1.0, 1e-2, n),
    },
    "AdaptiveBarrier (default)": lambda n: {"rule": AdaptiveBarrier()},
    "ModifiedBarrier": lambda n: {"rule": ModifiedBarrier()},
    "DualAscent(0.05)": lambda n: {"rule": DualAscent(0.05)},
}


def run(options: dict, steps: int, seed: int) -> list[float]:
    """Mean E[c], task gap, multiplier's mean and standard deviation, share of steps above the bound by 0.01."""
    costs, gaps, lam = sampled_run(steps, seed, **options)
    above = (costs > 0.01).double().mean()
    return [x.item() for x in (costs.mean(), gaps.mean(), lam.mean(), lam.std(), above)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {arguments.steps} steps, {arguments.seeds} seeds\n")
    print("| rule | E[c] | task gap | multiplier | above the bound by 0.01 |\n|---|---|---|---|---|")
    for name, options in RULES.items():
        rows = [run(options(arguments.steps), arguments.steps, seed) for seed in range(arguments.seeds)]
        cost, gap, mean, std, above = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        print(f"| {name} | {cost:.3f} | {gap:.3f} | {mean:.2f} ± {std:.2f} | {above:.0%} |", flush=True)


if __name__ == "__main__":
    main()
