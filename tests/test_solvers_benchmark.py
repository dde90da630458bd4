"""The comparison of solvers: its problems' answers, its scores, its methods and its file of finished runs."""

import json
import math

import pytest
import torch

from benchmarks.solvers import oracle, report, units
from benchmarks.solvers.__main__ import main
from benchmarks.solvers.methods import METHODS, ORACLE, multiplier_of_shifted_bound
from benchmarks.solvers.peers import Violations
from benchmarks.solvers.problems import F64, PROBLEMS, Quadratic, problem
from benchmarks.solvers.run import Task, Trajectory, execute, load, reference_multipliers, run_all, scores, simulate
from benchmarks.solvers.solution import residuals
from tests.problems import Categorical, sampled_run

pytest.importorskip("scipy")

KNOWN_MULTIPLIERS = {
    "gibbs": [0.69],
    "window": [0.0, 0.69],
    "two": [0.8, 0.15],
    "far": [5.0],
    "quadratic": [1.5, 0.8, 0.4, 0.0, 0.0],
    "inactive": [0.69, 0.0],
    "scaled": [0.0069],
}


def needs(method):
    """Skip where the package that a method comes from is not installed."""
    if method.role == "peer":
        pytest.importorskip(method.name.split()[0].replace("humancompatible", "humancompatible.train"))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_answer_satisfies_the_optimality_conditions(name):
    of = problem(name)
    found = residuals(of, of.solution)
    assert max(found) < 1e-8
    assert of.solution.multipliers.max() > 0
    if name in KNOWN_MULTIPLIERS:
        torch.testing.assert_close(of.solution.multipliers, torch.tensor(KNOWN_MULTIPLIERS[name], dtype=F64))
    # A wrong answer is seen: other multipliers leave the Lagrangian's gradient.
    assert max(residuals(of, of.solution._replace(multipliers=1.01 * of.solution.multipliers))) > 1e-6


