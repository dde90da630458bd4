"""The certificate: exact problems, coverage of its intervals, its sentences, and that it changes nothing."""

import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from barrierlm import (
    BarrierObjective,
    BatchMean,
    Certificate,
    ConstantSchedule,
    Constraint,
    DualAscent,
    GradientProbe,
    PackedBatch,
    RelaxedLogBarrier,
    Sampled,
)
from barrierlm.diagnostics import FeasibilityWatch
from barrierlm.intervals import inner_products, jackknife_ratio, normal_quantile, student_quantile
from tests.problems import BARRIER_POINTS as PROBLEMS
from tests.problems import Categorical

from .helpers import C, exact, relaxed, same, state_of
from .test_convergence import solve, step_size
from .test_windows import free_port

F64 = torch.float64


def probed(objective, parameters, calls):
    """A probe of the outputs of ``calls``, whose window is discarded."""
    probe = GradientProbe(parameters)
    for call in calls:
        probe.add(call())
    objective.discard_window()
    return probe


# ---- exact problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.1, 0.01])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_exact_problems(problem, mu):
    """At the barrier's point: complementarity m mu, no residual, and the bound on the gap holds."""
    rule = {"rule": RelaxedLogBarrier(), "schedule": ConstantSchedule(mu)}
    steps, lr = (1200, 0.1) if problem.name == "categorical 6" else (300, step_size(problem, mu))
    x, objective, _ = solve(problem, steps, lr, start=problem.solution(2 * mu), **rule)
    x.requires_grad_()
    probe = probed(objective, [x], [lambda: objective(x, measurements=problem.measure(x))] * 3)
    certificate = objective.certificate(probe)
    m = len(objective.report())
    assert certificate.mu_sum == pytest.approx(m * mu)
    assert certificate.complementarity.value == pytest.approx(m * mu, rel=1e-6)
    assert certificate.complementarity.stderr == 0
    assert certificate.gap_bound == certificate.complementarity.value
    stationarity = certificate.stationarity
    assert stationarity.rho2.value == pytest.approx(0, abs=1e-6)
    assert stationarity.rho2.low >= 0
    assert stationarity.cosine.value == pytest.approx(-1, abs=1e-6)
    assert stationarity.task_norm == pytest.approx(stationarity.constraint_norm, rel=1e-3)
    gap = problem.loss(x).item() - problem.optimum
    distance = (x - problem.solution(0.0)).norm().item()
    assert 0 < gap <= certificate.gap_bound + stationarity.residual_norm * distance + 1e-9
    assert "at most" in certificate.sentence


