"""From the lines of all runs to a document, and from that to Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from ..environment import hardware, revision
from ..environment import versions as environment_versions
from ..output import LAYOUT, path_of, stamp
from ..tables import markdown_table, number
from .methods import METHODS
from .problems import PROBLEMS, problem
from .run import Row, reference_multipliers, versions

SUITE, ORACLE_SUITE, UNITS_SUITE = "solvers", "solvers-oracle", "solvers-units"
#: Scores that are averaged over seeds as they are.
_MEANS = ("gap", "above", "multiplier_error", "cpu_s")
_VECTORS = ("violation", "value", "multiplier", "multiplier_std")

READING = """\
**Merit** is what a method is compared by, over the last quarter of the steps and the exact problem:
f - f* + 2 lambda*.(positive violation), averaged over steps and seeds. For these convex problems it is never negative,
0 at the optimum alone, and in the loss's unit; bounds that are not active count with a tenth of the largest multiplier.
After ± is its standard error over seeds; "÷ best" is the ratio to the best row of the column, in bold where it is 1 (in
the first table its geometric mean over the problems, the worst of them, and on how many it is 1).
**Violation** is the mean positive one, summed over bounds; **mean value** that of the bound with the largest multiplier
(0 is on it); both in the constraint's unit. **Above** is the share of steps at which any bound is exceeded by more than
0.01 units. **Multiplier** is that of the main bound over its true value, with its standard deviation over steps.

All methods get the same random numbers, start, optimizer (Adam) and learning rate. The library's rules (in bold) and
the baselines DualAscent and AugmentedLagrangian see averaged estimates (EMA) divided by a scale they are given or find;
other packages take each step's mean, by default in the constraint's own unit, and their settings "in units" are told
the problem's unit. Theirs is the multiplier they store. "Best of grid" is chosen for each problem with hindsight, on
the seeds that are shown, among at most four settings.
"""


def _average(rows: list[Row]) -> Row:
    """One row from those of all seeds of a setting."""
    first = rows[0]
    found = {key: first[key] for key in ("problem", "method", "setting")} | {"seeds": len(rows)}
    found |= {"role": METHODS[first["method"]].role, "failed": sum(row["status"] == "failed" for row in rows)}
    found |= {"diverged": sum(row["status"] == "diverged" for row in rows)}
    found |= {"error": next((row["error"] for row in rows if row["status"] == "failed"), None)}
    merits = [row["merit"] for row in rows]
    found["merit"] = fmean(merits)
    finite = len(rows) > 1 and math.isfinite(found["merit"])
    found["merit_stderr"] = stdev(merits) / math.sqrt(len(rows)) if finite else None
    found["merits"] = merits
    good = [row for row in rows if row["status"] == "ok"]
    if good:
        found |= {key: fmean(row[key] for row in good) for key in _MEANS}
        columns = {key: zip(*(row[key] for row in good), strict=True) for key in _VECTORS}
        found |= {key: [fmean(values) for values in column] for key, column in columns.items()}
        if first["setting"] == default_of(first["method"]):
            lines = {key: zip(*(row["trace"][key] for row in good), strict=True) for key in first["trace"]}
            found["trace"] = {key: [round(fmean(values), 4) for values in line] for key, line in lines.items()}
    return found


def default_of(method: str) -> str:
    """The name of a method's default setting."""
    return next(iter(METHODS[method].settings))


def averages(rows: list[Row]) -> list[Row]:
    """A row for each problem, method and setting, in their order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        groups.setdefault((row["problem"], row["method"], row["setting"]), []).append(row)
    return [_average(group) for group in groups.values()]


def new_document(suite: str, rows: list[Row], settings: Row, command: str) -> dict[str, Any]:
    """The JSON of a result, with what it was made on and with."""
    return {
        "layout": LAYOUT,
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "hardware": hardware(torch.device("cpu")),
        "versions": {"python": environment_versions()["python"]} | versions(),
        "revision": revision(),
        "implementation": None,
        "settings": settings,
        "complete": True,
        "rows": rows,
    }


def with_kept(document: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """The document with the rows of other methods in an earlier one, which say what revision they are of.

    Raises:
        ValueError: They were made with other steps, seeds, versions or hardware.
    """
    for key in ("settings", "versions", "hardware"):
        if document[key] != kept[key]:
            raise ValueError(f"keep: a result with {key} {kept[key]}; allowed: {document[key]}")
    own = {row["method"] for row in document["rows"]}
    others = [{"revision": kept["revision"]["commit"]} | row for row in kept["rows"] if row["method"] not in own]
    problems, methods = list(PROBLEMS), list(METHODS)
    rows = [*document["rows"], *others]
    rows.sort(key=lambda row: (problems.index(row["problem"]), methods.index(row["method"])))
    return document | {"rows": rows}


def _kept(rows: list[Row]) -> str:
    """Which methods' rows were made earlier, and when."""
    revisions: dict[str, dict[str, None]] = {}
    for row in rows:
        if "revision" in row:
            revisions.setdefault(row["revision"][:12], {})[row["method"]] = None
    return " ".join(f"Kept from revision {commit}: {', '.join(methods)}." for commit, methods in revisions.items())


