"""Our files against torch's own DCP, in both directions; what is not trusted; what is read of a
file.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import resource
import signal
import zipfile
import zlib

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchsft.checkpoint import archive, metadata, planning, reader
from torchsft.checkpoint.boxes import Box, whole_box
from torchsft.checkpoint.manifest import FileEntry, damaged, incomplete, write_manifest
from torchsft.checkpoint.metadata import read_metadata
from torchsft.checkpoint.planning import OwnedPlanner, owned_items, write_item
from torchsft.checkpoint.reader import RangeReader
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.writer import DirectoryWriter, write_metadata
from torchsft.config import InputError

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process: fine


def whole(tensor):
    return whole_box(tensor.shape)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected))


def tensors():
    """Every kind that a checkpoint may hold, with nan and infinities; and shapes at the edges."""
    torch.manual_seed(0)
    wide = torch.randn(70, 30, 20)
    wide[0, 0, :3] = torch.tensor([math.nan, math.inf, -0.0])
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8]
    ints = [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.uint32,
    ]
    found = {f"dtype.{dtype}": wide[:3].to(dtype) for dtype in floats}
    found |= {f"dtype.{dtype}": torch.arange(-40, 60).to(dtype) for dtype in ints}
    found |= {
        "wide": wide,
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 4),
        "one": torch.ones(1, 1, 1),
        "strided": wide[:, ::2].transpose(0, 2),
        "part": wide[5:9],
        "long": torch.arange(20_001),
    }
    return found


def write_boxes(folder, file, boxes):
    """Write one file of boxes, name -> (global shape, Box, its values); the plan and the
    results.
    """
    items = [write_item(n, shape, values.dtype, box) for n, (shape, box, values) in boxes.items()]
    planner = OwnedPlanner(items)
    planner.set_up_planner({name: values for name, (_, _, values) in boxes.items()})
    plan = planner.create_local_plan()
    return plan, DirectoryWriter(folder, file).write_data(plan, planner).value()


def finish(folder, *written):
    """Complete a checkpoint of (plan, results) of all files; its metadata."""
    planner = OwnedPlanner([])
    _, found = planner.create_global_plan([plan for plan, _ in written])
    DirectoryWriter(folder, "").finish(found, [results for _, results in written])
    return found


def write(place, named):
    """A checkpoint of whole tensors in one file; its metadata."""
    folder = Folder(place)
    folder.make()
    boxes = {name: (tensor.shape, whole(tensor), tensor) for name, tensor in named.items()}
    return finish(folder, write_boxes(folder, "__0_0.distcp", boxes))


def place_chunk(name, shape, dtype, file, length):
    """Metadata of one tensor, which is `length` bytes of a file."""
    size = torch.Size(shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), size)
    tensor = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [chunk])
    index = MetadataIndex(name, chunk.offsets)
    return {name: tensor}, {index: _StorageInfo(file, 0, length)}


def write_places(directory, *places):
    """Write what `place_chunk` made."""
    tensors, infos = {}, {}
    for more, at in places:
        tensors |= more
        infos |= at
    write_metadata(Folder(directory), Metadata(tensors, storage_data=infos))


@pytest.mark.parametrize("limit", [planning.CHUNK_BYTES, 10_000, 1])
def test_dcp_loads_what_we_write(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(planning, "CHUNK_BYTES", limit)
    named = {name: t for name, t in tensors().items() if limit > 1 or t.numel() < 300}
    written = write(tmp_path, named)
    size = (tmp_path / "__0_0.distcp").stat().st_size
    # no part comes with its whole
    assert size < sum(t.nbytes for t in named.values()) + 2000 * len(written.storage_data)
    for tensor in written.state_dict_metadata.values():
        itemsize = tensor.properties.dtype.itemsize
        for chunk in tensor.chunks:
            assert chunk.sizes.numel() * itemsize <= max(limit, itemsize)
    targets = {name: torch.zeros_like(tensor.contiguous()) for name, tensor in named.items()}
    dcp.load(targets, checkpoint_id=tmp_path)
    for name, tensor in named.items():
        assert_same(targets[name], tensor)
    found = dcp.FileSystemReader(tmp_path).read_metadata()  # and in every detail that we set
    assert found.planner_data == {name: (name,) for name in named}
    assert {name: entry.size for name, entry in found.state_dict_metadata.items()} == {
        n: t.shape for n, t in named.items()
    }


def test_dcp_turns_what_we_write_into_a_torch_save_file(tmp_path):
    """torch's own offline tool, which knows nothing but the directory."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    write(tmp_path / "dcp", {"model.a.weight": torch.arange(6.0), "b": torch.ones(2, 3)})
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "file.pt")
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    assert set(found) == {"model.a.weight", "b"} and torch.equal(
        found["model.a.weight"], torch.arange(6.0)
    )


