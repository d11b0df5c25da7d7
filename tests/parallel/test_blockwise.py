"""Block-wise fp8 in a model: which products are in fp8, that layouts do not change them, and what
is refused.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.passes import build, fill, training_pass
from tests.tiny import write_tiny_model
from torchsft.checkpoint import huggingface
from torchsft.checkpoint.hf_directory import check_export
from torchsft.config import Checkpoint, Config, InputError, Optim, Parallel, Precision
from torchsft.models.decoder import Linear
from torchsft.parallel.apply import parallelize
from torchsft.parallel.blockwise import check_device
from torchsft.parallel.memory import held_bytes
from torchsft.parallel.world import World
from torchsft.precision.blockwise import dequantise, scale_key

BLOCKWISE = Precision(compute="blockwise")
# Heads and inner widths that two ranks can share in whole blocks.
SIZES = {
    "intermediate_size": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}


@pytest.fixture(scope="module")
def one_process(ranks):
    return ranks(1, training_pass, parallel={}, precision=BLOCKWISE, **SIZES)[0]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, {"dp_shard": 2, "ep": 2}),
        (2, {"tp": 2}),
        (2, {"cp": 2}),
        (4, {"tp": 2, "cp": 2, "ep": 2}),
    ],
)
def test_layouts_compute_what_one_process_does(ranks, one_process, size, parallel):
    """Forward, to the last bits of fp32 sums. In the backward pass a sum in another order rounds
    some values to the neighbour of what one process has (by 1/16 of them; 1e-3 to 1e-2 of a
    gradient were seen, with the same code at different times), and which 128 tokens share a
    tile follows from the layout. Each of both gradients errs by 3.6 %
    (test_blockwise_compute.py), so they differ by up to 5 %; what is lost or counted twice would
    be a factor.
    """
    result = ranks(size, training_pass, parallel=parallel, precision=BLOCKWISE, **SIZES)[0]
    assert result["loss"] == pytest.approx(one_process["loss"], rel=1e-6)
    torch.testing.assert_close(result["logits"], one_process["logits"], rtol=0, atol=1e-5)
    assert torch.equal(result["loads"], one_process["loads"])
    for name, expected in one_process["gradients"].items():
        difference = result["gradients"][name] - expected
        error = (difference.norm() / expected.norm()).item()
        assert error <= 0.06, (name, error)
        factor = ((difference * expected).sum() / expected.square().sum()).item()
        assert abs(factor) < 0.01, (name, factor)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_fp8_export_holds_the_weights_that_were_trained_with(tmp_path, compute):
    """Every matrix that multiplies in fp8 is, bit by bit, what the export has: as it was gathered,
    in bf16 on GPUs, and quantised. All others are not in fp8 there either.
    """
    write_tiny_model(tmp_path / "model", intermediate_size=300, moe_intermediate_size=144)
    with World(Parallel(), 0) as world:
        model = build(intermediate_size=300, moe_intermediate_size=144)
        parallelize([model], world, torch.float32, precision=BLOCKWISE)
        fill(model)
        huggingface.export(model, tmp_path / "fp8", "fp8", tmp_path / "model", through=compute)
    multiplied = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.product is not Linear.product:
            products = module.product.__self__
            multiplied[f"{name}.weight"] = products.held(module.weight[None].to(compute))[0]
    for layer, moe in model.moe_layers().items():
        of_both, of_down = moe.experts.products
        for expert in range(len(moe.experts.down_proj)):
            weights = moe.experts.gate_up_proj[[expert]], moe.experts.down_proj[[expert]]
            both, down = (weight.to(compute) for weight in weights)
            both, down = of_both.held(both)[0], of_down.held(down)[0]
            for part, values in zip(("gate", "up", "down"), (*both.chunk(2), down), strict=True):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                multiplied[key] = values
    exported = {}
    for file in (tmp_path / "fp8").glob("*.safetensors"):
        exported |= load_file(file)
    in_fp8 = {key for key, value in exported.items() if value.dtype == torch.float8_e4m3fn}
    assert multiplied.keys() == in_fp8
    for key, values in multiplied.items():
        assert torch.equal(dequantise(exported[key], exported[scale_key(key)]), values), key


def test_what_cannot_be_in_fp8_is_refused():
    """Before memory is allocated, with both numbers."""
    with World(Parallel(), 0) as world:
        model = build(family="gpt_oss")
        with pytest.raises(InputError, match="in fp8, but a GptOss has none"):
            parallelize([model], world, torch.float32, precision=BLOCKWISE)
    with pytest.raises(InputError, match=r"needs a GPU of compute capability 9.0 .* has 8.0"):
        check_device((8, 0))


def test_copies_that_are_kept_are_counted():
    """2 bytes a parameter, where gathered parameters are kept too."""
    with World(Parallel(), 0) as world:
        model = build()
        parallelize([model], world, torch.bfloat16)
    for reshard, bytes_each in ((True, 0), (False, 2)):
        options = model, torch.bfloat16, reshard, Optim()
        more = sum(held_bytes(*options, fp8=True)) - sum(held_bytes(*options))
        assert more == bytes_each * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("released", [False, True])
def test_an_export_with_other_scales_than_training_s_is_refused(released):
    """DeepSeek-V3 has scales of any value, V3.1 powers of two; other exports have none."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    quantization |= {"scale_fmt": "ue8m0"} if released else {}
    described = {"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": quantization}
    for trained in (False, True):
        precision = Precision(compute="blockwise", power_of_two_scales=trained)
        check_export(described, Config(precision=precision))
        config = Config(precision=precision, checkpoint=Checkpoint(export="fp8"))
        if trained == released:
            check_export(described, config)
        else:
            with pytest.raises(InputError, match=f"two-scales {str(released).lower()}"):
                check_export(described, config)


def split_within_a_block(parallel):
    """The refusal of a layout; for `ranks`."""
    with World(Parallel(timeout_seconds=60, **parallel), 0) as world:
        try:
            parallelize([build()], world, torch.float32, precision=BLOCKWISE)
        except InputError as error:
            return str(error)


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_matrix_is_not_split_within_a_block(ranks, axis):
    message = ranks(2, split_within_a_block, parallel={axis: 2})[1]
    assert "model.layers.0.self_attn.q_b_proj [80, 24] is split at multiples of 40" in message
    assert "which are not multiples of the 128 rows and columns of an fp8 block" in message
