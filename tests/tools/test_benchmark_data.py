"""The data benchmark on a few conversations, without TRL: it runs, and its counts are those of the
data.
"""

import json

import pytest

from tools import benchmark_data


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    source = tmp_path / "source.jsonl"
    pairs = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(50)]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setattr(benchmark_data, "SOURCE", source)
    benchmark_data.write_inputs(tmp_path, 120)
    return tmp_path


def test_our_side_prepares_and_packs_what_was_written(inputs):
    report = benchmark_data.torchsft_side(inputs)
    assert (
        report["samples"] == 120
        and len({*(inputs / "chats.jsonl").read_text().splitlines()}) == 120
    )
    assert report["rows"] == 1 and 0 < report["fill"] < 1 and report["supervised"] > 120
    speeds = benchmark_data.encode_side(inputs)
    assert len(speeds) == 2 and min(speeds.values()) > 0


def test_a_side_runs_in_a_process_of_its_own_and_its_memory_is_seen(inputs):
    report = benchmark_data.measure("encode", inputs, threads=1)
    assert len(report) == 3 and 0.01 < report["peak GB"] < 10
