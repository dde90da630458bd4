"""The Triton kernels of `constraint_weights` equal the fp64 reference: interpreted, or native where there is a GPU."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from barrierlm_kernels.constraint_weights import constraint_weights
from barrierlm_kernels.constraint_weights.reference import position_bucket
from constraint_cases import EXTENSIONS, F64, Case, assert_same, barrier
from hypothesis import given, settings
from hypothesis import strategies as st
from test_constraint_weights import KINDS, LENGTHS, arguments, vector

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from barrierlm_kernels.constraint_weights._triton.tokens import bucket_at  # noqa: E402
from barrierlm_kernels.constraint_weights.triton import _token_shape  # noqa: E402

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(**options):
    """(Triton's, the reference's) results."""
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return tuple(constraint_weights(**options, impl=impl) for impl in ("triton", "reference"))


def check(case, **options):
    assert_same(*both(**case.data(coefficients=case.coefficients) | options))


LOW = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [(1, [9]), (8, [4]), (3, [1, 2, 300, 0, 1]), (8, [2, 0] * 32), (2, [3, 0, 1] * 43 + [130])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("constraints", "lengths"), SIZES, ids=lambda x: x if isinstance(x, int) else len(x))
def test_odd_sizes(constraints, lengths, kind):
    check(Case(constraints, lengths, *kind))


@settings(max_examples=30)
@given(
    constraints=st.integers(1, 9),
    lengths=st.lists(st.sampled_from([0, 1, 2, 17, 70]), max_size=12) | st.just([1, 0] * 20),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    buckets=st.sampled_from([0, 1, 2, 7, 64, 130]),
    sides=st.sampled_from([("lower",), ("upper",), ("lower", "upper")]),
    scaled=st.booleans(),
    s=st.sampled_from([None, 0.2, "each"]),
    extension=st.sampled_from(EXTENSIONS),
    order=st.sampled_from([2, 4, 6]),
    reduced=st.booleans(),
    samples=st.sampled_from([None, 0, 7, "tensor", "each"]),
    ints=st.sampled_from([torch.int32, torch.int64]),
    bad=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2**16), st.sampled_from([math.nan, 1e80])), max_size=2),
)
def test_every_combination_of_options(
    constraints, lengths, kind, seed, buckets, sides, scaled, s, extension, order, reduced, samples, ints, bad
):
    case = Case(constraints, lengths, *kind, seed=seed)
    for k, place, value in bad:
        if case.costs.shape[1]:
            case.costs[k % constraints, place % case.costs.shape[1]] = value
    options, bounds = case.data(), barrier(constraints, seed)
    for name in {"groups", "cu_seqlens"} & options.keys():
        options[name] = options[name].to(ints)
    if case.per_token:
        options["baselines"] = case.baselines[:, :1].expand(-1, buckets) + torch.arange(buckets)
    options |= {side: bounds[side] for side in sides} | {"mu": bounds["mu"] if scaled else 0.4}
    options |= {"scale": bounds["scale"]} if scaled else {}
    options |= {"s": bounds["mu"] / 3 if s == "each" else s, "extension": extension, "order": order}
    if reduced:
        options["statistics"] = both(**case.data(coefficients=case.coefficients))[1].statistics
        options["statistics"][0, 7] += seed % 2
    counts = {"tensor": torch.tensor(9), "each": torch.arange(constraints)}
    check(case, **{"coefficients": None} | options | {"num_samples": counts.get(samples, samples)})


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind):
    for name, bad in (("center", math.nan), ("baselines", -math.inf), ("ratios", math.nan), ("coefficients", math.inf)):
        case = Case(3, [2, 0, 30, 1], *kind)
        data = case.data(coefficients=case.coefficients.clone())
        if name in data:
            data[name] = data[name].clone()
            data[name][1] = bad
            ours, reference = both(**data)
            assert_same(ours, reference)
            assert ours.weights.isfinite().all()


def test_bounds_that_are_not_finite():
    """Every number of the barrier in turn, one constraint each."""
    cases = list(itertools.product(("lower", "upper", "scale", "mu", "s"), (math.nan, math.inf, -math.inf)))
    size = len(cases)
    bounds = barrier(size) | {"s": torch.full((size,), 0.1, dtype=F64)}
    for k, (name, bad) in enumerate(cases):
        bounds[name][k] = bad
    data = {"costs": torch.randn(size, 3, dtype=F64), "center": torch.zeros(size, dtype=F64)}
    for extension in EXTENSIONS:
        ours, reference = both(**data, **bounds, extension=extension)
        assert_same(ours, reference)
        assert ours.weights.isfinite().all()


def test_reduced_statistics_of_nothing_and_of_what_is_not_finite():
    case, bounds = Case(4, [2, 0, 30, 1]), barrier(4)
    reduced = both(**case.data(coefficients=case.coefficients))[1].statistics
    reduced[1] = 0
    reduced[2, 7] = 3
    ours, reference = both(**case.data(**bounds), statistics=reduced)
    assert_same(ours, reference)
    at_center = both(**case.data(**bounds))[0].coefficients
    assert torch.equal(ours.coefficients[1:3], at_center[1:3])
    assert not torch.equal(ours.coefficients[0], at_center[0])


def test_a_mean_exactly_at_the_bound_or_where_the_extension_begins():
    width = 0.25  # mu = 0.5
    center, upper = vector(1, 1, 1, 1), vector(1, 1 + width, 1 + 2 * width, 1 - width)
    for extension in EXTENSIONS:
        ours, reference = both(costs=torch.ones(4, 2), center=center, upper=upper, mu=0.5, extension=extension)
        assert torch.equal(ours.coefficients[1:3], vector(2, 1).to(DEVICE))  # mu / s, and mu / slack
        assert_same(ours, reference)


@pytest.mark.parametrize("bad", [None, math.inf])
@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, 3 * LOW, strict=False)))
def test_low_precision(kind, dtype, bad):
    case = Case(3, [2, 0, 30, 1], *kind)
    data = case.data(coefficients=case.coefficients)
    data |= {name: value.to(dtype) for name, value in data.items() if value.is_floating_point()}
    if bad is not None:
        data["costs"][1, 2] = bad
    ours, reference = both(**data)
    assert ours.weights.dtype == torch.float32
    assert ours.statistics[1, 7] == (bad is not None)
    torch.testing.assert_close(ours.weights, reference.weights, rtol=2e-7, atol=1e-12)  # rounded once
    assert_same((reference.weights, *ours[1:]), reference)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN; the list grows with every allocation."""
    empty, seen = torch.Tensor.new_empty, []

    def poison(tensor, *shape, **kwargs):
        out = empty(tensor, *shape, **kwargs)
        seen.append(out.fill_(math.nan if out.is_floating_point() else -7))
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_written_and_bits_repeat(kind, poisoned):
    case = Case(3, [2, 0, 40, 7, 1, 1], *kind)
    options = case.data(coefficients=case.coefficients)
    if case.per_token:  # tokens of no response on both sides
        options["costs"] = torch.nn.functional.pad(case.costs, (2, 3), value=math.nan)
        options["cu_seqlens"] = case.cu_seqlens + 2
    first, expected = both(**options)
    again, _ = both(**options)
    assert len(poisoned) >= 6
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert_same(first, expected)


