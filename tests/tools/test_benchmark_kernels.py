"""What a layer launches is counted, without compiling: that is tests/parallel/test_compile.py's."""

import json

import torch

from tools import benchmark_kernels
from torchsft.parallel import compile as compiling


def test_operations_are_counted_once_and_views_not(tmp_path, monkeypatch):
    """Counted by hand: a linear map is a product; of two, a sum and its mean three more."""
    x, w = torch.randn(4, 3), torch.randn(2, 3)
    run = lambda: (torch.nn.functional.linear(x, w).t() + torch.ones(2, 4)).mean()  # noqa: E731
    count, result = benchmark_kernels.launches(run, torch.device("cpu"))
    assert count == 4 and result == run()  # mm, fill_ of ones, add, mean
    monkeypatch.setattr(compiling, "apply_compile", lambda layer: None)
    benchmark_kernels.run(tmp_path / "kernels.json")
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["as it is"] == report["--model.compile"]
    assert all(report["as it is"][key] > 50 for key in ("forward", "backward", "kept"))
