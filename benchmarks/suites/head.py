"""Linear operations: hidden states [N, H] and LM head [V, H] to sequence log-probabilities, loss and gradients."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from ..candidate import GEMMS, NAIVE, Candidate, Case, Outputs
from ..measure import compare
from ..peers.head import PEERS, Forward, naive_forward
from ..problems import BOTH, FORWARD, HeadProblem
from ..settings import Settings

SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "cpu": [(1024, 576, 49152), (512, 2048, 128256)],
    "cuda": [(8192, 4096, 128256), (4096, 4096, 128256), (16384, 2048, 49152)],
}
QUICK: dict[str, list[tuple[int, int, int]]] = {"cpu": [(64, 32, 503)], "cuda": [(1024, 1024, 8192)]}
#: What the memory column shows.
MEMORY = ("beyond_gradients_bytes", "inputs and gradients")
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}


def weighted(**options: Any) -> Callable[[HeadProblem], Forward]:
    """`linear_weighted_logprob`."""

    def build(p: HeadProblem) -> Forward:
        from barrierlm_kernels import linear_weighted_logprob

        def forward() -> Outputs:
            out = linear_weighted_logprob(
                p.hidden, p.weight, p.targets, p.cu_seqlens, p.weights, weights_per="sequence", **options
            )
            return {"loss": -out.total, "sequences": out.logps}

        return forward

    return build


def sequence(**options: Any) -> Callable[[HeadProblem], Forward]:
    """`linear_sequence_logprob`, with the weights applied to its result."""

    def build(p: HeadProblem) -> Forward:
        from barrierlm_kernels import linear_sequence_logprob

        def forward() -> Outputs:
            logps = linear_sequence_logprob(p.hidden, p.weight, p.targets, p.cu_seqlens, **options).logps
            return {"loss": -(logps * p.weights).sum(), "sequences": logps}

        return forward

    return build


def bare_gemms(p: HeadProblem) -> Callable[[], None]:
    """The products alone, into memory that is there: logits, and for gradients dHidden and dW."""
    logits = torch.empty(p.rows, p.vocab, dtype=p.dtype, device=p.device)
    dhidden, dweight = torch.empty_like(p.hidden), torch.empty_like(p.weight)

    @torch.no_grad()
    def run() -> None:
        torch.mm(p.hidden, p.weight.t(), out=logits)
        if p.direction == BOTH:
            torch.mm(logits, p.weight, out=dhidden)
            torch.mm(logits.t(), p.hidden, out=dweight)

    return run


def ours(device: torch.device) -> list[Candidate]:
    """Both operations, on a GPU with the torch reference too."""
    own: dict[str, Any] = {"role": "ours", "gives": "sequence"}
    found = [
        Candidate("linear_weighted_logprob", weighted(), **own),
        Candidate("linear_sequence_logprob", sequence(), **own),
    ]
    if device.type == "cuda":
        found.append(Candidate("linear_weighted_logprob, reference", weighted(impl="reference"), **own))
        found.append(Candidate("linear_sequence_logprob, reference", sequence(impl="reference"), **own))
    return found


STANDARDS = [
    Candidate(NAIVE, naive_forward, role="naive", holds_logits=True),
    Candidate(GEMMS, bare_gemms, role="floor", gives="", holds_logits=True),
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
        made = cache(partial(HeadProblem, shape, dtype, device))
        for direction in (BOTH, FORWARD):
            fields = {"N": shape[0], "H": shape[1], "V": shape[2], "dtype": str(dtype)[6:], "direction": direction}
            yield Case(fields, partial(_measure, made, direction, settings, left))
            left -= 1


def _measure(made: Callable[[], HeadProblem], direction: str, settings: Settings, left: int) -> list[dict[str, Any]]:
    problem = made()
    problem.direction = direction
    rows = compare(candidates(settings.device), problem, settings, seconds=settings.share(left))
    return [row | {"floor": problem.floor()} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """One table for each shape and dtype, with both directions side by side."""
    from ..tables import direction_tables

    return direction_tables(rows, shape=("N", "H", "V", "dtype"), divisors=(NAIVE, GEMMS), memory=MEMORY)


def plot(rows: list[dict[str, Any]], figure: Any) -> None:
    """Time and memory of forward + backward, as bars."""
    from ..plots import bars

    bars(rows, figure, shape=("N", "H", "V", "dtype"), divisor=GEMMS, memory=MEMORY)