def test_every_number_is_written_where_there_is_no_response(poisoned):
    options = {"center": vector(1, 2), "coefficients": vector(3, 4), "baselines": torch.ones(2, 5)}
    ours, _ = both(costs=torch.ones(2, 300), cu_seqlens=torch.tensor([7]), **options)
    assert ours.weights.tolist() == [0] * 300
    assert not ours.statistics.any()
    assert ours.coefficients.tolist() == [3, 4]
    assert len(poisoned) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_layout_matters(kind):
    case = Case(3, LENGTHS, *kind)
    data = case.data(**barrier(3) | {"s": vector(0.1, 0.2, 0.3), "num_samples": torch.tensor([4, 5, 6])})
    data["statistics"] = both(**case.data(coefficients=case.coefficients))[1].statistics.cpu()
    apart = {}
    for name, value in data.items():
        spread = torch.full((*value.shape, 2), -7, dtype=value.dtype)
        spread[..., 0] = value
        apart[name] = spread[..., 0]
        assert value.numel() < 2 or not apart[name].is_contiguous()
    tight, loose = both(**data)[0], both(**apart)[0]
    assert all(torch.equal(a, b) for a, b in zip(tight, loose, strict=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_more_constraints_than_a_tile_is_made_for(per_token):
    check(Case(33, [1, 40, 0], per_token, grouped=True, off_policy=True))


def test_more_responses_than_programs():
    check(Case(1, [1, 2, 0] * 90, per_token=True))


@triton.jit
def write_buckets(positions, out, num_buckets, BLOCK: tl.constexpr, OCTAVES: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, bucket_at(tl.load(positions + at), num_buckets, OCTAVES))


@pytest.mark.parametrize("buckets", [1, 2, 3, 16, 101, 128, 1000])
def test_position_buckets_without_a_logarithm(buckets):
    """Around every boundary up to beyond the last bucket, and at powers of two, where octaves begin."""
    half = max(buckets // 2, 1)
    edges = [round(half * 2 ** (i / 8)) + d for i in range(min(buckets, 250)) for d in (-1, 0, 1)]
    positions = torch.tensor([*edges, *range(50), *(2**i for i in range(35))])
    positions = torch.nn.functional.pad(positions[positions >= 0], (0, 1024))[:1024].to(DEVICE)
    out = torch.empty_like(positions)
    octaves = _token_shape(1, buckets)["OCTAVES"]
    write_buckets[(1,)](positions, out, buckets, BLOCK=1024, OCTAVES=octaves)
    assert torch.equal(out, position_bucket(positions, buckets))


@pytest.mark.parametrize("constraints", [0, 3])
@pytest.mark.parametrize("per_token", [False, True])
def test_nothing_to_do(constraints, per_token):
    for lengths in ([], [0, 0]):
        check(Case(constraints, lengths, per_token, off_policy=bool(lengths)))
    case = Case(constraints, [2, 1], per_token)
    check(case)
    if per_token:
        check(case, cu_seqlens=torch.tensor([1]))


@pytest.mark.parametrize("kind", KINDS)
def test_registered_operation(kind):
    given_arguments = arguments(Case(2, LENGTHS, *kind), "triton", **barrier(2), num_samples=vector(9, 9))
    torch.library.opcheck(
        torch.ops.barrierlm.constraint_weights.default,
        tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given_arguments),
    )


def test_the_reference_and_the_kernels_agree_on_what_is_infinite():
    """A number of 1e70, as the reference has it; the modules do not import each other."""
    for size, dropped in ((0.99e70, 0), (1.01e70, 1)):
        ours, reference = both(costs=vector(1, size)[None], center=vector(0), coefficients=vector(1))
        assert ours.statistics[0, 7] == reference.statistics[0, 7] == dropped


COMPILE = """
import json, sys
from barrierlm_kernels.constraint_weights.triton import CONFIGS
from benchmarks.resources import TARGETS, build
rows = [build(c, TARGETS[t]) for c in CONFIGS if sys.argv[1] in c["name"] for t in ("sm_80", "sm_90")]
print(json.dumps(rows))
"""


@pytest.mark.parametrize("name", ["K=3 fp64 all", pytest.param("constraint_weights", marks=pytest.mark.slow)])
def test_compiles_for_gpus_that_are_not_here_and_spills_nothing(name):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == (4 if "all" in name else 20)
    for row in rows:
        assert row["spills"] == row["stack"] == 0, row
