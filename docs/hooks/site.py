"""What the site adds to the pages: those that live outside docs/, the links between them, and the navigation.

Pages link to each other as files of the repository, so that they work where it is browsed. Here the same links are
turned into those of the site; a link to a file that the site does not show becomes plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mathml import fences
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
#: Pages and pictures outside docs/, by the path they have in the repository.
OUTSIDE = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "kernels/README.md",
    "benchmarks/NOTES.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
)
#: Integrations in the order of the navigation; others follow.
INTEGRATIONS = ("pytorch", "trl", "transformers", "accelerate", "lightning", "peft", "compile")
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def _outside() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]


def _place(path: str) -> str:
    """Where the site has a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _source(uri: str) -> str:
    """The inverse of `_place`."""
    if uri == "index.md":
        return "README.md"
    return uri if uri in _outside() else f"docs/{uri}"


def on_config(config: Any) -> Any:
    """Add the integrations' pages, and any page that the navigation does not name."""
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    found = {Path(page).stem: page for page in pages if page.startswith("integrations/")}
    order = [name for name in INTEGRATIONS if name in found] + sorted(set(found) - set(INTEGRATIONS))
    named = set(re.findall(r"[\w./-]+\.md", str(config.nav))) | set(found.values())
    for section in config.nav:
        if "Integrations" in section:
            section["Integrations"] = [found[name] for name in order]
    results = [path for path in _outside() if path.startswith("benchmarks/") and path.endswith(".md")]
    for title, more in (("Benchmarks", results), ("More", sorted(pages - named))):
        if more:
            config.nav.append({title: more})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what lives outside docs/."""
    for path in _outside():
        files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the repository become links of the site; formulas become MathML."""
    here = posixpath.dirname(_source(page.file.src_uri))

    def relink(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(here, path))
        if files.get_file_from_path(_place(path)) is None:
            if image or not (ROOT / path).exists():
                return match[0]  # the strict build tells
            return text if text.startswith("`") else f"`{path}`" if text == path else f"{text} (`{path}`)"
        uri = posixpath.relpath(_place(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({uri}{'#' + anchor if anchor else ''})"

    # Code is left alone: fenced blocks, and what stands between backticks (but not a link whose text is code).
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [_LINK.sub(relink, part) for part in parts[::2]]
    return fences("".join(parts))
