"""DeepSeek-V3 itself, 671B on 256 ranks: built and sharded on the meta device of one process, under a fake process group."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from tools.benchmark_gpu import V3, hf_config


def shard_v3(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from torchsft.config import Parallel
    from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
    from torchsft.parallel.apply import parallelize
    from torchsft.parallel.world import mesh_sizes

    dist.init_process_group("fake", rank=rank, world_size=256, store=FakeStore())
    meshes = {
        name: init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        for name, axes in mesh_sizes(Parallel(ep=64), 256).items()
    }
    config = hf_config(V3.sizes | {"vocab_size": 129280}, experts=256, moe_layers=58) | {
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
    }
    with torch.device("meta"):
        model = DeepseekV3(DeepseekV3Config.from_hf(config))
    parallelize([model], SimpleNamespace(**meshes), torch.bfloat16)
    parameters = dict(model.named_parameters())
    experts = parameters["model.layers.3.mlp.experts.gate_up_proj"]
    return {
        "total": sum(p.numel() for p in parameters.values()),
        "share": sum(p.to_local().numel() for p in parameters.values()),
        "experts": (tuple(experts.shape), tuple(experts.to_local().shape)),
    }


def test_v3_spreads_evenly_over_256_ranks(ranks):
    """671,026,404,352 parameters without MTP (technical report: 671B), a 256th of them on a rank."""
    (result,) = ranks(1, shard_v3, rank=5)
    assert result["total"] == 671_026_404_352
    assert 1 <= result["share"] / (result["total"] / 256) < 1.001
    assert result["experts"] == ((256, 4096, 7168), (4, 1024, 7168))
