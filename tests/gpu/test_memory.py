"""Predicted memory, against a GPU's; never run so far."""

from __future__ import annotations

import pytest
import torch

from tools.benchmark_modes import documents
from tools.published import GPT_OSS_20B, LLAMA_8B, QWEN3_30B, model_config
from torchsft.config import Config, Data, Parallel, Precision, Train
from torchsft.data.batch import Batch
from torchsft.models.decoder import local
from torchsft.models.families import family_of, read_model_config
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World
from torchsft.planning.build import plan_model
from torchsft.planning.memory import CONTEXT, DOCUMENT, FRAGMENTS, predict

pytestmark = pytest.mark.gpu
ROW = 4096


def batch(device):
    lengths = [DOCUMENT] * (ROW // DOCUMENT)
    inputs = documents(torch.randint(1000, (ROW,), device=device), lengths)
    return Batch(**inputs, loss_weights=torch.ones(ROW, device=device), padding=0)


# Published models with so few layers that an H100 holds them.
MODELS = {
    "deepseek_v3": model_config("moonlight") | {"num_hidden_layers": 4},
    "qwen3": QWEN3_30B | {"num_hidden_layers": 4},
    "gpt_oss": GPT_OSS_20B
    | {"num_hidden_layers": 2, "layer_types": GPT_OSS_20B["layer_types"][:2]},
    "llama": LLAMA_8B | {"num_hidden_layers": 4},
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("deepseek_v3", "none"),
        ("deepseek_v3", "stream"),
        ("qwen3", "none"),
        ("qwen3", "full"),
        ("gpt_oss", "full"),
        ("llama", "selective"),
    ],
)
def test_a_gpu_holds_what_is_predicted(ranks, family, mode):
    """Within a tenth; the reserve is as large as is stated."""
    model = MODELS[family]
    config = Config(
        data=Data(seq_len=ROW),
        train=Train(global_batch_size=2, activation_checkpointing=mode),
        parallel=Parallel(dp_shard=1),
        precision=Precision(compute="bf16"),
    )
    (memory,) = ranks(1, predict, config=config, model_config=model, size=1)
    with World(config.parallel, seed=0) as world:
        plan = plan_model(config, family_of(model), read_model_config(model), world)
        allocate(plan.stages, world.device, offload=False)
        with torch.no_grad():
            for tensor in plan.model.parameters():
                local(tensor).normal_(std=0.02)
        optimizer = build_optimizer(plan.model.train(), config.optim, None, plan.stages)
        set_lr(optimizer, 1e-5)
        pipeline = plan.pipeline(config, world)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats(world.device)
            pipeline.step([batch(world.device) for _ in range(plan.microbatches)], 1.0)
            allocated = torch.cuda.max_memory_allocated(world.device)
            reserved = torch.cuda.max_memory_reserved(world.device)
            optimizer.step()
            optimizer.zero_grad()
        free, total = torch.cuda.mem_get_info(world.device)
    assert allocated == pytest.approx(memory.allocated, rel=0.1)
    assert reserved - allocated < FRAGMENTS
    assert total - free - torch.cuda.memory_reserved(world.device) < CONTEXT
