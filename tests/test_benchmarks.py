"""The benchmarks run, refuse what is wrong, list what cannot run, and the page shows the committed results."""

import gzip
import json
import os
import sys
from functools import cache

import pytest
import torch

from benchmarks import gpu, guard, report, steps
from benchmarks.candidate import COPY, GEMMS, NAIVE, Candidate, Case
from benchmarks.clock import captured, first_line, host_wait, launches, peak_memory, quick_collection
from benchmarks.costs import WeightsProblem
from benchmarks.environment import RESULTS
from benchmarks.isolate import run_isolated, without
from benchmarks.measure import DeviceLost, compare, errors_of, spread
from benchmarks.output import load_all, markdown, save
from benchmarks.peers.step import straightforward
from benchmarks.problems import BOTH, FORWARD, HeadProblem, LogitsProblem, lengths_of
from benchmarks.run import main, rows_of
from benchmarks.settings import Settings
from benchmarks.small import failures
from benchmarks.suites import SUITES, head, suite, weights
from benchmarks.tables import markdown_table, number
from benchmarks.targets import targets_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
#: No peers and no compilers: what they need is not installed everywhere, and takes long.
ALONE = ["--quick", "--device", "cpu", "--repeats", "2", "--no-compile", "--only", "F.", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def _fast():
    with quick_collection():
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder of the results of a suite, which is run once."""

    @cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        assert main([*ALONE, "--suite", name, "--out", str(folder)]) == 0
        return folder

    return run


def result_in(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_runs(name, quick):
    folder = quick(name)
    result = result_in(folder)
    for key in ("layout", "suite", "date", "command", "hardware", "versions", "revision", "settings", "rows"):
        assert key in result
    assert result["complete"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["revision"].keys() == {"commit", "dirty"}
    assert result["command"].startswith("python -m benchmarks.run --quick --device cpu")
    assert str(folder) not in json.dumps(result)
    assert result["copy_gb_per_s"] > 0
    own = [row for row in result["rows"] if row["role"] == "ours"]
    assert own
    assert all(row["status"] == "ok" for row in own), [row["error"] for row in own]
    for row in result["rows"]:
        assert row.keys() >= {"case", "candidate", "role", "gives", "holds_logits", "status", "error"}
        assert row["status"] in ("ok", "refused", "failed")
        assert (row["status"] == "ok") == (row["error"] is None)
        if row["status"] == "ok":
            assert row["time_ms"].keys() == {"median", "q1", "q3", "min", "runs"}
            assert row["time_ms"]["median"] > 0
            assert row["ratio"][NAIVE]["median"] > 0
            assert row["role"] == "floor" or max(row["relative_error"].values()) < 0.02
    table = suite(name).table(result["rows"])
    for row in own:
        assert row["candidate"] in table
    (text,) = folder.glob("*.md")
    assert table in text.read_text(encoding="utf-8")
    (picture,) = folder.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def perturbed(p):
    right = head.naive_forward(p)
    return lambda: {name: value * 1.01 for name, value in right().items()}


def raising(p):
    raise ModuleNotFoundError("No module named 'peer'\nand more")


def without_gradient(p):
    right = head.naive_forward(p)
    return lambda: {name: value + 0 * p.weight.sum() for name, value in right().items()}


def as_nan(p):
    right = head.naive_forward(p)
    return lambda: {name: value * float("nan") for name, value in right().items()}


@pytest.mark.parametrize(
    ("build", "status", "error"),
    [
        (perturbed, "refused", "wrong result: relative error of sequences 1.0e-02, allowed"),
        (as_nan, "refused", "wrong result: relative error of sequences nan"),
        (raising, "failed", "ModuleNotFoundError: No module named 'peer'"),
        (lambda p: dict, "failed", "KeyError: 'loss'"),
        (lambda p: lambda: {"loss": (p.hidden.sum() * 0)}, "failed", "ValueError: made no gradient for dweight"),
        (lambda p: lambda: {"loss": (p.hidden.sum() + p.weight.sum()).expand(2).sum(0, True)}, "failed", "ValueError"),
    ],
    ids=["perturbed", "nan", "raises", "nothing", "no gradient", "shape"],
)
def test_what_is_wrong_is_not_timed(build, status, error):
    problem = HeadProblem((16, 8, 64), torch.float32, CPU)
    wrong = Candidate("wrong", build)
    rows = compare([wrong, *head.STANDARDS], problem, Settings(repeats=2, quiet=True))
    row = next(r for r in rows if r["candidate"] == "wrong")
    assert row["status"] == status
    assert row["error"].startswith(error)
    assert "\n" not in row["error"]
    assert "time_ms" not in row
    others = [r for r in rows if r["candidate"] != "wrong"]
    assert {r["candidate"]: r["time_ms"]["runs"] for r in others} == {NAIVE: 2, GEMMS: 2}


def test_a_candidate_that_fails_later_is_dropped_from_the_rounds():
    def build(p):
        right, calls = head.naive_forward(p), []

        def forward():
            calls.append(None)
            if len(calls) > 4:
                raise RuntimeError("out of memory")
            return right()

        return forward

    rows = compare(
        [*head.STANDARDS, Candidate("tires", build)],
        HeadProblem((16, 8, 64), torch.float32, CPU),
        Settings(repeats=5, quiet=True),
    )
    assert [(r["status"], r.get("time_ms", {}).get("runs")) for r in rows] == [("ok", 5), ("ok", 5), ("failed", None)]


def test_a_case_that_cannot_be_set_up_is_listed():
    def too_large():
        raise MemoryError("cannot allocate 99 GiB")

    (row,) = rows_of(Case({"N": 1}, too_large))
    assert (row["status"], row["error"]) == ("failed", "MemoryError: cannot allocate 99 GiB")


def test_excluded_unwanted_and_late_candidates():
    problem = HeadProblem((16, 8, 64), torch.float32, CPU)
    settings = Settings(repeats=1, quiet=True, only=("this",), exclude={"this one": "it ended its process"})
    peers = [Candidate("this one", head.naive_forward), Candidate("another", head.naive_forward)]
    rows = {r["candidate"]: r for r in compare([*head.STANDARDS, *peers], problem, settings)}
    assert rows.keys() == {NAIVE, GEMMS, "this one"}
    assert rows["this one"]["error"] == "RuntimeError: it ended its process"
    late = compare(head.STANDARDS, problem, Settings(quiet=True, budget=0.0))
    assert {r["error"] for r in late} == {"TimeoutError: no time was left in the budget"}


def test_a_lost_device_names_its_candidate(monkeypatch, tmp_path):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("benchmarks.measure.synchronize", lost)
    settings = Settings(quiet=True, progress=tmp_path / "progress")
    with pytest.raises(DeviceLost, match="wrong=ModuleNotFoundError"):
        compare([Candidate("wrong", raising)], HeadProblem((16, 8, 64), torch.float32, CPU), settings)
    assert (tmp_path / "progress").read_text() == "wrong"


def test_small_shapes_for_the_sanitizer():
    assert failures(CPU) == []


@pytest.mark.gpu
def test_small_shapes_on_the_gpu():
    assert failures(GPU) == []


@pytest.mark.gpu
@pytest.mark.parametrize("build", [head.weighted(), head.sequence()], ids=["weighted", "sequence"])
def test_a_training_step_never_waits_for_the_gpu(build):
    problem = HeadProblem((64, 64, 512), torch.bfloat16, GPU)
    step = problem.step(build(problem))
    step()  # compiles
    assert host_wait(step, GPU) is None


@pytest.mark.gpu
def test_constraint_weights_is_one_launch_in_a_graph():
    problem = WeightsProblem(8, 64, GPU)
    step = torch.no_grad()(weights.constraint_weights()(problem))
    step()
    assert host_wait(step, GPU) is None
    assert launches(step, GPU)["kernels"] == 1
    found = errors_of(captured(step, GPU)(), problem.oracle())
    assert max(found.values()) < 1e-6


def test_the_problems_are_what_they_say():
    for skew in ("equal", "spread", "one"):
        for rows in (1, 33, 512):
            lengths = lengths_of(rows, skew)
            assert sum(lengths) == rows
            assert min(lengths) >= 0
    problem = HeadProblem((8, 4, 11), torch.float64, CPU)
    right = problem.oracle()
    hidden, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), problem.targets)
    loss.backward()
    torch.testing.assert_close(right["loss"], loss.detach())
    torch.testing.assert_close(right["dhidden"].double(), hidden.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(right["dweight"].double(), weight.grad, rtol=1e-6, atol=1e-8)
    problem.direction = FORWARD
    assert problem.oracle().keys() == {"loss", "sequences"}
    assert problem.kept_bytes() == {"gradients": 0}


def test_an_input_that_was_overwritten_is_restored():
    problem = LogitsProblem((4, 16), torch.float32, CPU)
    before = problem.logits.detach().clone()
    problem.reset(restore=True)
    problem.logits.data.zero_()
    problem.reset(restore=False)
    assert problem.logits.eq(0).all()
    problem.reset(restore=True)
    assert torch.equal(problem.logits, before)


def test_memory_and_launches_are_counted():
    size = 2**20

    def step():
        first = torch.ones(size)
        second = first + 1
        del first
        return second * 2

    found = peak_memory(step, CPU)
    assert 0 <= found["peak_bytes"] - 2 * 4 * size < 1024  # and a few scalars
    assert found["resident_bytes"] is None or found["resident_bytes"] < 4 * 4 * size
    assert launches(step, CPU) == {"operators": 3}


def test_errors_become_one_line_without_folders():
    error = ImportError("cannot import name 'x' from 'y' (/home/me/env/lib/y/__init__.py) and/or 3/4\nmore")
    assert first_line(error) == "ImportError: cannot import name 'x' from 'y' (__init__.py) and/or 3/4"
    assert first_line(KeyError()) == "KeyError: "


def test_numbers_and_spreads():
    assert [number(x) for x in (None, 0, 0.01234, 12.34, 1234.5, 123456.0)] == [
        "-",
        "0",
        "0.0123",
        "12.3",
        "1234",
        "123456",
    ]
    assert spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "min": 3.0, "runs": 1}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "runs": 5}


def test_the_page_shows_the_committed_results():
    assert report.main(["--check"]) == 0, "run `python -m benchmarks.report`"


def test_the_page_has_every_result_and_its_targets(quick):
    result = result_in(quick("head"))
    result["settings"]["quick"] = False
    page = report.updated(f"before\n{report.BEGIN}\nwhat was there\n{report.END}\nafter\n", [result])
    assert page.startswith(f"before\n{report.BEGIN}\n\n## ")
    assert page.endswith(f"{report.END}\nafter\n")
    assert "what was there" not in page
    assert "**linear_weighted_logprob**" in page
    assert report.updated(page, [result]) == page
    found = targets_of(result)
    assert len(found) == 7  # time, memory, peers for fp32 and bf16; memory beyond an fp32 dW for bf16
    assert all(target.met in (True, False) for target in found)
    for target in found:
        assert target.what in page
    with pytest.raises(ValueError, match="must hold the lines"):
        report.updated("no markers", [])


def test_results_that_are_committed_are_whole_or_say_that_they_are_not():
    for document in load_all(RESULTS):
        assert document["rows"]
        assert ("**Not all of it was run.**" in markdown(document)) == (not document["complete"])


def test_options_are_handed_on():
    line = ["--suite", "all", "--device", "cuda", "--budget=20", "--quick"]
    assert without(line, ("--suite", "--budget")) == ["--device", "cuda", "--quick"]


@pytest.mark.slow
def test_a_suite_survives_a_peer_that_kills_its_process(tmp_path, monkeypatch):
    package = tmp_path / "quack"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    options = [*ALONE, "--only", "QuACK", "--no-picture", "--out", str(tmp_path)]
    assert run_isolated("head", options, budget=None)
    rows = result_in(tmp_path)["rows"]
    error = "RuntimeError: ended its process with code -9"
    assert {r["error"] for r in rows if r["candidate"].startswith("QuACK")} == {error}
    assert all(r["status"] == "ok" for r in rows if r["role"] == "ours")


def test_gpu_steps_survive_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    commands = [
        ("good", ["true"], 5.0),
        ("bad", ["false"], 5.0),
        ("slow", ["sleep", "9"], 0.2),
        ("missing", ["/no/such/program"], 5.0),
        ("absent", [], 5.0),
    ]
    monkeypatch.setattr(gpu, "steps", lambda folder: commands)
    assert gpu.main(["--seconds", "20"]) == 1
    summary = [json.loads(line) for line in (tmp_path / "gpu-summary.txt").read_text().splitlines()]
    results = [step["result"] for step in summary]
    assert results[:3] == ["ok", "ended with code 1", "stopped after 0 s"]
    assert results[3].startswith("did not start")
    assert results[4].startswith("not run")
    monkeypatch.undo()
    assert [name for name, *_ in gpu.steps(tmp_path)] == ["device", "tests", "memcheck", "racecheck", "suites"]


def test_names_of_rows_are_stable():
    assert (NAIVE, GEMMS, COPY, BOTH) == ("naive PyTorch", "bare GEMMs", "copy", "forward+backward")


def guarded(ratio, status="ok"):
    """A result of the weights suite with this ratio, made by hand."""
    case = {"K": 8, "B": 64, "costs": "per response"}
    row = {"case": case, "candidate": "constraint_weights", "status": status, "ratio": {NAIVE: {"median": ratio}}}
    other = row | {"case": case | {"K": 1}, "ratio": {NAIVE: {"median": 99.0}}}
    return {"suite": "weights", "rows": [other, row]}


@pytest.mark.parametrize(
    ("committed", "measured", "slower"),
    [
        (guarded(0.2), [guarded(0.2)], False),
        (guarded(0.2), [guarded(0.29)], False),
        (guarded(0.2), [guarded(0.1)], False),
        (guarded(0.2), [guarded(0.31), guarded(0.31)], True),
        (guarded(0.2), [guarded(0.31), guarded(0.2)], False),  # noise is not a regression
        (guarded(0.2), [guarded(float("nan")), guarded(float("nan"))], True),
        (guarded(0.2), [guarded(0.2, "failed"), guarded(0.2, "failed")], True),
        (guarded(0.2), [None, None], True),
        (None, [guarded(9.0)], False),  # nothing to compare with
    ],
    ids=["equal", "noisy", "faster", "slower", "slower once", "nan", "failed", "did not run", "not committed"],
)
def test_the_guard_tells_a_regression_from_noise(committed, measured, slower):
    runs = iter(measured)
    (watched,) = [w for w in guard.WATCHED if w.suite == "weights"]
    results = {} if committed is None else {"weights": committed}
    (found,) = guard.compare_with(results, lambda one: next(runs), [watched])
    assert found.slower == slower
    assert next(runs, "all used") == "all used"


def test_the_guard_exits_with_1_on_a_regression(monkeypatch, capsys):
    monkeypatch.setattr(guard, "committed_results", lambda folder: {"weights": guarded(0.2)})
    monkeypatch.setattr(guard, "measure", lambda one: guarded(0.2))
    assert guard.main([]) == 0
    assert "not committed, so not compared: head" in capsys.readouterr().out
    monkeypatch.setattr(guard, "measure", lambda one: guarded(0.5))
    assert guard.main([]) == 1
    assert "**slower**" in capsys.readouterr().out


def test_what_the_guard_watches_are_cases_of_its_suites():
    for one in guard.WATCHED:
        titles = [
            ", ".join(f"{k} {v}" for k, v in case.fields.items())
            for case in suite(one.suite).cases(Settings(quiet=True))
        ]
        assert one.title in titles


def test_profile_writes_a_trace_and_the_costliest_operations(tmp_path, capfd):
    folder = tmp_path / "traces"
    command = [*ALONE, "--suite", "overhead", "--profile", str(folder), "--no-picture", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    traces = list(folder.glob("*.json.gz"))
    assert {path.name for path in traces} == {
        "overhead-k-2-b-16-costs-per-response-barrierobjective.json.gz",
        "overhead-k-2-b-16-costs-per-token-barrierobjective.json.gz",
    }
    with gzip.open(traces[0]) as file:
        assert any("aten::" in event["name"] for event in json.load(file)["traceEvents"])
    shown = capfd.readouterr().err
    assert "Self CPU" in shown
    lines = [line for line in shown.split("Self CPU time total")[0].splitlines() if "%" in line]
    assert len(lines) == 11  # ten, and the header


def test_the_recipe_step_and_the_straightforward_one_agree_with_fp64(quick):
    rows = result_in(quick("recipe"))["rows"]
    compared = [row for row in rows if row["role"] in ("naive", "ours")]
    assert len(compared) == 4
    for row in compared:
        assert max(row["relative_error"].values()) < 1e-5
        assert row["tokens"] > 100
        drawn = row["case"]["responses"] == "drawn"
        for part in ("forward", "head", "backward", "optimizer", "objective", *(["generation"] if drawn else [])):
            assert row["seconds"][part] > 0, part


def test_the_oracle_of_a_step_sees_a_wrong_gradient(monkeypatch):
    problem = steps.StepProblem(CPU, tiny=True)
    problem.generates = False
    right = problem.lengths
    which = [Candidate(NAIVE, lambda p: lambda: straightforward(p), role="naive"), Candidate("ours", lambda p: p.ours)]
    problem.oracle()
    monkeypatch.setattr(steps.StepProblem, "lengths", lambda p, logps: right(1.5 * logps))
    rows = compare(which, problem, Settings(repeats=1, quiet=True), memory=False)
    assert [row["status"] for row in rows] == ["ok", "ok"]  # the naive one sets the limit ...
    assert rows[0]["relative_error"]["gradient"] > 0.01
    assert rows[1]["relative_error"]["gradient"] < 1e-5  # ... and ours does not go through it


def test_a_column_of_which_nothing_is_known_is_left_out_only_where_it_may_be():
    lines = [["x", "-", "-"], ["y", "-", "2"]]
    assert markdown_table(["", "a", "b"], lines, optional=["a", "b"]).splitlines()[0] == "|  | b |"
    assert markdown_table(["", "a", "b"], lines).splitlines()[2] == "| x | - | - |"


def test_lists_of_numbers_are_on_one_line(tmp_path):
    """And all that is written is read again, strings that look like a list as well."""
    rows = [{"series": [1, -2.5, 3e-7, None, float("inf")], "names": ["a", "b"], "none": [], "text": "[\n 1,\n 2\n]"}]
    document = {"suite": "made", "hardware": {"name": "up"}, "settings": {"quick": False}, "rows": rows}
    path = save(document, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == document
    assert '"series": [ 1, -2.5, 3e-07, null, Infinity ],\n' in text
    assert '"names": [\n' in text
