"""docs/paper.md: its tables and pictures are made of the result files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..environment import hardware, implementation, revision
from ..environment import versions as environment_versions
from ..output import LAYOUT, path_of, stamp
from ..tables import markdown_table, number
from .experiment import QUICK_STEPS, SFT_STEPS, TOGETHER, Row
from .glance import at_a_glance, date_of, in_order
from .groups import bounds_of, by_method, by_problem, change, name_of, reward_only, sft_rows
from .methods import ABOUT, DEFAULT, L3M, MM, MODIFIED, SFT
from .run import versions
from .targets import satisfied, search_lines, targets

SUITE = "paper"
#: What comes after it in docs/paper.md is written by hand, and kept.
END = "<!-- end of what `python -m benchmarks.paper report` writes -->"
HEAD = Path(__file__).with_name("page.md")


def new_document(rows: list[Row], settings: Row, command: str, *, complete: bool, case: str = "") -> dict[str, Any]:
    """The JSON of a result, with what it was made on and with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "layout": LAYOUT,
        "suite": SUITE,
        "case": case,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "hardware": hardware(device) | {"threads": settings["threads"]},
        "versions": {"python": environment_versions()["python"]} | versions(),
        "revision": revision(),
        "implementation": implementation(device),
        "settings": settings,
        "complete": complete,
        "rows": rows,
    }


def _each(rows: list[Row], show: Callable[[Row], str]) -> str:
    """What is shown of every seed, once where all are the same."""
    cells = [show(row) if row["status"] == "ok" else "failed" for row in rows]
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _measured(row: Row, split: str) -> str:
    names = dict.fromkeys(bound.measure for bound in bounds_of(row))
    found = (row[split]["measures"][name] for name in names)
    return ", ".join(f"{number(at['mean'])} ± {number(1.96 * at['stderr'], 2)}" for at in found)


def _multipliers(row: Row) -> str:
    return ", ".join("-" if value is None else number(value, 2) for value in row["training"]["multipliers"].values())


def _change(row: Row, plain: dict[int, Row], split: str) -> str:
    found = change(row, plain, split)
    if found is None:
        return "-"
    more, half = found
    return f"{more:+.1%}" + ("" if half is None else f" ± {half:.1%}")


def _held_out(split: str, rows: list[Row], plain: dict[int, Row]) -> list[str]:
    return [
        _each(rows, lambda r: f"{r[split]['nll']:.3f}"),
        _each(rows, lambda r: _change(r, plain, split)),
        _each(rows, lambda r: f"{r[split]['perplexity']:.1f}"),
        _each(rows, lambda r: _measured(r, split)),
        _each(rows, lambda r: r[split]["verdict"]),
        _each(rows, lambda r: f"{r[split]['censored']:.0%}"),
    ]


_HELD_OUT = ["NLL", "to SFT", "perplexity", "mean", "verdict", "censored"]


def _named(group: list[Row], rows: list[Row]) -> str:
    """The method, and which seeds where not all are there."""
    name, own, every = name_of(group[0]), [r["task"]["seed"] for r in group], {r["task"]["seed"] for r in rows}
    name = f"**{name}**" if group[0]["task"]["method"] in (DEFAULT, MODIFIED) else name
    return name if every == set(own) else f"{name}, seed {', '.join(map(str, own))}"


def _outside(row: Row) -> str:
    return f"{row['training']['infeasible_share']:.0%}"


def _training_loss(row: Row, plain: dict[int, Row]) -> str:
    seed = row["task"]["seed"]
    if seed not in plain:
        return "-"
    return f"{row['training']['task_loss'] - plain[seed]['training']['task_loss']:+.4f}"


def _grad_norm(row: Row) -> str:
    """Unknown in results of before it was kept."""
    return number(row["training"].get("grad_norm"))


def held_out_table(rows: list[Row], plain: dict[int, Row], split: str) -> str:
    """A line for each method on one problem."""
    body = [[_named(group, rows), *_held_out(split, group, plain)] for group in by_method(rows)]
    return markdown_table(["", *_HELD_OUT], body)


def training_table(rows: list[Row], plain: dict[int, Row]) -> str:
    """A line for each method on one problem: what happened during the run, and what it took."""
    body = [
        [
            _named(group, rows),
            _each(group, lambda r: str(r["training"]["feasible_at"] or "never")),
            _each(group, _outside),
            _each(group, _multipliers),
            _each(group, lambda r: _training_loss(r, plain)),
            _each(group, _grad_norm),
            _each(group, lambda r: f"{r['training']['censored']:.0%}"),
            _each(group, lambda r: f"{r['training']['responses']:,}"),
            _each(group, lambda r: f"{r['training']['seconds']:.0f}"),
            _each(group, lambda r: f"{r['test']['seconds'] + r['shifted']['seconds']:.0f}"),
        ]
        for group in by_method(rows)
    ]
    header = ["", "feasible at", "infeasible", "multiplier", "loss", "gradient", "censored", "responses", "s training"]
    return markdown_table([*header, "s evaluation"], body, optional=["gradient"])