@pytest.mark.parametrize("problem", PROBLEMS[:3], ids=lambda p: p.name)
def test_the_gap_bound_holds_away_from_the_solution(problem):
    """Convex in x: f - f* <= -sum lambda z + |residual| |x - x*|, wherever the run stands."""
    for seed in range(20):
        shift = torch.randn(problem.start.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        x = (problem.solution(0.1) + 0.3 * shift).requires_grad_()
        objective = relaxed(problem.constraints)
        objective.calibrate(problem.measure(x))
        probe = GradientProbe([x])
        for _ in range(2):
            probe.add(objective.combine(problem.loss(x), problem.measure(x)))
        certificate = objective.certificate(probe)
        residual = certificate.stationarity.residual_norm
        task, constraint = torch.autograd.grad(problem.loss(x), x)[0], torch.zeros_like(x)
        for row, (name, value) in itertools.product(certificate.bounds, problem.measure(x).items()):
            if row.constraint == name:
                sign = 1 if row.side == "upper" else -1
                constraint += sign * row.per_unit * torch.autograd.grad(value, x, retain_graph=True)[0]
        assert residual == pytest.approx((task + constraint).norm().item(), rel=1e-6)
        distance = (x - problem.solution(0.0)).norm().item()
        gap = problem.loss(x).item() - problem.optimum
        assert gap <= certificate.gap_bound + residual * distance + 1e-6


def test_both_sides_of_a_constraint_share_an_estimate():
    """Standard errors: |lambda_upper - lambda_lower| within a constraint, summed between constraints."""
    both, one = Constraint("both", lower=0.0, upper=2.0, scale=0.5), Constraint("one", upper=1.0, scale=4.0)
    objective = relaxed([both, one], mu=0.3)
    objective.calibrate({"both": torch.tensor([0.5, 1.0, 1.2, 0.1]), "one": torch.tensor([0.0, 1.0])})
    certificate = objective.certificate(level=0.9)
    low, high, single = objective.report()
    assert [b.per_unit for b in certificate.bounds] == [r.multiplier / r.scale for r in (low, high, single)]
    expected = abs(high.multiplier - low.multiplier) * low.stderr / 0.5 + single.multiplier * single.stderr / 4
    value = sum(row.multiplier * row.slack / row.scale for row in (low, high, single))
    assert certificate.complementarity.value == pytest.approx(value)
    assert certificate.complementarity.stderr == pytest.approx(expected)
    assert certificate.gap_bound == pytest.approx(value + 1.6448536 * expected)
    assert [b.z for b in certificate.bounds] == pytest.approx([-r.slack / r.scale for r in (low, high, single)])


# ---- the statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "dof", "quantile"),
    [(0.95, 1, 12.7062047), (0.95, 2, 4.3026527), (0.95, 3, 3.1824463), (0.95, 7, 2.3646243), (0.99, 30, 2.7499957)],
)
def test_student_quantiles(level, dof, quantile):
    assert student_quantile(level, dof) == pytest.approx(quantile, rel=1e-7)
    assert normal_quantile(level) == pytest.approx(student_quantile(level, 10**5), rel=1e-4)


def test_inner_products_are_means_over_pairs():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(5, 2, 7, generator=generator, dtype=F64)

    def pairs(kept):
        return sum(g[i] @ g[j].T for i, j in itertools.permutations(kept, 2)) / (len(kept) * (len(kept) - 1))

    whole, without = inner_products(g @ g.mT, g.sum(0) @ g.mT)
    torch.testing.assert_close(whole, (pairs(range(5)) + pairs(range(5)).T) / 2 + (whole - whole.T) / 2)
    torch.testing.assert_close(whole[0, 0], pairs(range(5))[0, 0])
    torch.testing.assert_close(whole[0, 1], pairs(range(5))[0, 1])
    for left_out in range(5):
        kept = [j for j in range(5) if j != left_out]
        torch.testing.assert_close((without[left_out] + without[left_out].T) / 2, (pairs(kept) + pairs(kept).T) / 2)


def test_the_ends_are_ratios_that_are_just_not_rejected():
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([1.0, 2.0], dtype=F64) + 0.2 * torch.randn(6, 2, generator=generator, dtype=F64)
    without = (x.sum(0) - x) / 5
    pairs = [(x[:, i].mean(), without[:, i]) for i in (0, 1)]
    interval = jackknife_ratio(*pairs, 0.95, 0.0, math.inf)
    assert interval.low < interval.value < interval.high
    for ratio in (interval.low, interval.high):
        difference = x[:, 0] - ratio * x[:, 1]  # of means, the jackknife's error is the textbook one
        assert abs(difference.mean()).item() == pytest.approx(2.5705818 * difference.std().item() / math.sqrt(6))
    noise = (torch.tensor(0.01, dtype=F64), pairs[1][1] - 2)
    assert jackknife_ratio(pairs[0], noise, 0.95, 0.0, math.inf)[2:] == (0, math.inf)
    # An estimate outside of the range keeps half its width within.
    below = jackknife_ratio((pairs[0][0] - 9, pairs[0][1] - 9), pairs[1], 0.95, 0.0, math.inf)
    assert below.low == 0
    assert below.high > 0


REPETITIONS, BATCHES, SAMPLES, MULTIPLIER = 200, 8, 16, 0.69
GIBBS = Categorical()


