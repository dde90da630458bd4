"""`objective.linear`: one pass over the head is `combine` on log-probabilities, in value, gradient and state."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barrierlm import BarrierObjective, ConstantSchedule, Constraint, PackedBatch, RelaxedLogBarrier, Sampled
from barrierlm import linear as module

from . import test_sampling as language
from .helpers import F64, same, state_of
from .packed import IGNORED, KINDS, VOCAB, WIDTH, Case, make

lengths = st.lists(st.integers(0, 5), max_size=4)
#: Groups need two responses, so there are none or several.
sampled_lengths = st.just([]) | st.lists(st.integers(0, 5), min_size=2, max_size=5)


def tensors(value):
    """All tensors and numbers in a state, in order."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in tensors(value[key])]
    if isinstance(value, torch.Tensor):
        return [value.double().nan_to_num(-7e77)]
    return [torch.tensor(value, dtype=F64)] if isinstance(value, int | float) else []


def assert_close(a, b, tolerance):
    a, b = a.detach().double(), b.detach().double()
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    assert a.shape == b.shape
    assert a.numel() == 0 or float((a - b).abs().max()) <= tolerance * scale


@given(
    micro_batches=st.lists(st.tuples(lengths, sampled_lengths), min_size=1, max_size=3),
    kinds=st.sets(st.sampled_from(KINDS), min_size=1).map(lambda s: tuple(sorted(s))),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10_000),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    per_row=st.booleans(),
    task_on_sampled=st.booleans(),
    with_bias=st.booleans(),
    trains_head=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 2.0]),
    compact=st.booleans(),
    counted=st.sampled_from(["no", "ints", "tensors"]),
    reduction=st.sampled_from(["mean", "sum"]),
    ranks=st.sampled_from([1, 3]),
)
def test_the_one_pass_is_the_unfused_path(
    micro_batches, dtype, seed, compact, counted, reduction, ranks, kinds, **options
):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    objectives = [make(kinds, gradient_reduction=reduction) for _ in range(2)]
    samples = sum(len(sampled) for _, sampled in micro_batches)
    rows = sum(sum(learned) + sum(sampled) for learned, sampled in micro_batches)
    window = {}
    if counted != "no":
        numbers = {kind: rows if kind == "pathwise" else samples for kind in kinds if kind != "exact"}
        window = {k: torch.tensor(n) if counted == "tensors" else n for k, n in numbers.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("barrierlm.objective.world_size", lambda group: ranks)
        for step in range(3):
            for i, (learned, sampled) in enumerate(micro_batches):
                case = Case(learned, sampled, dtype, seed + 31 * step + i, kinds=kinds, **options)
                results = []
                for objective, path in zip(objectives, (case.fused, case.unfused), strict=True):
                    more = {"compact": compact} if path == case.fused else {}
                    out = path(objective, num_samples_in_window=window, loss_divisor=len(micro_batches), **more)
                    leaves = case.leaves()
                    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
                    results.append([out.loss.detach(), out.task_loss, out.penalty, *gradients])
                for ours, reference in zip(*results, strict=True):
                    assert_close(ours, reference, tolerance)
            with pytest.MonkeyPatch.context() as quiet:
                quiet.setattr(BarrierObjective, "_warn_once", lambda *args: None)  # windows without a sample
                for objective in objectives:
                    objective.step()
            for ours, reference in zip(*(tensors(o.state_dict()) for o in objectives), strict=True):
                assert_close(ours, reference, tolerance)
            # The next window starts from one state: a multiplier's kink must not magnify rounding errors.
            objectives[0].load_state_dict(objectives[1].state_dict())


def committed(kinds, **kwargs):
    """Two objectives in one state, with multipliers and position baselines."""
    objectives = [make(kinds, **kwargs) for _ in range(2)]
    Case([3], [2, 4, 1, 3], seed=5, kinds=kinds, ignored=0.0).unfused(objectives[0])
    objectives[0].step()
    objectives[1].load_state_dict(objectives[0].state_dict())
    assert all(row.multiplier > 0 for row in objectives[0].report() if row.side == "upper")
    return objectives


@pytest.mark.parametrize("kinds", [("response", "groups"), ("kl", "rollout kl", "token")])
def test_the_order_of_the_measurements_does_not_matter(kinds):
    """Constraints that are measured together, all that there are: named in another order than they were defined in."""
    results = []
    for objective, order in zip(committed(kinds), (kinds, kinds[::-1]), strict=True):
        case = Case([3, 2], [2, 4, 1, 3], seed=6, kinds=kinds)
        case.kinds = order
        losses = [path(objective).loss for path in (case.fused, case.unfused)]
        gradients = [torch.autograd.grad(loss, case.leaves()) for loss in losses]
        objective.step()
        results.append([*(x.detach() for x in losses), *sum(gradients, ()), *tensors(objective.state_dict())])
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, 1e-12)


