"""Safetensors files: slices against safetensors' own loader, damaged directories, and files that
are written.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.checkpoint.deepseek_format import BLOCK, dequantised, quantised
from tests.checkpoint.sources import INDEX, same_bits
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import (
    DTYPES,
    SafetensorsWriter,
    WeightIndex,
    has_weights,
    in_file_order,
)
from torchsft.config import InputError
from torchsft.precision.blockwise import dequantise

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def write(directory, *files, index=True, quantization=FP8):
    """A directory of these files, each a dictionary of tensors."""
    directory.mkdir()
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, directory / name)
    if index:
        weight_map = {
            key: name for name, tensors in zip(names, files, strict=True) for key in tensors
        }
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(
        json.dumps({"quantization_config": quantization} if quantization else {})
    )
    return directory


def refusal(directory):
    """The sentence with which a directory is refused."""
    with pytest.raises(InputError) as error:
        WeightIndex(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Tensors of all kinds, and an fp8 weight that is in another file than its scales."""
    torch.manual_seed(0)
    q, scale = quantised(torch.randn(300, 270))
    bits = torch.randint(0, 256, (2, 5, 64), dtype=torch.uint8)
    first = {
        word: bits.clone().view(dtype)
        for word, dtype in DTYPES.items()
        if dtype not in (torch.bool,)
    }
    first |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "BOOL": bits > 100,
        "w.weight": q,
    }
    del first["F8_E4M3"]  # without scales
    return write(
        tmp_path_factory.mktemp("files") / "d",
        first,
        {"w.weight_scale_inv": scale, "x": torch.randn(6, 7, 8)},
    )


def test_every_tensor_is_as_safetensors_reads_it(directory):
    index = WeightIndex(directory)
    expected = {
        key: tensor
        for path in directory.glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }
    assert index.tensors.keys() == expected.keys() and len(expected) == len(DTYPES) + 4
    for key, tensor in expected.items():
        assert same_bits(index.read_whole(key), tensor), key
        assert (
            index.tensors[key].shape == tuple(tensor.shape)
            and DTYPES[index.tensors[key].dtype] == tensor.dtype
        )
    assert index.bytes_read == sum(tensor.nbytes for tensor in expected.values())
    assert index.packed.keys() == {"w.weight"} and index.scales("x") is None
    assert same_bits(index.scales("w.weight"), expected["w.weight_scale_inv"])


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=0, max_size=3))
@settings(max_examples=100, deadline=None)
def test_slices_read_their_bytes_and_no_more(directory, bounds):
    index = WeightIndex(directory)
    part = tuple(slice(min(pair), max(pair)) for pair in bounds)
    with safe_open(directory / index.tensors["x"].file, "pt") as file:
        expected = file.get_tensor("x")[part]
    found = index.read("x", part)
    assert (
        found.is_contiguous()
        and same_bits(found, expected.contiguous())
        and index.bytes_read == expected.nbytes
    )


@given(
    st.tuples(st.integers(0, 300), st.integers(0, 300)),
    st.tuples(st.integers(0, 270), st.integers(0, 270)),
)
@settings(max_examples=60, deadline=None)
def test_a_slice_of_an_fp8_weight_is_the_slice_of_its_values(directory, rows, cols):
    index = WeightIndex(directory)
    tensors = {
        key: tensor
        for path in directory.glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }
    whole = dequantised(tensors["w.weight"], tensors["w.weight_scale_inv"])
    part = slice(min(rows), max(rows)), slice(min(cols), max(cols))
    assert same_bits(index.values("w.weight", part), whole[part].contiguous())
    values, blocks = (max(rows) - min(rows)) * (max(cols) - min(cols)), 3 * 3
    assert values <= index.bytes_read <= values + 4 * blocks
    assert same_bits(index.values("w.weight", part[:1]), whole[part[0]].contiguous())


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory the way Linux does"
)
def test_reading_leaves_nothing_in_memory(tmp_path):
    """As mapped pages would, which count as resident."""
    # 64 MB
    index = WeightIndex(write(tmp_path / "d", {str(i): torch.ones(1 << 18) for i in range(64)}))

    def resident(field):
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(field)
        )
        return int(line.split()[1]) * 1024

    index.read_whole("0")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = resident("VmRSS")
    for i in range(64):
        assert index.read_whole(str(i))[-1] == 1
    assert resident("VmHWM") - before < 8e6