def test_we_read_what_dcp_saves(tmp_path):
    """Besides tensors it has pickles of other things, which are left alone."""
    named = tensors()
    dcp.save(named | {"nested": {"list": [torch.ones(2), 5], "text": "x"}}, checkpoint_id=tmp_path)
    opened = RangeReader(tmp_path)
    assert set(opened.tensors) == {*named, "nested.list.0"}
    for name, tensor in named.items():
        stored = opened.tensors[name]
        assert (stored.size, stored.properties.dtype) == (tensor.shape, tensor.dtype)
        assert_same(opened.read(name, whole(tensor)), tensor)
        for index in (
            [(0,) * tensor.ndim, tuple(n - 1 for n in tensor.shape)] if tensor.numel() else []
        ):
            assert_same(
                opened.read(name, Box(index, (1,) * tensor.ndim)),
                tensor[index].reshape((1,) * tensor.ndim),
            )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("single", [True, False])
def test_we_read_dcps_other_file_layouts(tmp_path, threads, single):
    named = {str(i): torch.randn(40, 50) for i in range(5)}
    dcp.save(
        named,
        storage_writer=dcp.FileSystemWriter(
            tmp_path, single_file_per_rank=single, thread_count=threads
        ),
    )
    opened = RangeReader(str(tmp_path))
    for name, tensor in named.items():
        assert_same(opened.read(name, whole(tensor)), tensor)