def policy(where):
    shift = torch.randn(50, generator=torch.Generator().manual_seed(5), dtype=F64)
    return {
        "optimum": GIBBS.tilted(MULTIPLIER),
        "near": GIBBS.tilted(MULTIPLIER) + 0.3 * shift,
        "away": GIBBS.tilted(0.3) + 0.5 * shift,
    }[where]


def truth(theta):
    """-lambda E[c], rho2 and cosine in closed form."""
    log_p = theta.log_softmax(0)
    p, ratio = log_p.exp(), log_p - GIBBS.log_q
    task = p * (ratio - (p * ratio).sum())
    constraint = MULTIPLIER * p * (GIBBS.cost - GIBBS.expected(log_p))
    rho2 = ((task + constraint) ** 2).sum() / (task**2).sum()
    cosine = (task @ constraint) / (task.norm() * constraint.norm())
    return -MULTIPLIER * GIBBS.expected(log_p).item(), rho2.item(), cosine.item()


def certify_samples(theta, sampled_task, generator):
    """A certificate of a fixed policy from 128 samples for the estimate and 8 batches of 16 for the gradients."""
    theta = theta.clone().requires_grad_()
    # The multiplier is given: at 0.69 the tilted policy is the exact optimum.
    objective = BarrierObjective(
        None,
        [Constraint("c", upper=0.0, scale=1.0)],
        rule=DualAscent(1e-9, start_at=MULTIPLIER),
        estimator=BatchMean(),
    )

    def draw(n):
        return torch.multinomial(theta.detach().softmax(0), n, replacement=True, generator=generator)

    objective.calibrate({"c": Sampled(GIBBS.cost[draw(BATCHES * SAMPLES)])})
    probe = GradientProbe([theta])
    for _ in range(BATCHES):
        log_p, y = theta.log_softmax(0), draw(SAMPLES)
        if sampled_task:
            own = draw(SAMPLES)
            task = ((log_p[own] - GIBBS.log_q[own]).detach() * log_p[own]).mean()
        else:
            task = GIBBS.kl(theta)
        probe.add(objective.combine(task, {"c": Sampled(GIBBS.cost[y], log_p[y])}))
    return objective.certificate(probe)


