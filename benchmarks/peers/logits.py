"""Peers of `sequence_logprob`: from logits that exist to log-probabilities."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..candidate import Candidate, Outputs
from ..problems import LogitsProblem
from .verl import verl_module

Forward = Callable[[], Outputs]


def naive_forward(p: LogitsProblem) -> Forward:
    """What a user writes: log_softmax in fp32, and a gather."""
    return lambda: p.finish(torch.log_softmax(p.logits.float(), -1).gather(1, p.targets[:, None])[:, 0])


def _compiled(p: LogitsProblem) -> Forward:
    torch.compiler.reset()
    return torch.compile(naive_forward(p), dynamic=False)  # type: ignore[no-any-return]


def _cross_entropy(p: LogitsProblem) -> Forward:
    return lambda: p.finish(-F.cross_entropy(p.logits.float(), p.targets, reduction="none"))


def _trl(p: LogitsProblem) -> Forward:
    from trl.trainer.utils import selective_log_softmax

    return lambda: p.finish(selective_log_softmax(p.logits, p.targets))


def _liger(p: LogitsProblem) -> Forward:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda: p.finish(-loss(p.logits, p.targets))


def _verl(p: LogitsProblem) -> Forward:
    operation = verl_module("utils.torch_functional").logprobs_from_logits
    return lambda: p.finish(operation(p.logits, p.targets, inplace_backward=False))


def _quack(p: LogitsProblem) -> Forward:
    from quack.cross_entropy import cross_entropy

    return lambda: p.finish(-cross_entropy(p.logits, p.targets, reduction="none"))


# All of these get their logits from the caller; `holds_logits` tells whether they make another tensor of that size.
PEERS = [
    Candidate("torch.compile of naive", _compiled, package="torch", compiled=True),
    Candidate("F.cross_entropy", _cross_entropy, holds_logits=True, package="torch"),
    Candidate("TRL selective_log_softmax", _trl, package="trl"),
    Candidate("Liger CrossEntropy (overwrites logits)", _liger, package="liger-kernel", writes_input=True),
    Candidate("verl logprobs_from_logits", _verl, holds_logits=True, package="verl"),
    Candidate("QuACK cross_entropy", _quack, package="quack-kernels"),
]
