"""Shared by all tests: one thread per process, no network, and a pool of ranks that lives as long as the session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.ranks import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n, function, **arguments)` runs `function(**arguments)` on n ranks and returns their results."""
    pool = RankPool()
    yield pool.run
    pool.close()


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped, with a sentence, where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
