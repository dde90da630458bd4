"""Markdown tables from the rows of a result."""

from collections.abc import Iterable, Sequence
from typing import Any

from .candidate import NAIVE
from .problems import BOTH, FORWARD

Row = dict[str, Any]


def by_case(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows grouped by some fields of their case, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row["case"].get(key) for key in keys), []).append(row)
    return found


def case_title(keys: Sequence[str], values: Sequence[Any]) -> str:
    """N = 1024, V = 49152, bfloat16."""
    return ", ".join(str(v) if isinstance(v, str) else f"{k} = {v}" for k, v in zip(keys, values, strict=True))


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent; a dash for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, optional: Sequence[str] = ()) -> str:
    """A table; columns of numbers are aligned to the right, and those of `optional` left out where nothing is known."""
    body = list(lines)
    kept = [i for i, name in enumerate(header) if name not in optional or any(line[i] != "-" for line in body)]
    header, body = [header[i] for i in kept], [[line[i] for i in kept] for line in body]
    rule = ["---:" if _is_number(column) else "---" for column in zip(*body, strict=True)] or ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body])


def _is_number(column: Iterable[str]) -> bool:
    cells = [cell for cell in column if cell != "-"]
    return bool(cells) and all(cell[0].isdigit() for cell in cells)


def not_run(rows: Iterable[Row]) -> str:
    """The candidates that were not timed, each with why, once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault(f"{row['candidate']}: {row['error']}", []).append(row["case"].get("direction", ""))
    if not reasons:
        return ""
    return "Not timed:\n\n" + "\n".join(f"- {text.replace('|', ' ')}" for text in reasons)


def _ratio(row: Row | None, divisor: str) -> float | None:
    return None if row is None else row["ratio"].get(divisor, {}).get("median")


def _time(row: Row | None) -> float | None:
    return None if row is None else row["time_ms"]["median"]


def _mebibytes(row: Row | None, key: str) -> float | None:
    if row is None or row["role"] == "floor" or key not in row.get("memory", {}):
        return None
    return float(row["memory"][key]) / 2**20


def _worst_error(row: Row | None) -> str:
    errors = (row or {}).get("relative_error") or {}
    return f"{max(errors.values()):.0e}" if errors else "-"


def direction_tables(
    rows: list[Row], *, shape: Sequence[str], divisors: Sequence[str], memory: tuple[str, str], share: bool = False
) -> str:
    """A table for each shape: forward and forward + backward of a candidate on one line, fastest first.

    `memory` is a key of a row's "memory" and the heading of its column.
    """
    parts = []
    for values, of_case in by_case(rows, shape).items():
        timed = [row for row in of_case if row["status"] == "ok"]
        lines: dict[str, dict[str, Row]] = {row["candidate"]: {} for row in timed}
        for row in timed:
            lines[row["candidate"]][row["case"]["direction"]] = row
        header = ["", "gives", "holds [N, V]"]
        for direction in (FORWARD, "forward + backward"):
            header += [f"{direction}: ms", *(f"÷ {d.split()[-1 if 'GEMM' in d else 0]}" for d in divisors)]
            header += ["of copy bandwidth"] * share
        header += [f"MiB beyond {memory[1]}", "error"]
        body = []
        # A candidate that failed in one direction goes to the end.
        for name, both in sorted(lines.items(), key=lambda item: _time(item[1].get(BOTH)) or float("inf")):
            one = next(iter(both.values()))
            label = f"**{name}**" if one["role"] == "ours" else name
            cells = [label, one["gives"] or "-", "yes" if one["holds_logits"] else "no"]
            for direction in (FORWARD, BOTH):
                row = both.get(direction)
                cells += [number(_time(row)), *(number(_ratio(row, d)) for d in divisors)]
                cells += ["-" if row is None or "copy_share" not in row else f"{row['copy_share']:.0%}"] * share
            cells += [number(_mebibytes(both.get(BOTH), memory[0])), _worst_error(both.get(BOTH))]
            body.append(cells)
        parts.append(f"**{case_title(shape, values)}**\n\n{markdown_table(header, body)}")
        parts.append(not_run(of_case))
    return "\n\n".join(part for part in parts if part)


def weights_tables(rows: list[Row]) -> str:
    """A table for each case of the weights suite, in microseconds."""
    shape = ("K", "B", "costs")
    header = ["", "µs", "÷ naive", "host µs per call", "µs of kernels", "launches or operators", "error"]
    parts = []
    for values, of_case in by_case(rows, shape).items():
        body = []
        timed = [row for row in of_case if row["status"] == "ok"]
        for row in sorted(timed, key=lambda r: r["time_ms"]["median"]):
            name = f"**{row['candidate']}**" if row["role"] == "ours" else row["candidate"]
            found = row.get("launches", {})
            count = found.get("kernels", found.get("operators"))
            copies = f" and {found['copies']:.0f} copies" if found.get("copies") else ""
            body.append(
                [
                    name,
                    number(row["time_ms"]["median"] * 1e3),
                    number(_ratio(row, NAIVE)),
                    number(row.get("host_us")),
                    number(found.get("device_us")),
                    number(count) + copies,
                    _worst_error(row),
                ]
            )
        parts += [f"**{case_title(shape, values)}**\n\n{markdown_table(header, body)}", not_run(of_case)]
    return "\n\n".join(part for part in parts if part)


def overhead_table(rows: list[Row]) -> str:
    """A line for each case of the overhead suite, in microseconds."""
    shape = ("K", "B", "costs")
    header = [
        "",
        "by hand",
        "window",
        "÷ by hand",
        "call",
        "step",
        "reads in call",
        "reads in step",
        "objects kept a window",
    ]
    body, parts = [], []
    for values, of_case in by_case(rows, shape).items():
        timed = {row["role"]: row for row in of_case if row["status"] == "ok"}
        own, naive = timed.get("ours"), timed.get("naive")
        if own is not None:
            keys = ("call_us", "step_us", "reads_in_call", "reads_in_step", "kept_objects_per_window")
            times = [None if row is None else row["time_ms"]["median"] * 1e3 for row in (naive, own)]
            cells = [number(x) for x in (*times, _ratio(own, NAIVE), *(own[key] for key in keys))]
            body.append([f"**{own['candidate']}**, {case_title(shape, values)}", *cells])
        parts.append(not_run(of_case))
    return "\n\n".join(part for part in (markdown_table(header, body), *parts) if part)


#: The parts of a training step, in their order.
PARTS = ("generation", "costs", "forward", "head", "backward", "optimizer", "objective")


def step_tables(rows: list[Row]) -> str:
    """A table for each case of the recipe suite: time, tokens per second, memory and the parts in seconds."""
    shape, tables = ("model", "start", "responses"), []
    for values, of_case in by_case(rows, shape).items():
        timed = sorted((r for r in of_case if r["status"] == "ok"), key=lambda r: float(r["time_ms"]["median"]))
        lines = []
        for row in timed:
            seconds = row["time_ms"]["median"] / 1e3
            error = max(row.get("relative_error", {}).values(), default=None)
            cells = [
                seconds,
                _ratio(row, NAIVE),
                row["tokens"] / seconds,
                row["memory"]["beyond_gradients_bytes"] / 2**20,
            ]
            name = f"**{row['candidate']}**" if row["role"] == "ours" else row["candidate"]
            known = "-" if error is None else f"{error:.0e}"
            lines.append([name, *map(number, cells), known, *(number(row["seconds"][part], 2) for part in PARTS)])
        header = ["", "s", "÷ naive", "tokens/s", "MiB beyond weights and gradients", "error", *PARTS]
        tables += [f"**{case_title(shape, values)}**", markdown_table(header, lines), not_run(of_case)]
    return "\n\n".join(part for part in tables if part)


def scaling_table(rows: list[Row]) -> str:
    """A line for each point, a column for each candidate: milliseconds, and the ratio to the naive one."""
    parts = []
    for (axis,), of_axis in by_case(rows, ("axis",)).items():
        names = list(dict.fromkeys(row["candidate"] for row in of_axis if row["status"] == "ok"))
        body = []
        points = by_case(of_axis, ("value",))
        for value in sorted((value for (value,) in points), key=lambda v: (isinstance(v, str), v)):
            of_point = points[(value,)]
            timed = {row["candidate"]: row for row in of_point if row["status"] == "ok"}
            body.append(
                [
                    f"{axis} = {value}",
                    *(
                        "-" if n not in timed else f"{number(_time(timed[n]))} ({number(_ratio(timed[n], NAIVE))})"
                        for n in names
                    ),
                ]
            )
        parts += [markdown_table(["ms (÷ naive)", *names], body) if names else "", not_run(of_axis)]
    return "\n\n".join(part for part in parts if part)
