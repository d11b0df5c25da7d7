"""The benchmarks run: what they measure is not asserted, only that they measure it."""

import dataclasses

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
    stages,
)
from tools.benchmark_modes import MODES
from tools.benchmark_stage import build_stage, flops, measure_stage
from torchsft.config import Parallel
from torchsft.parallel.world import World


@pytest.mark.parametrize("case", [V3, QWEN3], ids=lambda case: case.name)
def test_the_gpu_benchmark_fills_an_80_gb_device_with_real_widths(case):
    experts, layers = largest_that_fits(case, 0.94 * 80e9)
    assert case.sizes["num_experts_per_tok"] < experts <= case.experts and 1 <= layers < case.layers
    parameters = sum(p.numel() for p in build(hf_config(case.sizes, experts, layers)).parameters())
    assert 2e9 < parameters < 4e9


SMALL = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2)
SMALL |= dict(num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, vocab_size=64)
SMALL |= dict(qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)


@pytest.fixture
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with World(Parallel(), seed=0) as world:
        yield world


def test_the_gpu_benchmark_measures_a_step_wherever_it_runs(world):
    config = hf_config(V3.sizes | SMALL, 16, 1)
    result = measure_step(MODES["plain"], config, world, row=64, repeats=1)
    assert result["tokens_per_second"] == pytest.approx(64 / result["step_seconds"])
    assert len(result["longest_kernels"]) == 10 and result["tflops"] > 0


def test_a_stage_of_the_gpu_benchmark_receives_its_rows_wherever_it_runs(world):
    """Of V3 with pp 8 and ep 32, by hand: 3 x 7168 x 2048 parameters an expert and as many FLOPs /
    6 for each row; what it receives at 4 x the mean load, and gradients of every parameter.
    """
    stage = stages()[0]
    expert = 3 * 7168 * 2048
    assert flops(stage, 4) - flops(stage, 1) == 8 * 6 * expert * 3 * 4096 * 8
    config = hf_config(V3.sizes | SMALL, 16, 2)
    stage = dataclasses.replace(stage, config=config, layers=2, local_experts=4)
    stage = dataclasses.replace(stage, tokens=64, lengths=document_lengths(64))
    result = measure_stage(stage, world, 4, repeats=1)
    assert result["rows"] == 64 * 8 * 4
    assert result["forward_ms_per_layer"] > 0 and result["tflops"] > 0
    model = build_stage(stage, world, 4, torch.float32)
    seen = []
    for moe in model.moe_layers().values():
        moe.experts.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), args[2])))
    x = torch.randn(64, 32, requires_grad=True)
    places = torch.arange(64), torch.tensor([0, 64], dtype=torch.int32)
    model(x, positions=places[0], cu_seqlens=places[1], max_seqlen=64).sum().backward()
    assert {rows for rows, _ in seen} == {2048}
    assert all(ends.tolist() == [512, 1024, 1536, 2048] for _, ends in seen)
    assert all(p.grad is not None for p in model.parameters())


def test_the_documents_of_the_benchmark_fill_the_row():
    assert sum(document_lengths(ROW)) == ROW


def test_a_machine_without_a_gpu_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^error: benchmark\.py gpu needs an NVIDIA GPU"):
        run(tmp_path / "gpu.json")
    assert not any(tmp_path.iterdir())
