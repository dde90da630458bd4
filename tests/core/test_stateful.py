"""Random sequences of everything that can be called, on two ranks at once and on a copy that is saved and loaded.

The ranks are threads; what they exchange goes through a stand-in for torch.distributed that adds up in a fixed order.
"""

import copy
import math
import threading
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from barrierlm import (
    EMA,
    AdaptiveBarrier,
    AdaptiveSchedule,
    AugmentedLagrangian,
    BarrierObjective,
    BatchMean,
    ConstantSchedule,
    Constraint,
    DualAscent,
    ExponentialSchedule,
    LogBarrier,
    ModifiedBarrier,
    PackedBatch,
    RelaxedLogBarrier,
    Sampled,
)
from barrierlm.objective import _CALLS_BEFORE_WARNING

from .helpers import F64, same, state_of

RANKS, VOCAB = 2, 6
METHODS = [RelaxedLogBarrier, lambda: RelaxedLogBarrier("exponential"), LogBarrier, ModifiedBarrier, AdaptiveBarrier]
METHODS += [DualAscent, lambda: DualAscent(parametrisation="log"), AugmentedLagrangian]
SCHEDULES = [AdaptiveSchedule, lambda: ConstantSchedule(0.1), lambda: ExponentialSchedule(1.0, 0.1, 5)]
KINDS = ["sequence", "token", "group", "pathwise", "exact"]
NAMES = ["a", "b", "c"]