SAMPLED_KINDS = tuple(kind for kind in KINDS if kind not in ("pathwise", "exact"))


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["hidden", "ignored hidden", "values", "old_logps", "ref_logps"])
def test_numbers_that_are_not_finite_do_what_they_do_unfused(policy, bad, where):
    """The constraints they belong to are dropped, in loss, gradient and state; the task and the others go on."""
    fused, unfused = committed(SAMPLED_KINDS, nonfinite=policy)
    case = Case([3, 2], [2, 4, 1, 3], seed=6, kinds=SAMPLED_KINDS, ignored=0.0)
    with torch.no_grad():
        if where == "hidden":
            case.hidden[case.first + 3, 1] = bad
        elif where == "ignored hidden":
            case.targets[case.first + 3] = IGNORED
            case.counted[3] = False
            case.hidden[case.first + 3] = bad
        elif where == "values":
            case.more[2] = bad
        else:
            getattr(case, where)[4] = bad
    gradients = []
    for objective, path in ((fused, case.fused), (unfused, case.unfused)):
        out = path(objective)
        assert torch.isfinite(out.loss)
        gradients.append([out.loss.detach(), *torch.autograd.grad(out.loss, case.leaves())])
    for ours, reference in zip(*gradients, strict=True):
        assert torch.isfinite(reference).all()
        assert_close(ours, reference, 1e-10)
    before = state_of(fused)
    for objective in (fused, unfused):
        if policy == "raise" and where != "ignored hidden":
            with pytest.raises(FloatingPointError, match=r"NaN or infinite value\(s\) measured for"):
                objective.step()
            assert same(before, state_of(objective))
        else:
            objective.step()
    for ours, reference in zip(*(tensors(o.state_dict()) for o in (fused, unfused)), strict=True):
        assert_close(ours, reference, 1e-10)
    if policy == "skip" and where == "hidden":
        assert fused.metrics()["constraints/response/nonfinite"] == 1


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_what_only_the_head_makes_infinite_never_enters_an_estimate(policy):
    """A log 0 that shows after the gradient was made: the loss is NaN, and step() does as it was told."""
    fused, unfused = committed(("response", "kl"), nonfinite=policy)
    case = Case([3, 2], [2, 4], seed=6, kinds=("response", "kl"), ignored=0.0)
    case.targets[case.targets == 5] = 4
    case.targets[case.first + 1] = 5
    with torch.no_grad():
        case.bias[5] = -float("inf")
    assert case.fused(fused).loss.isnan()
    case.unfused(unfused)
    before = state_of(fused)
    for objective in (fused, unfused):
        if policy == "raise":
            with pytest.raises(FloatingPointError, match=r"measured for 'response'"):
                objective.step()
            assert same(before, state_of(objective))
        else:
            objective.step()
            counts = [objective.metrics()[f"constraints/{kind}/nonfinite"] for kind in ("response", "kl")]
            assert min(counts) >= 1
    for name in ("estimator", "scales", "positions"):
        for ours, reference in zip(*(tensors({"": o.state_dict()[name]}) for o in (fused, unfused)), strict=True):
            assert torch.equal(ours, reference)