@pytest.mark.parametrize("sampled_task", [False, True], ids=["exact task", "sampled task"])
@pytest.mark.parametrize("where", ["optimum", "near", "away"])
def test_coverage(where, sampled_task):
    """95% intervals cover in 91% to 99% of 200 repetitions (2.6 standard deviations of a binomial around 95%).

    At the optimum rho2 is 0 and the cosine -1, the ends of their ranges: the estimates are sums over pairs of pure
    noise, whose variance the jackknife overstates (more than twofold). So there, and near it, only the lower limit is
    asked for.
    """
    theta, generator = policy(where), torch.Generator().manual_seed(2)
    expected = truth(theta)
    if where == "optimum":
        assert expected == pytest.approx((0, 0, -1), abs=1e-12)
    covered, lows, highs = torch.zeros(3), [], []
    for _ in range(REPETITIONS):
        certificate = certify_samples(theta, sampled_task, generator)
        estimates = (certificate.complementarity, certificate.stationarity.rho2, certificate.stationarity.cosine)
        covered += torch.tensor([e.low - 1e-9 <= x <= e.high + 1e-9 for e, x in zip(estimates, expected, strict=True)])
        lows.append(estimates[1].low)
        highs.append(estimates[1].high)
    rates = (covered / REPETITIONS).tolist()
    most = [0.99] * 3 if where == "away" else [0.99, 1.0, 1.0]
    assert all(0.91 <= rate <= limit for rate, limit in zip(rates, most, strict=True)), rates
    # And they say something: the optimum's residual is below the task gradient, and away from it it is not 0.
    if where == "optimum":
        assert sorted(highs)[REPETITIONS // 2] < 1
    if where == "away":
        assert sorted(lows)[REPETITIONS // 2] > 0.5


@pytest.mark.parametrize("correlation", [-1.0, 0.0, 1.0])
def test_coverage_of_several_constraints(correlation):
    """How their estimates vary together is not known: 95% at least, and exactly that when they move as one."""
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(REPETITIONS):
        objective = BarrierObjective(
            None,
            [Constraint("a", upper=0.0, scale=1.0), Constraint("b", upper=1.0, scale=2.0)],
            rule=DualAscent(1e-9, start_at=0.5),
            estimator=BatchMean(),
        )
        x, y = torch.randn(2, 128, generator=generator, dtype=F64)
        b = correlation * x if correlation else y
        objective.calibrate({"a": x - 0.1, "b": 2 * b + 0.5})
        interval = objective.certificate().complementarity
        covered += interval.low <= 0.5 * 0.1 + 0.5 * 0.25 <= interval.high
    assert covered / REPETITIONS >= 0.91
    assert correlation < 1 or covered / REPETITIONS <= 0.99


# ---- sentences -----------------------------------------------------------------------------------------


def at(x, *, gradients=0, task=lambda x: x.sum(), **options):
    """min x, x >= 0 at mu = 0.1, measured at ``x``; the barrier's point is 0.1."""
    x = torch.tensor([x], dtype=F64, requires_grad=True)
    objective = relaxed([Constraint("x", lower=0.0, scale=1.0)], **options)
    objective.calibrate({"x": x.sum()})
    probe = GradientProbe([x])
    for _ in range(gradients):
        probe.add(objective.combine(task(x), {"x": x.sum()}))
    return objective.certificate(probe if gradients else None)


def test_sentence_without_gradients():
    certificate = at(0.1)
    assert certificate.stationarity is None
    assert certificate.sentence == (
        "The bound is met or active. If loss and bounds are convex, the task loss is at most 0.1 above the best "
        "possible within these bounds (95% confidence), provided that the Lagrangian's gradient is zero, which was not "
        "measured (a GradientProbe does)."
    )


def test_sentence_of_a_claim():
    certificate = at(0.1, gradients=3)
    assert certificate.sentence.startswith(
        "The bound is met or active. If loss and bounds are convex, the task loss is at"
    )
    assert "measured: 0% of the task gradient (95% interval: 0% to 0%). Without convexity" in certificate.sentence


def test_sentence_of_a_residual():
    certificate = at(0.2, gradients=3)  # the multiplier is 0.1 / 0.2 where 1 is needed
    assert certificate.stationarity.rho2.value == pytest.approx(0.25)
    assert certificate.sentence == (
        "The bound is met or active, but the Lagrangian's gradient is not zero: 50% of the task gradient (95% "
        "interval: 50% to 50%). No stationary point, and no gap is claimed."
    )


def test_sentences_that_cannot_tell():
    assert "cannot be told: 2 batches give no interval" in at(0.1, gradients=2).sentence
    nothing = at(0.1, gradients=3, task=lambda x: 0 * x.sum())
    assert "cannot be told: the task gradient itself is within its noise" in nothing.sentence
    assert math.isnan(nothing.stationarity.rho2.value)
    x = torch.tensor([0.1], dtype=F64, requires_grad=True)
    objective = relaxed([Constraint("x", lower=0.0, scale=1.0)])
    objective.calibrate({"x": x.sum()})
    noise = (0.3, -0.3, 0.2, -0.2)
    probe = probed(objective, [x], [lambda n=n: objective.combine((1 + n) * x.sum(), {"x": x.sum()}) for n in noise])
    assert "cannot be told: the Lagrangian's gradient is 0% of the task" in objective.certificate(probe).sentence


def test_sentence_of_a_violation():
    assert at(-0.2).sentence.startswith("Violated beyond noise: x (lower); the policy is not within its bounds")


def test_sentence_of_what_is_not_known():
    objective = relaxed([C, Constraint("d", upper=1.0)])
    objective.calibrate({"c": exact(0.5)})
    certificate = objective.certificate()
    assert certificate.sentence.startswith("Not known yet: d (upper); nothing is claimed")
    assert certificate.mu_sum == pytest.approx(0.1)
    assert certificate.complementarity.value == pytest.approx(0.1)
    objective = relaxed([Constraint("c", upper=1.0, scale=1.0)])
    objective.calibrate({"c": torch.tensor([0.5])})  # one sample: no standard error
    certificate = objective.certificate()
    assert math.isnan(certificate.gap_bound)
    assert certificate.sentence == "The estimates' standard errors are not known yet, so nothing is claimed."


def test_sentence_of_infeasible_bounds():
    objective = relaxed([Constraint("a", upper=-1.0), Constraint("b", lower=1.0)])
    for _ in range(FeasibilityWatch.PATIENCE_WITHOUT_GROWTH + 1):
        objective(measurements=dict.fromkeys("ab", exact(0.0)))
        objective.step()
    assert objective.certificate().sentence.startswith("a (upper) and b (lower) do not seem to have a common solution")


def test_it_prints():
    lines = str(at(0.1, gradients=3, task=lambda x: 2 * x.sum())).splitlines()
    assert lines[0].split() == ["constraint", "bound", "multiplier", "per", "unit", "z", "+-", "verdict"]
    assert lines[1].split() == ["x", ">=", "0", "1", "1", "-0.1", "0", "met"]
    assert "sum of mu: 0.1" in lines
    assert "|t|: 2, |c|: 1, from 3 batches" in lines
    assert lines[-1].startswith("The bound is met or active, but")
    assert "sum of mu" not in str(at(0.1, rule=DualAscent()))


# ---- errors, and what stays as it was ------------------------------------------------------------------


def test_errors_of_the_certificate():
    objective = relaxed([C])
    with pytest.raises(RuntimeError, match=r"nothing measured yet; allowed: after step\(\) or calibrate\(\)"):
        objective.certificate()
    x = exact(0.5)
    objective.calibrate({"c": x})
    for level in (0, 1, -0.5, 95, True, "0.95", math.nan):
        with pytest.raises(ValueError, match=r"level=.*; allowed: 0 < level < 1"):
            objective.certificate(level=level)
    with pytest.raises(TypeError, match="gradients is a list; allowed: a GradientProbe or None"):
        objective.certificate([])
    probe = GradientProbe([x])
    with pytest.raises(ValueError, match=r"gradients has 0 batch\(es\), over all ranks; allowed: at least 2"):
        objective.certificate(probe)
    probe.add(objective.combine(x * 2, {"c": x * 1}))
    with pytest.raises(ValueError, match=r"gradients has 1 batch\(es\)"):
        objective.certificate(probe)
    probe.add(objective.combine(x * 2, {"c": x * 1}))
    assert objective.certificate(probe).stationarity.num_batches == len(probe) == 2
    objective(measurements={"c": x + 0.3})
    objective.step()
    with pytest.raises(
        ValueError, match=r"gradients were taken under the multipliers \[0.2.*; allowed: certificate\(\)"
    ):
        objective.certificate(probe)
    with pytest.raises(
        ValueError, match=r"out was made under the multipliers .* with no objective.step\(\) in between"
    ):
        probe.add(objective.combine(x * 2, {"c": x * 1}))


def test_errors_of_the_probe():
    x = exact(0.5)
    cases = [
        ([], ValueError, "parameters is empty"),
        ([1.0], TypeError, r"parameters\[0\] is float; allowed: floating tensors"),
        ([torch.zeros(2, dtype=torch.int64)], TypeError, r"parameters\[0\] is torch.int64"),
        ([x, torch.zeros(2)], ValueError, r"parameters\[1\] does not require grad; allowed"),
        ([x, x], ValueError, "parameters holds a tensor twice"),
    ]
    for parameters, error, message in cases:
        with pytest.raises(error, match=message):
            GradientProbe(parameters)
    objective, probe = relaxed([C]), GradientProbe([x])
    with pytest.raises(TypeError, match="out is a Tensor; allowed: the ObjectiveOutput"):
        probe.add(x)
    with pytest.raises(ValueError, match="out depends on none of the parameters"):
        probe.add(objective.combine(exact(1.0), {"c": exact(1.0)}))
    with pytest.raises(FloatingPointError, match="gradient has NaN or infinity; it was not added"):
        probe.add(objective.combine(x * math.inf, {"c": x * 1}))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="out has no gradient; allowed: the output of a call with gradients on"),
    ):
        probe.add(objective.combine(x * 1, {"c": x * 1}))
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    batch = PackedBatch(torch.tensor([4, 2, 1, 7, 1]), torch.tensor([0, 3, 5]), torch.tensor([0.3, 0.0]), num_sampled=1)
    with pytest.raises(ValueError, match=r"out comes from linear\(\).*; allowed: combine\(\)"):
        probe.add(objective.linear(hidden, head, batch, {"c": Sampled(torch.ones(1))}))
    assert len(probe) == 0


