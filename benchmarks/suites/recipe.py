"""A whole constrained training step of the demo: the recipe's against one written without further thought."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from ..candidate import NAIVE, SFT, Candidate, Case
from ..measure import compare
from ..peers.step import packed_sft, straightforward
from ..settings import Settings
from ..steps import StepProblem

#: (steps of plain fine-tuning before, whether responses are drawn): at the start they hit the cap of 32 tokens, after
#: 16 steps they are about as long as the data's, as in most of the demo's run.
CASES = [(16, True), (16, False), (0, True)]
QUICK = [(0, True), (0, False)]


def measure(tuned: int, generates: bool, made: Callable[[int], StepProblem], settings: Settings, left: int) -> Any:
    """Rows of one case."""
    problem = made(tuned)
    problem.generates = generates
    runs: dict[str, Callable[..., Any]] = {NAIVE: partial(straightforward, problem), "recipe": problem.run_ours}
    which = [
        Candidate(NAIVE, lambda p: partial(straightforward, p), role="naive", gives="", holds_logits=True),
        Candidate("recipe", lambda p: p.ours, role="ours", gives=""),
    ]
    if not generates:
        runs[SFT] = partial(packed_sft, problem)
        which.append(Candidate(SFT, lambda p: partial(packed_sft, p), role="floor", gives="", holds_logits=True))

    def inspect(candidate: Candidate, step: Callable[[], Any]) -> dict[str, Any]:
        return {"seconds": problem.split(runs[candidate.name], 1 if settings.quick else 2), "tokens": problem.tokens}

    return compare(which, problem, settings, seconds=settings.share(left) * 4, inspect=inspect)


def cases(settings: Settings) -> Iterator[Case]:
    """With and without drawing responses, on a fine-tuned and on the starting model."""

    @cache
    def made(tuned: int) -> StepProblem:
        return StepProblem(settings.device, tiny=settings.quick, tuned=tuned)

    every = QUICK if settings.quick else CASES
    for index, (tuned, generates) in enumerate(every):
        fields = {
            "model": "tiny" if settings.quick else "SmolLM2-135M",
            "start": f"after {tuned} steps of plain fine-tuning" if tuned else "start",
            "responses": "drawn" if generates else "given",
        }
        yield Case(fields, partial(measure, tuned, generates, made, settings, len(every) - index))


def table(rows: list[dict[str, Any]]) -> str:
    """A table for each case: a line for each version, its speed and its parts."""
    from ..tables import step_tables

    return step_tables(rows)


def plot(rows: list[dict[str, Any]], figure: Any) -> None:
    """The parts of a step, stacked."""
    from ..plots import stacked

    stacked(rows, figure)