def problem_section(name: str, rows: list[Row], plain: dict[int, Row], picture: str | None) -> str:
    """All that a problem's rows say."""
    problem = rows[0]["task"]["problem"]
    bounds = [
        f"{b.name}{f' ≥ {b.lower:g}' if b.lower is not None else ''}{f' ≤ {b.upper:g}' if b.upper is not None else ''}"
        for b in bounds_of(rows[0])
    ]
    start = "the model as it is"
    if problem["start"] == "sft":
        start = "the SFT run of the same seed, and so has twice its steps in all"
    parts = [f"### {name}", f"{'; '.join(bounds)}. Starts from {start}; responses end at {problem['cap']} tokens."]
    parts += [f"![{name}]({picture})"] if picture else []
    parts += ["Test prompts:", held_out_table(rows, plain, "test"), "Training:", training_table(rows, plain)]
    parts += ["Shifted, long prompts:", held_out_table(rows, plain, "shifted")]
    errors = [f"- {name_of(r)}, seed {r['task']['seed']}: {r['error']}" for r in rows if r["status"] != "ok"]
    return "\n\n".join([*parts, *(["Failed:", "\n".join(errors)] if errors else [])])


def plain_section(rows: list[Row]) -> str:
    """Plain fine-tuning with every number of steps, and what training for a reward alone reaches."""
    chosen = {row["key"] for row in sft_rows(rows).values()}
    body = []
    for row in (row for row in rows if row["status"] == "ok" and (not bounds_of(row) or reward_only(row))):
        name = "SFT" if not bounds_of(row) else row["task"]["problem"]["name"]
        values = [number(row["test"]["measures"][m]["mean"]) for m in ("length", "helpful", "harmless")]
        body.append(
            [
                f"**{name}**" if row["key"] in chosen else name,
                str(row["task"]["steps"]),
                str(row["task"]["seed"]),
                f"{row['validation_nll']:.3f}" if "validation_nll" in row else "-",
                f"{row['test']['nll']:.3f}",
                f"{row['test']['perplexity']:.1f}",
                *values,
                f"{row['test']['censored']:.0%}",
                f"{row['shifted']['nll']:.3f}",
                _grad_norm(row),
                f"{row['training']['seconds']:.0f}",
            ]
        )
    head = ["", "steps", "seed", "validation NLL", "test NLL", "perplexity", "length", "helpful", "harmless"]
    text = "In bold: what the others are held against. Its length is understated where responses are censored."
    if not body:
        return ""
    table = markdown_table([*head, "censored", "shifted NLL", "gradient", "s"], body, optional=["gradient"])
    return f"### Without bounds\n\n{text}\n\n{table}"


def claims_table(rows: list[Row]) -> str:
    """What is known of the paper's claims, each beside what was measured."""

    def counted(found: dict[str, tuple[int, int]]) -> str:
        return ", ".join(f"{name} {met} of {count}" for name, (met, count) in found.items()) or "not run"

    compared = (L3M, MM, DEFAULT)
    of_problem: list[dict[str, list[float]]] = []
    for name, part in by_problem(rows).items():
        found: dict[str, list[float]] = {}
        for row in part:
            if name != TOGETHER and row["task"]["method"] in compared and row["status"] == "ok":
                found.setdefault(row["task"]["method"], []).append(row["training"]["infeasible_share"])
        of_problem.append(found)
    ran = [method for method in compared if any(method in found for found in of_problem)]
    # Of other problems a method's share says nothing beside that of one that did not run them.
    common = [found for found in of_problem if all(method in found for method in ran)]

    def shares(method: str) -> str:
        if method not in ran:
            return f"{method} not run"
        found = [sum(of[method]) / len(of[method]) for of in common]
        return f"{method} {sum(found) / len(found):.0%}" if found else f"{method} on no problem of the others"

    ratios = [line[2] for line in search_lines(rows)]
    body = [
        ["length-constrained models, several windows", f"bounds met on test prompts: {counted(satisfied(rows, True))}"],
        ["helpful and harmless models with minimum rewards", f"bounds met: {counted(satisfied(rows, False))}"],
        [
            "fine-tuning and constraints in one run, without weights to be found",
            f"steps of the penalty's search over one run's: {', '.join(ratios) or 'not run'}",
        ],
        [
            "the relaxed barrier with s = μ², μ falling exponentially; min-max training as what it is compared with",
            "infeasible in the last quarter, mean over the problems that all of them ran: "
            + ", ".join(map(shares, compared)),
        ],
    ]
    text = (
        "What is known here of the paper's claims is in [papers](papers.md#l3ms). Its tables of numbers are not known, "
        "and are of other models and data."
    )
    return f"### Beside the paper\n\n{text}\n\n{markdown_table(['of the paper', 'measured here'], body)}"


def splits_table(rows: list[Row]) -> str:
    """The splits of the first row of each number of training pairs."""
    found: dict[str, list[str]] = {}
    for row in (row for row in rows if row["status"] == "ok"):
        for name, of in row["splits"].items():
            cells = [
                name,
                f"{of['pairs']:,}",
                str(of["conversations"]),
                number(of["mean_response"]),
                f"`{of['digest']}`",
            ]
            found.setdefault(" ".join(cells), cells)
    header = ["split", "pairs", "conversations", "mean response, tokens", "digest"]
    return markdown_table(header, found.values()) if found else ""


