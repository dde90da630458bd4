"""Shared set-up: no network, one thread per worker, Triton's interpreter where there is no GPU, and a Hypothesis
profile without wall-clock deadlines.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # read when a kernel is defined, so before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("barrierlm", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("barrierlm")


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    # Only where one was set: after a reset of nothing torch 2.7 cannot tell its default device any more.
    if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is not None:
        torch.set_default_device(None)
