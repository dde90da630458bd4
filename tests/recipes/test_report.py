import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

from barrierlm import BarrierObjective, BatchMean, Constraint
from barrierlm.cli import main
from barrierlm.recipes.config import ConfigError, load_options
from barrierlm.recipes.finetune import finetune
from barrierlm.recipes.report import load_runs, write_report
from barrierlm.recipes.report.charts import POINTS, sections, smooth, thin
from barrierlm.recipes.report.page import render
from barrierlm.recipes.report.verdicts import headline, judge

from .tiny import launch

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
NASTY = "<script>document.title = 'owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"


def write(folder: Path, rows: list[dict[str, Any]], **files: Any) -> Path:
    """A run's folder with these lines of metrics, and JSON files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def row(
    step: int, value: float, stderr: float = 0.1, *, upper: float = 5.0, name: str = "c", **more: Any
) -> dict[str, Any]:
    numbers = {"value": value, "stderr": stderr, "scale": 1.0, "upper/slack": upper - value}
    numbers |= {"upper/multiplier": 0.5, "upper/mu": 0.1, "upper/s": 0.01}
    return {"step": step, "loss/task": 1.0} | {f"constraints/{name}/{k}": v for k, v in numbers.items()} | more


def heldout(mean: float, stderr: float = 0.1, name: str = "c") -> dict[str, Any]:
    result = {"mean": mean, "stderr": stderr, "lower": None, "upper": 5.0, "satisfied": mean <= 5, "censored": 0.0}
    return {"runs": {"final": {"nll": 1.0, "seconds": 1.0, "constraints": {name: result}}}}


class Tables(HTMLParser):
    """Cells of a page's tables by the class of the table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self._table, self._in_cell = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._table = dict(attrs)["class"] or ""
        elif tag == "tr":
            self.rows.setdefault(self._table, []).append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            self.rows[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[self._table][-1][-1] += data


def browse(page: Path, tmp_path: Path) -> tuple[str, str]:
    """The page after its scripts have run, and what the browser logged."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=8000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def test_a_page_may_load_nothing(tmp_path: Path):
    """What the other tests rely on: the page's own policy refuses every request, and the browser says so."""
    page = write_report([write(tmp_path, [row(i, 4.0) for i in range(1, 4)])])
    text = page.read_text()
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text.replace(get_plotlyjs(), ""))
    tags = "<img src='http://127.0.0.1:9/x.png'><script src='http://127.0.0.1:9/x.js'></script>"
    page.write_text(text.replace("<main>", f"<main>{tags}"))
    log = browse(page, tmp_path)[1]
    for name in ("x.png", "x.js"):
        assert re.search(rf"CONSOLE.*http://127.0.0.1:9/{name}.*Content Security Policy", log)


