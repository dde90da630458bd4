"""What was to be reached, beside what was measured; missed targets are shown as such."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .candidate import GEMMS, NAIVE, SFT
from .problems import BOTH
from .tables import Row, by_case, case_title, markdown_table, number

WEIGHTED = "linear_weighted_logprob"


class Target(NamedTuple):
    """One line of the table; `met` is None where there is nothing to judge by."""

    what: str
    allowed: str
    measured: str
    met: bool | None


def targets_of(document: dict[str, Any]) -> list[Target]:
    """The targets of a result's suite and device."""
    makers = {
        ("head", "cpu"): _head_on_cpu,
        ("head", "cuda"): _head_on_cuda,
        ("logits", "cuda"): _logits_on_cuda,
        ("weights", "cpu"): _weights_on_cpu,
        ("weights", "cuda"): _weights_on_cuda,
        ("overhead", "cpu"): _overhead_on_cpu,
        ("recipe", "cpu"): _recipe,
        ("recipe", "cuda"): _recipe,
    }
    maker = makers.get((document["suite"], document["hardware"]["type"]))
    return list(maker(document["rows"])) if maker else []


def table_of(document: dict[str, Any]) -> str:
    """The same as Markdown; empty where there are none."""
    found = targets_of(document)
    words = {True: "yes", False: "**no**", None: "-"}
    lines = [[t.what, t.allowed, t.measured, words[t.met]] for t in found]
    return markdown_table(["target", "allowed", "measured", "met"], lines) if found else ""


def _at_most(what: str, value: float | None, limit: float, unit: str = "") -> Target:
    if value is None:
        return Target(what, f"≤ {number(limit)}{unit}", "not measured", None)
    return Target(what, f"≤ {number(limit)}{unit}", f"{number(value)}{unit}", value <= limit)


def _named(rows: list[Row], name: str) -> Row | None:
    return next((r for r in rows if r["candidate"] == name and r["status"] == "ok"), None)


def _median(row: Row | None, divisor: str | None = None) -> float | None:
    if row is None:
        return None
    if divisor is None:
        return float(row["time_ms"]["median"])
    return float(row["ratio"][divisor]["median"]) if divisor in row["ratio"] else None


def _against_peers(rows: list[Row], own: Row | None, *, without_logits: bool) -> float | None:
    """Our time over that of the fastest peer."""
    peers = [r for r in rows if r["status"] == "ok" and r["role"] == "peer"]
    times = [r["time_ms"]["median"] for r in peers if not (without_logits and r["holds_logits"])]
    return None if own is None or not times else float(own["time_ms"]["median"] / min(times))


def _memory(own: Row | None, naive: Row | None, kept: str) -> float | None:
    """Our memory beyond the gradients (their dtype as `kept` says) over naive PyTorch's beyond its own gradients."""
    if own is None or naive is None:
        return None
    return float(own["memory"][f"beyond_{kept}_bytes"] / max(1, naive["memory"]["beyond_gradients_bytes"]))


def _head_on_cpu(rows: list[Row]) -> Iterator[Target]:
    both = [r for r in rows if r["case"]["direction"] == BOTH]
    for values, of_case in by_case(both, ("N", "H", "V", "dtype")).items():
        title = case_title(("N", "H", "V", "dtype"), values)
        own, naive = _named(of_case, WEIGHTED), _named(of_case, NAIVE)
        limit = 1.05 if values[-1] == "float32" else 0.9
        yield _at_most(f"{title}: time ÷ naive", _median(own, NAIVE), limit)
        yield _at_most(f"{title}: memory beyond gradients ÷ naive's", _memory(own, naive, "gradients"), 0.15)
        if values[-1] != "float32":
            share = _memory(own, naive, "gradients_fp32_dw")
            yield _at_most(f"{title}: memory beyond dHidden and an fp32 dW ÷ naive's beyond gradients", share, 0.15)
        fastest = _against_peers(of_case, own, without_logits=True)
        yield _at_most(f"{title}: time ÷ fastest that holds no [N, V]", fastest, 1.0)


