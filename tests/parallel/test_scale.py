"""The presets for real models: built and sharded on the meta device of one process, under a fake
process group.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tools.published import PRESETS, PUBLISHED, model_config
from torchsft.config import InputError, Parallel
from torchsft.data.stream import microbatches_per_step
from torchsft.models.families import build_model, read_model_config
from torchsft.parallel.apply import parallelize
from torchsft.parallel.memory import held_bytes, host_bytes
from torchsft.parallel.pipeline import reshard_after_forward, split
from torchsft.parallel.stages import plan_stages
from torchsft.parallel.world import mesh_sizes

# Published numbers; V3 without MTP.
PARAMETERS = {"v3": 671_026_404_352}
PARAMETERS |= {name: model.parameters for name, model in PUBLISHED.items()}
# Bytes of a parameter with its gradient, by --optim.masters, and of its moments.
WITH_GRADIENT = {"fp32": 8, "bf16": 4}
OF_MOMENTS = {"fp32": 8, "bf16": 4, "int8": 2 * (1 + 4 / 128)}


def plan_of(name, parallel):
    """The preset's stages; what does not fit is refused."""
    train = PRESETS[name]().train
    microbatches = microbatches_per_step(
        train.global_batch_size, train.micro_batch_size, parallel.dp_shard
    )
    return plan_stages(parallel, read_model_config(model_config(name)), microbatches)


def share_of_a_rank(name, rank, changes):
    """A rank's part of a preset's model, as `Trainer` builds it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = Parallel(**changes) if changes else PRESETS[name]().parallel
    optim = PRESETS[name]().optim
    size = parallel.pp * parallel.dp_shard * parallel.tp * parallel.cp
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    meshes = {
        mesh: init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        for mesh, axes in mesh_sizes(parallel, size).items()
    }
    plan, pp_rank = plan_of(name, parallel), meshes["dense"].get_local_rank("pp")
    with torch.device("meta"):
        model = build_model(model_config(name), **plan.model_part(pp_rank))
        stages = split(model, plan, pp_rank)
    parallelize(
        stages,
        SimpleNamespace(**meshes, device=torch.device("cuda"), expert_nodes=1),
        torch.bfloat16,
        masters={"fp32": torch.float32, "bf16": torch.bfloat16}[optim.masters],
        reshard_after_forward=reshard_after_forward(parallel),
        offload=optim.offload,
    )
    parameters = dict(model.named_parameters())
    stacked = [p for fqn, p in parameters.items() if fqn.endswith("experts.gate_up_proj")]
    return {
        "stages": len(stages),
        "whole": sum(p.numel() for p in parameters.values()),
        "share": sum(p.to_local().numel() for p in parameters.values()),
        "held": sum(held_bytes(model, torch.bfloat16, reshard_after_forward(parallel), optim)),
        "host": host_bytes(model, is_pinned=True),
        "experts": tuple(stacked[0].to_local().shape) if stacked else None,
    }


@pytest.mark.parametrize(
    ("name", "changes", "rank", "experts"),
    [
        ("v3_256", {}, 0, (16, 4096, 7168)),
        ("v3_256", {}, 255, (16, 4096, 7168)),
        ("v3_128", {}, 40, (32, 4096, 7168)),
        ("v3_64", {}, 63, (4, 4096, 7168)),
        ("moonlight", {}, 5, (8, 2816, 2048)),
        ("qwen3_30b", {}, 5, (16, 1536, 2048)),
        ("qwen3_235b", {}, 63, (2, 3072, 4096)),
        ("qwen3_235b", {"dp_shard": 8, "tp": 8, "ep": 64}, 63, (2, 3072, 4096)),
        ("v3_256", {"pp": 1, "dp_shard": 256, "ep": 64}, 5, (4, 1024, 7168)),
        (
            "v3_256",
            {"pp": 8, "dp_shard": 8, "tp": 4, "ep": 32, "pp_schedule": "DualPipeV"},
            77,
            (8, 4096, 7168),
        ),
    ],
)
def test_a_rank_holds_its_share_and_no_more(ranks, name, changes, rank, experts):
    """1 / (ranks of its stage) of the stage, within 1 % for what tp replicates and what does not
    divide.
    """
    parallel = Parallel(**changes) if changes else PRESETS[name]().parallel
    (result,) = ranks(1, share_of_a_rank, name=name, changes=changes, rank=rank)
    replicated = 1.06 if parallel.tp > 1 else 1.01
    assert 1 <= result["share"] / (result["whole"] / (parallel.dp_shard * parallel.tp)) < replicated
    assert result["experts"] == experts
    assert result["stages"] == (1 if parallel.pp == 1 else 2)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("v3_256", 57),
        ("v3_128", 51),
        ("v3_64", 21),
        ("v3_256_128k", 42),
        ("moonlight", 32),
        *((name, model.gigabytes) for name, model in PUBLISHED.items()),
    ],
)
def test_the_presets_need_the_memory_that_they_name(ranks, name, gigabytes):
    """On the fullest pipeline rank; by hand: 16 bytes for each parameter of its share (fewer with
    masters or moments of low precision, with offload 2) and, with a pipeline, 2 for each that is
    gathered and 4 for its waiting gradient.
    """
    parallel, optim = PRESETS[name]().parallel, PRESETS[name]().optim
    offload = optim.offload
    plan = plan_of(name, parallel)
    with torch.device("meta"):
        parts = [
            build_model(model_config(name), **plan.model_part(rank)) for rank in range(parallel.pp)
        ]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    if known := PARAMETERS.get("v3" if name.startswith("v3_") else name):
        assert sum(counts) == known
    assert max(counts) / (sum(counts) / len(counts)) < 1.12
    fullest = counts.index(max(counts))
    share = counts[fullest] / (parallel.dp_shard * parallel.cp)
    each = WITH_GRADIENT[optim.masters] + OF_MOMENTS[optim.moments]
    expected = (2 if offload else each) * share
    if offload and parallel.pp > 1:
        expected += 4 * share  # of its gradient, waiting with the others
    if parallel.pp > 1:
        experts = (
            sum(p.numel() for fqn, p in parts[fullest].named_parameters() if ".experts." in fqn)
            / parallel.ep
        )
        others = counts[fullest] - experts * parallel.ep
        expected += 2 * (experts + others) + 4 * others * (1 - 1 / parallel.dp_shard)
    (result,) = ranks(1, share_of_a_rank, name=name, changes={}, rank=fullest * parallel.dp_shard)
    assert result["held"] == pytest.approx(expected, rel=1e-3)
    if offload:  # 8 ranks of a node; pinned ones of weights and gradients take a little more
        terabytes = f"{8 * result['host'] / 1e12:.1f} TB"
        assert terabytes in PRESETS[name].__doc__
        assert 1 <= result["host"] / (16 * share) < 1.1
    assert round(result["held"] / 1e9) == gigabytes and f"{gigabytes} GB" in PRESETS[name].__doc__


def test_more_ranks_than_experts_are_refused(ranks):
    with pytest.raises(
        AssertionError,
        match=r"has 64 experts, which do not divide over "
        r"--parallel\.ep 128 ranks",
    ):
        ranks(
            1,
            share_of_a_rank,
            name="moonlight",
            changes={"dp_shard": 32, "tp": 4, "ep": 128},
            rank=0,
        )


def test_layouts_that_v3_cannot_have_are_refused_with_numbers():
    with pytest.raises(
        InputError,
        match=r"has 128 stages, the model 61 layers; set --parallel\.pp "
        r"to at most 30",
    ):
        plan_of("v3_256", Parallel(pp=64, dp_shard=4))
