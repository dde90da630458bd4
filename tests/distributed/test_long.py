"""Many steps: memory does not grow, and ranks do not drift apart."""

import pytest
from launch import launch

STEPS = 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_steps(tmp_path):
    ranks = launch("long.py", 2, tmp_path, str(STEPS), timeout=900)
    for outcome in ranks:
        _, resident, traced, objective, model = zip(*outcome["history"], strict=True)
        assert objective == tuple(h[3] for h in ranks[0]["history"])
        assert model == tuple(h[4] for h in ranks[0]["history"])
        assert len(set(objective)) == 10
        # From step 2,000 on: caches are warm by then. 8 bytes a step would be 64 KiB.
        assert resident[-1] - resident[1] < 4 * 2**20, resident
        assert traced[-1] - traced[1] < 64 * 2**10, traced
        assert outcome["windows"] == STEPS
    print([(step, resident // 2**10, traced // 2**10) for step, resident, traced, *_ in ranks[0]["history"]])
