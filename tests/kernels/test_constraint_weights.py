"""`constraint_weights` equals what barrierlm's measurements and rules say, for every kind of cost and credit."""

import doctest
import itertools
import math

import pytest
import torch
from barrierlm_kernels.constraint_weights import ConstraintWeights, api, constraint_weights, reference, results
from constraint_cases import EXTENSIONS, F64, Case, assert_same, barrier
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from barrierlm import RelaxedLogBarrier
from barrierlm.estimators import Column

KINDS = list(itertools.product([False, True], repeat=3))  # per token, grouped, off policy
LENGTHS = [3, 0, 100, 1, 7, 2]


def vector(*values):
    return torch.tensor(values, dtype=F64)


def weigh(case, **changes):
    return constraint_weights(**case.data(coefficients=case.coefficients) | changes)


def check(case, **changes):
    """Against `Sampled.measure`, with coefficients of no rule and a window of ten samples."""
    advantages, statistics = case.expected()
    out = weigh(case, num_samples=10, **changes)
    assert_same(out, ((case.coefficients[:, None] / 10 * advantages).sum(0), statistics, case.coefficients))


# ---- samples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("constraints", range(1, 9))
def test_equals_the_measurements(constraints, kind):
    check(Case(constraints, LENGTHS, *kind))


@given(
    constraints=st.integers(1, 4),
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 70]), min_size=2, max_size=12),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    bad=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2**16), st.sampled_from([math.nan, math.inf])), max_size=3
    ),
)
def test_equals_the_measurements_whatever_the_costs(constraints, lengths, kind, seed, bad):
    case = Case(constraints, lengths, *kind, seed=seed)
    for k, place, value in bad:
        if case.costs.shape[1]:
            case.costs[k % constraints, place % case.costs.shape[1]] = value
    check(case)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_nothing_sampled(per_token, off_policy):
    check(Case(3, [], per_token, off_policy=off_policy))
    check(Case(3, [0, 0], per_token, off_policy=off_policy) if per_token else Case(3, [1]))
    out = constraint_weights(torch.zeros(0, 4), torch.zeros(0), coefficients=torch.zeros(0))
    assert out.weights.tolist() == [0, 0, 0, 0]
    assert out.statistics.shape == (0, 8)