def test_answers_known_by_construction():
    quadratic = Quadratic()
    torch.testing.assert_close(quadratic.solution.x, quadratic.answer)
    c = Categorical(0.69)
    assert problem("gibbs").solution.loss == pytest.approx(c.kl(c.tilted(0.69)).item(), abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_samples_are_right_on_average(name):
    """Loss, constraints and the gradients of both, from many samples, agree with the exact ones within their noise."""
    of = problem(name)
    x = (of.start + 0.1 * torch.randn(len(of.start), generator=torch.Generator().manual_seed(1), dtype=F64)).detach()
    exact = torch.cat([of.loss(x).reshape(1), of.violations(x)])
    slopes = torch.autograd.functional.jacobian(lambda y: torch.cat([of.loss(y).reshape(1), of.violations(y)]), x)
    draw, violations, values, gradients = of.stream(torch.Generator().manual_seed(0)), Violations(of, False), [], []
    for _ in range(310):  # ten epochs of the one problem that has a data set
        y = x.clone().requires_grad_()
        loss, measurements = draw(y)
        rows = torch.cat([loss.reshape(1), violations(measurements)])
        values.append(rows.detach())
        gradients.append(torch.stack([torch.autograd.grad(row, y, retain_graph=True)[0] for row in rows]))
    for samples, expected in ((torch.stack(values), exact[:, None]), (torch.stack(gradients), slopes)):
        samples = samples.reshape(len(samples), *expected.shape)
        noise = (samples.var(0) / len(samples)).sum(1).sqrt()  # of a row's mean, as a length
        errors = 4 if expected.shape[1] == 1 else 2  # a long vector's length hardly varies
        assert ((samples.mean(0) - expected).norm(dim=1) <= errors * noise + 1e-12).all()
        assert expected.shape[1] == 1 or (noise < 0.5 * expected.norm(dim=1)).all()  # a wrong sign would be seen


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_every_method_runs_on_every_problem(name, method):
    needs(method)
    of = problem(name)
    before = torch.cat([of.loss(of.start).reshape(1), of.violations(of.start)])
    settings = list(method.settings)
    # Settings of a rule differ by a number; a peer's last one is told the unit.
    for setting in [settings[0], settings[-1]] if method.role == "peer" else settings[:1]:
        task = Task(name, method.name, setting, 0, 5)
        run = simulate(task)
        assert all(part.isfinite().all() for part in run)
        after = torch.cat([run.losses[-1:], run.violations[-1]])
        assert (before != after).any()  # it moved
        assert run.multipliers.shape == run.violations.shape == (5, len(of.bounds))
        assert (run.multipliers >= 0).all()


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_a_grid_has_at_most_four_settings(method):
    assert 1 <= len(method.settings) <= 4
    assert len({str(options) for options in method.settings.values()}) == len(method.settings)


def test_the_gibbs_problem_is_that_of_sampled_run():
    run = simulate(Task("gibbs", "AdaptiveBarrier", "step=0.05", 3, 60))
    costs, gaps, multipliers = sampled_run(60, 3)
    torch.testing.assert_close(run.violations[45:, 0], costs)
    torch.testing.assert_close(run.losses[45:] - problem("gibbs").solution.loss, gaps)
    torch.testing.assert_close(run.multipliers[45:, 0], multipliers)


def test_all_methods_see_the_same_first_samples(monkeypatch):
    """The first step's measurements do not depend on the method."""
    seen = []
    of = problem("quadratic")
    original = of.stream

    def stream(generator):
        draw = original(generator)

        def noted(x):
            loss, measurements = draw(x)
            seen.append(torch.stack(list(measurements.values())).detach())
            return loss, measurements

        return noted

    monkeypatch.setattr(of, "stream", stream)
    for method in ("AdaptiveBarrier", "DualAscent"):
        simulate(Task("quadratic", method, next(iter(METHODS[method].settings)), 7, 1))
    assert torch.equal(*seen)


def test_scores_of_a_trajectory_made_by_hand():
    of = problem("inactive")
    best = of.solution
    lam = best.multipliers[0].item()
    # Eight steps, of which the last two count: 0.3 above f* with both bounds violated, then 0.1 below with none.
    losses = torch.full((8,), 99.0, dtype=F64)
    losses[-2:] = best.loss + torch.tensor([0.3, -0.1], dtype=F64)
    violations = torch.full((8, 2), 99.0, dtype=F64)
    violations[-2:] = torch.tensor([[0.2, 0.4], [-0.5, 0.005]], dtype=F64)
    multipliers = torch.full((8, 2), 99.0, dtype=F64)
    multipliers[-2:] = lam * torch.tensor([[1.5, 0.0], [1.0, 0.25]], dtype=F64)
    found = scores(Trajectory(losses, violations, multipliers), of)
    assert found["gap"] == pytest.approx(0.1)
    assert found["violation"] == pytest.approx([0.1, 0.2025])
    assert found["merit"] == pytest.approx(0.1 + 2 * (lam * 0.1 + 0.1 * lam * 0.2025))
    assert found["value"] == pytest.approx([-0.15, 0.2025])
    assert found["above"] == pytest.approx(0.5)  # 0.005 is within the tolerance
    assert found["multiplier"] == pytest.approx([1.25, 0.125])
    assert found["multiplier_error"] == pytest.approx((0.5 + 0.25) / 2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_merit_is_an_exact_penalty(name):
    """Nowhere below its value at the optimum, 0; infeasible points with a lower loss included."""
    of = problem(name)
    generator = torch.Generator().manual_seed(0)
    weights = reference_multipliers(of.solution.multipliers)
    for spread in (1e-3, 0.03, 0.3, 1.0):
        x = of.solution.x + spread * torch.randn(len(of.start), generator=generator, dtype=F64)
        merit = of.loss(x) - of.solution.loss + 2 * weights @ of.violations(x).clamp(min=0)
        assert merit > 0


def test_what_diverges_or_fails_is_told(monkeypatch):
    of = problem("gibbs")
    bad = Trajectory(torch.tensor([1.0, math.nan]), torch.zeros(2, 1), torch.zeros(2, 1))
    assert scores(bad, of) == {"status": "diverged", "merit": math.inf}

    def missing(*_, **__):
        raise ImportError("no module named cooper")

    broken = METHODS["cooper Lagrangian"]
    monkeypatch.setitem(METHODS, broken.name, type(broken)(broken.name, broken.role, missing, broken.settings))
    row = execute(Task("gibbs", broken.name, "lr=0.01", 0, 3))
    assert (row["status"], row["error"]) == ("failed", "ImportError: no module named cooper")
    rows = report.averages([row])
    assert "cooper Lagrangian: ImportError" in report.not_run(rows)
    assert "1 of 1 failed" in report.problem_table("gibbs", rows)


def test_ratios_are_to_the_best():
    rows = [
        {"problem": "gibbs", "method": m, "setting": report.default_of(m), "merit": merit}
        for m, merit in (("DualAscent", 0.2), ("AdaptiveBarrier", 0.1), ("ModifiedBarrier", math.inf))
    ]
    assert report.ratios(rows) == {
        ("gibbs", "DualAscent"): 2,
        ("gibbs", "AdaptiveBarrier"): 1,
        ("gibbs", "ModifiedBarrier"): math.inf,
    }


def test_finished_runs_are_remembered(tmp_path):
    cache = tmp_path / "runs.jsonl"
    tasks = [Task("quadratic", "DualAscent", "step=0.05", seed, 3) for seed in range(2)]
    rows = [execute(task) for task in tasks]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    cache.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:50], encoding="utf-8")
    assert list(load(cache)) == tasks[:1]  # the line that was cut off is done again
    cache.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert list(run_all(tasks, cache, processes=1)) == rows
    other = rows[0] | {"code": "of another version"}
    cache.write_text(json.dumps(other) + "\n", encoding="utf-8")
    assert load(cache) == {}