def shards(directory):
    """On 4 ranks: DCP saves DTensors, and reads with DTensors what we wrote."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    full = {"a": torch.randn(11, 30), "b": torch.randn(6, 10, 7).bfloat16(), "c": torch.randn(3)}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    places = {"a": [Shard(0), Shard(1)], "b": [Replicate(), Shard(0)], "c": [Shard(0), Shard(0)]}
    named = {name: distribute_tensor(tensor, mesh, places[name]) for name, tensor in full.items()}
    dcp.save(named, checkpoint_id=f"{directory}/theirs")
    opened = RangeReader(f"{directory}/theirs")
    wrong = [name for name, t in full.items() if not torch.equal(opened.read(name, whole(t)), t)]
    for _ in range(20):  # boxes that lie across their chunks
        shape = full["b"].shape
        start = tuple(int(torch.randint(n, ())) for n in shape)
        box = Box(
            start,
            tuple(int(torch.randint(1, n - s + 1, ())) for n, s in zip(shape, start, strict=True)),
        )
        if not torch.equal(opened.read("b", box), full["b"][box.within((0, 0, 0))]):
            wrong.append(box)

    # Ours: rank r writes other boxes than any DTensor has, each value once.
    folder = Folder(f"{directory}/ours")
    folder.make()
    boxes = {}
    for name, tensor in full.items():
        n = len(tensor)
        bounds = [0, n // 7, n // 3, n - 1, n]  # some of them empty
        rows = tensor[bounds[rank] : bounds[rank + 1]]
        start = (bounds[rank],) + (0,) * (tensor.ndim - 1)
        if len(rows):
            boxes[name] = tensor.shape, Box(start, tuple(rows.shape)), rows
    gathered = [None] * 4
    dist.all_gather_object(gathered, write_boxes(folder, f"__{rank}_0.distcp", boxes))
    if rank == 0:
        finish(folder, *gathered)
    dist.barrier()
    targets = {}
    for name, t in named.items():
        zeros = torch.zeros_like(t.to_local())
        targets[name] = DTensor.from_local(
            zeros, mesh, t.placements, shape=t.shape, stride=t.stride()
        )
    dcp.load(targets, checkpoint_id=f"{directory}/ours")
    wrong += [
        name for name, t in targets.items() if not torch.equal(t.to_local(), named[name].to_local())
    ]
    dist.destroy_process_group()
    return wrong


def test_shards_of_several_ranks_in_both_directions(ranks, tmp_path):
    assert ranks(4, shards, directory=str(tmp_path)) == [[]] * 4


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_is_read_and_little_else(tmp_path_factory, data):
    """Against slicing; of the file no more than the box's own bytes, the small gaps between its
    runs, and headers.
    """
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
    )
    tensor = torch.arange(math.prod(shape)).remainder(200).reshape(shape).to(dtype)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(
        start, tuple(data.draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True))
    )
    directory = tmp_path_factory.mktemp("box")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CHUNK_BYTES", data.draw(st.sampled_from([500, 3000, 10**9])))
        patch.setattr(reader, "SLAB_BYTES", data.draw(st.sampled_from([64, 10**9])))
        small = data.draw(st.sampled_from([3072, 3500, 10**9]))
        patch.setattr(reader, "SMALL_BYTES", small)
        gap = data.draw(st.sampled_from([0, 256]))
        patch.setattr(reader, "GAPS", {False: gap})
        write(directory, {"x": tensor})
        opened = RangeReader(directory)
        found = opened.read("x", box)
        assert_same(found, tensor[box.within((0,) * len(shape))])
        once = opened.bytes_read
        opened.read("x", box)  # now the headers are known
        places = opened.read_metadata().storage_data.values()
        small_chunks = sum(place.length for place in places if place.length <= small)
        assert gap or opened.bytes_read - once <= found.nbytes + small_chunks


def test_a_row_range_of_a_large_chunk_is_read_by_its_bytes(tmp_path):
    tensor = torch.randn(4096, 1024)
    dcp.save({"x": tensor}, checkpoint_id=tmp_path)
    opened = RangeReader(tmp_path)
    assert_same(opened.read("x", Box((100, 0), (50, 1024))), tensor[100:150])
    assert 50 * 4096 <= opened.bytes_read <= 50 * 4096 + 4096
    # columns: runs of 400 bytes
    assert_same(opened.read("x", Box((0, 300), (4096, 100))), tensor[:, 300:400])
    assert opened.bytes_read <= 50 * 4096 + 4096 + 4096 * 400


def test_layouts_that_are_not_plain_are_left_to_torch(tmp_path, monkeypatch):
    """Views of larger storages, transposed strides: what `torch.save` may hold. The reader must not
    take their bytes as they stand.
    """
    monkeypatch.setattr(reader, "SMALL_BYTES", archive.HEAD_BYTES + archive.TAIL_BYTES)
    base = torch.arange(2400.0).reshape(4, 600)
    odd = {
        "transposed": base.t(),
        "view": base[1:3],
        "expanded": base[:1].expand(3, 600),
        "half": base[:, :300],
    }
    odd["conjugated"] = torch.view_as_complex(base.reshape(4, 300, 2)).conj()
    odd["negative"] = torch._neg_view(base)  # a flag, as conj().imag has it
    places = []
    for name, tensor in odd.items():
        stream = io.BytesIO()
        torch.save(tensor, stream)
        data = stream.getvalue()
        (tmp_path / name).write_bytes(data)
        places.append(place_chunk(name, tensor.shape, tensor.dtype, name, len(data)))
    write_places(tmp_path, *places)
    opened = RangeReader(tmp_path)
    for name, tensor in odd.items():
        assert torch.equal(opened.read(name, whole(tensor)), tensor), name
        assert torch.equal(opened.read(name, Box((1, 1), (1, 2))), tensor[1:2, 1:3]), name


def test_a_chunk_of_another_byte_order_is_left_to_torch(tmp_path):
    """As a machine with another byte order writes it: torch cannot swap the bytes of what is not
    there (it crashes).
    """
    tensor, stream, swapped = torch.randn(300, 100), io.BytesIO(), io.BytesIO()
    torch.save(tensor, stream)
    with zipfile.ZipFile(stream) as theirs, zipfile.ZipFile(swapped, "w") as ours:
        for entry in theirs.infolist():
            content = theirs.read(entry)
            if entry.filename.endswith("data/0"):
                content = tensor.numpy().byteswap().tobytes()
            ours.writestr(
                entry.filename, b"big" if entry.filename.endswith("byteorder") else content
            )
    (tmp_path / "file").write_bytes(swapped.getvalue())
    length = len(swapped.getvalue())
    assert length > reader.SMALL_BYTES
    write_places(tmp_path, place_chunk("a", (300, 100), torch.float32, "file", length))
    assert_same(RangeReader(tmp_path).read("a", Box((7, 3), (20, 90))), tensor[7:27, 3:93])


def test_object_stores_work_too():
    try:
        named = {"a": torch.randn(30, 40), "b": torch.ones(3, dtype=torch.float8_e4m3fn)}
        write("memory://dcp-files/x", named)
        opened = RangeReader("memory://dcp-files/x")
        for name, tensor in named.items():
            assert_same(opened.read(name, whole(tensor)), tensor)
        assert_same(opened.read("a", Box((3, 5), (7, 9))), named["a"][3:10, 5:14])
    finally:
        fsspec.filesystem("memory").store.clear()


# --------------------------------------------------------------------------------------------------
# no trust


class Command:
    """Runs `touch` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def attacks(marker):
    """Pickles that would do something with pickle.load, and the name that the refusal must say."""
    yield pickle.dumps(Command(marker)), f"{os.system.__module__}.system"
    yield (
        pickle.dumps(Metadata({}, planner_data=Command(marker), storage_data={})),
        f"{os.system.__module__}.system",
    )
    yield f'cbuiltins\nexec\n(S\'open("{marker}", "w")\'\ntR.'.encode(), "builtins.exec"
    yield f"cbuiltins\ngetattr\n(ctorch\nload\nS'x'\ntR0S'{marker}'\n.".encode(), "builtins.getattr"
    yield f"ctorch\nload\n(S'{marker}'\ntR.".encode(), "torch.load"  # of torch only dtypes
    yield f"ctorch\nSize.__class__\n(S'{marker}'\ntR.".encode(), "torch.Size.__class__"
    # protocol 4 resolves dotted names
    yield b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.", "torch.os.system"
    yield (
        (
            b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R."
        ),
        "torch.distributed.checkpoint.metadata.os.system",
    )