def test_an_overflowing_ratio_is_dropped():
    fused, unfused = committed(("off-policy kl",), nonfinite="skip")
    case = Case([3], [2, 4], seed=6, kinds=("off-policy kl",), ignored=0.0)
    sampled = Sampled.reference_kl(case.ref_logps, old_logps=torch.full_like(case.old_logps, -1e4))
    batch = PackedBatch(case.targets, case.cu_seqlens, case.task_weights, 2)
    out = fused.linear(case.hidden, case.weight, batch, {"off-policy kl": sampled}, bias=case.bias)
    torch.testing.assert_close(out.loss.detach(), out.task_loss)
    fused.step()
    assert fused.metrics()["constraints/off-policy kl/nonfinite"] > 0
    assert fused.metrics()["constraints/off-policy kl/value"] == unfused.metrics()["constraints/off-policy kl/value"]


def test_a_task_weight_that_cancels_a_constraints_still_counts_in_the_loss():
    """The row has no gradient and is left out of the pass, were it not for the value of the task."""
    objective = BarrierObjective(
        None, [Constraint("c", upper=0.0, scale=1.0)], rule=RelaxedLogBarrier(), schedule=ConstantSchedule(1.0)
    )
    objective.calibrate({"c": Sampled(torch.tensor([2.0, 4.0], dtype=F64))})
    assert objective.report()[0].multiplier == 1.0
    hidden, weight = torch.randn(2, WIDTH, dtype=F64, requires_grad=True), torch.randn(VOCAB, WIDTH, dtype=F64)
    # The advantage is 5 - 3 = 2, and a task weight of 2 is one of -2 on log p.
    batch = PackedBatch(torch.tensor([1, 2]), torch.tensor([0, 1, 2]), torch.tensor([0.0, 2.0], dtype=F64), 1)
    out = objective.linear(hidden, weight, batch, {"c": Sampled(torch.tensor([5.0], dtype=F64))}, compact=True)
    expected = -2 * (weight @ hidden[1]).log_softmax(0)[2]
    assert out.task_loss.item() == pytest.approx(expected.item())
    assert out.loss.item() == pytest.approx(expected.item() + 5)
    out.loss.backward()
    assert hidden.grad.abs().max() < 1e-30


@pytest.mark.parametrize("known", [True, False])
def test_rows_may_be_known_to_the_device_alone(monkeypatch, known):
    """Off the CPU the first sampled row is a number on the device; all rows stand in for the sampled ones then."""
    kinds = ("response", "groups", "off-policy")
    fused, unfused = committed(kinds)
    case = Case([3, 2], [2, 4, 0, 3], seed=6, kinds=kinds)
    if not known:
        monkeypatch.setattr(PackedBatch, "sampled_rows", lambda self: None)
    results = []
    for objective, path in ((fused, case.fused), (unfused, case.unfused)):
        out = path(objective)
        results.append([out.loss.detach(), *torch.autograd.grad(out.loss, case.leaves())])
        objective.step()
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, 1e-10)
    for ours, reference in zip(*(tensors(o.state_dict()) for o in (fused, unfused)), strict=True):
        assert_close(ours, reference, 1e-10)


def test_the_kernels_are_called_once_each_and_forward_only_where_it_is_needed(monkeypatch):
    calls = []

    def called(name, real, first, *args, **kwargs):
        calls.append((name, len(first), kwargs.get("compact")))
        return real(first, *args, **kwargs)

    names = forward, weigh, one_pass = "linear_sequence_logprob", "constraint_weights", "linear_weighted_logprob"
    for name in names:
        monkeypatch.setattr(module, name, functools.partial(called, name, getattr(module, name)))

    def made(*kinds, **kwargs):
        calls.clear()
        Case([3, 2], [2, 4], kinds=kinds).fused(make(kinds), **kwargs)
        return sorted(calls)

    assert made("response", "token", "rollout kl") == [(weigh, 1, None), (weigh, 2, None), (one_pass, 11, False)]
    every = made("response", "groups", "kl", "off-policy", "off-policy token", compact=True)
    assert every == [(weigh, 1, None)] * 5 + [(forward, 6, None), (one_pass, 11, True)]


