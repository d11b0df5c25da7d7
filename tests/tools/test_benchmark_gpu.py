"""The benchmarks run: what they measure is not asserted, only that they measure it."""

import pytest
import torch

from tools.benchmark_gpu import (
    QWEN3,
    ROW,
    V3,
    build,
    document_lengths,
    hf_config,
    largest_that_fits,
    measure_step,
    run,
)
from tools.benchmark_modes import MODES
from torchsft.config import Parallel
from torchsft.parallel.world import World


@pytest.mark.parametrize("case", [V3, QWEN3], ids=lambda case: case.name)
def test_the_gpu_benchmark_fills_an_80_gb_device_with_real_widths(case):
    experts, layers = largest_that_fits(case, 0.94 * 80e9)
    assert case.sizes["num_experts_per_tok"] < experts <= case.experts and 1 <= layers < case.layers
    parameters = sum(p.numel() for p in build(hf_config(case.sizes, experts, layers)).parameters())
    assert 2e9 < parameters < 4e9


def test_the_gpu_benchmark_measures_a_step_wherever_it_runs(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    sizes = V3.sizes | dict(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2
    )
    sizes |= dict(num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, vocab_size=64)
    sizes |= dict(qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    with World(Parallel(), seed=0) as world:
        config = hf_config(sizes, 16, 1)
        result = measure_step(MODES["plain"], config, world, row=64, repeats=1)
    assert result["tokens_per_second"] == pytest.approx(64 / result["step_seconds"])
    assert len(result["longest_kernels"]) == 10 and result["tflops"] > 0


def test_the_documents_of_the_benchmark_fill_the_row():
    assert sum(document_lengths(ROW)) == ROW


def test_a_machine_without_a_gpu_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^error: benchmark\.py gpu needs an NVIDIA GPU"):
        run(tmp_path / "gpu.json")
    assert not any(tmp_path.iterdir())
