"""Accelerate: the example meets its bound, and a run that goes on from its checkpoint is the run that never stopped."""

import pytest
import torch

from .examples import EXAMPLES, added_lines, run, run_both


def test_the_example_meets_its_bound_and_resumes(tmp_path):
    constrained, plain = run_both("accelerate_loop.py", tmp_path)
    assert constrained["entropy"] >= 1.2 > plain["entropy"]
    assert len(added_lines("accelerate_loop.py")) <= 12
    stopped = tmp_path / "stopped.py"
    source = (EXAMPLES / "accelerate_loop.py").read_text(encoding="utf-8")
    stopped.write_text(source.replace("range(done, 40)", "range(done, 20)"), encoding="utf-8")
    run(stopped, tmp_path / "resumed")
    run(EXAMPLES / "accelerate_loop.py", tmp_path / "resumed")
    one, two = (
        torch.load(tmp_path / name / "state" / "custom_checkpoint_0.pkl", weights_only=True)
        for name in ("with", "resumed")
    )
    assert one["windows"] == two["windows"] == 320
    assert one["estimator"]["mean"].tolist() == pytest.approx(two["estimator"]["mean"].tolist(), rel=1e-12)
