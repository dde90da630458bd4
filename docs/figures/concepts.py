"""The pictures of docs/concepts.md, drawn with the library itself: `make docs-figures`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from barrierlm import BarrierObjective, Constraint, ExponentialSchedule, LogBarrier, RelaxedLogBarrier, Sampled

BLUE, RED, ORANGE, GRAY = "#1f6fb2", "#b23a3a", "#d98a1f", "#777777"
MUS = ((1.0, "#9ecae1"), (0.3, "#4292c6"), (0.1, "#08306b"))


def barrier() -> Figure:
    """Value and multiplier of the relaxed barrier, for a falling mu."""
    figure, (value, multiplier) = _figure(2)
    z = torch.linspace(-1.5, 0.6, 800, dtype=torch.float64)
    for mu, color in MUS:
        m, s = torch.tensor(mu).double(), torch.tensor(mu**2).double()
        rule = RelaxedLogBarrier()
        value.plot(z, rule.value(z, m, s), color=color, label=f"μ = {mu:g}")
        value.plot([-(mu**2)], rule.value(-s, m, s), "o", color=color, markersize=4)
        multiplier.plot(z, rule.multiplier(z, m, s), color=color)
    inside = z[z < -0.002]
    one = torch.tensor(0.1).double()
    value.plot(inside, LogBarrier().value(inside, one, one), ":", color=GRAY, label="log barrier, μ = 0.1")
    value.set(ylim=(-0.6, 3), ylabel="penalty B(z)", title="the barrier: dots are z = -s, where the line begins")
    multiplier.set(ylim=(0, 11), ylabel="multiplier dB/dz", title="its slope: μ/(-z), at most μ/s = 1/μ")
    value.legend(frameon=False)
    for axis in (value, multiplier):
        _bound(axis)
    return figure


def relaxation() -> Figure:
    """The four ways to continue the logarithm."""
    figure, (value, multiplier) = _figure(2)
    z = torch.linspace(-1.0, 0.5, 800, dtype=torch.float64)
    mu, s = torch.tensor(0.5).double(), torch.tensor(0.25).double()
    for name, color in (("linear", BLUE), ("quadratic", ORANGE), ("polynomial", "#3b8b5a"), ("exponential", RED)):
        rule = RelaxedLogBarrier(name)
        value.plot(z, rule.value(z, mu, s), color=color, label=name + (" (order 4)" if name == "polynomial" else ""))
        multiplier.plot(z, rule.multiplier(z, mu, s), color=color)
    value.set(ylabel="penalty B(z)", title="μ = 0.5, s = 0.25: the same inside")
    multiplier.set(ylabel="multiplier λ", title="the linear one stays at μ/s")
    value.legend(frameon=False)
    for axis in (value, multiplier):
        axis.axvline(-0.25, color=GRAY, linewidth=0.8, linestyle=":")
        _bound(axis)
    return figure


def path() -> Figure:
    """Where L + B is smallest, as mu falls: the optimum at the bound is approached from inside."""
    figure, (axis,) = _figure(1)
    x = torch.linspace(-0.6, 1.6, 2000, dtype=torch.float64)
    loss = (x - 1) ** 2
    axis.plot(x, loss, color=GRAY, linestyle="--", label="task loss (x - 1)², smallest at 1")
    for mu, (_, color) in zip((0.3, 0.1, 0.01), MUS, strict=True):
        m, s = torch.tensor(mu).double(), torch.tensor(mu**2).double()
        total = loss + RelaxedLogBarrier().value(x - 0.5, m, s)
        best = int(total.argmin())
        axis.plot(x, total, color=color, label=f"with the barrier of x ≤ 0.5, μ = {mu:g}: smallest at {x[best]:.2f}")
        axis.plot(x[best], total[best], "o", color=color)
    axis.axvline(0.5, color=RED, linestyle="--", linewidth=1)
    axis.set(xlabel="x", ylabel="loss", ylim=(-0.3, 4))
    axis.legend(frameon=False)
    return figure


def window() -> Figure:
    """Two ranks with three micro-batches each, as they come; one estimate and one multiplier for all of them."""
    figure, (batches, multiplier) = _figure(2, rows=2, height_ratios=[2, 1])
    torch.manual_seed(3)
    objective = BarrierObjective(
        None,
        [Constraint("length", upper=10.0, scale=4.0)],
        rule=RelaxedLogBarrier(),
        schedule=ExponentialSchedule(1.0, 0.3, steps=4),
    )
    x = torch.tensor(13.0, requires_grad=True)
    in_force = [0.0]
    for w in range(4):
        for k in range(3):
            for rank, marker in ((0, "o"), (1, "s")):
                samples = x.detach() - 1.2 * w + 3 * torch.randn(4)
                objective.combine(None, {"length": x * 0 + samples})
                label = f"rank {rank}: mean of a micro-batch" if w == k == 0 else None
                batches.plot(w + (k + 0.5) / 3, samples.mean(), marker, color=BLUE, alpha=0.55, label=label)
        objective.step()
        row = objective.report()[0]
        batches.errorbar(
            w + 1, row.estimate, 2 * row.stderr, fmt="D", color=RED, capsize=4,
            label="step(): estimate ± 2 standard errors" if w == 0 else None,
        )  # fmt: skip
        in_force.append(row.multiplier)
    batches.axhline(10, color=ORANGE, linestyle="--", label="upper bound")
    for axis in (batches, multiplier):
        for w in range(5):
            axis.axvline(w, color=GRAY, linewidth=0.8, alpha=0.5)
    for w in range(4):
        batches.text(w + 0.5, 16.2, f"window {w + 1}", ha="center", color=GRAY)
    batches.set(ylabel="length", ylim=(5, 17), xticks=[])
    batches.legend(frameon=False, ncols=2, loc="lower left")
    multiplier.stairs(in_force[:-1], range(5), color=RED, linewidth=2)
    multiplier.text(0.5, 0.1, "the first window\nonly measures", ha="center", color=GRAY)
    multiplier.set(ylabel="multiplier in force", xlabel="windows", ylim=(0, 1.15 * max(in_force)))
    return figure


def noise_floor() -> Figure:
    """The multiplier that a noisy estimate gives, with s as small as mu squared and with the floor."""
    figure, (left, right) = _figure(2)
    torch.manual_seed(0)
    true, stderr, mu = -0.1, 0.05, 0.05
    z = true + stderr * torch.randn(200).double()
    rule, floor = RelaxedLogBarrier(), stderr**0.5
    for axis, m, title in (
        (left, mu, f"off: s = μ² = {mu**2:g}"),
        (right, floor, f"on: s = standard error = {stderr:g}"),
    ):
        own = torch.tensor(m).double()
        lam = rule.multiplier(z, own, own**2)
        axis.plot(range(200), lam, ".", color=BLUE, markersize=4)
        exact = float(rule.multiplier(torch.tensor(true).double(), own, own**2))
        axis.axhline(exact, color=RED, linestyle="--", label=f"at the true value: {exact:.2g}")
        axis.axhline(float(lam.mean()), color=ORANGE, label=f"mean: {float(lam.mean()):.2g} ± {float(lam.std()):.2g}")
        axis.set(title=f"noise floor {title}", xlabel="200 estimates of z = -0.1, each ± 0.05", ylim=(0, 22))
        axis.legend(frameon=False)
    left.set_ylabel("multiplier")
    return figure


def hand_over() -> Figure:
    """The default rule on min KL(p || q) with E[c] <= 0: tightening, the hand-over, learning."""
    figure, (value, mu, multiplier) = _figure(3, rows=3, height_ratios=[1.4, 1, 1])
    generator = torch.Generator().manual_seed(0)
    cost = torch.linspace(-1, 1, 50)
    log_q = (1.5 * cost).log_softmax(0)
    true = _true_multiplier(log_q, cost)
    theta = (-cost).clone().requires_grad_()  # inside the bound, far from the task's optimum
    objective = BarrierObjective(None, [Constraint("c", upper=0.0, scale=1.0)])
    optimizer = torch.optim.Adam([theta], lr=0.02)
    rows = []
    for _ in range(400):
        log_p = theta.log_softmax(0)
        y = torch.multinomial(log_p.exp().detach(), 64, replacement=True, generator=generator)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        objective.combine(kl, {"c": Sampled(cost[y], log_p[y])}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.step()
        row = objective.report()[0]
        learning = bool(objective.rule.learning.any())
        rows.append((float((log_p.exp() * cost).sum().detach()), row.estimate, row.mu, row.multiplier, learning))
    exact, estimate, mus, lam, learning = zip(*rows, strict=True)
    moment = learning.index(True)
    value.plot(estimate, color=BLUE, label="estimate of E[c]")
    value.plot(exact, color="black", linewidth=0.9, label="exact E[c]")
    value.axhline(0, color=RED, linestyle="--", linewidth=1, label="upper bound")
    mu.plot(mus, color=BLUE)
    multiplier.plot(lam, color=BLUE)
    multiplier.axhline(true, color=RED, linestyle="--", label=f"true multiplier {true:.2f}")
    value.set_ylabel("E[c]")
    mu.set(ylabel="μ")
    multiplier.set(ylabel="multiplier λ", xlabel="window", ylim=(0, None))
    for axis in (value, mu, multiplier):
        axis.axvline(moment, color=ORANGE)
    value.text(moment + 4, value.get_ylim()[0] + 0.03, f"hand-over, window {moment + 1}", color=ORANGE)
    value.legend(frameon=False, loc="lower right")
    multiplier.legend(frameon=False, loc="lower right")
    return figure


def loop() -> Figure:
    """What happens between two optimizer steps."""
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 100), ylim=(0, 26))
    axis.axis("off")
    boxes = (
        (0, "micro-batches,\nranks", "costs, values"),
        (26, "window", "sums and counts\nadded up"),
        (52, "estimate ± error", "per constraint"),
        (78, "multiplier", "per bound,\nfor the next window"),
    )
    for left, title, text in boxes:
        axis.add_patch(
            FancyBboxPatch((left + 1, 8), 19, 13, boxstyle="round,pad=0.6", facecolor="#eaf1f8", edgecolor=BLUE)
        )
        axis.text(left + 10.5, 17.6, title, ha="center", va="center", weight="bold", fontsize=9)
        axis.text(left + 10.5, 11.2, text, ha="center", va="center", fontsize=9)
    for left, text in ((21.2, "objective(...)"), (47.2, "objective.step()"), (73.2, "rule, μ")):
        axis.annotate("", (left + 5, 14.5), (left + 0.4, 14.5), arrowprops={"arrowstyle": "->", "color": RED})
        axis.text(left + 2.7, 23.6, text, ha="center", fontsize=8.5, color=RED)
    axis.annotate(
        "", (10, 7), (88, 7), arrowprops={"arrowstyle": "->", "color": RED, "connectionstyle": "arc3,rad=-0.06"}
    )
    axis.text(49, 0.2, "loss = task + Σ weight · measurement", ha="center", fontsize=9, color=RED)
    return figure


def _true_multiplier(log_q: torch.Tensor, cost: torch.Tensor) -> float:
    """lambda with E[c] = 0 under p proportional to q exp(-lambda c), by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(((log_q - middle * cost).softmax(0) * cost).sum())
        low, high = (middle, high) if mean > 0 else (low, middle)
    return middle


def _figure(count: int, rows: int = 1, **options: object) -> tuple[Figure, list[Axes]]:
    size = (9.0, 3.6) if rows == 1 else (9.0, 2.3 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, count if rows == 1 else 1, squeeze=False, sharex=rows > 1, gridspec_kw=options)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _bound(axis: Axes) -> None:
    axis.axvline(0, color=RED, linestyle="--", linewidth=1)
    axis.set_xlabel("violation z (feasible is z ≤ 0)")


FIGURES = (loop, barrier, relaxation, path, window, noise_floor, hand_over)


def draw(folder: Path) -> None:
    """All of them as SVG, with the same bytes for the same versions."""
    with matplotlib.rc_context({"svg.hashsalt": "barrierlm", "font.size": 9, "svg.fonttype": "path"}):
        for figure in FIGURES:
            name = figure.__name__.replace("_", "-")
            figure().savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
