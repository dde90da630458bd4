"""The recipe's one pass equals the same step through token log-probabilities and `combine`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from barrierlm import BarrierObjective, Constraint, Sampled
from barrierlm.recipes.costs import FunctionCost, KLCost, LengthCost, measure_rollouts
from barrierlm.recipes.data import Pair, Tokens
from barrierlm.recipes.microbatch import MicroBatch, one_pass
from barrierlm.recipes.model import Policy, lay_out, load_policy
from barrierlm.recipes.options import ModelOptions
from barrierlm.recipes.rollout import Rollout

GROUPS = torch.tensor([0, 0, 1, 1])
PAIRS = [Tokens(Pair("a", "b", "o"), [2, 7, 3], [5, 9, 4, 1]), Tokens(Pair("a", "b", "o"), [2, 3], [7, 1])]
ROLLOUTS = [
    Rollout(Tokens(Pair("a", "b", "o"), [2, 9, 3], []), ids, "w" * n, censored=False)
    for n, ids in enumerate([[8, 9, 1], [8, 1], [20, 12, 11, 7, 3], [1]])
]
BATCH = MicroBatch(PAIRS, ROLLOUTS, GROUPS)


def policy_of(folder: Path, kind: str) -> Policy:
    if kind == "lora":
        policy, _ = load_policy(ModelOptions(name=str(folder), dtype="float32", lora_rank=2))
    else:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if kind == "tied":
            lm.lm_head.weight = lm.model.embed_tokens.weight
        if kind == "softcap":
            lm.config.final_logit_softcapping, lm.config.logits_scaling = 5.0, 1.3
        policy = Policy(lm)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # off the starting model, so that the KL is not 0
        for p in policy.trained():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("kind", ["lora", "full", "tied", "softcap"])
def test_one_pass_is_the_unfused_step(model_folder: Path, kind: str, grouped: bool):
    policy, groups = policy_of(model_folder, kind), GROUPS if grouped else None
    costs = {"length": LengthCost(), "text": FunctionCost(lambda completions: [len(c) for c in completions], "text")}
    if kind == "lora":  # the starting model is the one without adapters
        costs["kl"] = KLCost()
    measurements, own = measure_rollouts(costs, policy, ROLLOUTS, groups)
    objectives = []
    for _ in range(2):
        objectives.append(BarrierObjective(None, [Constraint(name, upper=-1.0, scale=2.0) for name in costs]))
        objectives[-1].calibrate(dict.fromkeys(costs, Sampled(torch.tensor([0.5, 1.0, 3.0]))))
    fused, unfused = objectives
    window = {"num_samples_in_window": dict.fromkeys(costs, 4), "loss_divisor": 3}
    loss, task_loss = one_pass(policy, BATCH, fused, measurements, task_weight=0.2, **window)
    gradients = torch.autograd.grad(loss, policy.trained())

    prompts = [t.prompt_ids for t in PAIRS] + [r.prompt.prompt_ids for r in ROLLOUTS]
    logps = policy(lay_out(prompts, [t.response_ids for t in PAIRS] + [r.ids for r in ROLLOUTS]))
    imitated = sum(len(t.response_ids) for t in PAIRS)
    task, tokens = -0.2 * logps[:imitated].sum(), logps[imitated:]
    whole = torch.stack([part.sum() for part in tokens.split([len(r.ids) for r in ROLLOUTS])])
    by_hand = {
        "length": Sampled.per_token(torch.ones(len(tokens)), tokens, own.cu_seqlens, groups=groups),
        "text": Sampled(torch.tensor([0.0, 1.0, 2.0, 3.0]), whole, groups),
    }
    if kind == "lora":
        gap = tokens.detach() - policy.reference(own)
        by_hand["kl"] = Sampled.per_token(gap, tokens, own.cu_seqlens, groups=groups)
    out = unfused.combine(task, by_hand, **window)
    torch.testing.assert_close(loss, out.loss)
    torch.testing.assert_close(task_loss, task.detach())
    for ours, reference in zip(gradients, torch.autograd.grad(out.loss, policy.trained()), strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))
    fused.step()
    unfused.step()
    assert fused.metrics() == pytest.approx(unfused.metrics(), rel=1e-5, nan_ok=True)
    assert all(row.multiplier > 0 for row in fused.report())


def test_without_an_objective_the_pass_is_the_task_alone(model_folder: Path):
    """Plain fine-tuning has the numbers of a constrained step whose constraints pull at nothing, bit for bit."""
    policy = policy_of(model_folder, "full")
    fresh = BarrierObjective(None, [Constraint("length", upper=3.0)])
    results = []
    for objective in (None, fresh):
        measurements = {} if objective is None else {"length": Sampled.per_token(torch.ones(11))}
        loss, task_loss = one_pass(policy, BATCH, objective, measurements, task_weight=0.2)
        results.append((task_loss, *torch.autograd.grad(loss, policy.trained())))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))