def defaults(rows: list[Row]) -> list[Row]:
    """The rows of default settings."""
    return [row for row in rows if row["setting"] == default_of(row["method"])]


def best_of_grid(rows: list[Row]) -> list[Row]:
    """For each problem and method the row of its best setting."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["problem"], row["method"])
        if key not in best or row["merit"] < best[key]["merit"]:
            best[key] = row
    return list(best.values())


def ratios(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Merit over the best merit among these rows, by problem and method."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["problem"]] = min(row["merit"], best.get(row["problem"], math.inf))
    return {(r["problem"], r["method"]): r["merit"] / best[r["problem"]] for r in rows if best[r["problem"]] < math.inf}


def _number(value: float | None) -> str:
    if value is not None and not math.isfinite(value):
        return "∞"
    return number(value)


def _ratio(value: float | None) -> str:
    text = _number(value)
    return f"**{text}**" if value == 1 else text


def _merit(row: Row) -> str:
    if row["failed"] or row["diverged"]:
        return f"{row['failed'] + row['diverged']} of {row['seeds']} failed"
    return _number(row["merit"]) + (f" ± {number(row['merit_stderr'], 2)}" if row["merit_stderr"] is not None else "")


def _named(method: str) -> str:
    return f"**{method}**" if METHODS[method].role == "ours" else method


def _details(row: Row) -> list[str]:
    if "gap" not in row:
        return ["-"] * 6
    main = int(problem(row["problem"]).solution.multipliers.argmax())
    return [
        _number(row["gap"]),
        _number(row["value"][main]),
        _number(sum(row["violation"])),
        f"{row['above']:.0%}",
        f"{_number(row['multiplier'][main])} ± {number(row['multiplier_std'][main], 2)}",
        _number(row["multiplier_error"]),
    ]


def problem_table(name: str, rows: list[Row]) -> str:
    """The defaults and the best settings on one problem."""
    header = ["", "merit", "÷ best", "task gap", "mean value", "violation", "above", "multiplier", "multiplier error"]
    parts = [f"## {name}", problem(name).about[0].upper() + problem(name).about[1:] + "."]
    multipliers = problem(name).solution.multipliers
    labels = problem(name).bounds.labels
    weights = (2 * reference_multipliers(multipliers)).tolist()
    truth = [f"{label} {m:.3g} ({w:.3g})" for label, m, w in zip(labels, multipliers.tolist(), weights, strict=True)]
    parts.append("True multipliers (weight of a violation in the merit): " + ", ".join(truth) + ".")
    of_problem = [row for row in rows if row["problem"] == name]
    kinds: tuple[tuple[str, Callable[[list[Row]], list[Row]]], ...] = (
        ("Defaults", defaults),
        ("Best of grid", best_of_grid),
    )
    for title, choose in kinds:
        chosen = choose(of_problem)
        if title == "Best of grid" and len(chosen) == len(of_problem):
            continue  # only defaults were run
        to_best = ratios(chosen)
        body = []
        for row in sorted(chosen, key=lambda r: r["merit"]):
            label = f"{_named(row['method'])} ({row['setting']})"
            body.append([label, _merit(row), _ratio(to_best.get((name, row["method"]))), *_details(row)])
        parts.append(f"**{title}**\n\n{markdown_table(header, body)}")
    return "\n\n".join(parts)


def summary_table(rows: list[Row]) -> str:
    """Each method's ratio to the best, over all problems: geometric mean, worst, and how often it was the best."""
    to_best = [ratios(defaults(rows)), ratios(best_of_grid(rows))]
    body = []
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for of_kind in to_best:
            own = [value for (_, method), value in of_kind.items() if method == name]
            mean = math.exp(fmean(math.log(v) for v in own)) if own and max(own) < math.inf else math.inf
            cells += [_number(mean), _number(max(own, default=math.inf)), str(sum(v == 1 for v in own))]
        body.append([_named(name), *cells])
    header = ["", "default ÷ best", "worst", "times best", "best of grid ÷ best", "worst", "times best"]
    return markdown_table(header, body)


def losses(rows: list[Row]) -> str:
    """Where the library's default was not the best default, said in words."""
    chosen = defaults(rows)
    to_best = ratios(chosen)
    lines = []
    for name in dict.fromkeys(row["problem"] for row in chosen):
        own = to_best.get((name, "AdaptiveBarrier"))
        ahead = [m for (p, m), value in to_best.items() if p == name and own is not None and value < own]
        if own is not None and own > 1:
            lines.append(f"- {name}: {_number(own)} times the best merit; ahead of it: {', '.join(ahead)}.")
    return "Where the library's default is not the best default:\n\n" + "\n".join(lines) if lines else ""


