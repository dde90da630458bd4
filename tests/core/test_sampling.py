"""The surrogate's gradient is the gradient of the exact expected cost, by enumeration of a small policy."""

import itertools

import pytest
import torch

from barrierlm import BarrierObjective, ConstantSchedule, Constraint, RelaxedLogBarrier, Sampled
from barrierlm.estimators import NUM_POSITIONS, Column
from barrierlm.positions import PositionBaseline, position_bucket
from barrierlm.sampling import measure_value

F64 = torch.float64
VOCAB, LENGTH, END = 3, 3, 0  # tokens 1 and 2 go on, 0 ends a response; responses of at most 3 tokens
ZERO, FLAT = torch.zeros((), dtype=F64), torch.zeros(NUM_POSITIONS, dtype=F64)


def responses():
    """All responses of the little language, as tuples of tokens."""
    for n in range(1, LENGTH + 1):
        for body in itertools.product([1, 2], repeat=n - 1):
            for last in [END] if n < LENGTH else range(VOCAB):
                yield (*body, last)


def theta():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LENGTH, VOCAB, VOCAB, generator=generator, dtype=F64).requires_grad_()


def token_logps(theta, response):
    """Log-probabilities of the tokens; the state is the position and the token before."""
    previous, out = 0, []
    for t, token in enumerate(response):
        out.append(theta[t, previous].log_softmax(0)[token])
        previous = token
    return torch.stack(out)


def cost_of(response):
    """Per-token costs that depend on the token, and a total that is no multiple of the length."""
    return torch.tensor([1.0 + 0.3 * token for token in response], dtype=F64)


def exact_gradient(theta):
    expected = sum(token_logps(theta, r).sum().exp() * cost_of(r).sum() for r in responses())
    return torch.autograd.grad(expected, theta)[0], expected.item()


def test_the_language_is_a_distribution():
    assert sum(token_logps(theta(), r).sum().exp() for r in responses()).item() == pytest.approx(1)


def expectation(theta, build, size, behaviour=None):
    """E over all tuples of ``size`` responses of (gradient of the surrogate mean, value)."""
    behaviour = theta if behaviour is None else behaviour
    gradient, value = torch.zeros_like(theta), 0.0
    for batch in itertools.product(list(responses()), repeat=size):
        p = torch.stack([token_logps(behaviour, r).sum() for r in batch]).sum().exp().detach()
        measured = build(theta, batch)
        mean = measured.total / size
        (g,) = torch.autograd.grad(mean, theta)
        gradient += p * g
        value += p.item() * mean.item()
    return gradient, value


def per_sequence(center=0.0, groups=None, old=None, clip=None):
    def build(theta, batch):
        logps = torch.stack([token_logps(theta, r).sum() for r in batch])
        costs = torch.stack([cost_of(r).sum() for r in batch])
        old_logps = None if old is None else torch.stack([token_logps(old, r).sum() for r in batch]).detach()
        g = None if groups is None else torch.tensor(groups)
        return Sampled(costs, logps, g, old_logps=old_logps, clip=clip).measure(ZERO + center, FLAT)

    return build


def per_token(center=0.0, positions=FLAT, old=None):
    def build(theta, batch):
        logps = torch.cat([token_logps(theta, r) for r in batch])
        costs = torch.cat([cost_of(r) for r in batch])
        cu = torch.tensor([0, *itertools.accumulate(len(r) for r in batch)])
        old_logps = None if old is None else torch.cat([token_logps(old, r) for r in batch]).detach()
        return Sampled.per_token(costs, logps, cu, old_logps=old_logps).measure(ZERO + center, positions)

    return build


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (per_sequence(), 1),
        (per_sequence(center=2.7), 1),
        (per_sequence(center=0.7), 2),
        (per_sequence(groups=[5, 5]), 2),
        (per_token(), 1),
        (per_token(center=1.1, positions=torch.linspace(3, -2, NUM_POSITIONS, dtype=F64)), 1),
        (per_token(positions=torch.linspace(3, 0, NUM_POSITIONS, dtype=F64)), 2),
    ],
    ids=["seq", "seq-baseline", "seq-pair", "seq-group", "token", "token-baseline", "token-pair"],
)
def test_unbiased_by_enumeration(build, size):
    parameters = theta()
    exact, expected = exact_gradient(parameters)
    gradient, value = expectation(parameters, build, size)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)
    assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [per_sequence, per_token])
