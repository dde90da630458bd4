"""`python -m benchmarks.ranks [--quick]`: measures, simulates, and writes results, picture and table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..environment import RESULTS, hardware, revision, slug, versions
from .measure import CHUNK, HEAD, measure
from .simulate import RANKS, WINDOWS, simulate

#: Assumed, not measured: seconds of a hop and bytes a second of a link between machines.
HOP, LINK = 10e-6, 25e9


def model_seconds(ranks: int, payload: int) -> float:
    """A tree's all-reduce: up and down, one hop a level, and the bytes twice over a link."""
    levels = max(0, ranks - 1).bit_length()
    return 2 * levels * HOP + (2 * payload / LINK if ranks > 1 else 0.0)


def window_bytes(constraints: int) -> int:
    """What `step` sends: 266 numbers in fp64 a constraint, and the number of calls."""
    return 8 * (1 + 266 * constraints)


def tables(results: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["### `objective.step()` over gloo on one machine", ""]
    lines += [
        "| ranks | constraints | collectives | bytes | ms | ms in one process |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for run in results["measured"]:
        for row in run["windows"]:
            numbers = (
                f"{row['calls']} | {row['bytes']:,} | {1e3 * row['seconds']:.2f} | {1e3 * row['seconds alone']:.2f}"
            )
            lines.append(f"| {run['ranks']} | {row['constraints']} | {numbers} |")
    rows, hidden, vocab = HEAD
    lines += ["", f"### The head over ranks: N = {rows}, H = {hidden}, V = {vocab}, fp32, chunks of {CHUNK} rows", ""]
    lines += ["| ranks | head | bytes handed to collectives | ms |", "|---:|---|---:|---:|"]
    for run in results["measured"]:
        for row in run.get("head", []):
            lines.append(f"| {run['ranks']} | {row['head']} | {row['bytes']:,} | {1e3 * row['seconds']:.0f} |")
    lines += [
        "",
        f"### Model of `step()` between machines: {HOP * 1e6:.0f} µs a hop, {LINK / 1e9:.0f} GB/s (assumed)",
        "",
    ]
    lines += ["| constraints | " + " | ".join(f"{p} ranks" for p in (8, 64, 256, 1000)) + " |", "|---:|" + "---:|" * 4]
    for count in (1, 10, 100):
        cells = (f"{1e6 * model_seconds(p, window_bytes(count)):.0f} µs" for p in (8, 64, 256, 1000))
        lines.append(f"| {count} | {' | '.join(cells)} |")
    lines += ["", f"### Simulated: {WINDOWS} windows; uneven ranks, stragglers that drop their samples", ""]
    columns = [k for k in results["simulated"][0] if k not in ("ranks", "order")]
    lines += [f"| ranks | sums added in | {' | '.join(columns)} |", "|---:|---|" + "---:|" * len(columns)]
    for row in results["simulated"]:
        lines.append(f"| {row['ranks']} | {row['order']} | {' | '.join(f'{row[c]:.2g}' for c in columns)} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Errors of the estimate, and disagreement of multipliers, over the number of ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=(9, 3.6))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    same = [r for r in rows if r["order"] == "same order"]
    other = [r for r in rows if r["order"] != "same order"]
    ranks, floor = [r["ranks"] for r in same], 1e-17
    left.plot(
        ranks[1:],
        [r["error of a mean of means"] for r in same][1:],
        "o-",
        color="#c1121f",
        label="mean of ranks' means",
    )
    left.plot(
        ranks, [r["standard error of a window"] for r in same], "--", color="#6c757d", label="sampling noise (s.e.)"
    )
    exact = [max(floor, r["estimate's relative error"]) for r in same]
    left.plot(ranks, exact, "o-", color="#003049", label="sums and counts (barrierlm)")
    left.set(title="Error of the estimate", ylabel="cost's units (bound: 1.2)", ylim=(floor / 3, 3))
    apart = [r["largest / smallest multiplier from own means"] - 1 for r in same]
    right.plot(ranks[1:], apart[1:], "o-", color="#c1121f", label="each rank's own mean")
    drift = [max(floor, r["multipliers' relative spread"]) for r in other]
    right.plot(
        [r["ranks"] for r in other],
        drift,
        "o--",
        color="#2a9d8f",
        label="barrierlm, sums in another order on each rank",
    )
    agree = [max(floor, r["multipliers' relative spread"]) for r in same]
    right.plot(ranks, agree, "o-", color="#003049", label="barrierlm (0, drawn at 1e-17)")
    right.set(title="Disagreement of the ranks' multipliers", ylabel="largest / smallest - 1", ylim=(floor / 3, 1e4))
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="ranks", xticks=ranks)
        axes.set_xticklabels([str(p) for p in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few ranks and repetitions; nothing is written")
    quick = parser.parse_args().quick
    cpu = torch.device("cpu")
    where = hardware(cpu)
    results: dict[str, Any] = {"hardware": where, "versions": versions(), "revision": revision()}
    results["measured"] = [measure(p, 5 if quick else 100) for p in ((2,) if quick else (2, 4, 8))]
    results["simulated"] = [simulate(p) for p in (RANKS[:3] if quick else RANKS)]
    results["simulated"] += [simulate(p, "own order") for p in ((4,) if quick else (4, 16, 64, 256))]
    text = f"# ranks, {where['name']}\n\n`step()` and the head over several ranks.\n\n" + tables(results)
    print(text)
    if not quick:
        name = f"ranks-{slug(where['name'])}"
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
        picture(results["simulated"], RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
