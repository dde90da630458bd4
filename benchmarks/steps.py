"""The problem of the recipe suite: one training step of the demo, whose sampling is timed and whose result is fixed.

Responses are drawn anew in every run, and that is timed; what follows works on the same fixed responses in all
versions, so that losses and gradients can be compared and no version is lucky with shorter ones.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .candidate import Outputs
from .clock import synchronize
from .tables import PARTS

#: Windows that the objective sees before anything is measured.
_WINDOWS = 5


class StepProblem:
    """The demo's model, data and objective after some steps of plain fine-tuning, and one micro-batch with responses.

    Args:
        device: Where it runs.
        tiny: A model with random weights and two layers, in fp32.
        tuned: Steps of plain fine-tuning on the demo's data; responses get shorter, as in the demo's own run.
    """

    def __init__(self, device: torch.device, *, tiny: bool, tuned: int = 0) -> None:
        from barrierlm.recipes.finetune import prepare, train_step
        from barrierlm.recipes.workspace import build_objective, open_workspace

        self.device, self.generates = device, True
        with tempfile.TemporaryDirectory() as folder:
            self.workspace = open_workspace(_options(tiny, Path(folder)))
        self.workspace.console.quiet = True
        self.policy = self.workspace.policy
        self.dtype = self.policy.compute_dtype
        self.model, self.optimizer = prepare(self.workspace)
        for group in self.optimizer.param_groups:
            group["lr"] = self.workspace.options.optim.learning_rate
        for step in range(1, tuned + 1):
            train_step(self.workspace, self.model, self.optimizer, None, step)
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.policy.trained():  # adapters start at 0, where half of the gradient vanishes
                p += (0.01 * torch.randn(p.shape, generator=random)).to(p) * (p == 0).all()
        self.start = [p.detach().clone() for p in self.policy.trained()]
        self.responses: list[Any] = []
        sample = self.workspace.sample
        # The step works on the first responses that were drawn, whatever later runs draw.
        self.workspace.sample = self._sampled_by(sample)  # type: ignore[method-assign]
        self.batch = self._collect()
        self.objective = build_objective(self.workspace.options)
        assert self.objective is not None
        zeros = torch.zeros(sum(len(r.ids) for r in self.responses), device=device, requires_grad=True)
        for _ in range(_WINDOWS):
            # Had the same responses been measured before, each would be as expected, and all advantages 0.
            self.objective.combine(None, {"length": self.lengths(zeros, cost=0.8)})
            self.objective.step()
        self.state = self.objective.state_dict()
        self.runs = 0
        self.kept: list[Tensor] = []
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer.register_step_pre_hook(self._keep_gradients)

    def _sampled_by(self, sample: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
        def sampled(prompts: list[Any]) -> list[Any]:
            if self.generates or not self.responses:
                drawn = sample(prompts)
                self.responses = self.responses or drawn
            return self.responses

        return sampled

    def _collect(self) -> Any:
        from barrierlm.recipes.microbatch import collect

        return collect(self.workspace, 0, sampled=True)

    def _keep_gradients(self, *_: Any) -> None:
        self.kept = [p.grad.detach().clone() for p in self.policy.trained() if p.grad is not None]

    @property
    def pair_tokens(self) -> int:
        """Response tokens of the pairs, over which the task loss is a mean."""
        return sum(len(pair.response_ids) for pair in self.batch.pairs)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and responses of a step, without padding."""
        sequences = [(t.prompt_ids, t.response_ids) for t in self.batch.pairs]
        sequences += [(r.prompt.prompt_ids, r.ids) for r in self.batch.rollouts]
        return sum(len(prompt) + len(response) for prompt, response in sequences)

    def lengths(self, logps: Tensor, cost: float = 1.0) -> Any:
        """The demo's constraint on the fixed responses, for `BarrierObjective.combine`: so much for each token."""
        from barrierlm import Sampled

        ends = torch.tensor([0, *(len(r.ids) for r in self.responses)], device=self.device).cumsum(0)
        groups = self.batch.groups if self.workspace.options.rollout.responses_per_prompt > 1 else None
        return Sampled.per_token(torch.full_like(logps.detach(), cost), logps, ends, groups=groups)

    def step(self, forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A whole training step."""
        return forward

    def reset(self, restore: bool) -> None:
        """Weights and multipliers as at the start; the random numbers of the next run."""
        with torch.no_grad():
            for p, start in zip(self.policy.trained(), self.start, strict=True):
                p.copy_(start)
        self.objective.load_state_dict(self.state)
        self.optimizer.zero_grad()
        self.runs += 1
        torch.manual_seed(self.runs)

    def result(self, loss: float) -> Outputs:
        """What a step returns: the loss, and the gradients that the optimizer was given."""
        return {"loss": torch.tensor(loss), "gradient": torch.cat([g.reshape(-1) for g in self.kept])}

    def kept_bytes(self) -> dict[str, int]:
        """The gradients."""
        return {"gradients": sum(p.nbytes for p in self.policy.trained())}

    def oracle(self) -> Outputs:
        return self._answers

    @cached_property
    def _answers(self) -> Outputs:
        """Sequence by sequence in fp64: no padding, no packing, no autocast."""
        lm = copy.deepcopy(self.policy.lm).double()
        trained = [p for p in lm.parameters() if p.requires_grad]
        loss = 0.0
        for pair in self.batch.pairs:
            part = -_logps(lm, pair.prompt_ids, pair.response_ids).sum() / self.pair_tokens
            part.backward()
            loss += float(part.detach())
        responses = [(r.prompt.prompt_ids, r.ids) for r in self.responses]
        with torch.no_grad():
            logps = torch.cat([_logps(lm, *sequence) for sequence in responses]).requires_grad_()
        self.objective.load_state_dict(self.state)
        out = self.objective.combine(None, {"length": self.lengths(logps)})
        (weights,) = torch.autograd.grad(out.loss, logps)
        for sequence, weight in zip(responses, weights.split([len(r.ids) for r in self.responses]), strict=True):
            (_logps(lm, *sequence) * weight).sum().backward()
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
        share = (self.workspace.options.optim.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as torch clips
        self.objective.load_state_dict(self.state)
        total = torch.tensor(loss + float(out.loss.detach()), dtype=torch.float64)
        return {"loss": total, "gradient": torch.cat([(g * share).reshape(-1) for g in gradients])}

    def ours(self) -> Outputs:
        """The recipe's own step."""
        return self.run_ours(None)

    def run_ours(self, clock: Any) -> Outputs:
        """The same with a clock, which splits it."""
        from barrierlm.recipes.finetune import train_step

        def model(sequences: Any, head: Callable[..., Any]) -> Any:
            def timed(*args: Any, **kwargs: Any) -> Any:
                with clock("head") if clock is not None else nullcontext():
                    return head(*args, **kwargs)

            return self.model(sequences, timed)

        metrics = train_step(self.workspace, model, self.optimizer, self.objective, 0, clock=clock)
        return self.result(metrics["loss/total"])

    def split(self, run: Callable[[Any], Outputs], runs: int) -> dict[str, float]:
        """Seconds of the parts of a step: of each part, the least of several runs."""
        from barrierlm.recipes.finetune import Clock

        found = []
        for _ in range(runs):
            self.reset(True)
            clock = Clock(lambda: synchronize(self.device))
            run(clock)
            found.append(clock.seconds)
        return {part: min(seconds.get(part, 0.0) for seconds in found) for part in PARTS}


def _logps(lm: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probabilities of one response's tokens."""
    device = next(lm.parameters()).device
    ids = torch.tensor([[*prompt, *response]], device=device)
    logits = lm(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def _options(tiny: bool, folder: Path) -> Any:
    """The demo's options; for the tiny model, which is written to the folder, those of the recipe's tests."""
    from barrierlm.recipes.config import config_path, load_options

    if not tiny:
        return load_options(config_path("demo"))
    from tests.recipes.tiny import make_data, make_model, tiny_overrides

    data = folder / "pairs.jsonl"
    make_model(folder)
    make_data(data)
    return load_options(None, tiny_overrides(folder, data, folder / "run"))