def test_a_real_run_in_a_browser(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = load_options(None, [*overrides, "balance_every=2", "save_model=false"])
    finetune(options)
    folder = Path(options.output_dir)
    other = write(tmp_path / "other", [row(i, 4.0 + i / 10) for i in range(1, 9)], summary=heldout(9.0, name="c"))
    capsys.readouterr()
    assert main(["report", str(folder), str(other), "-o", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"Written to {tmp_path / 'both.html'}\n"
    dom, log = browse(tmp_path / "both.html", tmp_path)
    assert re.findall(r"CONSOLE.*", log) == []  # no error, and no request that was refused
    tables = Tables(dom).rows
    assert [line[1] for line in tables["verdicts"][1:]] == ["length ≥ 3", "length ≤ 6", "c ≤ 5"]
    assert [line[4] for line in tables["heldout"][1:]][-1] == "violated"
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', dom, re.DOTALL)[1])
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", dom)
    assert len(titles) == len(specs)
    assert "Gradient norms of task and constraints" in titles
    for i in range(len(specs)):
        assert re.search(rf'id="chart-{i}"[^>]*>\s*<div class="plot-container', dom), titles[i]
    assert dom.count('class="trace scatter') >= 20
    assert "Options that differ" not in dom  # the other has no options
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert f"<h3>{samples[0]['prompt']}</h3>" in dom


def test_a_hidden_run_is_hidden_everywhere(tmp_path: Path):
    runs = [write(tmp_path / name, [row(i, 4.0) for i in range(1, 9)]) for name in "ab"]
    page = write_report(runs, tmp_path / "page.html")
    click = "<script>document.querySelectorAll('input[data-run]')[1].click()</script></body>"
    page.write_text(page.read_text().replace("</body>", click))
    dom, log = browse(page, tmp_path)
    assert "CONSOLE" not in log
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', dom, re.DOTALL)[1])
    traces = [trace.get("meta") for spec in specs for trace in spec["data"]]
    assert traces.count(0) == traces.count(1) > 5
    assert dom.count('class="trace scatter') == len(traces) - traces.count(1)


def test_text_of_a_run_is_escaped(tmp_path: Path):
    folder = write(
        tmp_path / "<b>run",
        [row(i, 4.0, name=NASTY.replace("/", "\u2215")) for i in range(1, 4)],
        summary=heldout(4.0, name=NASTY),
    )
    samples = [{"run": NASTY, "prompt": f"{NASTY} p", "response": NASTY}]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    page = write_report([folder])
    text = page.read_text()
    body = text.replace(get_plotlyjs(), "")
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)[1])
    names = {trace["name"] for spec in specs for trace in spec["data"] if "name" in trace}
    assert "&lt;b&gt;run" in names  # plotly would make the rest bold
    assert not any("<" in name for name in names)
    assert "<script>document" not in body
    assert "<img" not in body
    dom, log = browse(page, tmp_path)
    assert "CONSOLE" not in log
    assert "<title>&lt;b&gt;run · barrierlm report</title>" in dom
    assert dom.count("&lt;script&gt;document.title") >= 4


@pytest.mark.parametrize(
    ("value", "word", "sentence"),
    [
        (4.0, "met", "The bound is met. Task loss 1."),
        (4.9, "active", "The bound is met, within noise. Task loss 1."),
        (5.3, "violated", "The bound is violated: c ≤ 5 (estimate 5.3 ± 0.2). Task loss 1."),
        (math.nan, "unknown", "Not measured yet: c ≤ nan. Task loss 1."),
    ],
)
def test_verdicts(tmp_path: Path, value: float, word: str, sentence: str):
    (run,) = load_runs([write(tmp_path, [row(i, value) for i in range(1, 30)])])
    judged = judge(run)
    assert [r.verdict for r in judged.rows] == [word]
    assert judged.sentence == sentence
    assert judged.good == (word in ("met", "active"))


def test_verdicts_are_those_of_the_objective(tmp_path: Path):
    """Two bounds that exclude each other, one that holds, and an exact one that does."""
    constraints = [Constraint("a", lower=1, scale=2.0), Constraint("b", upper=-1), Constraint("free", upper=9)]
    objective = BarrierObjective(None, [*constraints, Constraint("exact", upper=1)], estimator=BatchMean())
    x = torch.zeros((), requires_grad=True)
    rows = []
    for step in range(1, 700):
        noise = 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(step))
        measured = {"a": x, "b": x, "free": x + noise, "exact": x + 0.5}
        objective.combine(x * 0, measured)
        objective.step()
        rows.append({"step": step, "loss/task": 0.0, **objective.metrics()})
    (run,) = load_runs([write(tmp_path, rows)])
    expected = [r.verdict for r in objective.report()]
    assert expected[0].startswith("infeasible together with b (upper)")
    assert expected[2:] == ["met", "met"]
    judged = judge(run)
    assert [r.verdict for r in judged.rows] == expected
    assert [r.bound for r in judged.rows] == [r.bound for r in objective.report()]