@pytest.mark.parametrize("per_token", [True, False])
def test_numbers_given_stand_in_for_the_forward_only_pass(per_token):
    case = Case([3], [2, 4], seed=8, kinds=("c",), ignored=0.3)
    with torch.no_grad():
        logps = case.logps()[0 if per_token else 1]
    results = []
    for numbers in (None, logps):
        objective = make(("c",))
        objective.calibrate({"c": Sampled(torch.tensor([3.0, 5.0], dtype=F64))})
        batch = PackedBatch(case.targets, case.cu_seqlens, case.task_weights, 2)
        if per_token:
            c = Sampled.reference_kl(case.ref_logps, numbers, old_logps=case.old_logps)
        else:
            c = Sampled(case.values, numbers, old_logps=case.old_response_logps)
        out = objective.linear(case.hidden, case.weight, batch, {"c": c}, **case.options())
        results.append([out.loss.detach(), *torch.autograd.grad(out.loss, case.leaves())])
    for ours, computed in zip(*results, strict=True):
        assert_close(ours, computed, 1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_triton_kernels_give_the_same():
    """All three, in Triton's interpreter."""
    kinds = ("response", "groups", "token", "off-policy kl")
    pytest.importorskip("triton")
    fused, unfused = committed(kinds)
    case = Case([3], [2, 4], torch.float32, seed=6, kinds=kinds)
    results = []
    for out in (case.fused(fused, impl="triton"), case.unfused(unfused)):
        results.append([out.loss.detach(), *torch.autograd.grad(out.loss, case.leaves())])
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, 2e-4)
    fused.step()
    unfused.step()
    for ours, exact in zip(*(tensors(o.state_dict()) for o in (fused, unfused)), strict=True):
        assert_close(ours, exact, 1e-5)


def test_nothing_is_committed_without_gradients():
    case = Case([3], [2, 4], kinds=SAMPLED_KINDS)
    fused, unfused = committed(SAMPLED_KINDS)
    before = state_of(fused)
    with torch.no_grad():
        out, reference = case.fused(fused), case.unfused(unfused)
        fused.step()
    assert not out.loss.requires_grad
    assert_close(out.loss, reference.loss, 1e-10)
    assert same(before, state_of(fused))


def test_calibrating_needs_no_log_probabilities():
    """As for a loop that has never seen one: they would only be needed for a gradient."""
    costs, cu_seqlens = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 3])
    objective = make(("a", "b"))
    objective.calibrate({"a": Sampled(torch.tensor([1.0, 3.0])), "b": Sampled.per_token(costs, cu_seqlens=cu_seqlens)})
    assert [row.estimate for row in objective.report() if row.side == "upper"] == [2.0, 3.5]


def test_autocast_multiplies_in_its_dtype_and_leaves_the_rest_alone():
    case = Case([3], [2, 4], dtype=torch.float32, kinds=("response", "groups", "token"), ignored=0.0)
    fused, unfused = committed(case.kinds)
    plain = case.fused(make(case.kinds))
    with torch.autocast("cpu", torch.bfloat16):
        out, reference = case.fused(fused), case.unfused(unfused)
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, reference.loss, 1e-6)
    assert out.task_loss != plain.task_loss
    fused.step()
    unfused.step()
    for ours, exact in zip(*(tensors(o.state_dict()) for o in (fused, unfused)), strict=True):
        assert_close(ours, exact, 1e-6)


