"""One thread; kernels are interpreted in a process of their own, and nothing else is tested there."""

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The sizes here are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