def test_other_block_sizes(tmp_path):
    q = torch.randint(0, 100, (5, 7), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(3, 3)
    sized = FP8 | {"weight_block_size": [2, 3]}
    index = WeightIndex(write(tmp_path / "d", {"w": q, "w_scale_inv": scale}, quantization=sized))
    expected = torch.stack(
        [torch.stack([q[i, j].float() * scale[i // 2, j // 3] for j in range(7)]) for i in range(5)]
    )
    assert same_bits(index.values("w", ()), expected)
    assert same_bits(index.values("w", (slice(1, 4), slice(2, 7))), expected[1:4, 2:7].contiguous())
    assert same_bits(dequantise(q, scale, (2, 3)), expected)


# --------------------------------------------------------------------------------------------------
# bad input


def test_a_directory_without_weights(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere") and not has_weights(
        tmp_path / "nowhere"
    )
    (tmp_path / "empty").mkdir()
    assert "it has no weights" in refusal(tmp_path / "empty") and not has_weights(
        tmp_path / "empty"
    )
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    assert "only pytorch_model.bin" in refusal(tmp_path / "empty")


def header(entries, data, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


TWICE = (
    b'{"a": '
    + json.dumps(entry(0, 8)).encode()
    + b', "a": '
    + json.dumps(entry(8, 16)).encode()
    + b"}"
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has 0 bytes"),
        (
            header({"a": entry(0, 8)}, b"", 1 << 40),
            "header too large",
        ),
        (header({"a": entry(0, 8)}, bytes(7)), "file not fully covered"),
        (header({"a": entry(0, 8)}, bytes(9)), "file not fully covered"),
        (
            header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
            "invalid offset for tensor `b`",
        ),
        (
            header({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
            "invalid offset for tensor `b`",
        ),
        (header({"a": entry(-8, 0)}, b""), "integer `-8`"),
        (header({"a": entry(0, 4)}, bytes(4)), "invalid shape, data type, or offset"),
        (header({"a": entry(0, 8, (-2,))}, bytes(8)), "integer `-2`"),
        (header(b"{", bytes(8)), "Expecting"),
        (header(b"[1]", bytes(8)), "invalid type: sequence"),
        (header({"a": {"dtype": "F32"}}, bytes(8)), "missing field `shape`"),
        (header({"a": 3}, bytes(8)), "invalid type: integer `3`"),
        (header(TWICE, bytes(16)), "it has a twice"),
        (header({"a": entry(0, 8, ("2",))}, bytes(8)), 'invalid type: string "2"'),
        (header({"a": entry(0, 8, (2.0,))}, bytes(8)), "floating point `2.0`"),
        (header({"a": entry(0, 8, (-2, -1))}, bytes(8)), "integer `-2`"),
        (header({"a": entry(0, 8.0)}, bytes(8)), "floating point `8.0`"),
        (header(b"[" * 200_000, bytes(8)), "recursion depth exceeded"),
    ],
)
def test_damaged_files(tmp_path, content, reason):
    (tmp_path / "model.safetensors").write_bytes(content)
    text = refusal(tmp_path)
    assert (
        "model.safetensors cannot be read as safetensors" in text
        and reason in text
        and "download it again" in text
    )


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    index = WeightIndex(write(tmp_path / "d", {"a": torch.ones(1000)}))
    path = next((tmp_path / "d").glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InputError, match="has become shorter"):
        index.read_whole("a")


def test_an_index_and_its_files(tmp_path):
    directory = write(tmp_path / "d", {"a": torch.ones(2)}, {"b": torch.ones(2)})
    good = json.loads((directory / INDEX).read_text())["weight_map"]

    def with_map(weight_map):
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return refusal(directory)

    assert "places a in files that do not hold them" in with_map(good | {"a": good["b"]})
    assert "places c in files that do not hold them" in with_map(good | {"c": good["b"]})
    assert "names 1 absent files (lost.safetensors)" in with_map(good | {"c": "lost.safetensors"})
    for odd in ({}, [1], {"a": 3}):
        assert "has no weight_map of keys to file names" in with_map(odd)
    assert "names files outside its directory (../x)" in with_map({"a": "../x"})
    (directory / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "it has a twice" in refusal(directory)
    (directory / INDEX).write_text("{")
    assert f"{INDEX} cannot be read as JSON" in refusal(directory)


def test_a_key_in_two_files(tmp_path):
    text = refusal(
        write(tmp_path / "d", {"a": torch.ones(2), "c": torch.ones(1)}, {"a": torch.ones(2)})
    )
    assert (
        "a is both in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"
        in text
    )


@pytest.mark.parametrize(
    ("changes", "quantization", "reason"),
    [
        ({"w_scale_inv": None}, FP8, "fp8 weights without their scales (w)"),
        ({"w": None}, FP8, "scales without their fp8 weights (w_scale_inv)"),
        ({"w": torch.ones(300, 270)}, FP8, "scales without their fp8 weights (w_scale_inv)"),
        (
            {"w_scale_inv": torch.ones(3, 2)},
            FP8,
            "w_scale_inv (F32 (3, 2) for a weight (300, 270))",
        ),
        ({"w_scale_inv": torch.ones(3, 3).bfloat16()}, FP8, "w_scale_inv (BF16 (3, 3)"),
        ({"w": torch.ones(300).to(torch.float8_e4m3fn)}, FP8, "for a weight (300,))"),
        ({}, FP8 | {"weight_block_size": [64, 64]}, "one for each block of 64 x 64"),
        ({}, None, "where {"),
        ({}, FP8 | {"quant_method": "awq"}, "where {"),
        ({}, FP8 | {"weight_block_size": [128]}, "where {"),
        ({}, FP8 | {"weight_block_size": [0, 128]}, "where {"),
    ],
)
def test_fp8_and_scales_must_fit(tmp_path, changes, quantization, reason):
    tensors = {
        "w": torch.zeros(300, 270).to(torch.float8_e4m3fn),
        "w_scale_inv": torch.ones(3, 3),
    } | changes
    given = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    assert reason in refusal(write(tmp_path / "d", given, quantization=quantization))


def test_dtypes_that_torch_lacks_are_no_fault_until_they_are_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        header({"a": entry(0, 1, (2,), "F4"), "b": entry(1, 9)}, bytes(9))
    )
    index = WeightIndex(tmp_path)
    assert index.read_whole("b").tolist() == [0, 0]
    with pytest.raises(InputError, match="a has dtype F4, which cannot be read"):
        index.read_whole("a")


# --------------------------------------------------------------------------------------------------
# writing


def contents(tensors):
    known = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    weights = []
    for key in known:
        if not key.endswith("_scale_inv"):
            parts = {part: known[part] for part in (key, f"{key}_scale_inv") if part in known}
            weights.append(SimpleNamespace(key=key, contents=parts))
    return {part: known[part] for weight in in_file_order(weights) for part in weight.contents}


@pytest.fixture
def tensors():
    """Odd bf16 sizes before fp32 would put fp32 at odd addresses."""
    q, scale = quantised(torch.randn(4, 131))
    return {
        "a": torch.randn(3).bfloat16(),
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "q": q,
        "b": torch.randn(2, 2),
        "q_scale_inv": scale,
        "c": torch.tensor(7),
        "d": torch.zeros(0, 4),
    }


@pytest.mark.parametrize("place", ["{tmp}", "file://{tmp}/url", "memory://written"])
def test_written_files_are_aligned_and_as_safetensors_reads_them(tmp_path, tensors, place):
    folder, known = Folder(place.format(tmp=tmp_path)), contents(tensors)
    folder.make()
    with SafetensorsWriter(folder, "x.safetensors", known) as writer:
        for key in known:
            rows = (
                tensors[key].split(2)
                if tensors[key].ndim == 2 and len(tensors[key])
                else [tensors[key]]
            )
            for part in rows:
                writer.write(key, part)
    data = folder.read("x.safetensors")
    assert len(data) == folder.size("x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(data)
    found = load_file(tmp_path / "y.safetensors")
    assert found.keys() == tensors.keys() and all(
        same_bits(found[key], tensor) for key, tensor in tensors.items()
    )
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    assert entries.pop("__metadata__") == {"format": "pt"} and start % 8 == 0
    # scales behind their weight
    assert list(entries) == ["c", "q", "q_scale_inv", "b", "d", "a", "byte"]
    for key, tensor in tensors.items():
        assert (start + entries[key]["data_offsets"][0]) % tensor.itemsize == 0


def test_what_was_promised_is_written_and_nothing_else(tmp_path, tensors):
    known = contents(tensors)
    with (
        pytest.raises(AssertionError, match="never written: q, q_scale_inv"),
        SafetensorsWriter(Folder(tmp_path), "y", known) as w,
    ):
        w.write("c", tensors["c"])
    for key, values in [
        ("b", tensors["b"]),
        ("c", tensors["c"].float()),
        ("c", torch.tensor([1, 2])),
    ]:
        with pytest.raises(AssertionError), SafetensorsWriter(Folder(tmp_path), "y", known) as w:
            w.write(key, values)


def test_fp8_weights_whose_scales_would_not_be_aligned():
    odd = {"q": (torch.float8_e4m3fn, (3, 5)), "q_scale_inv": (torch.float32, (1, 1))}
    with pytest.raises(InputError, match="q cannot be written with scales"):
        in_file_order([SimpleNamespace(key="q", contents=odd)])