def test_retained_and_scaled_backward():
    """The loss is an ordinary one: it can be scaled, added to others and differentiated twice over."""
    case = Case([3], [2, 4], kinds=("response", "pathwise"))
    fused, _ = committed(case.kinds)
    loss = case.fused(fused).loss
    once = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    again = torch.autograd.grad(3 * loss + (case.hidden**2).sum(), case.leaves())
    for a, b, x in zip(once, again, case.leaves(), strict=True):
        assert_close(b, 3 * a + (2 * x.detach() if x is case.hidden else 0), 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_gives_the_cpus_numbers_and_never_waits(dtype):
    """A call and its backward pass do not synchronise: only `step()` does."""
    fused, unfused = committed(SAMPLED_KINDS)
    case = Case([3, 2], [2, 4, 1, 3], dtype, seed=6, kinds=SAMPLED_KINDS)
    reference = case.unfused(unfused)
    expected = torch.autograd.grad(reference.loss, case.leaves())
    on_gpu = case.to("cuda")
    on_gpu.fused(fused)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = on_gpu.fused(fused)
        gradients = torch.autograd.grad(out.loss, on_gpu.leaves())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for ours, theirs in zip((out.loss, *gradients), (reference.loss, *expected), strict=True):
        assert_close(ours.cpu(), theirs, tolerance)


# ---- the gradient of a KL, by enumeration of the little language


def one_hot_states(response):
    """The language of test_sampling as hidden states and a head: logits theta[position, token before]."""
    states = [t * language.VOCAB + previous for t, previous in enumerate([0, *response[:-1]])]
    return torch.nn.functional.one_hot(torch.tensor(states), language.LENGTH * language.VOCAB).to(F64)


def kl_gradient(theta, reference):
    total = 0
    for r in language.responses():
        logps = language.token_logps(theta, r).sum()
        total = total + logps.exp() * (logps - language.token_logps(reference, r).sum().detach())
    return torch.autograd.grad(total, theta)[0], total.item()


@pytest.mark.parametrize("how", ["forward-only", "rollout", "combine", "off-policy", "off-policy combine"])
def test_the_gradient_of_the_kl_by_enumeration(how):
    """E over responses of the one pass' gradient is that of the exact KL(policy, reference)."""
    theta = language.theta()
    reference = (0.3 - 0.5 * theta.detach()).requires_grad_()
    behaviour = (0.7 * theta.detach() + 0.1).requires_grad_() if "off-policy" in how else theta
    exact, divergence = kl_gradient(theta, reference)
    objective = BarrierObjective(
        None, [Constraint("kl", upper=-1.0, scale=1.0)], rule=RelaxedLogBarrier(), schedule=ConstantSchedule(0.5)
    )
    # Committed before: a multiplier, and baselines by position that are not 0.
    objective.calibrate({"kl": Sampled.per_token(torch.tensor([0.4, -0.7, 1.1]), cu_seqlens=torch.tensor([0, 3]))})
    multiplier = objective.report()[0].multiplier
    assert multiplier > 0
    assert objective._committed.baselines[0, :3].abs().min() > 0
    gradient, value = torch.zeros_like(theta), 0.0
    for r in language.responses():
        logps, ref_logps, old_logps = (
            language.token_logps(parameters, r).detach() for parameters in (theta, reference, behaviour)
        )
        cu_seqlens, old = torch.tensor([0, len(r)]), old_logps if "off-policy" in how else None
        if "combine" in how:
            given = language.token_logps(theta, r)
            out = objective.combine(None, {"kl": Sampled.reference_kl(ref_logps, given, cu_seqlens, old_logps=old)})
        else:
            head = theta.reshape(-1, language.VOCAB).T
            batch = PackedBatch(torch.tensor(r), cu_seqlens, torch.zeros(1), num_sampled=1)
            kl = Sampled.reference_kl(ref_logps, logps if how == "rollout" else None, old_logps=old)
            out = objective.linear(one_hot_states(r), head, batch, {"kl": kl})
        p = old_logps.sum().exp()
        gradient += p * torch.autograd.grad(out.loss, theta)[0] / multiplier
        value += p.item() * out.loss.item() / multiplier
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)
    assert exact.abs().max() > 0.1
    assert value == pytest.approx(divergence, abs=1e-12)


