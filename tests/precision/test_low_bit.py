"""INT4 groups and MXFP4 blocks: against plain loops, `transformers`, and numbers by hand."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from torchsft.config import InputError
from torchsft.precision import int4, mxfp4
from torchsft.precision.formats import Int4Groups, Mxfp4, described_format

INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "actorder": None,
            },
            "input_activations": None,
        }
    },
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int4_is_packed_as_compressed_tensors_packs_it():
    """The eight numbers and their word come from its `pack_to_int32`, version 0.18."""
    numbers = torch.tensor([[4, 7, -3, -8, -5, 3, -5, -1] * 4])
    word = 0x73B305FC
    packed = torch.tensor([[word] * 4], dtype=torch.int32)
    scale = torch.tensor([[0.375]]).bfloat16()
    values = int4.dequantise(packed, scale)
    assert torch.equal(values, numbers * 0.375)
    again, kept = int4.quantise(values, scale, "w")
    assert torch.equal(again, packed) and torch.equal(kept, scale)


def test_int4_rounds_to_the_nearest_of_15_steps_and_keeps_unchanged_groups():
    w = draw(6, 96)
    packed, scale = int4.quantise(w, None, "w")
    read = int4.dequantise(packed, scale)
    for row in range(6):
        for group in range(3):
            part = slice(32 * group, 32 * group + 32)
            expected = (w[row, part].abs().max() / 7.5).bfloat16()
            assert scale[row, group] == expected
            error = (read[row, part] - w[row, part]).abs().max()
            # half a step, and what the scale lost by its rounding to bf16
            assert error <= 0.5 * expected.float() + 8 * expected.float() / 256
    odd = torch.rand(6, 3).bfloat16() + 0.5  # no rule would give such scales
    read = int4.dequantise(packed, odd)
    changed = read.clone()
    changed[2, 40] += 100  # beyond the steps of its group
    for values, same in ((read, torch.ones(6, 3)), (changed, torch.ones(6, 3))):
        found, found_scale = int4.quantise(values, odd, "w")
        if values is changed:
            same[2, 1] = 0
        assert torch.equal(found_scale == odd, same.bool())
        kept = same.bool().repeat_interleave(4, dim=1)
        assert torch.equal(found[kept], packed[kept])


def test_mxfp4_is_read_as_transformers_reads_it():
    """All bytes, with scales from the smallest to 2^32; its layout is the other way round."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 160, (3, 8, 2), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    values = mxfp4.dequantise(blocks, scales)
    assert torch.equal(values.transpose(1, 2), expected)
    again, kept = mxfp4.quantise(values, scales, "w")  # signs of zeros too
    assert torch.equal(again, blocks) and torch.equal(kept, scales)


def test_mxfp4_rounds_to_the_nearest_with_ties_to_even():
    """In units of a block whose largest value is 4 (scale 1): each number, each tie, and what is
    above the last.
    """
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 7.5: 6}
    given = [*numbers, *ties, *(-tie for tie in ties), 4.9, 5.1, 0.1, -0.1, 0.3, 2.4, 2.6, 3.4]
    expected = [*numbers, *ties.values(), *(-t for t in ties.values()), 4, 6, 0, 0, 0.5, 2, 3, 3]
    blocks, scales = mxfp4.quantise(torch.tensor([given]), None, "w")
    assert scales.tolist() == [[127]]
    assert mxfp4.dequantise(blocks, scales).tolist() == [expected]


def test_mxfp4_keeps_blocks_that_did_not_change():
    blocks, odd = mxfp4.quantise(draw(2, 5, 96), None, "w")
    blocks &= 0xBB  # at most 1.5: the rule would give them another scale
    values = mxfp4.dequantise(blocks, odd)
    values[1, 2, 40] += 100  # beyond the numbers of its block
    found, found_scales = mxfp4.quantise(values, odd, "w")
    same = torch.ones(2, 5, 3, dtype=torch.bool)
    same[1, 2, 1] = False
    assert torch.equal(found_scales == odd, same)
    assert torch.equal(found[same], blocks[same])


@pytest.mark.parametrize(
    ("module", "shape"), [(int4, (6, 96)), (mxfp4, (2, 5, 96))], ids=["int4", "mxfp4"]
)
def test_what_changes_little_keeps_its_scale(module, shape):
    """As training leaves it: with new scales, every value would be rounded anew."""
    data, scales = module.quantise(draw(*shape), None, "w")
    stored = module.dequantise(data, scales)
    trained = stored + 1e-5 * draw(*shape, seed=1)
    found, kept = module.quantise(trained, scales, "w")
    assert torch.equal(kept, scales)
    assert (module.dequantise(found, kept) - trained).abs().max() < 1e-4


@pytest.mark.parametrize("form", [Int4Groups(), Mxfp4()], ids=lambda form: form.name)
def test_slices_at_any_offset_are_those_of_the_whole(form):
    """Only the groups that a slice meets are read."""
    shape = (5, 96) if form.name == "int4" else (3, 64, 6)
    parts = form.encode(draw(*shape), None, "w")
    assert {key: (t.dtype, tuple(t.shape)) for key, t in parts.items()} == {
        key: entry for key, entry in form.parts("w", shape).items() if not key.endswith("_shape")
    }

    def read(key, part):
        return parts[key][part]

    whole = form.values(read, "w", [(0, size) for size in shape])
    # MXFP4's scale lets the largest values be 8 units, of which it has 6
    bound = draw(*shape).abs().max() / (12 if form.name == "int4" else 4)
    assert tuple(whole.shape) == shape and (whole - draw(*shape)).abs().max() <= bound
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        ends = [sorted(torch.randint(0, n + 1, (2,), generator=generator).tolist()) for n in shape]
        expected = whole[tuple(slice(*pair) for pair in ends)]
        assert torch.equal(form.values(read, "w", ends), expected), ends


@pytest.mark.parametrize("quantise", [int4.quantise, mxfp4.quantise])
def test_nan_and_inf_are_refused_by_name(quantise):
    for odd in (float("nan"), float("inf")):
        w = draw(2, 32)
        w[1, 3] = odd
        with pytest.raises(InputError, match=r"experts\.w holds nan or inf"):
            quantise(w, None, "experts.w")


def test_which_descriptions_are_known():
    assert described_format({"quantization_config": INT4}) == Int4Groups()
    assert described_format({"text_config": {"quantization_config": INT4}}) == Int4Groups()
    assert described_format({"quantization_config": {"quant_method": "mxfp4"}}) == Mxfp4()
    weights = INT4["config_groups"]["group_0"]["weights"]
    for change in ({"num_bits": 8}, {"group_size": 128}, {"symmetric": False}, {"actorder": "g"}):
        group = {"weights": weights | change, "input_activations": None}
        other = INT4 | {"config_groups": {"group_0": group}}
        assert described_format({"quantization_config": other}) is None
    assert described_format({"quantization_config": INT4 | {"format": "int-quantized"}}) is None
    assert described_format({}) is None
