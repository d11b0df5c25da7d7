"""The CPU benchmark, on sizes that take seconds, and its memory measure on known allocations."""

import json

import pytest
import torch

from tests.precision.test_float8 import SIZES
from tests.tiny import tiny_config
from tools import benchmark_modes, benchmark_step


def test_held_peak_is_the_most_that_was_held_at_once():
    kept = []

    def allocate():
        first = torch.empty(3 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first, second
        kept.append(torch.empty(4 << 20, dtype=torch.uint8))

    assert benchmark_step.held_peak(allocate) == 5 << 20


def test_step_compares_the_same_training_and_writes_its_numbers(tmp_path, monkeypatch):
    """It asserts equal losses itself, over several updates of both sides."""
    sizes = {key: getattr(tiny_config(**SIZES), key) for key in benchmark_step.SMALL}
    monkeypatch.setattr(benchmark_step, "SMALL", sizes)
    monkeypatch.setattr(benchmark_step, "ROW", 32)
    monkeypatch.setattr(benchmark_step, "PEAK_SIZE", 64)
    threads = torch.get_num_threads()
    report = benchmark_step.run(tmp_path / "step.json", repeats=1, threads=1, show_profile=False)
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "step.json").read_text()) == report
    modes = report["modes"]
    assert modes.keys() == benchmark_modes.MODES.keys()
    # weights, gradients and moments; what routers and vectors keep in fp32 and int8's scales beside
    assert modes["plain"]["bytes_per_parameter"] == pytest.approx(16, abs=0.01)
    assert modes["--optim.moments bf16"]["bytes_per_parameter"] == pytest.approx(12, abs=0.2)
    assert 10 < modes["--optim.moments int8"]["bytes_per_parameter"] < 10.6
    assert 12 < modes["--optim.masters bf16"]["bytes_per_parameter"] < 12.4
    exact = ("--train", "...", "--optim.offload")
    for name, numbers in modes.items():
        difference = abs(numbers["loss"] - modes["plain"]["loss"])
        is_exact = name.startswith(exact) and "smoothing" not in name
        assert difference < (1e-5 if is_exact else 0.05), name
    assert report["tokens"] == 4 * 32
    for setting in ("given_back", "kept"):
        assert report[setting]["speed_ratio"] > 0 and report[setting]["memory_ratio"] > 0
        theirs, ours = (report[setting][side] for side in ("transformers", "torchsft"))
        shares = ours["share_of_peak"] / theirs["share_of_peak"]
        assert shares == pytest.approx(report[setting]["speed_ratio"])
