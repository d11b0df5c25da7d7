"""Shared by all tests: one thread per process that keeps what memory it frees, no network, and a
pool of ranks that lives as long as the session.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.ranks import RankPool
from torchsft.launch import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
POOL = RankPool()


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    """Tokenised samples go where the session's files go; in the environment, so that processes
    inherit it.
    """
    os.environ["TORCHSFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ranks(token_cache):
    """`ranks(n, function, **arguments)` runs `function(**arguments)` on n ranks and returns their
    results.
    """
    yield POOL.run
    POOL.close()


def pytest_sessionfinish(session):
    """A process of pytest-xdist hands its crashes to the one that tells them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["crashes"] = POOL.crashes


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take over the crashes of a process of pytest-xdist."""
    POOL.crashes += getattr(node, "workeroutput", {}).get("crashes", [])


def pytest_terminal_summary(terminalreporter):
    """A crash that did not make a test fail is told nevertheless."""
    for crash in POOL.crashes:
        terminalreporter.section("a rank crashed in native code and its job was run again")
        terminalreporter.write_line(crash)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped, with a sentence, where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
