"""Every operation once on small odd shapes, for compute-sanitizer: `python -m benchmarks.small --device cuda`."""

import argparse
import sys
from collections.abc import Sequence

import torch

from .candidate import Candidate
from .clock import quick_collection
from .costs import WeightsProblem
from .measure import compare
from .problems import HeadProblem, LogitsProblem
from .settings import Settings
from .suites import head, logits, weights


def failures(device: torch.device) -> list[str]:
    """What did not run, or gave a wrong result; checked as in the benchmarks, timed once."""
    settings = Settings(device=device, repeats=1, compile=False, quiet=True)
    found: list[str] = []

    def check(candidates: Sequence[Candidate], problem: object, what: str) -> None:
        # The sanitizer runs without torch's cache of memory, and a graph cannot be captured without that.
        wanted = [c for c in candidates if c.role in ("naive", "ours") and "graph" not in c.name]
        for row in compare(wanted, problem, settings, memory=False):  # type: ignore[arg-type]
            if row["status"] != "ok":
                found.append(f"{row['candidate']}, {what}: {row['error']}")

    with quick_collection():
        for dtype in (torch.float32, torch.bfloat16):
            for rows, size, vocab in ((7, 16, 252), (33, 96, 1031), (1, 123, 507)):
                for skew in ("spread", "one"):
                    what = f"{(rows, size, vocab)}, {skew}, {dtype}"
                    head_problem = HeadProblem((rows, size, vocab), dtype, device, skew=skew)
                    check(head.ours(device) + head.STANDARDS, head_problem, what)
                    logits_problem = LogitsProblem((rows, vocab), dtype, device, skew=skew)
                    check(logits.ours(device) + logits.STANDARDS, logits_problem, what)
        for constraints, responses, per_token in ((1, 4, False), (3, 68, False), (5, 9, True)):
            costs = WeightsProblem(constraints, responses, device, per_token=per_token)
            check(weights.candidates(device), costs, f"{(constraints, responses, per_token)}")
    return found


def main() -> int:
    """1 if anything failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.small", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    found = failures(torch.device(parser.parse_args().device))
    print("\n".join(found) or "all right")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
