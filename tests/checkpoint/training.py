"""What the ranks do in test_convert.py. Without `transformers`, whose import costs each rank
seconds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.checkpoint.layouts import optimizer_for, update
from torchsft.checkpoint import huggingface
from torchsft.checkpoint.state import Checkpointer
from torchsft.config import Parallel
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from torchsft.parallel.apply import parallelize
from torchsft.parallel.world import World


def checkpoint_and_export(source, work, dtypes):
    """Two updates of a model that two ranks share, experts too; a checkpoint and exports of it."""
    with World(Parallel(ep=2, timeout_seconds=60), 0) as world:
        with torch.device("meta"):
            model = DeepseekV3(DeepseekV3Config.from_hf(huggingface.read_config(source)))
        weights = huggingface.check_weights(source, model)
        parallelize([model], world, torch.float32)
        model.to_empty(device="cpu")
        model.init_buffers()
        huggingface.load_weights(model, weights)
        optimizer = optimizer_for(model)
        update(model, optimizer, 2)
        checkpoints = Checkpointer(work, group=dist.new_group(backend="gloo"))
        checkpoints.save(
            2, model, optimizer, extra={}, config={"model": {"path": source}}, now=True
        )
        assert [report.error for report in checkpoints.reports()] == [None]
        for dtype in dtypes:
            huggingface.export(
                model,
                f"{work}/export-{dtype}",
                dtype,
                source,
                max_shard_bytes=80_000,
            )
