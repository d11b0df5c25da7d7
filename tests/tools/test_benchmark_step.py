"""The CPU benchmark, on sizes that take seconds, and its memory measure on known allocations."""

import json

import torch

from tests.tiny import tiny_config
from tools import benchmark_step


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
    sizes = {key: getattr(tiny_config(), key) for key in benchmark_step.SMALL}
    monkeypatch.setattr(benchmark_step, "SMALL", sizes)
    monkeypatch.setattr(benchmark_step, "ROW", 32)
    threads = torch.get_num_threads()
    report = benchmark_step.run(tmp_path / "step.json", repeats=3, threads=1, show_profile=False)
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "step.json").read_text()) == report
    assert report["speed_ratio"] > 0 and report["memory_ratio"] > 0 and report["tokens"] == 4 * 32