@pytest.mark.parametrize("number", range(8))
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, number):
    marker = tmp_path / "executed"
    content, name = list(attacks(marker))[number]
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(InputError) as error:
        RangeReader(tmp_path)
    assert f"names {name}, which DCP's metadata has no use for; it was not run" in str(error.value)
    assert not marker.exists()


def test_the_attack_is_one(tmp_path):
    """The test above would notice: the same bytes do run under `pickle`."""
    content, _ = next(attacks(tmp_path / "executed"))
    pickle.loads(content)
    assert (tmp_path / "executed").exists()


def test_a_pickle_cannot_change_classes(tmp_path):
    """BUILD with a class as its object sets attributes of the class."""
    write(tmp_path, {"a": torch.ones(2)})
    state, known = (
        pickle.dumps((None, {"poisoned": 1}), protocol=2)[2:-1],
        metadata._KNOWN[Metadata.__module__, "Metadata"],
    )
    for name in ("Metadata", "TensorStorageMetadata"):
        bad = b"ctorch.distributed.checkpoint.metadata\n" + name.encode() + b"\n" + state + b"b."
        (tmp_path / ".metadata").write_bytes(bad)
        with pytest.raises(InputError, match="damaged"):
            read_metadata(Folder(tmp_path))
    assert not hasattr(Metadata, "poisoned") and not hasattr(known, "poisoned")


