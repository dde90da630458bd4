"""`sequence_logprob`: logits [N, V] that exist already; bound by memory, so measured against a copy."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from ..candidate import COPY, NAIVE, Candidate, Case, Outputs
from ..measure import compare
from ..peers.logits import PEERS, Forward, naive_forward
from ..problems import BOTH, FORWARD, LogitsProblem
from ..settings import Settings

SHAPES: dict[str, list[tuple[int, int]]] = {
    "cpu": [(1024, 49152), (512, 128256)],
    "cuda": [(8192, 128256), (16384, 49152)],
}
QUICK: dict[str, list[tuple[int, int]]] = {"cpu": [(64, 503)], "cuda": [(1024, 8192)]}
#: What the memory column shows: all that is there beside the logits, their gradient included.
MEMORY = ("peak_bytes", "logits")
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16, torch.float32]}


def sequence(**options: Any) -> Callable[[LogitsProblem], Forward]:
    """`sequence_logprob`, with the weights applied to its result."""

    def build(p: LogitsProblem) -> Forward:
        from barrierlm_kernels import sequence_logprob

        def forward() -> Outputs:
            logps = sequence_logprob(p.logits, p.targets, p.cu_seqlens, **options).logps
            return {"loss": -(logps * p.weights).sum(), "sequences": logps}

        return forward

    return build


def copy(p: LogitsProblem) -> Callable[[], None]:
    """One copy of the logits: reads and writes as many bytes as they have."""
    target = torch.empty_like(p.logits, requires_grad=False)

    @torch.no_grad()
    def run() -> None:
        target.copy_(p.logits)

    return run


def ours(device: torch.device) -> list[Candidate]:
    """With a gradient of its own and with one that overwrites the logits; on a GPU the torch reference too."""
    own: dict[str, Any] = {"role": "ours", "gives": "sequence"}
    found = [
        Candidate("sequence_logprob", sequence(), **own),
        Candidate("sequence_logprob, in place", sequence(inplace_backward=True), writes_input=True, **own),
    ]
    if device.type == "cuda":
        found.append(Candidate("sequence_logprob, reference", sequence(impl="reference"), **own))
    return found


STANDARDS = [
    Candidate(NAIVE, naive_forward, role="naive", holds_logits=True),
    Candidate(COPY, copy, role="floor", gives="", holds_logits=True),
]


def candidates(device: torch.device) -> list[Candidate]:
    """Everything that is compared."""
    return [*STANDARDS, *ours(device), *PEERS]


def cases(settings: Settings) -> Iterator[Case]:
    """Every shape and dtype, forward alone and with the backward pass."""
    device = settings.device
    shapes = (QUICK if settings.quick else SHAPES)[device.type]
    left = 2 * len(shapes) * len(DTYPES[device.type])
    for shape, dtype in product(shapes, DTYPES[device.type]):
        made = cache(partial(LogitsProblem, shape, dtype, device))
        for direction in (BOTH, FORWARD):
            fields = {"N": shape[0], "V": shape[1], "dtype": str(dtype)[6:], "direction": direction}
            yield Case(fields, partial(_measure, made, direction, settings, left))
            left -= 1


def _measure(made: Callable[[], LogitsProblem], direction: str, settings: Settings, left: int) -> list[dict[str, Any]]:
    problem = made()
    problem.direction = direction
    rows = compare(candidates(settings.device), problem, settings, seconds=min(10.0, settings.share(left)))
    # A copy moves twice the bytes of the logits; an operation must move those of its floor at least.
    share = problem.floor()["bytes"] / (2 * problem.logits.nbytes)
    for row in rows:
        row["floor"] = problem.floor()
        if row["status"] == "ok" and row["role"] != "floor" and COPY in row["ratio"]:
            row["copy_share"] = share / row["ratio"][COPY]["median"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One table for each shape and dtype, with both directions side by side."""
    from ..tables import direction_tables

    return direction_tables(rows, shape=("N", "V", "dtype"), divisors=(NAIVE,), memory=MEMORY, share=True)


def plot(rows: list[dict[str, Any]], figure: Any) -> None:
    """Time and memory of forward + backward, as bars."""
    from ..plots import bars

    bars(rows, figure, shape=("N", "V", "dtype"), divisor=NAIVE, memory=MEMORY)
