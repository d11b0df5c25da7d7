"""Block-wise fp8 in a model: which products are in fp8, that layouts do not change them, and what
is refused.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.passes import build, compare, fill, training_pass
from tests.tiny import write_tiny_model
from torchsft.checkpoint import huggingface
from torchsft.checkpoint.hf_directory import check_export
from torchsft.config import Checkpoint, Config, InputError, Optim, Parallel, Precision
from torchsft.models import moe
from torchsft.models.decoder import Linear
from torchsft.ops import tiles
from torchsft.parallel.apply import parallelize
from torchsft.parallel.blockwise import check_device
from torchsft.parallel.memory import check_memory, held_bytes
from torchsft.parallel.world import World
from torchsft.precision import blockwise_compute
from torchsft.precision.blockwise import dequantise, scale_key

BLOCKWISE = Precision(compute="blockwise")
# Heads and inner widths that two ranks can share in whole blocks.
SIZES = {
    "intermediate_size": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}


SMOOTH = "smooth"  # the number format that `blockwise_pass` makes up


def smooth(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In place of rounding: a function of value and scale without jumps."""
    units = values / scale
    return units + (units / 4).sin()


def blockwise_pass(number_format: str, **arguments):
    """`training_pass` with tiles of 24 rows, so that the rows of 2 and 4 ranks are whole tiles, in
    e4m3 or in a made-up format; for `ranks`.
    """
    tiles.SIZE = blockwise_compute.SIZE = 24
    blockwise_compute.ROWS = (24, 1)
    moe.MOST = 1000  # slices of an overloaded rank's rows would begin tiles of their own
    if number_format == SMOOTH:
        blockwise_compute.encode = smooth
    precision = None if number_format == "fp32" else BLOCKWISE
    return training_pass(precision=precision, **SIZES, **arguments)


@pytest.fixture(scope="module")
def one_process(ranks):
    formats = (SMOOTH, "e4m3", "fp32")
    return {each: ranks(1, blockwise_pass, number_format=each, parallel={})[0] for each in formats}


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, {"dp_shard": 2, "ep": 2}),
        (2, {"tp": 2, "ep": 2}),
        (2, {"cp": 2, "ep": 2}),
        (4, {"tp": 2, "cp": 2, "ep": 4}),
    ],
)
def test_layouts_compute_what_one_process_does(ranks, one_process, size, parallel):
    """As exactly as in fp32: parts, blocks, tiles and scales are the same.

    Rounding makes that invisible: it is a function with jumps, so that sums in another order do not
    stay small. In one process with 3 threads in place of 1, inputs of the first product that
    differ by 2e-8 flipped 1e-4 of its codes, that 2 % of all codes of the pass, and those
    changed gradients by up to 4 %. (With the same threads it is equal bit by bit.) So e4m3 has a
    stand-in without jumps here, in which the same threads make 2.5e-6 of a gradient's largest
    element, and these layouts 1e-6; other scales, of half a tile or of gate and up together,
    make 1e-2.

    With dp_shard, rows of both ranks meet at an expert and share tiles: its gradients alone are
    others there.
    """
    results = ranks(size, blockwise_pass, number_format=SMOOTH, parallel=parallel)
    expected = dict(one_process[SMOOTH])
    if "dp_shard" in parallel:
        expected["gradients"] = {
            name: results[0]["gradients"][name] if "mlp.experts" in name else gradient
            for name, gradient in expected["gradients"].items()
        }
        expected["norm"] = results[0]["norm"]
    compare(results, expected)


def distance(result, other):
    """Of all gradients together."""
    pairs = zip(result["gradients"].values(), other["gradients"].values(), strict=True)
    return sum((a - b).square().sum().item() for a, b in pairs) ** 0.5


@pytest.mark.parametrize(
    ("size", "parallel"), [(2, {"dp_shard": 2, "ep": 2}), (4, {"tp": 2, "cp": 2, "ep": 2})]
)
def test_layouts_round_as_well_as_one_process(ranks, one_process, size, parallel):
    """In e4m3 a layout is as far from fp32 as one process is, and far nearer to that one: 0.03 of
    this distance where nothing but flips and tiles that ranks share differ, 0.1 with other threads
    (see above). It is rounding, which scales no gradient.
    """
    result = ranks(size, blockwise_pass, number_format="e4m3", parallel=parallel)[0]
    alone, exact = one_process["e4m3"], one_process["fp32"]
    rounding = distance(alone, exact)
    assert 0 < distance(result, alone) < 0.3 * rounding
    assert 0.95 < distance(result, exact) / rounding < 1.05
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    torch.testing.assert_close(result["logits"], alone["logits"], rtol=0, atol=1e-5)
    assert torch.equal(result["loads"], alone["loads"])
    for name, expected in alone["gradients"].items():
        factor = (result["gradients"][name] * expected).sum() / expected.square().sum()
        assert abs(factor - 1) < 0.01, (name, factor)


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
    for layer, block in model.moe_layers().items():
        of_both, of_down = block.experts.products
        for expert in range(len(block.experts.down_proj)):
            weights = block.experts.gate_up_proj[[expert]], block.experts.down_proj[[expert]]
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


def refusals_of_split_blocks(parallel):
    """What is said of a layout's matrices in fp8, and of its moments in int8; for `ranks`."""
    with World(Parallel(timeout_seconds=60, **parallel), 0) as world:
        said = []
        for precision in (BLOCKWISE, None):
            try:
                parallelize([model := build()], world, torch.float32, precision=precision)
                config = Config(optim=Optim(moments="int8"))
                check_memory(model, torch.float32, True, config, world, 1)
            except InputError as error:
                said.append(str(error))
        return said


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_matrix_is_not_split_within_a_block(ranks, axis):
    """Every rank says so, the one whose part begins with a block too: none goes on alone."""
    for in_fp8, *in_int8 in ranks(2, refusals_of_split_blocks, parallel={axis: 2}):
        assert "model.layers.0.self_attn.q_b_proj [80, 24] is split at multiples of 40" in in_fp8
        assert "which are not multiples of the 128 rows and columns of an fp8 block" in in_fp8
        if axis == "tp":  # cp splits heads, not parameters
            assert "rows of model.layers.0.self_attn.o_proj.weight in parts of 32" in in_int8.pop()
        assert not in_int8
