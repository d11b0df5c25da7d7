"""Folders by path and by URL, against what the file systems themselves say."""

from __future__ import annotations

import os
import threading
import uuid

import fsspec
import pytest
import torch
import xxhash

from torchsft.checkpoint.publish import published, read_lock
from torchsft.checkpoint.storage import Folder
from torchsft.config import InputError


@pytest.fixture(params=["path", "file", "memory"])
def place(request, tmp_path):
    """Of a folder that is not there yet."""
    if request.param == "memory":
        yield f"memory://{uuid.uuid4().hex}/folder"
        fsspec.filesystem("memory").store.clear()
    else:
        yield f"{'file://' if request.param == 'file' else ''}{tmp_path}/parent/folder"


def test_files_go_out_and_come_back(place):
    folder = Folder(place + "/")
    assert str(folder) == place and folder.remote == ("://" in place)
    assert folder.names() == [] and not folder.has("a")
    folder.remove()  # nothing there: fine
    folder.make()
    folder.make()
    data = os.urandom(3_000_000)
    with folder.writer("a") as out:
        assert out.write(data[:5]) == 5
        out.write(memoryview(data)[5:1_000_000])
        # any buffer
        out.write(torch.frombuffer(bytearray(data[1_000_000:]), dtype=torch.int32).numpy())
    assert (out.size, out.checksum) == (len(data), xxhash.xxh3_64_hexdigest(data))
    with fsspec.open(f"{place}/a", "rb") as file:  # what others see
        assert file.read() == data
    assert folder.has("a") and not folder.has("b") and folder.size("a") == len(data)
    assert (
        folder.read("a") == data
        and folder.read("a", 7, 19) == data[7:19]
        and folder.read("a", 2_999_990) == data[-10:]
    )
    target = bytearray(100)
    folder.read_into("a", 500, memoryview(target))
    assert target == data[500:600]
    with pytest.raises(OSError, match="ends 90 bytes too early"):
        folder.read_into("a", len(data) - 10, memoryview(target))
    assert folder.write_text("b", "ä\n").size == 3 and folder.read("b") == "ä\n".encode()
    folder.write_text("b", "")  # replaced
    assert folder.size("b") == 0
    for name in ("c", "absent"):
        with pytest.raises(OSError):
            folder.read(name)

    child = folder.child("child")
    child.make()
    child.write_text("d", "x")
    assert (
        str(child) == f"{place}/child"
        and child.names() == ["d"]
        and folder.names() == ["a", "b", "child"]
    )
    assert not folder.has("child")  # no file
    folder.remove("b")
    folder.remove("b")
    assert folder.names() == ["a", "child"]
    folder.remove()
    assert folder.names() == [] and child.names() == []


def test_a_published_folder_is_new_as_a_whole(place):
    folder = Folder(place)
    for round_ in ("first", "second"):
        with published(place) as staging:
            assert staging.names() == []
            staging.write_text(round_, "x")
            if not folder.remote:
                assert folder.names() == ([] if round_ == "first" else ["first"])
        assert folder.names() == [round_]
    with pytest.raises(ZeroDivisionError), published(place) as staging:
        staging.write_text("third", "x")
        raise ZeroDivisionError
    if not folder.remote:
        assert folder.names() == ["second"]
        with published(place):  # over what the failure left
            pass
        assert sorted(os.listdir(os.path.dirname(place))) == ["folder"] and folder.names() == []


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_nothing_behind(tmp_path, monkeypatch, exchange):
    """Also where the system cannot exchange two names."""
    if not exchange:
        monkeypatch.setattr("torchsft.checkpoint.publish._exchange", lambda *_: False)
    for text in "xy":
        with published(tmp_path / "folder") as staging:
            staging.write_text("file", text)
    assert os.listdir(tmp_path) == ["folder"] and (tmp_path / "folder/file").read_text() == "y"


def test_an_exchange_is_one_step(tmp_path, monkeypatch):
    """At no time is the name without a directory: on Linux nothing is renamed away first."""
    (tmp_path / "folder").mkdir()
    before = os.stat(tmp_path / "folder").st_ino
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: pytest.fail("renamed"))
    with published(tmp_path / "folder") as staging:
        new = os.stat(staging.path).st_ino
    assert os.stat(tmp_path / "folder").st_ino == new != before


def test_what_is_replaced_while_it_is_read_is_not_taken_for_one_checkpoint(tmp_path):
    """Its files may have been those of both."""
    for what in ("replaced", "removed"):
        with published(tmp_path / what) as staging:
            staging.write_text("trainer.json", "{}")
    folder = Folder(tmp_path / "replaced")
    with (
        pytest.raises(InputError, match="has just been removed or replaced"),
        read_lock(folder),
        published(folder) as staging,
    ):
        staging.write_text("trainer.json", "{}")
    with (
        pytest.raises(InputError, match="removed has just been removed"),
        read_lock(Folder(tmp_path / "removed")),
    ):
        Folder(tmp_path / "removed").remove()


def test_a_url_that_means_several_places_is_refused():
    """fsspec removes what fits the pattern: another run's files."""
    with pytest.raises(InputError, match=r"memory://bucket/run\[1\] has one of the signs"):
        Folder("memory://bucket/run[1]")


def test_threads_share_the_connection_of_their_folder():
    """fsspec makes and keeps one for each thread that asks, and each save has a thread."""
    folder, systems = Folder("memory://bucket"), []
    thread = threading.Thread(target=lambda: systems.append(folder.child("x")._system))
    thread.start()
    thread.join()
    assert systems[0] is folder._system


def test_full_and_absent_places_say_so(tmp_path):
    with (
        pytest.raises(OSError, match="No space left on device"),
        Folder("/dev").writer("full") as out,
    ):
        out.write(b"x" * 10_000)
    with pytest.raises(FileNotFoundError), Folder(tmp_path / "gone").writer("file"):
        pass


def test_a_url_of_an_unknown_kind_is_refused():
    with pytest.raises(
        InputError,
        match=r"nonsense://bucket/x cannot be reached \(.*\); install "
        r"what it needs or use a local",
    ):
        Folder("nonsense://bucket/x")