def not_run(rows: list[Row]) -> str:
    """Methods with failed runs, each with its error, once."""
    errors = {f"{row['method']}: {row['error']}" for row in rows if row["error"]}
    return "Not run:\n\n" + "\n".join(f"- {text}" for text in sorted(errors)) if errors else ""


def markdown(document: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page of a result; ``pictures`` are file names by problem, and under "profile"."""
    rows, settings = document["rows"], document["settings"]
    parts = ["# Rules for constraints under sampling noise", stamp(document), READING.rstrip()]
    parts.append(f"{settings['steps']} steps, {settings['seeds']} seeds. {_kept(rows)}".rstrip())
    parts += [summary_table(rows), losses(rows), not_run(rows)]
    if "profile" in pictures:
        parts.append(
            f"Share of problems on which a method is within a factor of the best:\n\n![]({pictures['profile']})"
        )
    for name in dict.fromkeys(row["problem"] for row in rows):
        parts.append(problem_table(name, rows))
        if name in pictures:
            parts.append(f"![{name}]({pictures[name]})")
    return "\n\n".join(part for part in parts if part) + "\n"


def oracle_markdown(document: dict[str, Any]) -> str:
    """The page of the comparison with an oracle."""
    body = [
        [
            f"{row['final_lr']:g}",
            f"{row['method']} ({row['setting']})",
            f"{row['above']:.1%}",
            number(row["gap"]),
            "-"
            if row["method"] == "oracle"
            else (_number(row["over_frontier"]) if row["over_frontier"] else "outside"),
            number(row["multiplier"]),
        ]
        for row in document["rows"]
    ]
    header = ["final learning rate", "", "above", "task gap", "÷ oracle at the same share", "multiplier ÷ true"]
    about = (
        "The oracle holds the true multiplier of a bound that is stricter by d. Above: steps of the last quarter with "
        "E[cost] > 0.01. A rule's gap is divided by the oracle's, interpolated at the rule's share of steps above; "
        "outside: the share is beyond the oracle's, or its gap there is not positive."
    )
    settings = document["settings"]
    return (
        "\n\n".join(
            [
                "# How close to an oracle",
                stamp(document),
                f"{about} {settings['steps']} steps, {settings['seeds']} seeds. The oracle's multiplier is that of its "
                "own bound, over the one at d = 0.",
                markdown_table(header, body),
            ]
        )
        + "\n"
    )


def units_markdown(document: dict[str, Any]) -> str:
    """The page of losses in other units."""
    rows, settings = document["rows"], document["settings"]
    columns = list(rows[0]["merits"])
    scales = list(dict.fromkeys(row["loss_scale"] for row in rows))
    body = [
        [row["problem"], f"{row['loss_scale']:g}", *(number(row["merits"][name]) for name in columns)] for row in rows
    ]
    means = [
        [f"{scale:g}", *(number(_geometric_mean_ratio(rows, scale, name)) for name in columns[1:])] for scale in scales
    ]
    about = (
        "The merit (see the page of all methods) of `AdaptiveBarrier` with the loss multiplied by a number, divided by "
        'it again: 0 is the optimum. "told": `unit` is that number, which gives the very run of `unit=1` on the plain '
        f"loss. {settings['steps']} steps, {settings['seeds']} seeds."
    )
    parts = [
        "# Losses in other units",
        stamp(document),
        about,
        "Geometric mean over the problems of the merit over that of `unit=1`:",
        markdown_table(["loss times", *columns[1:]], means),
        markdown_table(["problem", "loss times", *columns], body),
    ]
    return "\n\n".join(parts) + "\n"


def _geometric_mean_ratio(rows: list[Row], scale: float, name: str) -> float:
    """Over the problems at this loss scale: the merit of a column over that of the first."""
    merits = [next(iter(row["merits"].values())) / row["merits"][name] for row in rows if row["loss_scale"] == scale]
    return math.exp(-fmean(map(math.log, merits)))


def write(document: dict[str, Any], folder: Path) -> Path:
    """The page and the pictures beside the JSON."""
    path = path_of(document, folder).with_suffix(".md")
    if document["suite"] == ORACLE_SUITE:
        path.write_text(oracle_markdown(document), encoding="utf-8")
        return path
    if document["suite"] == UNITS_SUITE:
        path.write_text(units_markdown(document), encoding="utf-8")
        return path
    from .plots import save_pictures

    path.write_text(markdown(document, save_pictures(document["rows"], path)), encoding="utf-8")
    return path
