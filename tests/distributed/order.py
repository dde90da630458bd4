"""Run by `launch`: constraints in another order, as out of a set; and a warning, an error here, of one rank."""

import torch
from launch import end, join

from barrierlm import BarrierObjective, Constraint


def main():
    rank, _, _ = join(timeout=20)
    constraints = [Constraint(name, upper=1.0, scale=1.0) for name in ("a", "b")]
    values = {"a": torch.tensor([5.0], requires_grad=True), "b": torch.tensor([0.0], requires_grad=True)}
    messages = []
    for given in (constraints, constraints[:: -1 if rank else 1]):
        objective = BarrierObjective(None, given)
        for call in (lambda objective=objective: objective.calibrate(values), objective.step):
            objective.discard_window()
            if call == objective.step:
                objective(measurements=values)
            try:
                call()
                messages.append("")
            except RuntimeError as error:
                messages.append(str(error))
    warned = BarrierObjective(None, constraints)
    warned.combine(None, {"a": values["a"]}, num_samples_in_window={"a": 7 if rank else 2})
    try:
        warned.step()
        warning = ""
    except RuntimeWarning as error:
        warning = str(error)
    end(
        {
            "messages": messages,
            "windows": objective.windows,
            "warning": warning,
            "warned": [warned.windows, warned.weights["a"]],
        }
    )


if __name__ == "__main__":
    main()
