"""Run by `launch`: 20 steps of a small policy, its windows split over ranks and micro-batches in every way."""

import functools
import itertools
import sys

import torch
import torch.distributed as dist
from barrierlm_kernels import VocabParallel, linear_sequence_logprob
from launch import end, join
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from barrierlm import (
    AdaptiveBarrier,
    BarrierObjective,
    Constraint,
    ExponentialSchedule,
    PackedBatch,
    RelaxedLogBarrier,
    Sampled,
)

F64, VOCAB, WIDTH, STEPS, RESPONSES = torch.float64, 11, 6, 20, 24
#: Micro-batches of a window; the last window of an epoch of `EPOCH` steps has one (or two) fewer.
ACCUMULATION, EPOCH = (1, 2, 4), 5
EVERYTHING = ("response", "groups", "length", "kl", "pathwise", "rare")


class Policy(nn.Module):
    """Embedding, one layer and a head; what hidden states are used for runs inside `forward`, as wrappers expect."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, dtype=F64)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=F64)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=F64)

    def forward(self, tokens, use):
        return use(torch.tanh(self.layer(self.embedding(tokens))), self.head.weight)


def make_policy():
    torch.manual_seed(3)
    return Policy()


def make_objective(*, learning=False, **options):
    """``learning``: the default rule, which hands over to learned multipliers at the first step, and its schedule."""
    bounds = [Constraint(name, lower=-9.0, upper=-0.5, scale=2.0) for name in EVERYTHING]
    if learning:
        return BarrierObjective(None, bounds, rule=AdaptiveBarrier(1.0, patience=3), **options)
    rule, schedule = RelaxedLogBarrier("quadratic"), ExponentialSchedule(1.0, 0.2, STEPS)
    return BarrierObjective(None, bounds, rule=rule, schedule=schedule, **options)


class Window:
    """The responses of one step: lengths, tokens, costs; the same on all ranks, which then take their own."""

    def __init__(self, step):
        generator = torch.Generator().manual_seed(step)
        self.lengths = torch.randint(1, 5, (RESPONSES,), generator=generator)
        total = int(self.lengths.sum())
        self.ends = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)])
        self.tokens, self.targets = torch.randint(VOCAB, (2, total), generator=generator)
        self.costs, self.rare = torch.randn(2, RESPONSES, generator=generator, dtype=F64)
        self.reference = -torch.rand(total, generator=generator, dtype=F64) * 3


class MicroBatch:
    """Responses lo to hi of a window, and their measurements; ``rare``: with the constraint few ranks measure."""

    def __init__(self, window, lo, hi, *, rare):
        rows = slice(window.ends[lo], window.ends[hi])
        self.window, self.lo, self.hi, self.rows, self.size, self.rare = window, lo, hi, rows, hi - lo, rare
        self.tokens, self.targets = window.tokens[rows], window.targets[rows]
        self.cu_seqlens = window.ends[lo : hi + 1] - window.ends[lo]

    def measure(self, hidden, token_logps=None):
        """With log-probabilities for `combine`, without for `linear`."""
        given, packed = {}, {}
        if token_logps is not None:
            given["logps"] = torch.segment_reduce(token_logps, "sum", offsets=self.cu_seqlens, axis=0)
            packed = {"logps": token_logps, "cu_seqlens": self.cu_seqlens}
        costs, rare = (x[self.lo : self.hi] for x in (self.window.costs, self.window.rare))
        measured = {
            "response": Sampled(costs, **given),
            "groups": Sampled(costs**2, **given, groups=torch.arange(self.lo, self.hi) // 2),
            "length": Sampled.per_token(torch.ones(len(self.targets), dtype=F64), **packed),
            "kl": Sampled.reference_kl(self.window.reference[self.rows], **packed),
            "pathwise": hidden[self.cu_seqlens[:-1], 0],
        }
        return measured | ({"rare": Sampled(rare, **given)} if self.rare else {})


def split(parts, accumulation, step):
    """Uneven cuts, by rank and micro-batch, of a window's responses; the last rank has none in some micro-batches."""
    if step % EPOCH == EPOCH - 1:
        accumulation = max(1, accumulation - 1 - accumulation // 4)
    generator = torch.Generator().manual_seed(100 * step + accumulation)
    cuts = 2 * torch.randint(RESPONSES // 2 + 1, (parts * accumulation - 1,), generator=generator).sort().values
    cuts = [0, *cuts.tolist(), RESPONSES]
    if step % 3 == 0 and parts > 1:  # the last rank has no response in the whole window
        cuts[-1 - accumulation :] = [RESPONSES] * (accumulation + 1)
    return [list(itertools.pairwise(cuts))[r * accumulation : (r + 1) * accumulation] for r in range(parts)]


def train(
    policy,
    accumulation,
    parts,
    *,
    rank=None,
    model=None,
    linear=False,
    vocab=None,
    group=None,
    head=False,
    learning=False,
):
    """What each step's gradients are, and what the objective then says: {"0": (gradients, metrics), ...}.

    The windows are split over ``parts`` data-parallel ranks, of which this one is ``rank``; None: it does the work of
    all. ``head``: the head is used outside of the model's forward; ``learning``: as in `make_objective`.
    """
    model = policy if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    objective = make_objective(learning=learning, process_group=group)
    averaged, history = 1 if rank is None else parts, {}
    for step in range(STEPS):
        window = Window(step)
        everyone = split(parts, accumulation, step)
        mine = everyone[rank] if rank is not None else [span for own in everyone for span in own]
        first = everyone[0][0]
        counts = dict.fromkeys(EVERYTHING, RESPONSES) | {"rare": first[1] - first[0]}
        for k, (lo, hi) in enumerate(mine):
            is_last = k == len(mine) - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = is_last
            elif hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(is_last)
            micro = MicroBatch(window, lo, hi, rare=k == 0 and not rank)
            use = functools.partial(loss_of, objective, micro, linear, vocab, counts, len(mine), averaged)
            if head:
                loss = use(model(micro.tokens, lambda hidden, _: hidden), policy.head.weight)
            else:
                loss = model(micro.tokens, use)
            (loss / len(mine)).backward()
        gradient = gradients(model, vocab)
        optimizer.step()
        optimizer.zero_grad()
        objective.step()
        history[str(step)] = (gradient, objective.metrics())
    return history


def loss_of(objective, micro, linear, vocab, counts, divisor, ranks, hidden, weight):
    """The loss of one micro-batch; loop and ranks divide it by ``divisor`` times ``ranks`` in the end."""
    announced = {"num_samples_in_window": counts, "loss_divisor": divisor}
    task_weight = divisor * ranks / len(micro.window.targets)  # a mean over the window's tokens
    if linear:
        weights = torch.full((micro.size,), task_weight, dtype=F64)
        batch = PackedBatch(micro.targets, micro.cu_seqlens, weights, micro.size, len(micro.targets))
        measured = micro.measure(hidden)
        return objective.linear(hidden, weight, batch, measured, vocab_parallel=vocab, **announced).loss
    options = {"return_token_logps": True, "vocab_parallel": vocab, "memory_budget": 200}
    out = linear_sequence_logprob(hidden, weight, micro.targets, micro.cu_seqlens, **options)
    measured = micro.measure(hidden, out.token_logps)
    return objective.combine(-task_weight * out.token_logps.sum(), measured, **announced).loss


def gradients(model, vocab):
    """Whole gradients by parameter: parts of FSDP and slices of the vocabulary put together."""
    result = {}
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        name = name.removeprefix("module.")
        if vocab is not None and name == "head.weight":
            whole = gradient.new_zeros(vocab.size, WIDTH)
            whole[vocab.start : vocab.start + vocab.rows] = gradient
            dist.all_reduce(whole, group=vocab.group)
            gradient = whole
        result[name] = gradient
    return result


def sharded(policy):
    """FSDP2, layer by layer; the head belongs to the root, and is whole during its forward."""
    fully_shard(policy.layer)
    return fully_shard(policy)


def sharded_head(policy):
    """FSDP2 with a head of its own, that is used outside of any forward: a DTensor."""
    fully_shard(policy.head)
    return sharded(policy)


def slice_head(policy, group=None):
    """Leave the policy this rank's slice of the vocabulary."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    vocab = VocabParallel(VOCAB // ranks + (rank < VOCAB % ranks), group)
    rows = slice(vocab.start, vocab.start + vocab.rows)
    policy.head.weight = nn.Parameter(policy.head.weight.detach()[rows].clone())
    return vocab


def arrange(kind, rank, ranks):
    """The policy of a kind of parallelism, and how `train` is to be called."""
    policy = make_policy()
    if kind == "vocabulary":  # every rank sees all data: a window is one rank's
        alone = [dist.new_group([r]) for r in range(ranks)][rank]
        return policy, {"parts": ranks, "vocab": slice_head(policy), "group": alone}
    if kind == "mesh":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
        vocab, group = slice_head(policy, mesh["tp"].get_group()), mesh["dp"].get_group()
        model = DistributedDataParallel(policy, process_group=group)
        return policy, {"parts": 2, "rank": mesh.get_local_rank("dp"), "model": model, "vocab": vocab, "group": group}
    wrap = {"fsdp2": sharded, "fsdp2 head": sharded_head}.get(kind, DistributedDataParallel)
    how = {"head": kind == "fsdp2 head", "learning": kind == "learning"}
    return policy, {"parts": ranks, "rank": rank, "model": wrap(policy), **how}


def main(kinds):
    rank, ranks, _ = join()
    results = {}
    for kind in kinds:
        for accumulation in ACCUMULATION:
            for linear in (False, True) if kind != "fsdp2 head" else (True,):
                policy, how = arrange(kind, rank, ranks)
                history = train(policy, accumulation, linear=linear, **how)
                results[f"{kind}, accumulation {accumulation}, {'linear' if linear else 'combine'}"] = history
    end(results)


if __name__ == "__main__":
    main(sys.argv[1:])
