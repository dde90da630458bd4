"""Packed batches with every kind of measurement, through the one pass and through token log-probabilities."""

import copy
from dataclasses import dataclass

import torch
from barrierlm_kernels import linear_sequence_logprob

from barrierlm import BarrierObjective, ConstantSchedule, Constraint, PackedBatch, RelaxedLogBarrier, Sampled

VOCAB, WIDTH, IGNORED = 13, 6, -100
KINDS = (
    "response",
    "groups",
    "token",
    "token groups",
    "off-policy",
    "off-policy token",
    "kl",
    "rollout kl",
    "off-policy kl",
    "pathwise",
    "exact",
)


def make(kinds=KINDS, **kwargs):
    """All bounds violated from the first numbers on, so that every multiplier pulls."""
    defaults = {"rule": RelaxedLogBarrier("quadratic"), "schedule": ConstantSchedule(0.7)}
    bounds = [Constraint(kind, lower=-9.0, upper=-0.5) for kind in kinds]
    return BarrierObjective(None, bounds, **(defaults | kwargs))


@dataclass
class Case:
    """One micro-batch: ``learned`` and ``sampled`` are lengths of sequences."""

    learned: list[int]
    sampled: list[int]
    dtype: torch.dtype = torch.float64
    seed: int = 0
    ignored: float = 0.2
    per_row: bool = False
    kinds: tuple[str, ...] = KINDS
    with_bias: bool = True
    trains_head: bool = True
    temperature: float = 1.0
    softcap: float | None = None
    task_on_sampled: bool = False

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        lengths = [*self.learned, *self.sampled]
        if sum(lengths) == len(lengths) and 0 in lengths:  # weights by row or by sequence? refused
            self.learned = [*self.learned, 3]
        lengths = torch.tensor([*self.learned, *self.sampled], dtype=torch.long)
        n, self.first, self.size = int(lengths.sum()), sum(self.learned), len(self.sampled)
        self.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        self.targets = torch.randint(VOCAB, (n,), generator=generator)
        self.targets[torch.rand(n, generator=generator) < self.ignored] = IGNORED
        self.counted = (self.targets != IGNORED)[self.first :]
        self.hidden = normal(n, WIDTH).requires_grad_()
        self.weight = normal(VOCAB, WIDTH).requires_grad_(self.trains_head)
        self.bias = normal(VOCAB).requires_grad_(self.trains_head) if self.with_bias else None
        self.task_weights = normal(n if self.per_row else len(lengths)).abs()
        if not self.task_on_sampled:
            self.task_weights[self.first if self.per_row else len(self.learned) :] = 0
        # Groups in any order, of two or three; one response alone cannot be in a group.
        members = torch.arange(self.size) // 2
        if self.size % 2:
            members[-1:] = members[-2:-1]
        self.groups = members[torch.randperm(self.size, generator=generator)] + 7
        self.values, self.more = normal(self.size), normal(self.size)
        tokens = n - self.first
        self.costs = normal(tokens)
        # Numbers at tokens that do not count must not matter.
        self.ref_logps, self.old_logps, self.rollout_logps = (-normal(tokens).abs() for _ in range(3))
        self.old_response_logps = -2 * torch.tensor([float(x) for x in self.sampled], dtype=self.dtype)

    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def to(self, device):
        """The same case elsewhere."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.detach().to(device).requires_grad_(value.requires_grad))
        return moved

    def options(self):
        return {"bias": self.bias, "temperature": self.temperature, "softcap": self.softcap}

    def pathwise(self):
        return {"pathwise": self.hidden.sum(1), "exact": (self.weight**2).mean() + (self.hidden**2).sum()}

    def fused(self, objective, *, compact=False, **kwargs):
        every = {
            "response": Sampled(self.values),
            "groups": Sampled(self.more, groups=self.groups),
            "token": Sampled.per_token(self.costs),
            "token groups": Sampled.per_token(torch.ones_like(self.costs), groups=self.groups),
            "off-policy": Sampled(self.more, old_logps=self.old_response_logps, clip=0.3),
            "off-policy token": Sampled.per_token(self.costs, old_logps=self.old_logps, clip=0.5),
            "kl": Sampled.reference_kl(self.ref_logps),
            "rollout kl": Sampled.reference_kl(self.ref_logps, self.rollout_logps),
            "off-policy kl": Sampled.reference_kl(self.ref_logps, old_logps=self.old_logps, clip=0.5),
        } | self.pathwise()
        batch = PackedBatch(self.targets, self.cu_seqlens, self.task_weights, self.size)
        return objective.linear(
            self.hidden,
            self.weight,
            batch,
            {kind: every[kind] for kind in reversed(self.kinds)},  # an order that must not matter
            compact=compact,
            **self.options(),
            **kwargs,
        )

    def output(self):
        return linear_sequence_logprob(
            self.hidden, self.weight, self.targets, self.cu_seqlens, return_token_logps=True, **self.options()
        )

    def logps(self):
        """Of the sampled sequences: their tokens', and their own."""
        out = self.output()
        return out.token_logps[self.first :], out.logps[len(self.learned) :]

    def unfused(self, objective, **kwargs):
        out, learned = self.output(), len(self.learned)
        cu = self.cu_seqlens[learned:] - self.cu_seqlens[learned]
        logps, whole = out.token_logps[self.first :], out.logps[learned:]
        ref, old, rollout = (
            torch.where(self.counted, x, 0) for x in (self.ref_logps, self.old_logps, self.rollout_logps)
        )
        # The cost takes the rollout's numbers, the gradient the policy's: a KL with costs given.
        every = {
            "response": Sampled(self.values, whole),
            "groups": Sampled(self.more, whole, self.groups),
            "token": Sampled.per_token(self.costs, logps, cu),
            "token groups": Sampled.per_token(torch.ones_like(self.costs), logps, cu, groups=self.groups),
            "off-policy": Sampled(self.more, whole, old_logps=self.old_response_logps, clip=0.3),
            "off-policy token": Sampled.per_token(self.costs, logps, cu, old_logps=old, clip=0.5),
            "kl": Sampled.reference_kl(ref, logps, cu),
            "rollout kl": Sampled.per_token(rollout - ref, logps, cu),
            "off-policy kl": Sampled.reference_kl(ref, logps, cu, old_logps=old, clip=0.5),
        } | self.pathwise()
        given = out.token_logps if self.per_row else out.logps
        task = -torch.where(self.task_weights != 0, self.task_weights * given, 0).sum()
        return objective.combine(task, {kind: every[kind] for kind in self.kinds}, **kwargs)