def test_large_groups_equal_a_comparison_of_all_pairs():
    groups = torch.randint(-300, 300, (4096,), dtype=torch.int32)
    costs = torch.randn(2, 4096, dtype=F64)
    out = constraint_weights(costs, vector(0.3, -2), coefficients=vector(1, 0.5), groups=groups)
    same = (groups[:, None] == groups).double()
    sizes, d = same.sum(1), costs - vector(0.3, -2)[:, None]
    advantages = d - torch.where(sizes > 1, (d @ same - d) / (sizes - 1), 0)
    torch.testing.assert_close(out.weights, vector(1, 0.5) @ advantages / 4096, rtol=1e-12, atol=1e-15)
    total = d @ same
    expected = [len(groups.unique()), (total**2 / sizes)[0].sum(), total[0].sum(), sizes.sum()]
    torch.testing.assert_close(out.statistics[0, 3:7], vector(*expected), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_up", ["_add_up", "_sort_and_add_up"])
def test_many_responses_and_other_devices(kind, add_up, monkeypatch):
    """Groups found by sorting, as those of many responses are, and sums as they are made on a GPU."""
    monkeypatch.setattr(reference, "_FEW", 0)
    monkeypatch.setattr(reference, "_add_up", getattr(reference, add_up))
    case = Case(3, LENGTHS, *kind)
    check(case)
    case.groups = torch.stack([case.groups, case.groups], 1)[:, 0]  # not contiguous
    check(case)
    case.costs[1, 2] = math.nan
    check(case)
    check(Case(3, [], *kind))


def test_a_response_without_others_in_its_group_keeps_the_center_as_baseline():
    out = constraint_weights(vector(5, 1, 2)[None], vector(3), coefficients=vector(6), groups=torch.tensor([4, -1, -1]))
    assert out.weights.tolist() == [4, -2, 2]


@pytest.mark.parametrize("buckets", [0, 1, 2, 7, 16, 130])
def test_any_number_of_position_buckets(buckets):
    case = Case(2, [40, 3, 0, 9], per_token=True)
    baselines = torch.randn(2, buckets, dtype=F64)
    out = weigh(case, baselines=baselines)
    assert out.statistics.shape == (2, 8 + 2 * buckets)
    half, sums, tokens, weights = max(buckets // 2, 1), torch.zeros(2, buckets), torch.zeros(buckets), []
    sums = sums.double()
    for costs in case.costs.split(case.lengths, 1):
        for t in range(costs.shape[1]):
            to_go = costs[:, t:].sum(1)
            if buckets:
                place = min(t if t < half else half + int(8 * math.log2(t / half)), buckets - 1)
                sums[:, place] += to_go
                tokens[place] += 1
                to_go = to_go - baselines[:, place]
            weights.append(case.coefficients @ to_go / 4)
    expected = torch.cat([sums, tokens.double().expand(2, -1)], 1)
    torch.testing.assert_close(out.statistics[:, 8:], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.weights, torch.stack(weights), rtol=1e-12, atol=1e-12)


def test_without_baselines_the_credit_is_the_reward_to_go():
    costs, cu = vector(1, 2, 4, 8, 16)[None], torch.tensor([0, 3, 3, 5])
    out = constraint_weights(costs, vector(5), coefficients=vector(3), cu_seqlens=cu, ratios=vector(1, 1, 2))
    assert out.weights.tolist() == [7, 6, 4, 48, 32]
    assert out.statistics.tolist() == [[3, 2 - 5 + 38, 4 + 25 + 38**2, 3, 4 + 25 + 38**2, 35, 3, 0]]


def test_tokens_of_no_response_weigh_nothing_and_may_hold_anything():
    case = Case(2, LENGTHS, per_token=True, grouped=True, off_policy=True)
    inner = weigh(case)
    outside = torch.full((2, 3), math.nan, dtype=F64)
    costs = torch.cat([outside, case.costs, outside + math.inf], 1)
    out = weigh(case, costs=costs, cu_seqlens=case.cu_seqlens + 3)
    assert out.weights[:3].tolist() == out.weights[-3:].tolist() == [0, 0, 0]
    assert_same((out.weights[3:-3], *out[1:]), inner)
    none = weigh(case, costs=costs, cu_seqlens=torch.tensor([3]), groups=case.groups[:0], ratios=case.ratios[:0])
    assert not none.weights.any()
    assert not none.statistics.any()


# ---- what is not finite


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_number_drops_its_constraint_and_no_other(kind):
    for bad in (math.nan, math.inf, -math.inf, 1e80):
        case = Case(3, LENGTHS, *kind)
        kept = weigh(case, coefficients=case.coefficients * vector(1, 0, 1))
        case.costs[1, 2] = bad
        out = weigh(case)
        assert torch.equal(out.weights, kept.weights)
        assert torch.equal(out.statistics[::2], kept.statistics[::2])
        assert out.statistics[1].tolist() == [0] * 7 + [1] + [0] * (out.statistics.shape[1] - 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_center_or_baseline_drops_its_constraint(kind):
    case = Case(3, LENGTHS, *kind)
    kept = weigh(case, coefficients=case.coefficients * vector(1, 0, 1))
    for name in ("center", "baselines") if case.per_token else ("center",):
        bad = getattr(case, name).clone()
        bad[1] = math.inf
        out = weigh(case, **{name: bad})
        assert torch.equal(out.weights, kept.weights)
        assert out.statistics[1, 7] == (6 if name == "center" else 128)
        assert not out.statistics[1, :7].any()
        assert not out.statistics[1, 8:].any()


@pytest.mark.parametrize("per_token", [False, True])
def test_a_bad_ratio_drops_all(per_token):
    case = Case(3, LENGTHS, per_token, off_policy=True)
    ratios = case.ratios
    ratios[[2, 5]] = math.nan
    out = weigh(case, ratios=ratios)
    assert not out.weights.any()
    assert out.statistics[:, 7].tolist() == [2, 2, 2]
    assert not out.statistics[:, :7].any()


def test_a_coefficient_that_is_not_finite_adds_nothing_and_is_returned():
    case = Case(3, LENGTHS)
    kept = weigh(case, coefficients=case.coefficients * vector(1, 0, 1))
    for bad in (math.inf, math.nan):
        coefficients = case.coefficients.clone()
        coefficients[1] = bad
        out = weigh(case, coefficients=coefficients)
        assert torch.equal(out.weights, kept.weights)
        assert torch.equal(out.statistics, kept.statistics)
        assert not out.coefficients[1].isfinite()


def test_finite_numbers_never_overflow():
    huge = torch.full((1, 50), 4e69, dtype=F64)
    for groups in (None, torch.zeros(50, dtype=torch.int64)):
        out = constraint_weights(huge, vector(-4e69), coefficients=vector(1), groups=groups, ratios=huge[0])
        assert out.statistics.isfinite().all()
        assert out.weights.isfinite().all()
        assert out.statistics[0, 7] == 0


# ---- the barrier


@pytest.mark.parametrize("s", [None, 0.3, "each"])
@pytest.mark.parametrize("sides", [("lower",), ("upper",), ("lower", "upper")])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_coefficients_are_the_rule_s_multipliers(extension, sides, s):
    size = 300
    given_bounds = barrier(size)
    mu, scale, center = given_bounds["mu"], given_bounds["scale"], torch.randn(size, dtype=F64)
    width = mu**2 if s is None else mu / 2 if s == "each" else torch.full_like(mu, s)
    rule, expected = RelaxedLogBarrier(extension), torch.zeros(size, dtype=F64)
    if "upper" in sides:
        expected += rule.multiplier((center - given_bounds["upper"]) / scale, mu, width) / scale
    if "lower" in sides:
        expected -= rule.multiplier((given_bounds["lower"] - center) / scale, mu, width) / scale
    out = constraint_weights(
        torch.randn(size, 2),
        center,
        **{side: given_bounds[side] for side in sides},
        scale=scale,
        mu=mu,
        s=width if s == "each" else s,
        extension=extension,
    )
    torch.testing.assert_close(out.coefficients, expected, rtol=1e-12, atol=1e-300)


def test_order_of_the_polynomial_and_defaults():
    center, mu = vector(0.4, 2.0), 0.5
    rule = RelaxedLogBarrier("polynomial", order=6)
    expected = rule.multiplier(center - 1, vector(mu, mu), vector(mu**2, mu**2))
    for number in (mu, torch.tensor(mu), vector(mu, mu)):
        out = constraint_weights(
            torch.zeros(2, 3), center, upper=vector(1, 1), mu=number, extension="polynomial", order=6
        )
        torch.testing.assert_close(out.coefficients, expected, rtol=1e-12, atol=0)


def test_reduced_statistics_move_the_point_and_nothing_else():
    case, bounds = Case(3, LENGTHS), barrier(3)
    reduced = weigh(case).statistics
    reduced[1] = 0  # nothing measured
    mean = case.center + reduced[:, Column.SUM] / vector(6, 1, 6)
    at_mean = constraint_weights(case.costs, mean, **bounds)
    out = constraint_weights(case.costs, case.center, **bounds, statistics=reduced)
    torch.testing.assert_close(out.coefficients, at_mean.coefficients, rtol=1e-12, atol=0)
    assert_same(out, weigh(case, coefficients=out.coefficients))


def test_what_another_rank_found_not_finite_is_dropped_here_too():
    case, bounds = Case(3, LENGTHS), barrier(3)
    reduced = weigh(case).statistics
    reduced[1, 7] = 1
    out = constraint_weights(case.costs, case.center, **bounds, statistics=reduced)
    expected = constraint_weights(case.costs, case.center, **bounds).coefficients[1]
    assert out.coefficients[1] == expected  # at the center
    assert torch.equal(out.weights, weigh(case, coefficients=out.coefficients * vector(1, 0, 1)).weights)


@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_around_a_reduction_equal_one_process(kind):
    """A batch split over two ranks: sums add up, and with them the weights are those of the whole."""
    whole = Case(2, [3, 4, 0, 2, 90, 1, 2, 5], *kind)
    whole.groups = torch.tensor([5, 8, 5, 8, 8, 2, 2, 2])
    ranks = []
    for part, tokens in ((slice(0, 5), slice(0, 99)), (slice(5, 8), slice(99, 107))):
        data = whole.data()
        data["costs"] = whole.costs[:, tokens if whole.per_token else part]
        for name in {"groups", "ratios"} & data.keys():
            data[name] = data[name][part]
        if whole.per_token:
            data["cu_seqlens"] = torch.tensor([0, *whole.lengths[part]]).cumsum(0)
        ranks.append(data)
    firsts = [constraint_weights(**data, coefficients=torch.zeros(2)) for data in ranks]
    assert not any(first.weights.any() for first in firsts)
    reduced = firsts[0].statistics + firsts[1].statistics  # the all-reduce
    bounds = barrier(2) | {"s": 0.01}
    seconds = [constraint_weights(**data, **bounds, statistics=reduced, num_samples=8) for data in ranks]

    own = constraint_weights(**whole.data(), coefficients=torch.zeros(2)).statistics
    expected = constraint_weights(**whole.data(), **bounds, statistics=own)
    assert expected.coefficients.count_nonzero() == 2
    weights = torch.cat([second.weights for second in seconds])
    assert_same((weights, reduced, seconds[0].coefficients), (expected.weights, own, seconds[1].coefficients))
    torch.testing.assert_close(seconds[0].coefficients, expected.coefficients, rtol=1e-12, atol=0)


# ---- the gradient, by enumeration of a small language


def responses():
    """All responses of at most three tokens: 1 and 2 go on, 0 ends."""
    for n in range(1, 4):
        for body in itertools.product([1, 2], repeat=n - 1):
            for last in [0] if n < 3 else range(3):
                yield (*body, last)


def token_logps(theta, response):
    states = zip(range(3), (0, *response[:-1]), response, strict=False)
    return torch.stack([theta[t, before].log_softmax(0)[token] for t, before, token in states])


def cost(response):
    return vector(*(1.0 + 0.3 * token for token in response))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"groups": torch.tensor([5, 5])}),
        (1, {"baselines": torch.linspace(3, -2, 16, dtype=F64)[None]}),
        (2, {"baselines": torch.linspace(3, 0, 4, dtype=F64)[None], "groups": torch.tensor([5, 5])}),
        (1, {"off_policy": True}),
        (1, {"off_policy": True, "baselines": torch.linspace(3, -2, 16, dtype=F64)[None]}),
    ],
    ids=["response", "pair", "group", "token", "token pair", "off policy", "off policy token"],
)
def test_the_expected_gradient_is_the_coefficient_times_that_of_the_mean(size, options):
    options = dict(options)
    theta = torch.randn(3, 3, 3, dtype=F64).requires_grad_()
    behaviour = (theta.detach() * 0.5 + 0.1) if options.pop("off_policy", False) else theta.detach()
    per_token = "baselines" in options
    expected = sum(token_logps(theta, r).sum().exp() * cost(r).sum() for r in responses())
    (exact,) = torch.autograd.grad(expected, theta)

    gradient, coefficients = torch.zeros_like(theta), []
    for batch in itertools.product(responses(), repeat=size):
        logps = [token_logps(theta, r) for r in batch]
        old = torch.stack([token_logps(behaviour, r).sum() for r in batch])
        sums = torch.stack([x.sum() for x in logps])
        costs = [cost(r) if per_token else cost(r).sum()[None] for r in batch]
        cu = torch.tensor([0, *itertools.accumulate(len(r) for r in batch)]) if per_token else None
        out = constraint_weights(
            torch.cat(costs)[None],
            vector(2.1),
            upper=vector(2.0),
            mu=0.5,
            cu_seqlens=cu,
            ratios=None if behaviour.equal(theta) else (sums.detach() - old).exp(),
            **options,
        )
        surrogate = out.weights @ (torch.cat(logps) if per_token else sums)
        gradient += old.sum().exp() * torch.autograd.grad(surrogate, theta)[0]
        coefficients.append(out.coefficients.item())
    assert min(coefficients) == max(coefficients) == 2.0  # violated by 0.1: mu / s
    torch.testing.assert_close(gradient, 2.0 * exact, rtol=0, atol=1e-12)