def _head_on_cuda(rows: list[Row]) -> Iterator[Target]:
    for values, of_case in by_case(rows, ("N", "H", "V", "dtype", "direction")).items():
        title = case_title(("N", "H", "V", "dtype", "direction"), values)
        own = _named(of_case, WEIGHTED)
        if values == (8192, 4096, 128256, "bfloat16", BOTH):
            yield _at_most(f"{title}: time ÷ bare GEMMs", _median(own, GEMMS), 1 / 0.85)
            room = None if own is None else own["memory"]["beyond_gradients_fp32_dw_bytes"] / 2**30
            yield _at_most(f"{title}: memory beyond dHidden and an fp32 dW", room, 1.0, " GiB")
        yield _at_most(f"{title}: time ÷ fastest peer", _against_peers(of_case, own, without_logits=False), 1.0)
        waits = None if own is None else own.get("host_wait")
        yield Target(f"{title}: waits for the device", "0", waits or "0" if own else "not measured", own and not waits)


def _logits_on_cuda(rows: list[Row]) -> Iterator[Target]:
    for values, of_case in by_case(rows, ("N", "V", "dtype", "direction")).items():
        own = _named(of_case, "sequence_logprob")
        share = None if own is None else own.get("copy_share")
        title = f"{case_title(('N', 'V', 'dtype', 'direction'), values)}: of copy bandwidth"
        measured = "not measured" if share is None else f"{share:.0%}"
        yield Target(title, "≥ 85%", measured, None if share is None else share >= 0.85)


def _weights_on_cpu(rows: list[Row]) -> Iterator[Target]:
    of_case = by_case(rows, ("K", "B", "costs")).get((8, 64, "per response"), [])
    time = _median(_named(of_case, "constraint_weights"))
    yield _at_most("K = 8, B = 64: time", None if time is None else time * 1e3, 150.0, " µs")


def _overhead_on_cpu(rows: list[Row]) -> Iterator[Target]:
    for (costs,), of_costs in by_case(rows, ("costs",)).items():
        own = _named([row for row in of_costs if row["case"]["K"] == 8], "BarrierObjective") or {}
        for key, what in (("call_us", "a call"), ("step_us", "a step")):
            yield _at_most(f"K = 8, B = 16, {costs}: {what}", own.get(key), 300.0, " µs")
        yield _at_most(f"K = 8, B = 16, {costs}: reads of tensors in a call", own.get("reads_in_call"), 0)
        kept = own.get("kept_objects_per_window")
        # Python's lists of free objects still fill now and then; what a window keeps would be 1 or more.
        yield _at_most(f"K = 8, B = 16, {costs}: objects kept per window", kept, 0.1)


def _recipe(rows: list[Row]) -> Iterator[Target]:
    for (model, start, responses), of_case in by_case(rows, ("model", "start", "responses")).items():
        own, title = _named(of_case, "recipe"), f"{model}, {start}, responses {responses}"
        if responses == "drawn":
            ratio = _median(own, NAIVE)
            speed = None if ratio is None else 1 / ratio
            measured = "not measured" if speed is None else number(speed)
            yield Target(f"{title}: tokens/s ÷ naive", "≥ 1.8", measured, None if speed is None else speed >= 1.8)
        else:
            yield _at_most(f"{title}: time ÷ plain fine-tuning on the same packed tokens", _median(own, SFT), 1.1)


def _weights_on_cuda(rows: list[Row]) -> Iterator[Target]:
    of_case = by_case(rows, ("K", "B", "costs")).get((8, 64, "per response"), [])
    own = _named(of_case, "constraint_weights")
    found = {} if own is None else own.get("launches", {})
    yield _at_most("K = 8, B = 64: launches", found.get("kernels"), 1)
    yield _at_most("K = 8, B = 64: time on the device", found.get("device_us"), 10.0, " µs")
    graph = _named(of_case, "constraint_weights, CUDA graph")
    yield Target("K = 8, B = 64: in a CUDA graph", "works", "works" if graph else "does not", graph is not None)