def section(document: dict[str, Any], pictures: dict[str, Path], page: Path) -> str:
    """All of one result file."""
    rows, settings = document["rows"], document["settings"]
    plain = sft_rows(rows)
    links = {name: os.path.relpath(path, page.parent) for name, path in pictures.items()}
    good = [row for row in rows if row["status"] == "ok"]
    steps = sorted({row["task"]["steps"] for row in rows})
    seeds = sorted({row["task"]["seed"] for row in rows})
    spent = sum(r["training"]["seconds"] + r["test"]["seconds"] + r["shifted"]["seconds"] for r in good) / 3600
    cores = sum(row["cpu_seconds"] for row in good) / 3600
    memory = max((row["peak_gb"] for row in good), default=0.0)
    sources = rows[0]["task"]["sources"]
    counts = f"steps {', '.join(map(str, steps))}; seeds {', '.join(map(str, seeds))}"
    what = f"{sources['model']} on {sources['data']}; {counts}"
    at_once = f"{settings['processes'] or 1} at a time with {settings['threads']} thread(s) each"
    took = f"{len(good)} runs, {spent:.1f} hours of training and evaluation in all ({cores:.1f} of a core), {at_once}"
    codes = {row["code"] for row in rows}
    tried = [
        (row["validation_nll"], row["task"]["steps"])
        for row in good
        if row["task"]["method"] == SFT and row["task"]["seed"] == 0
    ]
    notes = [f"{what}. {took}; peak memory of a process {memory:.1f} GB."]
    if settings["quick"]:
        why = "what the time of the quick version allows" if steps == [QUICK_STEPS] else "what was asked for"
        notes.append(f"{steps[0]} steps are {why}, not where SFT's NLL stops falling.")
    elif len(tried) > 1 and min(tried)[1] == SFT_STEPS[-1]:
        notes.append(f"SFT's validation NLL was still falling at {SFT_STEPS[-1]} steps, the most that are tried.")
    if len(codes) > 1:
        notes.append(f"**The rows are of {len(codes)} versions of the code**; the result file says which.")
    reached = targets(rows, complete=document["complete"])
    where = [document["case"], document["hardware"]["name"]]
    parts = [
        f"## {'Quick' if settings['quick'] else 'Full'} version, {', '.join(filter(None, where))}",
        stamp(document),
        " ".join(notes),
        splits_table(rows),
        "### Targets\n\n" + markdown_table(["target", "measured", "reached"], reached),
        claims_table(rows),
    ]
    found = search_lines(rows)
    if found:
        header = ["", "weights", "steps ÷ one run's", "weights that met", "kept", "ended"]
        parts.append("### What finding a weight costs\n\n" + markdown_table(header, found))
    parts.append(plain_section(rows))
    if "ends" in links:
        parts.append(f"### Where runs ended\n\n![held-out means and NLL]({links['ends']})")
    parts += [problem_section(name, part, plain, links.get(name)) for name, part in by_problem(rows).items()]
    return "\n\n".join(part for part in parts if part)


def glance_table(documents: list[dict[str, Any]]) -> str:
    """The default and min-max training on every problem, each by one result."""
    body = []
    for document, rows in at_a_glance(documents):
        plain = sft_rows(document["rows"])
        for group in by_method([row for row in rows if row["task"]["method"] in (DEFAULT, MM)]):
            first = group[0]
            held = dict(zip(_HELD_OUT, _held_out("test", group, plain), strict=True))
            body.append(
                [
                    first["task"]["problem"]["name"],
                    str(first["task"]["steps"]),
                    date_of(document, first)[:10],
                    _named(group, rows),
                    *(held[column] for column in ("to SFT", "mean", "verdict")),
                    _each(group, _outside),
                ]
            )
    header = ["", "steps", "date", "method", "to SFT", "mean", "verdict", "infeasible"]
    return markdown_table(header, body) if body else "No result yet."


def updated(text: str, documents: list[dict[str, Any]], results: Path, page: Path) -> str:
    """The page's text, written anew up to the mark; pictures go beside the results."""
    from .plots import save_pictures

    _, _, after = text.partition(END)
    methods = markdown_table(["method", "what it is"], [[name, about] for name, about in ABOUT.items()])
    head = HEAD.read_text(encoding="utf-8").replace("METHODS", methods).replace("GLANCE", glance_table(documents))
    parts = [section(d, save_pictures(d["rows"], path_of(d, results)), page) for d in documents]
    return "\n\n".join([head.rstrip(), *parts, END]) + (after or "\n")


def write(results: Path, page: Path) -> bool:
    """Write the page of the results that there are; without any there is none, and False is returned."""
    found = (json.loads(p.read_text(encoding="utf-8")) for p in results.glob(f"{SUITE}-*.json"))
    documents = in_order([document for document in found if document["rows"]])
    if not documents:
        return False
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(updated(text, documents, results, page), encoding="utf-8")
    return True