# ---- errors

HIDDEN, HEAD = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
TARGETS, CU, WEIGHTS = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 5]), torch.tensor([0.5, 0.0])
BATCH = PackedBatch(TARGETS, CU, WEIGHTS, num_sampled=1)
ONE, THREE = torch.ones(1), torch.ones(3)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PackedBatch(TARGETS.float(), CU, WEIGHTS), TypeError, "targets is torch.float32; allowed: an integer"),
        (lambda: PackedBatch([1], CU, WEIGHTS), TypeError, "targets is list; allowed: an integer torch.Tensor"),
        (lambda: PackedBatch(TARGETS, CU, WEIGHTS.long()), TypeError, "task_weights is torch.int64; allowed: a flo"),
        (lambda: PackedBatch(TARGETS[None], CU, WEIGHTS), ValueError, r"targets has shape \(1, 5\); allowed: 1 dim"),
        (lambda: PackedBatch(TARGETS, CU, torch.ones(3)), ValueError, r"one per sequence \(2,\) or per row \(5,\)"),
        (lambda: PackedBatch(TARGETS, CU, WEIGHTS.clone().requires_grad_()), ValueError, "task_weights requires grad"),
        (lambda: PackedBatch(TARGETS, CU + 1, WEIGHTS), ValueError, r"cu_seqlens=\[1, 3, 6\]; allowed: 0 = first"),
        (lambda: PackedBatch(TARGETS, CU[:0], WEIGHTS), ValueError, "cu_seqlens is empty"),
        (lambda: PackedBatch(TARGETS[:2], CU * 0 + CU.clamp(max=2), WEIGHTS), ValueError, "leave empty sequences out"),
        (lambda: PackedBatch(TARGETS, CU, WEIGHTS, 3), ValueError, "num_sampled=3; allowed: 0 to 2"),
        (lambda: PackedBatch(TARGETS, CU, WEIGHTS, ONE), TypeError, "num_sampled is a Tensor; allowed: an int"),
        (lambda: PackedBatch(TARGETS, CU, WEIGHTS, 1, 2), ValueError, "num_sampled_tokens=2; allowed: 3, the rows"),
        (lambda: PackedBatch(TARGETS.to("meta"), CU, WEIGHTS), ValueError, "cu_seqlens is on cpu, targets on meta"),
        (lambda: Sampled.reference_kl(THREE.clone().requires_grad_()), ValueError, "ref_logps requires grad; allowed"),
        (lambda: Sampled.reference_kl(THREE, ONE), ValueError, r"logps has shape \(1,\); allowed: \(3,\)"),
        (lambda: Sampled.reference_kl([0.0]), TypeError, "ref_logps is a list; allowed: a torch.Tensor"),
        (lambda: len(Sampled.per_token(THREE)), TypeError, "cu_seqlens was left out"),
    ],
)
def test_what_a_batch_may_be(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"batch": (TARGETS, CU)}, TypeError, "batch is a tuple; allowed: a PackedBatch"),
        ({"hidden": HIDDEN[:4]}, ValueError, "hidden has 4 rows on cpu; allowed: one for each of the batch's 5"),
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden has shape \(4,\); allowed: 2 dimensions"),
        ({"weight": HEAD.long()}, TypeError, "weight is torch.int64; allowed: a floating torch.Tensor"),
        ({"weight": HEAD.double()}, TypeError, "weight must have hidden's dtype"),
        ({"hidden": HIDDEN.detach()}, ValueError, "neither hidden nor the head requires grad; allowed: hidden states"),
        ({"measurements": {"c": Sampled(THREE)}}, ValueError, r"\['c'\] has 3 costs; allowed: one for each of the 1 s"),
        (
            {"measurements": {"c": Sampled.per_token(ONE)}},
            ValueError,
            "1 costs; allowed: one for each of the 3 sampled",
        ),
        (
            {"measurements": {"c": Sampled(ONE, ONE.clone().requires_grad_())}},
            ValueError,
            "logps require grad, and linear",
        ),
        (
            {"measurements": {"c": Sampled.per_token(THREE, groups=torch.tensor([1, 1]))}},
            ValueError,
            r"groups has shape \(2,\); allowed: \(1,\) for the batch's 1 sampled",
        ),
        (
            {"measurements": {"c": Sampled.per_token(THREE, cu_seqlens=torch.tensor([0, 1, 3]))}},
            ValueError,
            r"cu_seqlens has shape \(3,\); allowed: \(2,\)",
        ),
        ({"measurements": {"c": Sampled(ONE.to("meta"))}}, ValueError, "is on meta, the batch on cpu"),
        ({"measurements": {"x": Sampled(ONE)}}, ValueError, "measurements has 'x'; allowed: the constraints 'c'"),
        ({"measurements": {"c": ONE}}, ValueError, "without gradient.*Did you mean Sampled"),
        ({"num_samples_in_window": {"c": -1}}, ValueError, r"\['c'\]=-1; allowed"),
        ({"loss_divisor": 0}, ValueError, "loss_divisor=0; allowed"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ],
)
def test_call_errors_change_nothing(call, error, message):
    objective = make(("c",))
    arguments = {"hidden": HIDDEN, "weight": HEAD, "batch": BATCH, "measurements": {"c": Sampled(ONE)}}
    with pytest.raises(error, match=message):
        objective.linear(**(arguments | call))
    with pytest.raises(RuntimeError, match="nothing measured since the last one"):
        objective.step()