class Ranks:
    """Two threads and the sums over them."""

    def __init__(self):
        self.here, self.barrier, self.sent = threading.local(), threading.Barrier(RANKS, timeout=20), [None] * RANKS

    def all_reduce(self, tensor, op=None, group=None, async_op=False):
        self.sent[self.here.rank] = tensor.clone()
        self.barrier.wait()
        total = self.sent[0] + self.sent[1]
        self.barrier.wait()
        tensor.copy_(total)
        return mock.Mock(wait=lambda: None) if async_op else None

    def run(self, action):
        """``action(rank)`` on every rank at once; their results, or errors."""
        results = [None] * RANKS
        grad = torch.is_grad_enabled()

        def work(rank):
            self.here.rank = rank
            try:
                with torch.set_grad_enabled(grad):  # another thread starts with its own
                    results[rank] = action(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    @contextmanager
    def installed(self):
        with (
            mock.patch.object(dist, "is_initialized", return_value=True),
            mock.patch.object(dist, "get_world_size", return_value=RANKS),
            mock.patch.object(dist, "get_rank", side_effect=lambda group=None: self.here.rank),
            mock.patch.object(dist, "get_backend", return_value="gloo"),
            mock.patch.object(dist, "all_reduce", self.all_reduce),
        ):
            yield


class World:
    """The objectives of the two ranks with a parameter each."""

    def __init__(self, make):
        self.objectives = [make() for _ in range(RANKS)]
        self.theta = [torch.zeros(VOCAB, dtype=F64, requires_grad=True) for _ in range(RANKS)]

    def state(self):
        return [state_of(o) for o in self.objectives]


def measurement(kind, seed, count, theta, bad):
    """``count`` samples of a kind; None where it has no empty form."""
    generator = torch.Generator().manual_seed(seed)
    logp = theta.log_softmax(0)
    costs = torch.randn(count, generator=generator, dtype=F64) + 0.3
    if bad is not None and count:
        costs[seed % count] = bad
    tokens = torch.randint(VOCAB, (count,), generator=generator)
    if kind == "token":
        cut = seed % (count + 1)
        return Sampled.per_token(costs, logp[tokens], torch.tensor([0, cut, count]))
    if kind == "group":
        return Sampled(costs, logp[tokens], groups=torch.zeros(count, dtype=torch.long)) if count > 1 else None
    if kind == "pathwise":
        return costs + 0.1 * logp[tokens]
    if kind == "exact":
        return costs.sum() + theta.sum() if count else None
    return Sampled(costs, logp[tokens])


class Machine(RuleBasedStateMachine):
    """What the objective promises, whatever is called in whatever order."""

    @initialize(
        method=st.sampled_from(METHODS),
        schedule=st.sampled_from(SCHEDULES),
        estimator=st.sampled_from([lambda: EMA(0.3), BatchMean]),
        nonfinite=st.sampled_from(["raise", "skip"]),
        normalize=st.booleans(),
        floor=st.sampled_from([0.0, 1.0]),
        kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    )
    def start(self, method, schedule, estimator, nonfinite, normalize, floor, kinds):
        def make():
            constraints = [Constraint("a", upper=0.5), Constraint("b", lower=-1, upper=1), Constraint("c", lower=-0.2)]
            parts = {"rule": method(), "schedule": schedule(), "estimator": estimator()}
            return BarrierObjective(
                None, constraints, **parts, nonfinite=nonfinite, normalize=normalize, noise_floor=floor
            )

        self.make, self.kinds, self.ranks = make, dict(zip(NAMES, kinds, strict=True)), Ranks()
        self.worlds = [World(make)]
        self.calls = 0
        self.measured = set()  # constraints with a committed estimate
        self.window = set()  # constraints measured in the open window
        self.bad = set()  # of these, with a NaN

    def everywhere(self, action):
        """``action(objective, theta, rank)`` in every world; the results are the same in all and on both ranks."""
        everything = []
        with self.ranks.installed():
            for world in self.worlds:
                everything.append(self.ranks.run(lambda r, w=world: action(w.objectives[r], w.theta[r], r)))
        for results in everything:
            for result in results:
                if isinstance(result, threading.BrokenBarrierError):
                    raise result
        return everything

    def rejected(self, action, errors):
        """``action`` raises one of ``errors`` on both ranks, with the same words in all worlds, and changes nothing."""
        before = [world.state() for world in self.worlds]
        everything = self.everywhere(action)
        for results in everything:
            for result in results:
                assert isinstance(result, errors), repr(result)
        for world, states in zip(self.worlds, before, strict=True):
            assert all(same(a, b) for a, b in zip(world.state(), states, strict=True))
        return str(everything[0][0])

    def call(self, seeds, counts, names, bad, how, where=(0, 1)):
        """What `everywhere` does, the sizes by name, and which constraints got ``bad`` on a rank of ``where``."""
        values, hit = {}, set()

        def action(objective, theta, rank):
            measurements = {}
            for name in names:
                poison = bad if name == names[0] and rank in where else None
                value = measurement(self.kinds[name], seeds[rank], counts[rank], theta, poison)
                if value is not None:
                    if poison is not None and counts[rank]:
                        hit.add(name)
                    measurements[name] = value
                    size = len(value) if isinstance(value, Sampled) else value.numel()
                    values[name] = values.get(name, 0) + size  # per token there are two responses, maybe empty
            if how == "calibrate":
                return objective.calibrate(measurements)
            task = (theta - 1).square().sum()
            out = objective.combine(task, measurements)
            if torch.is_grad_enabled():
                out.loss.backward()
            return out.loss.detach()

        return action, values, hit

    def note(self, results, values, hit=()):
        for result in (r for world in results for r in world):
            assert not isinstance(result, Exception), repr(result)
        self.window |= {name for name, count in values.items() if count}
        self.bad |= set(hit)

    #: More calls than this without a step are warned of, which is an error in tests.
    few_calls = precondition(lambda self: self.calls < _CALLS_BEFORE_WARNING - 1)

    numbers = st.tuples(st.integers(0, 99), st.integers(0, 99))
    sizes = st.tuples(st.integers(0, 4), st.integers(0, 4))
    some = st.lists(st.sampled_from(NAMES), unique=True, max_size=3)

    @few_calls
    @rule(seeds=numbers, counts=sizes, names=some)
    def combine(self, seeds, counts, names):
        action, values, _ = self.call(seeds, counts, names, None, "combine")
        results = self.everywhere(action)
        self.note(results, values)
        for world in results[1:]:
            assert all(map(torch.equal, world, results[0]))
        assert all(bool(loss.isfinite()) for loss in results[0])
        self.calls += 1

    full = st.tuples(st.integers(2, 4), st.integers(0, 4))
    first = st.permutations(NAMES)
    some_ranks = st.sampled_from([(0, 1), (0,), (1,)])

    @few_calls
    @rule(seeds=numbers, counts=full)
    def whole_window(self, seeds, counts):
        """What a loop does most of the time."""
        self.combine(seeds, counts, NAMES)
        self.step()

    @few_calls
    @rule(seeds=numbers, counts=full, names=first, bad=st.sampled_from([math.nan, math.inf]), where=some_ranks)
    def combine_with_a_nan(self, seeds, counts, names, bad, where):
        action, values, hit = self.call(seeds, counts, names, bad, "combine", where)
        results = self.everywhere(action)
        self.note(results, values, hit)
        if not names or self.kinds[names[0]] not in ("exact", "pathwise"):
            assert all(bool(loss.isfinite()) for loss in results[0])
        self.calls += 1

    @few_calls
    @rule(seeds=numbers, count=st.integers(1, 3))
    def linear(self, seeds, count):
        """Per-response costs of one-token sequences, in one pass over a head."""

        def action(objective, theta, rank):
            generator = torch.Generator().manual_seed(seeds[rank])
            hidden = torch.randn(count + 1, VOCAB, generator=generator, dtype=F64).requires_grad_()
            head = torch.eye(VOCAB, dtype=F64) * 1.0
            targets = torch.randint(VOCAB, (count + 1,), generator=generator)
            weights = torch.tensor([1.0] + [0.0] * count, dtype=F64)
            batch = PackedBatch(targets, torch.arange(count + 2), weights, num_sampled=count)
            costs = Sampled(torch.randn(count, generator=generator, dtype=F64))
            out = objective.linear(hidden, head, batch, {"a": costs})
            out.loss.backward()
            return out.loss.detach()

        if self.kinds["a"] == "group":
            return
        results = self.everywhere(action)
        self.note(results, {"a": 2 * count})
        for world in results[1:]:
            assert all(map(torch.equal, world, results[0]))
        self.calls += 1

    @rule(seeds=numbers, counts=sizes, names=some)
    def evaluate(self, seeds, counts, names):
        """Without gradients: nothing is added to the window."""
        before = [world.state() for world in self.worlds]
        action, _, _ = self.call(seeds, counts, names, None, "combine")
        with torch.no_grad():
            results = self.everywhere(action)
        assert not any(isinstance(r, Exception) for world in results for r in world)
        for world, states in zip(self.worlds, before, strict=True):
            assert all(same(a, b) for a, b in zip(world.state(), states, strict=True))

    def commit(self, results, window, bad):
        """Both ranks agree on whether it is committed; what is, is known from now on."""
        flat = [r for world in results for r in world]
        failed = [r for r in flat if isinstance(r, Exception)]
        if failed:
            assert len(failed) == len(flat), flat
            assert len({str(r) for r in failed}) == 1
            assert isinstance(failed[0], FloatingPointError | ValueError), repr(failed[0])
            nonfinite = isinstance(failed[0], FloatingPointError)
            assert nonfinite == bool(bad and self.worlds[0].objectives[0].nonfinite == "raise")
            return False
        self.measured |= window - bad
        return True

    @rule(seeds=numbers, counts=sizes, names=some, bad=st.sampled_from([None, None, math.nan]), where=some_ranks)
    def calibrate(self, seeds, counts, names, bad, where):
        action, values, hit = self.call(seeds, counts, names, bad, "calibrate", where)
        if self.calls:
            assert "of an unfinished window" in self.rejected(action, RuntimeError)
            return
        before = [world.state() for world in self.worlds]
        results = self.everywhere(action)
        window = {name for name, count in values.items() if count}
        if not self.commit(results, window, hit):
            for world, states in zip(self.worlds, before, strict=True):
                assert all(same(a, b) for a, b in zip(world.state(), states, strict=True))

    @rule()
    def step(self):
        if not self.calls:
            assert "nothing measured" in self.rejected(lambda o, t, r: o.step(), RuntimeError)
            return
        before = [world.state() for world in self.worlds]
        with mock.patch("warnings.warn"):  # an empty window says so once
            results = self.everywhere(lambda o, t, r: o.step())
        if self.commit(results, self.window, self.bad):
            self.forget()
        else:  # the window is still there
            for world, states in zip(self.worlds, before, strict=True):
                assert all(same(a, b) for a, b in zip(world.state(), states, strict=True))

    @rule()
    def discard(self):
        self.everywhere(lambda o, t, r: o.discard_window())
        self.forget()

    def forget(self):
        self.calls, self.window, self.bad = 0, set(), set()

    @precondition(lambda self: len(self.worlds) == 1 and not self.calls)
    @rule()
    def save_and_load(self):
        """From now on a copy in fresh objectives goes along, and must stay equal."""
        copied = World(self.make)
        for old, new, a, b in zip(
            self.worlds[0].objectives, copied.objectives, self.worlds[0].theta, copied.theta, strict=True
        ):
            new.load_state_dict(old.state_dict())
            with torch.no_grad():
                b.copy_(a)
        self.worlds.append(copied)

    @precondition(lambda self: len(self.worlds) == 2 and not self.calls)
    @rule(seeds=numbers, counts=full, open_window=st.booleans())
    def load_into_used_ones(self, seeds, counts, open_window):
        """The copy goes its own way for a while; what is loaded then leaves nothing of that, nor of an open window."""
        ours, copied = self.worlds
        action, _, _ = self.call(seeds, counts, NAMES, None, "combine")
        self.worlds = [copied]
        try:
            self.everywhere(action)
            with mock.patch("warnings.warn"):
                self.everywhere(lambda o, t, r: o.step())  # a bound that LogBarrier finds infeasible may refuse
            if open_window:
                self.everywhere(action)
        finally:
            self.worlds = [ours, copied]
        for old, new, a, b in zip(ours.objectives, copied.objectives, ours.theta, copied.theta, strict=True):
            new.load_state_dict(old.state_dict())
            with torch.no_grad():
                b.copy_(a)

    @rule(which=st.integers(0, 5))
    def a_wrong_call(self, which):
        x = torch.zeros(2, dtype=F64, requires_grad=True)
        wrong = [
            lambda o: o.combine(None, {"nobody": x}),
            lambda o: o.combine(None, {"a": x.detach()}),
            lambda o: o.combine(x, {"a": x}),
            lambda o: o.combine(None, {"a": torch.zeros(2, 2, requires_grad=True)}),
            lambda o: o.combine(None, {"a": x}, loss_divisor=0),
            lambda o: o.load_state_dict({**o.state_dict(), "estimator": {}}),
        ]
        self.rejected(lambda o, t, r: wrong[which](o), (ValueError, TypeError))

    @invariant()
    def everything_agrees(self):
        if not hasattr(self, "worlds"):
            return
        states = [state for world in self.worlds for state in world.state()]
        assert all(same(state, states[0]) for state in states[1:])  # on both ranks, and after loading

    @invariant()
    def numbers_are_finite(self):
        if not hasattr(self, "worlds"):
            return
        objective = self.worlds[0].objectives[0]
        metrics = objective.metrics()
        for name in NAMES:
            value = metrics[f"constraints/{name}/value"]
            assert math.isfinite(value) if name in self.measured else math.isnan(value)
        for row in objective.report():
            assert math.isfinite(row.multiplier)
            assert row.multiplier >= 0
            assert row.mu > 0
        assert math.isfinite(metrics["barrier/penalty"])


def test_any_sequence_of_calls():
    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=25))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_sequences_of_calls():
    run_state_machine_as_test(Machine, settings=settings(max_examples=200, stateful_step_count=50))


def test_the_stand_in_adds_up():
    """The machine's ranks see each other's sums: else it would agree about nothing at all."""
    ranks = Ranks()
    with ranks.installed():
        sums = ranks.run(lambda rank: copy.copy(reduced(torch.tensor([rank + 1.0]))))
    assert [s.item() for s in sums] == [3, 3]


def reduced(tensor):
    dist.all_reduce(tensor)
    return tensor
