"""The benchmark of the longest row, on a model that takes seconds."""

import json

from tests.tiny import tiny_config
from tools import benchmark_rows


def test_streamed_layers_hold_longer_rows_in_the_same_memory(tmp_path, monkeypatch):
    """Memory is counted, so that it is the same in every run; speed is not asserted."""
    tiny = tiny_config(num_attention_heads=8)
    sizes = {key: getattr(tiny, key) for key in benchmark_rows.SIZES if key != "model_type"}
    monkeypatch.setattr(benchmark_rows, "SIZES", {"model_type": "deepseek_v3"} | sizes)
    monkeypatch.setattr(benchmark_rows, "LIMIT", 2**20)
    benchmark_rows.run(tmp_path / "rows.json", repeats=1)
    modes = json.loads((tmp_path / "rows.json").read_text())["modes"]
    full, stream = modes["full"], modes["stream"]
    assert stream["longest_row"] > 1.5 * full["longest_row"] > 0
    assert full["deviation"] == 0 < stream["deviation"] < 1e-5
