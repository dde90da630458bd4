"""The suites. To add one: a module here with `run`, `table` and `plot`, and a row in `SUITES`.

run(settings)          yields lists of rows (dicts with "case", "candidate", "status", ...), a list per case
table(rows)            those rows as Markdown
plot(rows, figure)     those rows as a picture, on an empty matplotlib figure
"""

from importlib import import_module
from types import ModuleType

#: What each suite answers, in the order in which they run.
SUITES = {
    "head": "From hidden states to sequence log-probabilities and gradients: time and memory.",
    "logits": "From logits that exist: share of the copy bandwidth.",
    "weights": "From constraint costs to policy weights and statistics: time and launches.",
    "overhead": "BarrierObjective itself, a window of one call: time, reads of tensors, objects that are kept.",
    "recipe": "A whole constrained training step of the demo: tokens per second, and where the time goes.",
    "scaling": "How time grows with rows, vocabulary, hidden size, constraints and uneven lengths.",
}


def suite(name: str) -> ModuleType:
    """The module of a suite."""
    return import_module(f"{__name__}.{name}")
