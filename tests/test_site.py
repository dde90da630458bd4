"""The docs site: it builds without a warning, holds every public name, and no page asks another host for anything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import barrierlm_kernels
import pytest
import torch
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import barrierlm
from barrierlm import BarrierObjective, Constraint, SplitGradients
from tests.test_docs import INTEGRATIONS

ROOT = Path(__file__).parent.parent
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def documented(section: str) -> set[str]:
    """The metrics in the table of a section of docs/metrics.md."""
    text = METRICS.split(f"## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def test_metrics_of_the_objective_are_documented():
    objective = BarrierObjective(None, [Constraint("NAME", lower=0.0, upper=1.0)])
    out = objective.combine(None, {"NAME": torch.ones(2, requires_grad=True)})
    names = {name.replace("NAME", "<name>") for name in out.metrics()}
    names = {re.sub("/(lower|upper)/", "/<side>/", name) for name in names}
    assert names == documented("Of the objective")


def test_metrics_of_split_gradients_are_documented():
    x = torch.ones(2, requires_grad=True)
    parts = SplitGradients([x])
    parts.backward(BarrierObjective(None, [Constraint("x", upper=1.0)]).combine(x.sum(), {"x": x * 1}))
    assert parts.clip_(1.0).metrics().keys() == documented("Of `SplitGradients`")


def test_every_public_name_is_in_the_reference_once():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    names = [f"{package.__name__}.{name}" for package in (barrierlm, barrierlm_kernels) for name in package.__all__]
    names += [f"barrierlm.integrations.{module}.{name}" for module, (_, ns) in INTEGRATIONS.items() for name in ns]
    assert sorted(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) == sorted(names)


def test_blocks_that_need_another_package():
    """Blocks marked ```py use cooper, which only `make bench-solvers` installs."""
    pytest.importorskip("cooper")
    parser = CodeBlockParser(language="py", evaluator=PythonEvaluator())
    blocks = list(Sybil(parsers=[parser], path=str(ROOT)).parse(ROOT / "docs" / "migration.md").examples())
    assert blocks
    for block in blocks:
        block.evaluate()


def test_only_the_migration_page_has_blocks_that_may_not_run():
    # Those of the trainers are whole examples, which tests/integrations runs.
    others = [p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "integrations"]
    assert [p.name for p in others if "```py\n" in p.read_text(encoding="utf-8")] == ["migration.md"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def pages(site: Path) -> list[tuple[str, str]]:
    return [(path.relative_to(site).as_posix(), path.read_text(encoding="utf-8")) for path in site.rglob("*.html")]


def test_no_page_asks_another_host(site):
    """Links may leave the site; scripts, styles, pictures, fonts and frames may not."""
    loads = re.compile(
        r"<(?:script|img|iframe|source|video|audio|embed|object|link)\b[^>]*?(?:src|href|data)=[\"']?([^\"' >]+)"
    )
    checked = 0
    for name, html in pages(site):
        for target in loads.findall(html):
            checked += 1
            assert not re.match(r"(https?:)?//", target), f"{name}: {target}"
        assert not re.search(r"url\([\"']?(https?:)?//", html), name
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style
    assert checked > 100


def test_formulas_and_links_are_rendered(site):
    html = dict(pages(site))
    for name, text in html.items():
        body = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", text.split("<article")[-1], flags=re.DOTALL)
        assert ":math:" not in body, name
        assert ".. math::" not in body, name
        assert "\\frac" not in body, name
    assert html["api/rules.html"].count("<math") > 10
    assert html["concepts.html"].count("<math") >= 2
    assert 'href="../kernels/index.html"' in html["api/kernels.html"]
    assert 'href="guide.html"' in html["index.html"]
    assert 'id="barrierlm.BarrierObjective.combine"' in html["api/objective.html"]


def test_every_page_can_be_found(site):
    """In the navigation, and by the search."""
    home = (site / "index.html").read_text(encoding="utf-8")
    places = {
        entry["location"].split("#")[0]
        for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]
    }
    for path in (ROOT / "docs").rglob("*.md"):
        name = path.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / name).exists(), name
        assert f'href="{name}"' in home, name
        assert name in places
    for name, html in pages(site):
        assert "<title>" in html, name


@pytest.mark.slow
def test_figures_are_drawn(tmp_path):
    """All that the page shows, by the committed script."""
    script = ROOT / "docs" / "figures" / "concepts.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], cwd=ROOT, check=True)
    shown = set(re.findall(r"\(figures/([\w-]+\.svg)\)", (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")))
    assert {path.name for path in tmp_path.iterdir()} == shown
    assert {path.name for path in script.parent.glob("*.svg")} == shown
