"""A rank that dies or stays away is a clear error on the others within the timeout, and no hang."""

import pytest
import torch
from launch import finish, launch, start


@pytest.mark.parametrize("how", ["dies", "stays away"])
def test_a_rank_is_missing(how, tmp_path):
    processes = start("faults.py", 2, tmp_path, how)
    (survivor,) = finish(processes[:1], 60)
    assert survivor[0] == 0, survivor[1]
    processes[1].kill()
    assert processes[1].wait(10) == (7 if how == "dies" else -9)
    processes[1].communicate()
    outcome = torch.load(tmp_path / "rank-0.pt", weights_only=True)
    assert outcome["seconds"] < 10
    assert outcome["message"].startswith("the sums of 2 ranks could not be added up: ")
    assert "rank 0" in outcome["message"]
    assert "allowed: the same calls, such as step(), on every rank" in outcome["message"]
    assert outcome["unchanged"]
    assert outcome["window is kept"] == 1


def test_constraints_in_another_order(tmp_path):
    """Their sums would be added up crosswise, and every rank would go its own way."""
    outcomes = launch("order.py", 2, tmp_path)
    for outcome in outcomes:
        assert outcome["messages"][:2] == ["", ""]
        assert all("constraints differ between the ranks" in message for message in outcome["messages"][2:])
        assert outcome["windows"] == 0
    # A warning that is an error on one rank keeps no rank from what the others commit.
    assert [outcome["warning"][:21] for outcome in outcomes] == ["", "num_samples_in_window"]
    assert outcomes[0]["warned"] == outcomes[1]["warned"]
    assert outcomes[0]["warned"][0] == 1