def test_offsets_may_be_repeated_but_not_contradicted():
    batch = PackedBatch(TARGETS, torch.tensor([0, 1, 3, 5]), torch.zeros(3), num_sampled=2)
    own, other = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 4])
    make(("c",)).linear(HIDDEN, HEAD, batch, {"c": Sampled.per_token(torch.ones(4), cu_seqlens=own)})
    with pytest.raises(ValueError, match=r"cu_seqlens=\[0, 1, 4\]; allowed: those of the batch, \[0, 2, 4\]"):
        make(("c",)).linear(HIDDEN, HEAD, batch, {"c": Sampled.per_token(torch.ones(4), cu_seqlens=other)})


def test_the_barrier_of_the_calls_own_values_cannot_be_known_beforehand():
    with pytest.raises(ValueError, match=r"linear\(\) with multiplier='current'; allowed: multiplier='committed'"):
        make(("c",), multiplier="current").linear(HIDDEN, HEAD, BATCH, {"c": Sampled(ONE)})


def test_a_response_alone_in_its_group_is_found_at_step():
    """The constructor sees it on the CPU only."""
    objective, sampled = make(("c",)), Sampled(torch.ones(2), groups=torch.tensor([4, 4]))
    sampled.groups = torch.tensor([4, 5])
    batch = PackedBatch(TARGETS, CU, torch.zeros(2), num_sampled=2)
    objective.linear(HIDDEN, HEAD, batch, {"c": sampled})
    with pytest.raises(ValueError, match="groups of 'c': a prompt has one response"):
        objective.step()


@pytest.mark.parametrize(
    ("measurement", "message"),
    [
        (Sampled(ONE), r"\['c'\]: logps is missing; allowed: the policy's log-probabilities.*only linear"),
        (Sampled.reference_kl(THREE), "logps is missing"),
        (Sampled.per_token(THREE, THREE.clone().requires_grad_()), r"\['c'\]: cu_seqlens is missing; allowed"),
    ],
)
def test_only_the_one_pass_makes_log_probabilities_itself(measurement, message):
    objective = make(("c",))
    with pytest.raises(ValueError, match=message):
        objective.combine(None, {"c": measurement})
    with pytest.raises(ValueError, match=message):
        objective(measurements={"c": measurement})
    if measurement.needs_logps:
        with pytest.raises(ValueError, match=message):
            objective.calibrate({"c": measurement})
