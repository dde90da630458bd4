"""A window split over ranks is the window of one process: gradients, estimates and multipliers of 20 steps."""

import functools

import pytest
import torch
import windows
from launch import launch

TOLERANCE = 1e-10
KINDS = ("ddp", "learning", "fsdp2", "fsdp2 head", "vocabulary")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    kinds = KINDS if request.param == 2 else (*KINDS, "mesh")
    return launch("windows.py", request.param, tmp_path_factory.mktemp("windows"), *kinds)


@functools.cache
def reference(accumulation, parts, linear, learning=False):
    return windows.train(windows.make_policy(), accumulation, parts, linear=linear, learning=learning)


def cases(results):
    """(what, rank, history, the single process's)."""
    for rank, outcome in enumerate(results):
        for name, history in outcome.items():
            kind, accumulation, how = name.split(", ")
            parts = 2 if kind == "mesh" else len(results)
            expected = reference(int(accumulation.split()[1]), parts, how == "linear", kind == "learning")
            yield f"{name}, rank {rank}", history, expected


def test_every_step_is_that_of_one_process(results):
    seen = list(cases(results))
    assert len(seen) == len(results) * (27 if len(results) == 2 else 33)
    for what, history, expected in seen:
        assert len(history) == windows.STEPS
        for step, (gradient, metrics) in history.items():
            expected_gradient, expected_metrics = expected[step]
            assert gradient.keys() == expected_gradient.keys()
            for name, tensor in gradient.items():
                assert (tensor - expected_gradient[name]).abs().max() <= TOLERANCE, (what, step, name)
            assert metrics.keys() == expected_metrics.keys()
            for name, value in metrics.items():
                assert value == pytest.approx(expected_metrics[name], abs=TOLERANCE, rel=TOLERANCE, nan_ok=True), (
                    what,
                    step,
                    name,
                )


def test_ranks_agree_to_the_bit(results):
    for name, history in results[0].items():
        for other in results[1:]:
            for step, (gradient, metrics) in history.items():
                assert repr(metrics) == repr(other[name][step][1]), (name, step)
                if not name.startswith("mesh"):  # there the head's slices meet in another sum
                    assert all(torch.equal(g, other[name][step][0][k]) for k, g in gradient.items()), (name, step)


@pytest.mark.parametrize("learning", [False, True])
def test_the_comparison_means_something(learning):
    """Every constraint pulls and every multiplier moves; ranks are uneven, and one goes without samples."""
    history = reference(2, 2, True, learning)
    first, last = (history[str(k)][1] for k in (1, windows.STEPS - 1))
    for name in windows.EVERYTHING:
        key = f"constraints/{name}/upper/multiplier"
        assert last[key] > 0.01
        assert abs(last[key] - first[key]) > 1e-3, name
    spans = [windows.split(2, 2, step) for step in range(windows.STEPS)]
    sizes = [[sum(hi - lo for lo, hi in own) for own in everyone] for everyone in spans]
    assert any(own[-1] == 0 for own in sizes)
    assert len({tuple(own) for own in sizes}) > 5
    assert {len(own) for everyone in spans for own in everyone} == {1, 2}