def test_off_policy_is_unbiased_by_enumeration(kind):
    parameters = theta()
    behaviour = (parameters.detach() * 0.5 + 0.1).requires_grad_()
    exact, expected = exact_gradient(parameters)
    gradient, value = expectation(parameters, kind(center=1.3, old=behaviour), 1, behaviour)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)
    assert value == pytest.approx(expected, abs=1e-12)


def test_clip_truncates_the_ratio():
    logps = torch.tensor([-1.0, -1.0], dtype=F64, requires_grad=True)
    old = torch.tensor([-3.0, -1.0], dtype=F64)
    costs = torch.tensor([1.0, 1.0], dtype=F64)
    measured = Sampled(costs, logps, old_logps=old, clip=0.2).measure(ZERO, FLAT)
    (gradient,) = torch.autograd.grad(measured.total, logps)
    assert gradient.tolist() == pytest.approx([1.2, 1.0])


def test_baselines_lower_the_variance():
    """Why they are there: the same mean gradient, less spread around it."""
    parameters = theta()
    _, expected = exact_gradient(parameters)

    def spread(build):
        total = 0.0
        for r in responses():
            p = token_logps(parameters, r).sum().exp().item()
            (g,) = torch.autograd.grad(build(parameters, [r]).total, parameters)
            total += p * g.square().sum().item()
        return total

    reached = torch.zeros(2, NUM_POSITIONS, dtype=F64)
    for r in responses():
        p = token_logps(parameters, r).sum().exp().item()
        togo = cost_of(r).flip(0).cumsum(0).flip(0)
        for t in range(len(r)):
            reached[0, t] += p * togo[t]
            reached[1, t] += p
    positions = torch.where(reached[1] > 0, reached[0] / reached[1].clamp(min=1e-9), 0.0)
    plain, centred = spread(per_sequence()), spread(per_sequence(center=expected))
    credited = spread(per_token(positions=positions))
    assert centred < 0.7 * plain
    assert credited < 0.7 * centred


def test_two_sample_group_equals_leave_one_out_by_hand():
    logps = torch.zeros(4, dtype=F64, requires_grad=True)
    costs = torch.tensor([1.0, 4.0, 10.0, 30.0], dtype=F64)
    measured = Sampled(costs, logps, torch.tensor([7, 9, 7, 9])).measure(ZERO + 99, FLAT)
    (gradient,) = torch.autograd.grad(measured.total, logps)
    assert gradient.tolist() == [1 - 10, 4 - 30, 10 - 1, 30 - 4]


def test_position_baseline():
    buckets = position_bucket(torch.arange(20_000))
    assert buckets[:64].tolist() == list(range(64))
    assert (buckets.diff() >= 0).all()
    assert buckets.max() == NUM_POSITIONS - 1
    rows = torch.zeros(1, Column.POSITIONS + 2 * NUM_POSITIONS, dtype=F64)
    rows[0, Column.POSITIONS : Column.POSITIONS + 2] = torch.tensor([6.0, 2.0])
    rows[0, Column.POSITIONS + NUM_POSITIONS : Column.POSITIONS + NUM_POSITIONS + 2] = torch.tensor([2.0, 1.0])
    baseline = PositionBaseline(1, 1.0)
    baseline.update(rows)
    assert baseline.table()[0, :5].tolist() == [3.0, 2.0, 2.0, 2.0, 2.0]


def test_position_baseline_under_another_default_device():
    with torch.device("meta"):
        assert PositionBaseline(2, 0.1).table().shape == (2, NUM_POSITIONS)


