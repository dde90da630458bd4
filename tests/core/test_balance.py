"""Task and constraints clipped apart: the same gradient where nothing is clipped, and a task that is not drowned."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from barrierlm import BarrierObjective, Constraint, PackedBatch, Sampled, SplitGradients
from barrierlm.balance import PartNorms

from .helpers import F64, C, exact, relaxed
from .test_windows import free_port

N, STEPS = 12, 3
SPLITS = {
    "1": [(0, 12)],
    "2": [(0, 6), (6, 12)],
    "4, the last one short": [(0, 4), (4, 8), (8, 11), (11, 12)],
    "one empty": [(0, 0), (0, 12)],
}


def make(reduction="mean"):
    return BarrierObjective(
        None, [Constraint("cost", upper=0.3), Constraint("path", lower=0.2, upper=0.6)], gradient_reduction=reduction
    )


def network():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    model[0].bias.requires_grad_(False)
    return model


def call(objective, model, x, divisor, ranks):
    logits = model(x)
    logp = logits.log_softmax(-1)
    action = x[:, :3].argmax(-1)
    return objective.combine(
        (logits**2).sum() * divisor * ranks / N,
        {"cost": Sampled((action == 1).to(F64), logp.gather(1, action[:, None])[:, 0]), "path": logits[:, 0].tanh()},
        num_samples_in_window={"cost": N, "path": N},
        loss_divisor=divisor,
    )


def train(split, backward, finish, model=None, objective=None, ranks=1):
    """Some windows; returns the gradients that the optimizer sees, by step and parameter."""
    model, objective = model or network(), objective or make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = torch.randn(STEPS, N, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    seen = []
    for x in data:
        for i, (a, b) in enumerate(split):
            sync = not isinstance(model, DistributedDataParallel) or i == len(split) - 1
            model.require_backward_grad_sync = sync
            backward(call(objective, model, x[a:b], len(split), ranks), len(split))
        finish(model)
        seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        objective.step()
    assert sum(row.multiplier for row in objective.report()) > 0.1  # the constraints do pull
    return seen


def assert_close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None)
            assert x is None or (x - y).abs().max() <= tolerance


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_without_clipping_it_is_the_gradient_of_the_loss(split):
    expected = train(split, lambda out, k: (out.loss / k).backward(), lambda model: None)
    model = network()
    parts = SplitGradients(model.parameters())
    got = train(split, lambda out, k: parts.backward(out, divisor=k), lambda _: parts.clip_(math.inf), model)
    assert_close(got, expected)
    assert not parts._kept
    assert got[0][1] is None  # the frozen bias


def batch_of(rows, cu_seqlens, task_weights, num_sampled):
    targets = torch.arange(rows) % 3
    return PackedBatch(
        targets[-cu_seqlens[-1] :], torch.tensor(cu_seqlens), exact(task_weights).detach(), num_sampled=num_sampled
    )


@pytest.mark.parametrize(("micro_batches", "normalize"), [(1, False), (2, True)])
def test_two_passes_of_linear_are_one(micro_batches, normalize):
    """Two sequences to imitate and two sampled ones: one pass makes the gradient that the two parts add up to."""
    torch.manual_seed(5)
    model, x = torch.nn.Linear(4, 6).double(), torch.randn(8, 4, dtype=F64)
    head, costs = torch.randn(3, 6, dtype=F64), torch.tensor([0.2, 1.4])
    both = batch_of(8, [0, 2, 4, 7, 8], [0.3, 0.2, 0.0, 0.0], 2)
    pairs, samples = batch_of(4, [0, 2, 4], [0.3, 0.2], 0), batch_of(8, [0, 3, 4], [0.0, 0.0], 2)
    seen = {}
    for way in ("together", "apart"):
        objective = BarrierObjective(None, [Constraint("cost", upper=0.3)], normalize=normalize)
        counts = {"num_samples_in_window": {"cost": 2 * micro_batches}, "loss_divisor": micro_batches}
        parts = SplitGradients(model.parameters())
        for _ in range(2):  # the first window only measures
            model.zero_grad()
            for _ in range(micro_batches):
                measured = {"cost": Sampled(costs)}
                if way == "together":
                    (objective.linear(model(x), head, both, measured, **counts).loss / micro_batches).backward()
                else:
                    task = objective.linear(model(x[:4]), head, pairs, **counts)
                    parts.backward_parts(task=task.loss, divisor=micro_batches)
                    rest = objective.linear(model(x[4:]), head, samples, measured, **counts)
                    parts.backward_parts(constraint=rest.loss, divisor=micro_batches)
            norms = parts.clip_(math.inf)
            objective.step()
        seen[way] = torch.cat([p.grad.flatten() for p in model.parameters()]), objective.report()
    assert norms.constraint > 0.01
    assert (seen["together"][0] - seen["apart"][0]).abs().max() < 1e-12
    assert seen["together"][1] == seen["apart"][1]
    assert norms.total.item() == pytest.approx(seen["together"][0].norm().item())


def test_two_passes_with_a_grad_scaler():
    """Both parts are multiplied by the scale, also where each has a call of its own."""
    theta, scaler = exact([1.0, 2.0]), torch.amp.GradScaler("cpu", init_scale=1024.0)
    parts = SplitGradients([theta])
    parts.backward_parts(task=theta.sum(), scaler=scaler)
    parts.backward_parts(constraint=3 * theta[0], scaler=scaler)
    norms = parts.clip_(math.inf)
    assert theta.grad.tolist() == [4 * 1024.0, 1024.0]
    assert norms.task.item() == pytest.approx(math.sqrt(2))
    assert norms.constraint.item() == pytest.approx(3)
    assert norms.total.item() == pytest.approx(math.sqrt(17))


@pytest.mark.parametrize("first", [True, False])
def test_a_scaler_in_one_of_two_passes_is_refused(first: bool):
    """One part would be a thousand times as large as the other. Nothing is added, and the right call goes on."""
    theta, scaler = exact([1.0, 2.0]), torch.amp.GradScaler("cpu", init_scale=1024.0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    right, wrong, had = (scaler, off, "one") if first else (off, scaler, "none")
    parts = SplitGradients([theta])
    parts.backward_parts(task=theta.sum(), scaler=right)
    before = theta.grad.clone()
    for given in (off, None) if first else (scaler,):
        with pytest.raises(ValueError, match=f"scaler is .* an earlier backward pass of this step had {had}; allowed"):
            parts.backward_parts(constraint=3 * theta[0], scaler=given)
    if first:
        with pytest.raises(ValueError, match="scaler is given, and an earlier backward pass of this step had another"):
            parts.backward_parts(constraint=3 * theta[0], scaler=torch.amp.GradScaler("cpu"))
    assert torch.equal(theta.grad, before)
    parts.backward_parts(constraint=3 * theta[0], scaler=right)
    norms = parts.clip_(math.inf)
    assert norms.constraint.item() == pytest.approx(3)
    theta.grad = None
    parts.backward_parts(task=theta.sum(), constraint=3 * theta[0], scaler=wrong)  # another step
    parts.discard_window()
    parts.backward_parts(constraint=3 * theta[0], scaler=right)  # and another


def test_the_norm_of_both_where_they_oppose():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert PartNorms(one, two, torch.tensor(-1.0)).total == 1
    assert PartNorms(one, one, torch.tensor(-1.0)).total == 0
    rounded = torch.tensor(-1.0 - 2**-23)  # as a product of three rounded numbers may be
    assert PartNorms(one, one, rounded).total == 0
    nan = torch.tensor(math.nan)
    assert PartNorms(one, torch.tensor(0.0), nan).total == 1
    assert PartNorms(one, torch.tensor(math.inf), nan).total == math.inf


def opposed(multiplier):
    """A task that pulls along [1, 0] and a constraint along [0.6, 0.8], ``multiplier`` times as strong."""
    theta = torch.zeros(2, dtype=F64, requires_grad=True)
    objective = relaxed([Constraint("c", upper=-1.0, scale=1.0)], mu=1 / multiplier, noise_floor=0.0)

    def out():
        return objective.combine(theta @ exact([0.5, 0.0]).detach(), {"c": theta @ exact([0.6, 0.8]).detach()})

    out()
    objective.step()
    assert objective.report()[0].multiplier == pytest.approx(multiplier)
    return theta, out()


def test_a_large_multiplier_does_not_drown_the_task():
    share = {}
    for multiplier in (0.5, 100.0):
        theta, out = opposed(multiplier)
        task = torch.tensor([0.5, 0.0], dtype=F64)
        constraint = multiplier * torch.tensor([0.6, 0.8], dtype=F64)
        out.loss.backward(retain_graph=True)
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        whole = theta.grad.clone()
        theta.grad = None
        parts = SplitGradients([theta])
        parts.backward(out)
        norms = parts.clip_(1.0)
        assert norms.task == pytest.approx(0.5)
        assert norms.constraint == pytest.approx(multiplier)
        assert norms.cosine == pytest.approx(0.6)
        assert norms.metrics() == {
            "balance/task_norm": norms.task.item(),
            "balance/constraint_norm": norms.constraint.item(),
            "balance/cosine": norms.cosine.item(),
        }
        expected = task + constraint * min(1.0, 2.0 / multiplier)
        assert torch.allclose(theta.grad, expected, rtol=1e-12)
        # How much of the task is in the update: what remains along [0.8, -0.6], where the constraint has nothing.
        across = torch.tensor([0.8, -0.6], dtype=F64)
        share[multiplier] = [(g @ across / (task @ across)).item() for g in (whole, theta.grad)]
    assert share[0.5] == pytest.approx([1.0, 1.0], rel=0.2)
    assert share[100.0][0] < 0.011
    assert share[100.0][1] == pytest.approx(1.0)


@pytest.mark.parametrize("equal", [False, True])
def test_the_constraint_wins_where_both_pull_along_one_line(equal):
    """Minimise 5 x subject to x >= 0, from x = -3: with equal norms nothing would move."""
    x = exact(-3.0)
    objective = relaxed([Constraint("x", lower=0.0, scale=1.0)], mu=0.01, noise_floor=0.0)
    parts, optimizer = SplitGradients([x]), torch.optim.SGD([x], lr=0.1)
    for _ in range(60):
        parts.backward(objective.combine(5 * x, {"x": x * 1.0}))
        parts.clip_(1.0, 1.0 if equal else None)
        optimizer.step()
        optimizer.zero_grad()
        objective.step()
    assert (x.item() > -0.15) != equal


def test_norms_of_their_own():
    theta, out = opposed(100.0)
    parts = SplitGradients([theta])
    parts.backward(out)
    parts.clip_(0.1, 0.25)
    assert torch.allclose(theta.grad, torch.tensor([0.1 + 0.25 * 0.6, 0.25 * 0.8], dtype=F64))


def test_a_task_or_a_constraint_without_gradient():
    theta = exact([1.0, 2.0])
    objective = relaxed([C], mu=1.0)
    out = objective.combine(None, {"c": theta.sum()})
    objective.step()
    for task in (None, torch.tensor(3.0)):
        parts = SplitGradients([theta])
        parts.backward(objective.combine(task, {"c": theta.sum()}))
        norms = parts.clip_(math.inf)
        assert theta.grad.tolist() == [objective.report()[0].multiplier] * 2
        assert (norms.task, norms.cosine.isnan()) == (0, True)
        theta.grad = None
    parts.backward(objective.combine((theta**2).sum()))
    norms = parts.clip_(math.inf)
    assert theta.grad.tolist() == [2.0, 4.0]
    assert norms.constraint == 0
    with torch.no_grad():
        out = objective.combine(theta.sum(), {"c": theta.sum()})
    with pytest.raises(ValueError, match="out has no gradient; allowed"):
        parts.backward(out)


def test_gradients_that_autograd_hands_out_twice_are_not_changed():
    """The gradient of a + b is one tensor for both; a second micro-batch must not add to it twice."""
    a, b = exact([1.0]), exact([2.0])
    objective = relaxed([C], mu=1.0)
    objective.combine(None, {"c": (a + b).sum()})
    objective.step()
    parts = SplitGradients([a, b])
    for _ in range(2):
        parts.backward(objective.combine(None, {"c": (a + b).sum()}), divisor=2)
    parts.clip_(math.inf)
    assert a.grad.tolist() == b.grad.tolist() == [objective.report()[0].multiplier]
    assert a.grad is not b.grad


@pytest.mark.parametrize("part", ["task", "constraint"])
def test_what_is_not_finite_is_named_and_not_added(part):
    theta = exact([1.0, 2.0])
    objective = relaxed([C], mu=1.0)
    objective.combine(None, {"c": theta.sum()})
    objective.step()
    bad = (theta - theta.detach()).sqrt().sum()  # value 0, gradient infinite
    parts = SplitGradients([theta])
    task, value = (bad, theta.sum()) if part == "task" else (theta.sum(), theta.sum() + bad)
    parts.backward(objective.combine(task, {"c": value}))
    before = theta.grad.clone()
    with pytest.raises(ValueError, match=f"the {part} part of the gradient has norm inf; allowed: finite"):
        parts.clip_(1.0)
    assert torch.equal(theta.grad, before)
    norms = parts.clip_(1.0, error_if_nonfinite=False)
    assert not theta.grad.isfinite().all()
    assert not math.isfinite(getattr(norms, part))
    theta.grad = None
    parts.backward(objective.combine(theta.sum(), {"c": theta.sum()}))
    parts.discard_window()
    parts.clip_(math.inf)
    assert theta.grad.tolist() == [1.0, 1.0]  # the task alone


def test_with_a_grad_scaler():
    """Multiplied by the scale, clipped without it, and left to `scaler.step`, which skips what is not finite."""
    plain, scaled = network().float(), network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    data = torch.randn(STEPS, N, 5, generator=torch.Generator().manual_seed(0))
    runs = []
    for model, given in ((plain, None), (scaled, scaler)):
        objective, parts = make(), SplitGradients(model.parameters())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for x in data:
            for half in x.split(N // 2):
                logits = model(half)
                out = objective.combine((logits**2).mean(), {"path": logits[:, 0].tanh()})
                parts.backward(out, divisor=2, scaler=given)
            norms = parts.clip_(0.3)
            if given is None:
                optimizer.step()
            else:
                given.step(optimizer)
                given.update()
            optimizer.zero_grad()
            objective.step()
        runs.append((norms, objective.report()))
    assert runs[0][0].constraint > 0.1
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    # An overflow in the constraint part alone: the step is skipped and the scale comes down.
    before = copy.deepcopy(scaled.state_dict())
    logits = scaled(data[0])
    steep = (logits[:, 0] - logits[:, 0].detach()) * 1e37  # a value that is fine, and a gradient that is not
    out = objective.combine((logits**2).mean(), {"path": steep})
    parts.backward(out, scaler=scaler)
    norms = parts.clip_(0.3)
    assert not torch.isfinite(norms.constraint)
    scaler.step(optimizer)
    scaler.update()
    objective.discard_window()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(before[key], value) for key, value in scaled.state_dict().items())


def test_low_precision_beside_full():
    """A bf16 weight keeps its dtype, and its norm is taken in fp32."""
    low, full = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True), exact([1.0])
    objective = relaxed([C], mu=1.0)
    value = low.float().sum() + 3 * full.sum()
    objective.combine(None, {"c": value})
    objective.step()
    parts = SplitGradients([low, full])
    weight = objective.report()[0].multiplier / objective.report()[0].scale
    parts.backward(objective.combine(2 * full.sum(), {"c": low.float().sum() + 3 * full.sum()}))
    norms = parts.clip_(math.inf, weight * math.sqrt(4096 + 9) / 2)
    assert norms.constraint.item() == pytest.approx(weight * math.sqrt(4096 + 9), rel=1e-6)
    assert norms.cosine.item() == pytest.approx(3 / math.sqrt(4096 + 9), rel=1e-6)
    assert low.grad.dtype == torch.bfloat16
    assert low.grad.float().unique().tolist() == pytest.approx([weight / 2], rel=2**-8)
    assert full.grad.item() == pytest.approx(2 + 1.5 * weight, rel=1e-6)


def test_mistakes():
    theta = exact([1.0])
    for given, error, message in (
        ([], ValueError, "parameters is empty"),
        ([1.0], TypeError, r"parameters\[0\] is a float; allowed: tensors"),
        ([theta, theta], ValueError, r"parameters\[1\] is there twice"),
        ([theta * 2], ValueError, r"parameters\[0\] is the result of a computation; allowed: leaf"),
    ):
        with pytest.raises(error, match=message):
            SplitGradients(given)
    with pytest.raises(ValueError, match="reduction='none'; allowed: 'mean' or 'sum'"):
        SplitGradients([theta], reduction="none")
    parts = SplitGradients([theta])
    with pytest.raises(TypeError, match="out is a Tensor; allowed"):
        parts.backward(theta.sum())
    objective = relaxed([C])
    out = objective.combine(theta.sum(), {"c": theta.sum()})
    with pytest.raises(ValueError, match="divisor=0; allowed: a finite number > 0"):
        parts.backward(out, divisor=0)
    for norms in ((0.0,), (math.nan,), (None,), (1.0, -1.0)):
        with pytest.raises(ValueError, match=r"max_norm=.*; allowed: a number > 0"):
            parts.clip_(*norms)
    hidden = torch.randn(2, 3, requires_grad=True)
    batch = PackedBatch(torch.tensor([1, 0]), torch.tensor([0, 2]), torch.tensor([0.5]), num_sampled=0)
    with pytest.raises(ValueError, match="out comes from linear"):
        parts.backward(BarrierObjective(None, [C]).linear(hidden, torch.eye(3), batch))
    for losses, error, message in (
        ((), ValueError, "task and constraint are None; allowed: at least one loss"),
        ((1.0,), TypeError, r"task is a float; allowed: a loss \(0-d floating tensor\) or None"),
        ((None, out), TypeError, "constraint is a ObjectiveOutput; allowed: a loss"),
        ((theta.sum(), theta.repeat(1)), ValueError, r"constraint is torch.float64 of shape \(1,\); allowed: a loss"),
        ((torch.tensor(1),), ValueError, r"task is torch.int64 of shape \(\); allowed: a loss"),
        ((out.task_loss, out.loss), ValueError, "task has no gradient; allowed: .* not its task_loss"),
        ((out.loss, out.task_loss), ValueError, "constraint has no gradient; allowed: "),
    ):
        with pytest.raises(error, match=message):
            parts.backward_parts(*losses)
    with pytest.raises(ValueError, match="divisor=nan; allowed: a finite number > 0"):
        parts.backward_parts(theta.sum(), divisor=math.nan)
    assert theta.grad is None
    assert not parts._kept
    with pytest.warns(RuntimeWarning, match="reaches none of the parameters") as warned:
        SplitGradients([exact([1.0])]).backward(out)
    with pytest.warns(RuntimeWarning, match="reaches none of the parameters") as warned_too:
        SplitGradients([exact([1.0])]).backward_parts(constraint=out.loss)
    assert {w.filename for w in (*warned, *warned_too)} == {__file__}


# ---- real processes

RANK_SPLITS = {
    "equal": [[(0, 6)], [(6, 12)]],
    "accumulated, unequal": [[(0, 2), (2, 4)], [(4, 8), (8, 12)]],
    "one rank without samples": [[(0, 12)], [(0, 0)]],
}


LIMITS = (math.inf, math.inf), (0.2, 0.3)


def train_split(split, limits, model, ranks=1):
    parts = SplitGradients(model.parameters())
    return train(
        split, lambda out, k: parts.backward(out, divisor=k), lambda _: parts.clip_(*limits), model, ranks=ranks
    )


def measured_on_one_rank(rank, reduction):
    """Rank 1 measures nothing at all; a parameter that nothing reaches keeps its None on both."""
    theta, unused = exact([1.0, 2.0]), exact([5.0])
    objective = relaxed([C], mu=1.0, gradient_reduction=reduction)
    objective.combine(None, {"c": theta.sum()})
    objective.step()
    parts = SplitGradients([theta, unused], reduction=reduction)
    out = objective.combine((theta**2).sum(), {} if rank else {"c": theta.sum() * 3})
    parts.backward(out)
    norms = parts.clip_(math.inf)
    return theta.grad.tolist(), norms.constraint.item(), unused.grad is None


def worker(rank, port, results):
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for ranges in RANK_SPLITS.values():
            for limits in LIMITS:
                seen = train_split(ranges[rank], limits, DistributedDataParallel(network()), ranks=2)
                plain = [[None if g is None else g.tolist() for g in step] for step in seen]
                results.put((rank, limits, plain))
        for reduction in ("mean", "sum"):
            results.put((rank, reduction, measured_on_one_rank(rank, reduction)))
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one():
    context = mp.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=worker, args=(rank, port, results)) for rank in range(2)]
    for p in processes:
        p.start()
    got = [results.get(timeout=200) for _ in range(2 * (2 * len(RANK_SPLITS) + 2))]
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    whole = {limits: train_split([(0, 12)], limits, network()) for limits in LIMITS}
    assert not torch.allclose(whole[LIMITS[0]][0][0], whole[LIMITS[1]][0][0])  # these do clip
    for _, kind, value in got:
        if kind in LIMITS:
            gradients = [[None if g is None else torch.tensor(g, dtype=F64) for g in step] for step in value]
            assert_close(gradients, whole[kind])
        else:
            gradient, norm, none = value
            # One rank of two has measured: without counts ranks are equal, so the mean over them is half of it.
            # Task gradients of this bare loop are each rank's own: the constraint's alone is combined.
            assert gradient == pytest.approx([2 + 1.5, 4 + 1.5])
            assert norm == pytest.approx(1.5 * math.sqrt(2))
            assert none
