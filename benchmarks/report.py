"""Write docs/performance.md from the committed results: `python -m benchmarks.report` (`--check` only compares)."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .environment import RESULTS, ROOT
from .output import load_all, markdown, path_of
from .plots import save_picture
from .targets import table_of

PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- begin of what `python -m benchmarks.report` writes -->"
END = "<!-- end of what `python -m benchmarks.report` writes -->"


def generated(documents: list[dict[str, Any]], results: Path = RESULTS, page: Path = PAGE) -> str:
    """The tables of all results, by device."""
    if not documents:
        return "No result has been committed yet."
    parts = []
    for device in dict.fromkeys(d["hardware"]["name"] for d in documents):
        parts.append(f"## {device}")
        for document in (d for d in documents if d["hardware"]["name"] == device):
            parts += [f"### {document['suite']}", document["question"], table_of(document), markdown(document).rstrip()]
            picture = path_of(document, results).with_suffix(".png")
            if picture.exists():
                parts.append(f"![{document['suite']}]({os.path.relpath(picture, page.parent)})")
    return "\n\n".join(part for part in parts if part)


def updated(text: str, documents: list[dict[str, Any]]) -> str:
    """The page's text with the part between the markers written anew."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{PAGE.name} must hold the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{generated(documents)}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """0 if the page is current, or has been made so; a picture that is missing is drawn."""
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page is not current")
    arguments = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    documents = load_all(RESULTS)
    if not arguments.check:
        for document in documents:
            picture = path_of(document, RESULTS).with_suffix(".png")
            if not picture.exists():
                save_picture(document, picture)
    new = updated(text, documents)
    if not arguments.check:
        PAGE.write_text(new, encoding="utf-8")
    return int(arguments.check and new != text)


if __name__ == "__main__":
    sys.exit(main())