def test_what_is_held_out_counts(tmp_path: Path):
    rows = [row(i, 4.0) for i in range(1, 9)]
    words = []
    for i, (mean, stderr) in enumerate([(4.0, 0.1), (4.95, 0.1), (5.05, 0.1), (6.0, 0.1)]):
        judged = judge(load_runs([write(tmp_path / str(i), rows, summary=heldout(mean, stderr))])[0])
        words.append(judged.heldout[0].verdict)
        assert judged.good == (words[-1] != "violated")
    assert words == ["met", "met, uncertain", "violated, uncertain", "violated"]
    assert judged.sentence == "The bound is met in training, but not held out: c 6 ± 0.2, allowed -∞ to 5. Task loss 1."


def test_several_runs_have_one_headline(tmp_path: Path):
    values = {"good": (4.0, 2.0), "better": (4.5, 1.0), "bad": (7.0, 0.5)}
    runs = [
        write(tmp_path / n, [row(i, v, **{"loss/task": loss}) for i in range(9)]) for n, (v, loss) in values.items()
    ]
    runs.append(write(tmp_path / "plain", [{"step": i, "loss/task": 0.1} for i in range(9)]))
    judged = [judge(run) for run in load_runs(runs)]
    expected = "2 of 3 runs with bounds meet all of them; of these better has the smallest task loss (1)."
    assert headline(judged) == expected
    for nll, folder in zip((1.0, 2.0), runs, strict=False):
        summary = heldout(4.0)
        summary["runs"]["final"]["nll"] = nll
        (folder / "summary.json").write_text(json.dumps(summary))
    judged = [judge(run) for run in load_runs(runs)]
    assert headline(judged) == expected.replace("better", "good").replace("task loss (1)", "held-out NLL (1)")
    page = write_report(runs, tmp_path / "r.html").read_text()
    assert [line[0] for line in Tables(page).rows["about"][1:]] == ["good", "better", "bad", "plain"]


def test_logs_that_are_not_neat(tmp_path: Path):
    """Cut off, begun again from a checkpoint, with NaN, null, gaps and other things than numbers."""
    rows = [row(i, 4.0) for i in range(1, 7)] + [row(i, 4.5) for i in range(4, 9)]
    rows[0]["constraints/c/value"] = rows[0]["constraints/c/stderr"] = None
    rows[-1] |= {"loss/task": math.nan, "note": "text", "flag": True}
    del rows[-2]["loss/task"]
    folder = write(tmp_path / "run", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n[1, 2]\n" + '{"step": 9, "constraints/c/val')
    (folder / "config.yaml").write_text("optim: {steps: 20}\n")
    (folder / "summary.json").write_text('{"runs": {"final"')
    (run,) = load_runs([folder])
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert run.column("constraints/c/value")[3:].tolist() == [4.5] * 5
    assert set(run.columns) == {key for r in rows for key in r} - {"note", "flag"}
    assert run.notes == [
        "2 lines of metrics.jsonl left out: not JSON (cut off?)",
        "3 steps were logged again after a restart; the later lines count",
        "summary.json is not valid JSON and was left out",
        "unfinished: step 8 of 20",
    ]
    page = write_report([folder]).read_text()
    assert "unfinished: step 8 of 20" in page
    assert Tables(page).rows["verdicts"][1][:3] == ["c ≤ 5", "met", "4.5"]


def test_a_log_without_anything_else(tmp_path: Path):
    """Of another trainer, older: no steps, no scale; a file instead of its folder."""
    rows = [{k: v for k, v in row(i, 4.0, 0.0).items() if k != "step" and "scale" not in k} for i in range(5)]
    folder = write(tmp_path, rows)
    page = write_report([folder / "metrics.jsonl"], tmp_path / "r.html").read_text()
    assert Tables(page).rows["verdicts"][1][:2] == ["c ≤ 5", "met"]
    assert load_runs([folder])[0].steps.tolist() == [1, 2, 3, 4, 5]


def test_mistakes_name_the_folder_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "blank", [])
    good = write(tmp_path / "good", [row(1, 4.0)])
    for arguments, message in (
        ([str(tmp_path / "none")], f"{tmp_path / 'none'} is no folder; allowed: the output_dir of"),
        ([str(tmp_path / "empty")], f"{tmp_path / 'empty'} has no metrics.jsonl; allowed: the output_dir of"),
        ([str(tmp_path / "blank")], "metrics.jsonl has no line with metrics; allowed: one JSON object a line"),
        ([str(good), str(good / "metrics.jsonl")], f"{good} is given twice; allowed: each run once"),
        ([str(good), "-o", str(tmp_path / "no" / "r.html")], f"--output {tmp_path / 'no' / 'r.html'}: No such file"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(good), "--resume"])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path):
    runs = [write(tmp_path / parent / "run", [row(1, 4.0)]) for parent in "ab"]
    assert [run.name for run in load_runs(runs)] == ["a/run", "b/run"]
    with pytest.raises(ConfigError, match="given twice"):
        load_runs([runs[0], runs[0]])


