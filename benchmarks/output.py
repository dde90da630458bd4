"""Result files: JSON with everything, a Markdown table and a picture beside it."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .environment import hardware, implementation, revision, slug, versions
from .settings import Settings
from .suites import SUITES, suite

#: Version of the JSON's layout.
LAYOUT = 1


def new_document(name: str, settings: Settings, command: str) -> dict[str, Any]:
    """All of a result but its rows."""
    return {
        "layout": LAYOUT,
        "suite": name,
        "question": SUITES[name],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "hardware": hardware(settings.device),
        "versions": versions(),
        "revision": revision(),
        "implementation": implementation(settings.device),
        "settings": {"quick": settings.quick, "repeats": settings.repeats, "budget": settings.budget},
        "complete": False,
        "rows": [],
    }


def path_of(document: dict[str, Any], folder: Path) -> Path:
    """Where the JSON goes: suite, device and what was picked out make the name."""
    quick = "-quick" if document["settings"]["quick"] else ""
    case = f"-{slug(document['case'])}" if document.get("case") else ""
    return folder / f"{document['suite']}-{slug(document['hardware']['name'])}{case}{quick}.json"


def save(document: dict[str, Any], folder: Path) -> Path:
    """Write the JSON, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(document, folder)
    half = path.with_suffix(f".{os.getpid()}.tmp")
    half.write_text(_on_one_line(json.dumps(document, indent=1, allow_nan=True)) + "\n", encoding="utf-8")
    half.replace(path)
    return path


def _on_one_line(text: str) -> str:
    """Lists of numbers; a line break is in no JSON string."""
    return re.sub(r"\[\n[-+.\w\s,]+\]", lambda found: " ".join(found[0].split()), text)


def load_all(folder: Path) -> list[dict[str, Any]]:
    """Every result in the folder, by suite and name."""
    order = list(SUITES)
    documents = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    documents = [d for d in documents if d.get("suite") in SUITES and not d["settings"]["quick"]]
    return sorted(documents, key=lambda d: (order.index(d["suite"]), d["hardware"]["name"]))


def stamp(document: dict[str, Any]) -> str:
    """One paragraph: hardware, versions, revision, date, command."""
    device, used = document["hardware"], {k: v for k, v in document["versions"].items() if v is not None}
    threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    commit = (document["revision"]["commit"] or "unknown")[:12] + (
        " with changes" if document["revision"]["dirty"] else ""
    )
    packages = ", ".join(f"{name} {version}" for name, version in used.items())
    bandwidth = document.get("copy_gb_per_s")
    copies = f"; copies move {bandwidth:.3g} GB/s" if bandwidth else ""
    copies += f'; impl="auto" runs the {document["implementation"]}' if document["implementation"] else ""
    unfinished = "" if document["complete"] else " **Not all of it was run.**"
    return (
        f"{device['name']}{threads}{copies}. {packages}. Revision {commit}, {document['date'][:10]}: "
        f"`{document['command']}`.{unfinished}"
    )


def markdown(document: dict[str, Any]) -> str:
    """The stamp and the suite's tables."""
    return f"{stamp(document)}\n\n{suite(document['suite']).table(document['rows'])}".rstrip() + "\n"


def write_beside(document: dict[str, Any], folder: Path, *, picture: bool) -> None:
    """The Markdown table and the picture of a result."""
    path = path_of(document, folder)
    title = f"# {document['suite']}, {document['hardware']['name']}\n\n{document['question']}\n\n"
    path.with_suffix(".md").write_text(title + markdown(document), encoding="utf-8")
    if picture:
        from .plots import save_picture

        save_picture(document, path.with_suffix(".png"))
