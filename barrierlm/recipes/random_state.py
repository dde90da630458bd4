"""The states of all random generators of a process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed them all: a cost function may draw from any."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def random_state() -> dict[str, Any]:
    """Of this process: of torch, and of Python and NumPy for cost functions that draw; plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state, which users draw from
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Draw on from where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})  # noqa: NPY002
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