def test_a_long_log_is_thinned_out(tmp_path: Path):
    began = time.process_time()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for i in range(100_000):
            value = 100.0 if i == 77_777 else 4 + math.sin(i / 1000)
            file.write(json.dumps(row(i, value)) + "\n")
    (run,) = load_runs([tmp_path])
    page = render([run])
    assert time.process_time() - began < 20
    assert len(page) < 7e6
    figures = [chart.figure for section in sections([run]) for chart in section.charts]
    assert max(len(trace.x) for figure in figures for trace in figure.data) <= 4 * POINTS
    assert any(np.max(trace.y) == 100.0 for figure in figures for trace in figure.data if len(trace.y))


def test_thinning_keeps_ends_extremes_and_gaps():
    x = np.sin(np.arange(10_000) / 300)
    x[5000], x[7000], x[8000:8200] = 9.0, -9.0, math.nan
    kept = thin(x, 100)
    assert len(kept) < 170
    assert kept[0] == 0
    assert kept[-1] == 9999
    assert {5000, 7000} <= set(kept)
    assert np.isnan(x[kept]).any()
    assert thin(x[:100], 100).tolist() == list(range(100))


def test_smoothing_leaves_out_what_is_not_finite():
    x = np.array([1.0, math.nan, 3.0, math.inf, 7.0])
    assert smooth(x, 3).tolist() == [1.0, 1.0, 2.0, 3.0, 5.0]
    assert np.isnan(smooth(np.array([math.nan]), 2)).all()


def test_gradient_balance_adds_up(overrides: list[str], tmp_path: Path):
    """Logging it changes nothing else; the parts give the norm of the whole; a first window has no constraint part."""
    lines = []
    for every in (0, 2):
        extra = ["optim.gradient_accumulation=2", f"balance_every={every}", f"output_dir={tmp_path / str(every)}"]
        options = load_options(None, [*overrides, *extra, "save_model=false"])
        finetune(options)
        text = (Path(options.output_dir) / "metrics.jsonl").read_text()
        lines.append([{k: v for k, v in json.loads(x).items() if "seconds" not in k} for x in text.splitlines()])
    parts = [{k: line.pop(k) for k in list(line) if k.startswith("balance/")} for line in lines[1]]
    assert lines[0] == lines[1]
    assert [bool(p) for p in parts] == [True, False, True, False]
    assert parts[0]["balance/constraint_norm"] == 0
    assert parts[0]["balance/task_norm"] == pytest.approx(lines[0][0]["grad_norm"], rel=1e-4)
    task, rest, cosine = parts[2].values()
    assert rest > 0
    whole = math.sqrt(task**2 + rest**2 + 2 * task * rest * cosine)
    assert whole == pytest.approx(lines[0][2]["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_one_of_two_processes_writes(tmp_path: Path):
    run = write(tmp_path / "run", [row(i, 4.0) for i in range(1, 4)])
    assert launch(2, "report", str(run)).count("Written to ") == 1
    assert (run / "report.html").is_file()