def test_learned_position_baseline_is_the_mean_reward_to_go():
    objective = BarrierObjective(None, [Constraint("len", lower=1, upper=3)])
    logps = torch.zeros(5, requires_grad=True)
    objective(measurements={"len": Sampled.per_token(torch.ones(5), logps, torch.tensor([0, 2, 5]))})
    objective.step()
    assert objective._committed.baselines[0, :4].tolist() == pytest.approx([2.5, 1.5, 1.0, 1.0])


def test_low_precision_logps_are_summed_in_fp32():
    logps = torch.full((4096,), -0.01, dtype=torch.bfloat16, requires_grad=True)
    measured = Sampled(torch.ones(4096, dtype=torch.bfloat16), logps).measure(ZERO, FLAT)
    assert measured.total.dtype == torch.float32
    assert measured.total.item() == 4096
    measured.total.backward()
    assert logps.grad.dtype == torch.bfloat16


def test_a_kl_in_low_precision_is_subtracted_in_fp32():
    logps, ref_logps = (torch.tensor([x], dtype=torch.bfloat16) for x in (-100.5, -3.015625))
    kl = Sampled.reference_kl(ref_logps, logps.requires_grad_(), torch.tensor([0, 1]))
    assert kl.values.dtype == torch.float32
    assert kl.values.item() == -97.484375  # -97.5 in bf16
    assert not kl.values.requires_grad


def test_empty_micro_batch_is_a_connected_zero():
    for n, build in (
        (0, lambda x: Sampled(x.detach(), x)),
        (0, lambda x: Sampled.per_token(x.detach(), x, torch.tensor([0]))),
    ):
        logps = torch.zeros(n, requires_grad=True)
        measured = build(logps).measure(ZERO, FLAT)
        measured.total.backward()
        assert measured.total.item() == 0
        assert logps.grad is not None
    x = torch.zeros(0, requires_grad=True)
    measure_value(x, ZERO).total.backward()
    assert x.grad is not None


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("shift", [100.0, 800.0])
def test_an_overflowing_importance_ratio_is_nonfinite(policy, shift):
    logps = torch.zeros(2, requires_grad=True)
    objective = BarrierObjective(None, [Constraint("c", upper=1.0)], nonfinite=policy)
    objective.calibrate({"c": torch.tensor([1.0, 3.0])})
    out = objective(measurements={"c": Sampled(torch.ones(2), logps, old_logps=logps.detach() - shift)})
    assert torch.isfinite(out.loss)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="for 'c'"):
            objective.step()
    else:
        objective.step()
        assert objective.metrics()["constraints/c/nonfinite"] > 0
    assert objective.metrics()["constraints/c/value"] == 2


def test_old_logps_may_share_the_graph():
    logps = torch.tensor([-1.0, -2.0], dtype=F64, requires_grad=True)
    gradients = []
    for old in (logps, logps.detach()):
        total = Sampled(torch.tensor([1.0, 3.0], dtype=F64), logps, old_logps=old).measure(ZERO, FLAT).total
        gradients.append(torch.autograd.grad(total, logps)[0].tolist())
    assert gradients[0] == gradients[1] == [1.0, 3.0]


def test_huge_pathwise_values_are_nonfinite_not_poison():
    objective = BarrierObjective(None, [Constraint("c", upper=1.0)], nonfinite="skip")
    objective(measurements={"c": torch.tensor([1e200, -1e200, 1.0], dtype=F64, requires_grad=True)})
    objective.step()
    assert objective.metrics()["constraints/c/nonfinite"] == 2
    assert objective.report()[0].verdict == "unknown"


@pytest.mark.parametrize(("cost", "logp"), [(1e26, -1.0), (1.0, -1e11), (1e20, -1e20)])
def test_what_would_overflow_in_a_product_is_nonfinite_not_poison(cost, logp):
    objective = BarrierObjective(None, [Constraint("c", upper=1.0, scale=1.0)], nonfinite="skip")
    objective.calibrate({"c": Sampled(torch.tensor([3.0, 4.0]))})
    logps = torch.tensor([-1.0, logp], requires_grad=True)
    out = objective.combine(torch.tensor(1.0), {"c": Sampled(torch.tensor([1.0, cost]), logps)})
    out.loss.backward()
    assert out.loss.isfinite()
    assert logps.grad.tolist() == [0, 0]
    objective.step()
    assert objective.report()[0].estimate == 3.5
    assert objective.metrics()["constraints/c/nonfinite"] == 1


