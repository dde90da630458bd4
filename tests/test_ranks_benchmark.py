"""The simulation of many ranks, and the numbers that the page on scaling is made of."""

import torch

from barrierlm.estimators import NUM_COLUMNS
from benchmarks.ranks.__main__ import HOP, model_seconds, picture, tables, window_bytes
from benchmarks.ranks.simulate import add_up, simulate


def test_what_a_window_sends():
    assert window_bytes(3) == 8 * (1 + 3 * NUM_COLUMNS)


def test_the_model_counts_levels_of_a_tree():
    assert model_seconds(1, 10**9) == 0
    assert round(model_seconds(2, 0) / HOP) == 2
    assert round(model_seconds(1000, 0) / HOP) == 20


def test_simulated_ranks_agree_and_means_of_means_do_not(tmp_path):
    rows = [simulate(1), simulate(6), simulate(6, "own order")]
    one, same, own = rows
    assert one["multipliers' relative error"] == 0
    assert same["multipliers' relative spread"] == 0
    assert same["estimate's relative error"] < 1e-14
    assert own["multipliers' relative spread"] < 1e-12
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (1e16, 1.0, -1e16)]
    assert add_up(numbers, 2, "own order") != add_up(numbers, 0, "own order")  # it is another order
    assert same["error of a mean of means"] > 3 * same["standard error of a window"]
    assert same["largest / smallest multiplier from own means"] > 2
    text = tables({"measured": [], "simulated": rows})
    assert text.count("| 6 |") == 2
    picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