def test_a_chunk_with_code_is_refused_and_not_run(tmp_path):
    """The archive inside a .distcp file has a pickle too."""
    stream = io.BytesIO()
    torch.save(Command(tmp_path / "executed"), stream)
    (tmp_path / "file").write_bytes(stream.getvalue())
    length = len(stream.getvalue())
    write_places(tmp_path, place_chunk("a", (2,), torch.float32, "file", length))
    with pytest.raises(InputError, match="a cannot be read from file"):
        RangeReader(tmp_path).read("a", Box((0,), (2,)))
    assert not (tmp_path / "executed").exists()


def test_an_empty_view_of_a_larger_tensor_is_written(tmp_path):
    write(tmp_path, {"a": torch.ones(5, 4)[5:]})
    assert RangeReader(tmp_path).read("a", Box((0, 0), (0, 4))).shape == (0, 4)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "..", "a\\b"])
def test_a_metadata_that_points_outside_is_refused(tmp_path, file):
    write_places(tmp_path, place_chunk("a", (2,), torch.float32, file, 10))
    with pytest.raises(InputError, match="damaged: unreadable"):
        RangeReader(tmp_path)


# --------------------------------------------------------------------------------------------------
# damage


def test_damaged_metadata_is_refused_in_one_sentence(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(InputError, match=r"is no DCP checkpoint: its .metadata cannot be read"):
        read_metadata(folder)
    write(tmp_path, {"a": torch.ones(4, 4)})
    good = (tmp_path / ".metadata").read_bytes()
    contents = [b"", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(None), good[:-40]]
    for content in contents:
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(InputError, match="is damaged: unreadable") as error:
            read_metadata(folder)
        assert "\n" not in str(error.value)
    for i in range(0, len(good), 7):  # any flipped byte is read, or refused in a sentence
        (tmp_path / ".metadata").write_bytes(good[:i] + bytes([good[i] ^ 0x15]) + good[i + 1 :])
        try:
            opened = RangeReader(folder)
            for name, stored in opened.tensors.items():
                opened.read(name, whole_box(stored.size))
        except InputError as error:
            assert "\n" not in str(error)


def test_missing_bytes_and_files_are_named(tmp_path):
    tensor = torch.randn(300, 100)
    write(tmp_path, {"a": tensor, "b": tensor})
    path, box = tmp_path / "__0_0.distcp", whole(tensor)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 3000])
    opened = RangeReader(tmp_path)
    assert_same(opened.read("a", box), tensor)
    with pytest.raises(
        InputError,
        match=r"is damaged: b cannot be read from __0_0.distcp "
        r"\(OSError: .* too early",
    ):
        opened.read("b", box)
    path.write_bytes(data[:100] + bytes(3000) + data[3100:])  # the archive's description
    with pytest.raises(InputError, match=r"a cannot be read from __0_0.distcp"):
        RangeReader(tmp_path).read("a", box)
    path.unlink()
    with pytest.raises(InputError, match=r"a cannot be read from __0_0.distcp \(FileNotFoundError"):
        RangeReader(tmp_path).read("a", box)


def test_a_tensor_of_which_a_part_is_lacking_is_refused(tmp_path):
    folder = Folder(tmp_path)
    parts = {"0": Box((0, 0), (3, 4)), "1": Box((5, 0), (5, 4))}
    written = [
        write_boxes(folder, file, {"a": ((10, 4), box, torch.ones(box.shape))})
        for file, box in parts.items()
    ]
    with pytest.raises(ValueError, match="Failed to validate global plan"):
        finish(folder, *written)
    # such as another program may write
    _, found = dcp.default_planner.create_default_global_save_plan([plan for plan, _ in written])
    DirectoryWriter(folder, "").finish(found, [results for _, results in written])
    with pytest.raises(InputError, match=r"is damaged: it holds 32 of the 40 elements of a"):
        RangeReader(folder)


