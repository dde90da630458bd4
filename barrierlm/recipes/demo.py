"""The demo: the starting model, plain supervised fine-tuning, and the constrained run, on equal terms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .best import BestWeights
from .evaluate import Evaluation, evaluate, print_evaluations, write_summary
from .figure import draw_figure
from .finetune import evaluate_best, train
from .model import save_model
from .options import Options
from .workspace import Workspace, build_objective, open_workspace


def demo(options: Options) -> dict[str, Evaluation]:
    """Evaluate the start, fine-tune without and with the constraints, and compare.

    Both runs start from the same weights and see the same pairs in the same order. Metrics of the constrained run,
    summary.json, samples.jsonl and figure.png go to ``options.output_dir``, those of plain fine-tuning to its
    subfolder ``sft``.

    Args:
        options: Checked options with at least one constraint.

    Returns:
        The evaluations ``start``, ``sft`` and ``constrained``, and with ``keep_best`` ``best``.

    Raises:
        ConfigError, ModuleNotFoundError: See `open_workspace` and `build_objective`.
    """
    build_objective(options)
    options = dataclasses.replace(options, resume=False)
    workspace = open_workspace(options)
    folder = Path(options.output_dir)
    main = workspace.accelerator.is_main_process
    evaluations = {"start": evaluate(workspace)}
    _say(workspace, "start", evaluations["start"])
    for name, constrained in (("sft", False), ("constrained", True)):
        workspace.reset()
        target = folder if constrained else folder / name
        best = BestWeights(workspace.policy.trained()) if constrained and options.keep_best else None
        seconds = train(workspace, target, constrained=constrained, label=name, best=best)
        evaluations[name] = evaluate(workspace, seconds)
        _say(workspace, name, evaluations[name])
    if main and options.save_model:
        save_model(workspace.policy, workspace.tokenizer, options.model, folder / "model")
    if best is not None:
        evaluations |= evaluate_best(workspace, best, folder, seconds)
    if main:
        write_summary(folder, evaluations)
        draw_figure(folder / "metrics.jsonl", options.constraints, folder / "figure.png")
    print_evaluations(workspace.console, evaluations)
    workspace.console.print(
        f"Written to {folder}: metrics.jsonl, summary.json, figure.png", highlight=False, soft_wrap=True
    )
    return evaluations


def _say(workspace: Workspace, name: str, evaluation: Evaluation) -> None:
    constraints = ", ".join(f"{key} {result.mean:.3g}" for key, result in evaluation.constraints.items())
    workspace.console.print(
        f"{name}: held-out NLL {evaluation.nll:.3f}, {constraints} ({evaluation.seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
