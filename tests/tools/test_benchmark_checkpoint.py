"""The pieces of the checkpoint benchmark."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tools.benchmark_checkpoint import CONFIG, save, watched, write_source
from tools.conversion.convert import meta_model
from torchsft.checkpoint.huggingface import check_weights
from torchsft.models.deepseek_v3 import DeepseekV3Config

SMALL = CONFIG | {
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "n_routed_experts": 16,
}


def test_the_checkpoint_is_one_of_deepseek_v3(tmp_path):
    size = write_source(tmp_path / "hf", SMALL, file_bytes=300_000)
    index = check_weights(tmp_path / "hf", meta_model(SMALL))
    assert len({stored.file for stored in index.tensors.values()}) > 2
    assert size == sum(index.read_whole(key).nbytes for key in index.tensors)
    assert all(index.read_whole(key).std() > 0 for key in index.tensors)
    v3 = DeepseekV3Config.from_hf(CONFIG)
    assert (v3.hidden_size, v3.vocab_size, v3.n_routed_experts) == (7168, 129280, 256)


def test_memory_and_faults_of_a_command_are_seen():
    child = "x = bytearray(50_000_000); import time; time.sleep(1)"
    parent = (
        f"y = bytearray(100_000_000); import subprocess, sys; subprocess.run([sys.executable, "
        f"'-c', {child!r}])"
    )
    seconds, peak = watched([sys.executable, "-c", parent])
    assert seconds > 1 and 150e6 < peak < 250e6
    with pytest.raises(subprocess.CalledProcessError):
        watched([sys.executable, "-c", "raise SystemExit(3)"])


def test_saves_are_reported(ranks, tmp_path):
    for mode in ("sync", "async"):
        first, second = ranks(
            2, save, directory=str(tmp_path / mode), config=SMALL, mode=mode, repeats=2
        )[0]
        parameters = sum(p.numel() for p in meta_model(SMALL).parameters())
        assert first["bytes"] == pytest.approx(12 * parameters, rel=0.1)  # weight and two moments
        assert second["stall"] > 0 and second["write"] >= 0
    assert torch.get_num_threads() == 1