def test_a_group_forgets_an_outlier_before_it():
    """Its costs are compared with each other, and a committed mean far off costs them no digits."""
    objective = BarrierObjective(None, [Constraint("c", upper=1.0, scale=1.0)], rule=RelaxedLogBarrier())
    objective.calibrate({"c": Sampled(torch.tensor([1e20, 1.0]))})
    logps = torch.full((4,), -1.0, requires_grad=True)
    costs, groups = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1])
    objective.combine(None, {"c": Sampled(costs, logps, groups=groups)}).loss.backward()
    torch.testing.assert_close(logps.grad / objective.weights["c"], torch.tensor([-0.25, 0.25, -0.25, 0.25]))


def test_cu_seqlens_that_are_a_column_of_a_table():
    objective = BarrierObjective(None, [Constraint("c", upper=1.0, scale=1.0)])
    cu_seqlens = torch.tensor([[0, 9], [2, 9], [5, 9]])[:, 0]
    objective.combine(
        None, {"c": Sampled.per_token(torch.ones(5), torch.zeros(5, requires_grad=True), cu_seqlens)}
    ).loss.backward()
    objective.step()
    assert objective.report()[0].estimate == 2.5


def test_autocast_changes_nothing():
    logps = torch.randn(8, requires_grad=True)
    objective = BarrierObjective(
        None, [Constraint("c", upper=0.0, scale=1.0)], rule=RelaxedLogBarrier(), schedule=ConstantSchedule(0.1)
    )
    objective.calibrate({"c": Sampled(torch.randn(8), logps)})
    measurement = {"c": Sampled(torch.randn(8), logps, torch.arange(8) // 2)}
    plain = objective(measurements=measurement).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = objective(measurements=measurement).loss
    assert torch.equal(plain, cast)


V, L = torch.zeros(3), torch.zeros(3, requires_grad=True)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Sampled([1.0], L), TypeError, "values is a list; allowed: a torch.Tensor"),
        (lambda: Sampled(V.long(), L), TypeError, r"values has dtype torch.int64; allowed: a floating dtype"),
        (lambda: Sampled(V[None], L), ValueError, r"values has shape \(1, 3\); allowed: 1 dimension"),
        (lambda: Sampled(V, L[:2]), ValueError, r"logps has shape \(2,\); allowed: \(3,\)"),
        (lambda: Sampled(L, L), ValueError, "values requires grad; allowed: detached costs"),
        (lambda: Sampled(V, L, torch.zeros(2).long()), ValueError, r"groups has shape \(2,\)"),
        (lambda: Sampled(V, L, torch.zeros(3)), TypeError, "groups must be an integer"),
        (
            lambda: Sampled(V, L, torch.tensor([4, 4, 6])),
            ValueError,
            "groups: prompt 6 has one response; allowed: at l",
        ),
        (lambda: Sampled(V, L, clip=0.2), ValueError, "clip=0.2, old_logps missing"),
        (lambda: Sampled(V, L, old_logps=V[:1]), ValueError, r"old_logps has shape \(1,\)"),
        (
            lambda: Sampled.per_token(V, L, torch.tensor([0, 2])),
            ValueError,
            "cu_seqlens ends at 2; allowed: the number",
        ),
        (lambda: Sampled.per_token(V, L, torch.tensor([1, 3])), ValueError, "does not start at 0"),
        (lambda: Sampled.per_token(V, L, torch.tensor([0, 2, 1, 3])), ValueError, "cu_seqlens decreases"),
        (lambda: Sampled.per_token(V, L, torch.tensor([0.0, 3.0])), TypeError, "cu_seqlens must be an integer"),
        (lambda: Sampled.per_token(V, L, torch.zeros(2, 2).long()), ValueError, r"cu_seqlens has shape \(2, 2\)"),
        (lambda: Sampled.per_token(V.long(), L, torch.tensor([0, 3])), TypeError, "costs has dtype torch.int64"),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
