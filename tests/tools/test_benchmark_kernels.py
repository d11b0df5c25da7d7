"""The count of what a layer launches. Compiling is tested by tests/parallel/test_compile.py."""

import json

import torch

from tools import benchmark_kernels
from torchsft.parallel import compile as compiling


def test_operations_are_counted_once_and_views_not(tmp_path, monkeypatch):
    """Counted by hand: a product, ones, an addition, a sum and a division."""
    x, w = torch.randn(4, 3), torch.randn(2, 3)

    def run() -> torch.Tensor:
        return (torch.nn.functional.linear(x, w).t() + torch.ones(2, 4)).mean()

    count, result = benchmark_kernels.launches(run, torch.device("cpu"))
    assert count == 5 and result == run()
    monkeypatch.setattr(compiling, "apply_compile", lambda layer: None)
    benchmark_kernels.run(tmp_path / "kernels.json")
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["as it is"] == report["--model.compile"]
    assert all(report["as it is"][key] > 50 for key in ("forward", "backward", "kept"))
