"""Any loss can be wrapped: cross-entropy, DPO, a regression loss, none at all; each ends with its bound met."""

import pytest
import torch
import torch.nn.functional as F

from barrierlm import EMA, AdaptiveBarrier, BarrierObjective, Constraint, Sampled


def fit(objective, parameters, call, steps=400, lr=0.02):
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        out = call()
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        objective.step()
    return out


def test_cross_entropy_with_entropy_kept_up():
    """A classifier that would become certain keeps its mean entropy above a bound (pathwise, per sample)."""
    model = torch.nn.Linear(4, 3)
    x = torch.randn(64, 4)
    labels = x[:, :3].argmax(1)
    # A fast policy and a value that is differentiated: a short average, and the unit of so small a multiplier.
    settings = {"rule": AdaptiveBarrier(unit=0.1), "estimator": EMA(0.3)}
    objective = BarrierObjective(F.cross_entropy, [Constraint("entropy", lower=0.8)], **settings)

    def call():
        logits = model(x)
        logp = logits.log_softmax(-1)
        return objective(logits, labels, measurements={"entropy": -(logp.exp() * logp).sum(-1)})

    free = torch.nn.Linear(4, 3)
    free.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(free.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(free(x), labels).backward()
        optimizer.step()
    logp = free(x).log_softmax(-1)
    assert -(logp.exp() * logp).sum(-1).mean() < 0.4  # without the constraint the bound is not met
    out = fit(objective, model.parameters(), call, steps=600)
    assert objective.report()[0].estimate == pytest.approx(0.8, abs=0.01)
    assert objective.report()[0].multiplier > 0
    assert out.task_loss < F.cross_entropy(torch.zeros(64, 3), labels)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def test_dpo_whose_chosen_log_probability_does_not_fall():
    """DPO lowers the chosen responses' log-probabilities too (their margin grows all the same): forbid it."""
    torch.manual_seed(1)
    features = torch.randn(32, 6)
    chosen, rejected = torch.randint(5, (32,)), torch.randint(5, (32,))
    rows = torch.arange(32)

    def run(constrained):
        torch.manual_seed(2)
        policy = torch.nn.Linear(6, 5)
        with torch.no_grad():
            reference = policy(features).log_softmax(-1)
        bound = reference[rows, chosen].mean().item()
        # beta = 0.1 makes the loss's slope in log-probabilities small, and so the right multiplier.
        rule = AdaptiveBarrier(unit=0.1)
        objective = BarrierObjective(dpo_loss, [Constraint("chosen", lower=bound)], rule=rule)

        def call():
            logp = policy(features).log_softmax(-1)
            arguments = (
                logp[rows, chosen],
                logp[rows, rejected],
                reference[rows, chosen],
                reference[rows, rejected],
            )
            measured = {"chosen": logp[rows, chosen]} if constrained else {}
            return objective(*arguments, measurements=measured)

        if constrained:
            fit(objective, policy.parameters(), call, steps=500)
        else:
            optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
            for _ in range(30):
                optimizer.zero_grad()
                call().loss.backward()
                optimizer.step()
            for _ in range(270):
                optimizer.zero_grad()
                logp = policy(features).log_softmax(-1)
                dpo_loss(
                    logp[rows, chosen], logp[rows, rejected], reference[rows, chosen], reference[rows, rejected]
                ).backward()
                optimizer.step()
        logp = policy(features).log_softmax(-1).detach()
        loss = dpo_loss(logp[rows, chosen], logp[rows, rejected], reference[rows, chosen], reference[rows, rejected])
        return (logp[rows, chosen].mean() - bound).item(), loss.item()

    free, free_loss = run(False)
    kept, kept_loss = run(True)
    assert free < -0.2
    assert kept > -0.05
    assert kept_loss < 0.69  # still better than the reference (log 2)
    assert kept_loss > free_loss


def test_regression_with_a_bounded_mean():
    x = torch.randn(128, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 3.0
    model = torch.nn.Linear(3, 1)
    objective = BarrierObjective(F.mse_loss, [Constraint("mean", lower=0.0, upper=2.0)])

    def call():
        prediction = model(x).squeeze(1)
        return objective(prediction, target=y, measurements={"mean": prediction})

    fit(objective, model.parameters(), call, steps=900)
    assert model(x).mean().item() == pytest.approx(2.0, abs=0.05)  # the free fit's mean is near 3


def test_no_loss_at_all():
    """Constraints alone: a feasibility problem, here with samples."""
    theta = torch.zeros(6, requires_grad=True)
    cost = torch.arange(6.0)
    objective = BarrierObjective(None, [Constraint("c", lower=3.6, upper=4.0)])

    def call():
        logp = theta.log_softmax(0)
        y = torch.multinomial(logp.exp().detach(), 64, replacement=True)
        return objective(measurements={"c": Sampled(cost[y], logp[y])})

    out = fit(objective, [theta], call, steps=200)
    assert out.task_loss == 0
    assert 3.6 <= (theta.softmax(0) * cost).sum().item() <= 4.0
