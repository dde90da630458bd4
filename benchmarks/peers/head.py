"""Peers of the linear operations: from hidden states and the LM head to log-probabilities, or to a scalar loss."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..candidate import Candidate, Outputs
from ..problems import HeadProblem
from .verl import verl_module

Forward = Callable[[], Outputs]


def naive_forward(p: HeadProblem) -> Forward:
    """What a user writes: all logits, in fp32 for the softmax."""

    def forward() -> Outputs:
        logits = F.linear(p.hidden, p.weight).float()
        logps = torch.log_softmax(logits, -1).gather(1, p.targets[:, None])[:, 0]
        return p.finish(logps)

    return forward


def _compiled(p: HeadProblem) -> Forward:
    torch.compiler.reset()
    return torch.compile(naive_forward(p), dynamic=False)  # type: ignore[no-any-return]


def _torch(reduction: str, chunked: bool) -> Callable[[HeadProblem], Forward]:
    def build(p: HeadProblem) -> Forward:
        operation: Any = F.linear_cross_entropy  # torch 2.13 and later
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def forward() -> Outputs:
            loss = operation(p.hidden, p.weight, p.targets, reduction=reduction, options=options)
            return p.finish(-loss) if reduction == "none" else {"loss": loss}

        return forward

    return build


def _trl(p: HeadProblem) -> Forward:
    from trl.kernels import ChunkedLogProbFunction

    # A tile of 32768 vocabulary entries is what TRL's trainers use.
    def forward() -> Outputs:
        outputs = ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.targets, 1.0, 32768, None, 1.0, ())
        return p.finish(outputs[0])

    return forward


def _cut(**options: Any) -> Callable[[HeadProblem], Forward]:
    def build(p: HeadProblem) -> Forward:
        from cut_cross_entropy import linear_cross_entropy

        return lambda: p.finish(-linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none", **options))

    return build


def _liger(**options: Any) -> Callable[[HeadProblem], Forward]:
    def build(p: HeadProblem) -> Forward:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(**options)
        return lambda: {"loss": loss(p.weight, p.hidden, p.targets)}

    return build


def _liger_scaled(p: HeadProblem) -> Forward:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return lambda: p.finish(-LigerFusedLinearScaledCrossEntropyFunction.apply(p.hidden, p.weight, p.targets))


def _verl(p: HeadProblem) -> Forward:
    operation = verl_module("utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda: p.finish(operation(p.hidden, p.weight, p.targets, 1.0, "none")[0])


def _verl_chunked(p: HeadProblem) -> Forward:
    operation = verl_module("utils.experimental.torch_functional").FusedLinearForPPO()
    return lambda: p.finish(operation(p.hidden, p.weight, p.targets)[0])


def _quack(p: HeadProblem) -> Forward:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: {"loss": chunked_linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="mean")}


PEERS = [
    Candidate("torch.compile of naive", _compiled, holds_logits=True, package="torch", compiled=True),
    Candidate("F.linear_cross_entropy", _torch("none", False), holds_logits=True, package="torch"),
    Candidate("F.linear_cross_entropy chunked", _torch("none", True), package="torch"),
    Candidate("F.linear_cross_entropy chunked mean", _torch("mean", True), gives="scalar", package="torch"),
    Candidate("TRL ChunkedLogProbFunction", _trl, package="trl"),
    Candidate("cut-cross-entropy", _cut(), package="cut-cross-entropy"),
    Candidate("cut-cross-entropy without filter", _cut(filter_eps=None), package="cut-cross-entropy"),
    Candidate(
        "cut-cross-entropy torch_compile",
        _cut(impl="torch_compile"),
        holds_logits=True,
        package="cut-cross-entropy",
        compiled=True,
    ),
    Candidate("Liger FusedLinearCrossEntropy", _liger(), gives="scalar", package="liger-kernel"),
    Candidate(
        "Liger FusedLinearCrossEntropy fp32",
        _liger(accum_dtype=torch.float32),
        gives="scalar",
        package="liger-kernel",
    ),
    Candidate("Liger FusedLinearScaledCrossEntropy", _liger_scaled, package="liger-kernel"),
    Candidate("verl linear_cross_entropy", _verl, package="verl"),
    Candidate("verl FusedLinearForPPO", _verl_chunked, package="verl"),
    Candidate("QuACK chunked_linear_cross_entropy", _quack, gives="scalar", package="quack-kernels"),
]