# ---- dtypes, layouts, how it runs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_low_precision_costs_are_summed_in_fp64(dtype):
    costs = torch.randn(3, 500).to(dtype)
    groups, cu_seqlens = (torch.arange(500) // 5).int(), torch.arange(0, 501, 100).int()
    for credit in ({"groups": groups}, {"cu_seqlens": cu_seqlens, "baselines": torch.randn(3, 128)}):
        options = {"coefficients": torch.ones(3), **credit}
        out = constraint_weights(costs, torch.zeros(3), **options)
        wide = constraint_weights(costs.double(), torch.zeros(3), **options)
        assert out.weights.dtype == (F64 if dtype == F64 else torch.float32)
        assert torch.equal(out.weights, wide.weights.to(out.weights.dtype))
        assert torch.equal(out.statistics, wide.statistics)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_does_not_matter_and_bits_repeat(kind):
    case = Case(3, LENGTHS, *kind)
    first = weigh(case)
    apart = {}
    for name, value in case.data(coefficients=case.coefficients).items():
        apart[name] = torch.stack([value, value], -1)[..., 0]
    again = constraint_weights(**apart)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.coefficients.data_ptr() != case.coefficients.data_ptr()


def test_num_samples():
    case = Case(2, LENGTHS)
    expected = weigh(case).weights * 6 / 24
    for number in (24, torch.tensor(24), torch.tensor([24, 24]), torch.tensor([24.0, 24.0])):
        torch.testing.assert_close(weigh(case, num_samples=number).weights, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(weigh(case, num_samples=0).weights, expected * 24, rtol=1e-14, atol=0)
    torch.testing.assert_close(weigh(case, num_samples=torch.tensor(0)).weights, expected * 24, rtol=1e-14, atol=0)


ORDER = (
    *("costs", "center", "coefficients", "lower", "upper", "scale", "mu", "s", "statistics", "groups", "cu_seqlens"),
    *("baselines", "ratios", "num_samples"),
)


def arguments(case, impl, **changes):
    """The registered operation's arguments."""
    given_arguments = case.data(**changes)
    return *(given_arguments.get(name) for name in ORDER), case.num_responses, "quadratic", 4, impl


@pytest.mark.parametrize("kind", KINDS)
def test_registered_operation(kind):
    case = Case(2, LENGTHS, *kind)
    torch.library.opcheck(
        torch.ops.barrierlm.constraint_weights.default,
        arguments(case, "reference", **barrier(2), num_samples=vector(9, 9)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_looked_at(kind):
    """On a device without values a hidden wait would raise; fake tensors have none either."""
    case = Case(2, LENGTHS, *kind)
    real = constraint_weights(**case.data(**barrier(2), num_samples=torch.tensor(9)))
    given_arguments = arguments(case, "reference", **barrier(2), num_samples=torch.tensor(9))[:-1]
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in given_arguments]
    data = case.data(**barrier(2))
    outputs = [reference.weights_and_statistics(*meta)]
    with FakeTensorMode() as mode:
        outputs.append(constraint_weights(**{k: mode.from_tensor(v) for k, v in data.items()}))
    for output in outputs:
        assert [(x.shape, x.dtype) for x in output] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("per_token", [False, True])
def test_compiles_whole(per_token):
    torch._dynamo.reset()
    case, bounds = Case(2, LENGTHS, per_token, grouped=True), barrier(2)

    def step(scaled, logps, **given_arguments):
        out = constraint_weights(scaled * 2, **given_arguments, **bounds, num_samples=9)
        return (out.weights * logps).sum(), out.statistics

    data = case.data()
    costs = data.pop("costs")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_loss, eager_sums = step(costs, case.logps, **data)
    loss, sums = compiled(costs, case.logps, **data)
    assert torch.equal(loss, eager_loss)
    assert torch.equal(sums, eager_sums)
    gradients = [torch.autograd.grad(x, case.logps)[0] for x in (loss, eager_loss)]
    assert torch.equal(*gradients)
    if per_token:
        with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
            compiled(costs, case.logps, **data | {"cu_seqlens": data["cu_seqlens"].flip(0).contiguous()})


# ---- arguments

COSTS, ONE = torch.zeros(2, 3), torch.zeros(2)
CU = torch.tensor([0, 1, 3])
GIVEN = {"coefficients": ONE}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"costs": [1.0]}, TypeError, "costs must be a torch.Tensor, got list"),
        ({"costs": torch.zeros(3)}, ValueError, r"costs must have shape \[K, B\], got \[3\]"),
        ({"costs": torch.zeros(3), "cu_seqlens": CU}, ValueError, r"costs must have shape \[K, N\], got \[3\]"),
        ({"costs": COSTS.long()}, TypeError, "costs must have one of the dtypes .* got torch.int64"),
        ({"costs": COSTS.clone().requires_grad_()}, ValueError, "costs must not require gradient"),
        ({"center": None}, TypeError, "center must be a torch.Tensor, got NoneType"),
        ({"center": torch.zeros(3)}, ValueError, r"center must have K = 2 entries, got \[3\]"),
        ({"center": ONE.to("meta")}, ValueError, "center must be on cpu as the first argument is, got meta"),
        ({"coefficients": torch.zeros(1)}, ValueError, "coefficients must have K = 2 entries"),
        ({"coefficients": ONE.clone().requires_grad_()}, ValueError, "coefficients must not require gradient"),
        ({"coefficients": None}, ValueError, "mu and at least one of lower and upper must be given; got none of them"),
        ({"coefficients": None, "mu": 1.0}, ValueError, "lower and upper must be given; got mu"),
        ({"coefficients": None, "upper": ONE}, ValueError, "must be given; got upper"),
        ({"mu": 1.0, "scale": ONE}, ValueError, "the barrier's arguments must not be; got scale, mu"),
        ({"statistics": torch.zeros(2, 8)}, ValueError, "must not be; got statistics"),
        ({"coefficients": None, "upper": ONE, "mu": 0.0}, ValueError, "mu must be positive and finite, got 0.0"),
        ({"coefficients": None, "upper": ONE, "mu": "1"}, TypeError, "mu must be a number or a torch.Tensor, got str"),
        ({"coefficients": None, "upper": ONE, "mu": torch.ones(3)}, ValueError, "mu must have K = 2 entries"),
        ({"coefficients": None, "upper": ONE, "mu": 1.0, "s": math.inf}, ValueError, "s must be positive and finite"),
        (
            {"coefficients": None, "upper": ONE[None], "mu": 1.0},
            ValueError,
            r"upper must have shape \[K\], got \[1, 2\]",
        ),
        (
            {"coefficients": None, "lower": ONE, "mu": 1.0, "statistics": torch.zeros(2, 7)},
            ValueError,
            r"statistics must have at least 8 columns, got \[2, 7\]",
        ),
        ({"extension": "cubic"}, ValueError, "extension must be one of 'linear', .* got 'cubic'"),
        ({"order": 3}, ValueError, "order must be an even int >= 2, got 3"),
        ({"groups": torch.zeros(2).long()}, ValueError, r"groups must have B = 3 entries, got \[2\]"),
        ({"groups": torch.zeros(3)}, TypeError, "groups must have one of the dtypes torch.int32, torch.int64, got"),
        ({"groups": torch.zeros(3).long(), "cu_seqlens": CU}, ValueError, "groups must have B = 2 entries"),
        ({"cu_seqlens": CU.double()}, TypeError, "cu_seqlens must have one of the dtypes"),
        ({"cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens must have B\+1 entries, so at least one, got none"),
        ({"cu_seqlens": CU + 1}, ValueError, "cu_seqlens must lie within the 3 tokens, got 1 to 4"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, ValueError, "cu_seqlens must not decrease"),
        ({"baselines": torch.zeros(2, 4)}, ValueError, r"baselines are for costs per token \(with cu_seqlens\)"),
        ({"baselines": torch.zeros(4), "cu_seqlens": CU}, ValueError, r"baselines must have shape \[K, P\], got \[4\]"),
        ({"ratios": torch.zeros(2)}, ValueError, "ratios must have B = 3 entries"),
        ({"ratios": torch.zeros(3, requires_grad=True)}, ValueError, "ratios must not require gradient"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an int or a torch.Tensor, got float"),
        ({"num_samples": -1}, ValueError, "num_samples must be >= 0, got -1"),
        ({"num_samples": torch.ones(3)}, ValueError, "num_samples must have K = 2 entries"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'fast'"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        constraint_weights(**{"costs": COSTS, "center": ONE, **GIVEN} | changes)


def test_examples_run():
    for module in (api, results):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0
    assert ConstraintWeights._fields == ("weights", "statistics", "coefficients")