def test_the_command_writes_json_page_and_pictures(tmp_path):
    options = ["run", "--problems", "gibbs", "--methods", "AdaptiveBarrier", "DualAscent", "--settings", "default"]
    options += ["--steps", "8", "--seeds", "2", "--cache", str(tmp_path / "c.jsonl"), "--out", str(tmp_path)]
    tasks = [
        Task("gibbs", m, report.default_of(m), seed, 8) for m in ("AdaptiveBarrier", "DualAscent") for seed in (0, 1)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(execute(task)) + "\n" for task in tasks), encoding="utf-8")
    assert main(options) == 0
    (path,) = tmp_path.glob("solvers-*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"hardware", "versions", "revision", "command"} <= set(document)
    assert [row["seeds"] for row in document["rows"]] == [2, 2]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "## gibbs" in page
    assert all(method in page for method in ("AdaptiveBarrier", "DualAscent"))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_methods_that_have_not_changed_are_kept_from_an_earlier_result(tmp_path):
    def run(method, seeds, *options):
        cache = tmp_path / f"{method}.jsonl"
        tasks = [Task("gibbs", method, report.default_of(method), seed, 4) for seed in range(seeds)]
        cache.write_text("".join(json.dumps(execute(task)) + "\n" for task in tasks), encoding="utf-8")
        given = ["run", "--problems", "gibbs", "--methods", method, "--settings", "default", "--steps", "4"]
        out = tmp_path / method
        assert main([*given, "--seeds", str(seeds), "--cache", str(cache), "--out", str(out), *options]) == 0
        (path,) = out.glob("solvers-*.json")
        return path

    earlier = run("DualAscent", 2)
    document = json.loads(earlier.read_text(encoding="utf-8"))
    document["revision"]["commit"] = "0123456789abcdef"
    earlier.write_text(json.dumps(document), encoding="utf-8")
    path = run("AdaptiveBarrier", 2, "--keep", str(earlier))
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["AdaptiveBarrier", "DualAscent"]
    assert rows[1] == {"revision": "0123456789abcdef"} | document["rows"][0]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "Kept from revision 0123456789ab: DualAscent.\n" in page
    with pytest.raises(ValueError, match=r"keep: a result with settings .*'seeds': 2.*allowed: .*'seeds': 1"):
        run("AdaptiveBarrier", 1, "--keep", str(earlier))


def test_the_oracle_and_its_frontier():
    of = problem("gibbs")
    for shift in (0.0, 0.03):
        held = multiplier_of_shifted_bound(of, shift)
        assert of.costs[0] @ (of.log_q - held * of.costs[0]).softmax(0) == pytest.approx(-shift, abs=1e-12)
    assert multiplier_of_shifted_bound(of, 0.0) == pytest.approx(0.69)
    run = simulate(Task("gibbs", ORACLE.name, "d=0.03", 0, 4))
    assert run.multipliers[:, 0].tolist() == pytest.approx([multiplier_of_shifted_bound(of, 0.03)] * 4)
    points = [(0.3, 0.004), (0.1, 0.012), (0.05, 0.02)]
    assert oracle.frontier_gap(points, 0.2) == pytest.approx(0.008)
    assert oracle.frontier_gap(points, 0.05) == pytest.approx(0.02)
    assert oracle.frontier_gap(points, 0.4) is None


def test_a_loss_in_another_unit():
    """A rule that is told the unit runs as on the plain loss, and scores the same; one that is not does not."""
    plain, told, other = (
        simulate(Task("far", "units", setting, 0, 40, 1.0, scale))
        for setting, scale in (("unit=1", 1.0), ("unit=20", 20.0), ("unit=1", 20.0))
    )
    torch.testing.assert_close(told.multipliers, plain.multipliers)
    assert not torch.allclose(other.multipliers, plain.multipliers)
    tasks = list(units.tasks(10, 1))
    assert len(set(tasks)) == len(tasks) == 8 * (2 + 3 + 3)
    rows = [task._asdict() | {"merit": 2.0 if task.setting == 'unit="auto"' else 4.0} for task in tasks]
    summary = units.summary(rows)
    assert [row["merits"] for row in summary] == [{"unit=1": 4.0, "told": 4.0, 'unit="auto"': 2.0}] * 24
    page = report.units_markdown(report.new_document(report.UNITS_SUITE, summary, {"steps": 10, "seeds": 1}, ""))
    assert "| 20 | 1 | 0.5 |" in " ".join(page.split()).replace("1.000", "1").replace("0.5000", "0.5")


def test_a_learning_rate_that_decays_moves_less():
    far = [simulate(Task("gibbs", ORACLE.name, "d=0", 0, 40, final_lr)).losses[-1] for final_lr in (1.0, 0.1)]
    assert far[0] > far[1]