def test_empty_boxes_are_left_out_and_empty_tensors_are_not():
    items = owned_items({"a": torch.ones(3), "b": torch.ones(0, 4)})
    assert [item.index.fqn for item in items] == ["a", "b"]


def test_a_failed_write_says_what_the_disk_said(tmp_path):
    """Also where torch's archive writer covers it with words of its own: a file that cannot grow is
    written in part.
    """
    boxes = {"a": ((100_000,), Box((0,), (100_000,)), torch.ones(100_000))}
    with pytest.raises(OSError, match="No space left on device"):
        write_boxes(Folder("/dev"), "full", boxes)
    limits, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_boxes(Folder(tmp_path), "x", boxes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.serialization.get_crc32_options()  # as it was


def test_what_torch_save_writes_elsewhere_keeps_its_checksums(tmp_path):
    write(tmp_path, {"a": torch.ones(5)})
    stream = io.BytesIO()
    torch.save(torch.ones(5), stream)
    assert zipfile.ZipFile(stream).testzip() is None


# --------------------------------------------------------------------------------------------------
# manifest


def by_zlib(content):
    return f"{zlib.crc32(content):08x}"


@pytest.mark.parametrize(
    ("algorithm", "checksum"), [("xxh3", xxhash.xxh3_64_hexdigest), ("crc32", by_zlib)]
)
def test_the_manifest_finds_absent_short_and_changed_files(tmp_path, algorithm, checksum):
    folder = Folder(tmp_path)
    assert incomplete(folder) == damaged(folder) == ["it has no checkpoint.json"]
    write(tmp_path, {"a": torch.randn(100)})
    manifest = json.loads((tmp_path / "checkpoint.json").read_text())
    contents = {name: (tmp_path / name).read_bytes() for name in ("__0_0.distcp", ".metadata")}
    # what others say of the files
    assert manifest["files"] == {
        name: {"bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}
        for name, content in contents.items()
    }
    if algorithm == "crc32":  # as older versions wrote it
        files = {n: {"bytes": len(c), "crc32": by_zlib(c)} for n, c in contents.items()}
        (tmp_path / "checkpoint.json").write_text(json.dumps({"files": files}))
    read = []
    assert incomplete(folder) == damaged(folder, read.append) == []
    assert sum(read) == sum(map(len, contents.values()))

    path, data = tmp_path / "__0_0.distcp", contents["__0_0.distcp"]
    path.write_bytes(data[:-300] + bytes([data[-300] ^ 1]) + data[-299:])
    assert incomplete(folder) == []
    changed = checksum(path.read_bytes())
    assert damaged(folder) == [
        f"__0_0.distcp has the checksum {changed} instead of {checksum(data)}"
    ]
    path.write_bytes(data[:-1])
    assert (
        incomplete(folder)
        == damaged(folder)
        == [f"__0_0.distcp has {len(data) - 1} bytes instead of {len(data)}"]
    )
    path.unlink()
    assert incomplete(folder) == ["it has no __0_0.distcp"]
    for text in (
        "{",
        "[]",
        "{}",
        '{"files": {"a": 3}}',
        '{"files": {"a": {"bytes": "x", "crc32": 1}}}',
        '{"files": {"a": {"bytes": 5}}}',
        '{"files": {"a": {"bytes": 5, "xxh3": "z"}}}',
        "",
    ):
        (tmp_path / "checkpoint.json").write_text(text)
        assert incomplete(folder) == ["it has a damaged checkpoint.json"]
    write_manifest(folder, {"x": FileEntry(0, "0")})
    assert incomplete(folder) == ["its checkpoint.json names no .metadata", "it has no x"]