def test_nothing_is_changed():
    """Neither the state nor the open window, nor any .grad; and backward() works after the probe."""

    def run(certified):
        model = torch.nn.Linear(3, 1)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.fill_(0.1 * (i + 1))
        objective = BarrierObjective(None, [C], estimator=BatchMean())
        inputs = torch.linspace(-1, 2, 12).view(4, 3)
        objective.calibrate({"c": model(inputs).flatten()})
        probe = GradientProbe(model.parameters())
        for part in inputs.split(2):
            out = objective.combine(model(part).square().mean(), {"c": model(part).flatten()})
            if certified:
                before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                probe.add(out)
                assert all(same(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
            out.loss.backward()
        if certified:
            before = state_of(objective)
            certificate = objective.certificate(probe)
            assert isinstance(certificate, Certificate)
            assert same(before, state_of(objective))
            t, c = probe.products(None)[1].sum(0).diagonal().sqrt().tolist()
            assert t > 0
            assert c > 0
        objective.step()
        return state_of(objective), [p.grad for p in model.parameters()]

    (state, grads), (certified_state, certified_grads) = run(False), run(True)
    assert same(state, certified_state)
    assert all(map(torch.equal, grads, certified_grads))


def test_frozen_and_unused_parameters_count_as_zero():
    x, unused = exact(0.1), torch.ones(3, requires_grad=True)
    objective = relaxed([Constraint("x", lower=0.0, scale=1.0)])
    objective.calibrate({"x": x})
    calls = [lambda: objective.combine(x * 2, {"x": x * 1}), lambda: objective.combine(x * 2, {})] * 2
    stationarity = objective.certificate(probed(objective, [unused, x], calls)).stationarity
    assert stationarity.task_norm == pytest.approx(2)
    pairs = [0.0, 1.0] * 2  # half of the batches did not measure the constraint
    expected = sum(a * b for a, b in itertools.permutations(pairs, 2)) / 12
    assert stationarity.constraint_norm == pytest.approx(math.sqrt(expected))


# ---- several ranks -------------------------------------------------------------------------------------


def ranks_certificate(batches):
    """A certificate from these of eight batches."""
    theta = policy("away").requires_grad_()
    objective = BarrierObjective(None, [Constraint("c", upper=0.0, scale=1.0)], rule=DualAscent(1e-9, start_at=0.7))
    objective.calibrate({"c": GIBBS.expected(theta.log_softmax(0))})
    probe = GradientProbe([theta])
    for seed in batches:
        y = torch.randint(50, (16,), generator=torch.Generator().manual_seed(seed))
        log_p = theta.log_softmax(0)
        probe.add(objective.combine(-log_p[y].mean(), {"c": Sampled(GIBBS.cost[y], log_p[y])}))
    objective.discard_window()
    return objective.certificate(probe)


SPLITS = [[range(3), range(3, 8)], [range(0), range(8)]]


def worker(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for split in SPLITS:
            results.put(ranks_certificate(split[rank]).stationarity)
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one():
    """However the batches lie on the ranks, also with none on one of them."""
    context = mp.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=worker, args=(rank, port, results)) for rank in range(2)]
    for p in processes:
        p.start()
    got = [results.get(timeout=200) for _ in range(2 * len(SPLITS))]
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    expected = ranks_certificate(range(8)).stationarity
    assert expected.num_batches == 8
    for stationarity in got:
        for a, b in zip(stationarity, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-9)
