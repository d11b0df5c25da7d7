"""The prediction of what is saved, on a model that takes seconds."""

import json

from tests.tiny import tiny_config
from tools import benchmark_savings


def test_each_saving_saves(tmp_path, monkeypatch):
    """Experts alone, slices under 4 times the mean load, and receive buffers in flight."""
    tiny = tiny_config(num_hidden_layers=4, n_routed_experts=32, moe_intermediate_size=64).to_dict()
    known = benchmark_savings.MODEL
    sizes = {key: tiny.get(key, known[key]) for key in known if key != "architectures"}
    monkeypatch.setattr(benchmark_savings, "MODEL", known | sizes)
    monkeypatch.setattr(benchmark_savings, "TOKENS", 512)
    monkeypatch.setattr(
        benchmark_savings, "RUNS", [(name, 4) for name in benchmark_savings.VARIANTS]
    )
    benchmark_savings.run(tmp_path / "savings.json")
    results = json.loads((tmp_path / "savings.json").read_text())
    held = {each["variant"]: each["gigabytes"] for each in results}
    total = {variant: sum(parts.values()) for variant, parts in held.items()}
    assert total["whole rows"] > total["all"]
    assert total["all buffers"] > total["all"]
    assert total["FSDP2 experts"] >= total["all"]  # it holds more behind this peak
    allocated = {each["variant"]: each["allocated_for_gradients"] for each in results}
    for number in ("allocations", "gigabytes"):
        assert allocated["FSDP2 experts"][number] > allocated["all"][number]
