"""Two processes: one window, one state, and the gradient of a plain loop over the responses of both."""

import subprocess
import sys

import pytest
import torch
from tiny_model import tiny_model
from transformers import AutoModelForCausalLM

from .trl_tools import ROOT, gradients, state_equal, token_logps
from .trl_two_processes import REFERENCE

pytestmark = pytest.mark.slow


def run(kind, model, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29541"]
    command += ["-m", "tests.integrations.trl_two_processes", kind, model, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_rewards(kind, tmp_path):
    folder = tiny_model()
    ranks = run(kind, folder, tmp_path)
    assert state_equal(ranks[0]["state"], ranks[1]["state"])
    rewards = ranks[0]["rewards"]
    assert [tuple(r.shape) for r in rewards] == [(16, 2)] * 2
    # Each response once: EMA(0.1) of the two windows' means, and a standard error of 16 responses, not of 32.
    first, second = (r[:, 1].mean() for r in rewards)
    assert ranks[0]["report"] == pytest.approx(float((0.9 * first + second) / 1.9), rel=1e-6)
    assert ranks[0]["weights"][1]["length"] > 0.1
    weight = ranks[0]["weights"][1]["length"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    combined = (rewards[1][:, 0] - weight * rewards[1][:, 1]).view(2, 8)
    expected = (combined - combined.mean(1, keepdim=True)).flatten() * (8 / 7 if kind == "rloo" else 1)
    advantages = torch.cat([batch["advantages"] for rank in ranks for batch in rank["batches"]])
    torch.testing.assert_close(advantages.sort().values, expected.sort().values)
    total = torch.zeros(())
    for batch in (batch for rank in ranks for batch in rank["batches"]):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
        logps = token_logps(model, ids, mask, ids.masked_fill(counted == 0, -100))[0].sum(1)
        total = total + (batch["advantages"] * logps).sum()
    divisor = 16 if kind == "rloo" else sum(sum(rank["tokens"]) for rank in ranks)
    (-total / divisor).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"][1], gradients(model), rtol=1e-4, atol=1e-6)


def test_sft(tmp_path):
    folder = tiny_model()
    ranks = run("sft", folder, tmp_path)
    assert state_equal(ranks[0]["state"], ranks[1]["state"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = ranks[0]["weights"][1]["value"]
    assert weight < -0.5
    nll, tokens, values = torch.zeros(()), 0, []
    steps = len(ranks[0]["batches"]) // 2
    for batch in (batch for rank in ranks for batch in rank["batches"][steps:]):
        logps, logits = token_logps(model, *(batch[key] for key in ("input_ids", "attention_mask", "labels")))
        mask = batch["labels"][:, 1:] != -100
        nll, tokens = nll - logps.sum(), tokens + int(mask.sum())
        values.append((torch.distributions.Categorical(logits=logits).entropy() * mask).sum(1) / mask.sum(1))
    (nll / tokens + weight * torch.cat(values).mean()).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"][1], gradients(model), rtol=1e-4, atol=1e-6)


def test_dpo(tmp_path):
    """The loss is the mean of micro-batches, which is TRL's; the constraint that of all pairs of both processes."""
    folder = tiny_model()
    ranks = run("dpo", folder, tmp_path)
    assert state_equal(ranks[0]["state"], ranks[1]["state"])
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(REFERENCE)
    weight = ranks[0]["weights"][1]["value"]
    assert weight == ranks[1]["weights"][1]["value"] < -0.5
    losses, windows = [], ([], [])
    steps = len(ranks[0]["batches"]) // 2
    for i, batch in ((i, batch) for rank in ranks for i, batch in enumerate(rank["batches"])):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
        logps = token_logps(model, ids, mask, labels)[0].sum(1)
        with torch.no_grad():
            ref_logps = token_logps(reference, ids, mask, labels)[0].sum(1)
        won, lost = (logps - ref_logps).chunk(2)
        windows[i // steps].append(won)
        if i >= steps:
            losses.append(-torch.nn.functional.logsigmoid(0.1 * (won - lost)).mean())
    first, second = (torch.cat(values).mean() for values in windows)
    assert ranks[0]["report"] == pytest.approx(((0.9 * first + second) / 1.9).item(), rel=1e-5)  # EMA(0.1)
    assert abs(ranks[0]["report"]) > 1e-2
    (torch.stack(losses).mean() + weight * second).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"][1], gradients(model), rtol=1e-4, atol=1e-6)
