"""The cache: what is read is what was written, one process builds, nothing half or damaged is ever
opened.
"""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchsft.config import InputError
from torchsft.data import cache
from torchsft.data.cache import Samples, fingerprint, open_or_build, pack_block
from torchsft.data.sources import Source

# A build in a process of its own: CODE may do anything on the way. Arguments: the directory, and a
# file of notes.
PROCESS = """
import os, resource, signal, sys, time
from pathlib import Path
from torchsft.config import InputError
from torchsft.data.cache import open_or_build
from tests.data.test_cache import blocks, random_samples
directory, notes = Path(sys.argv[1]), Path(sys.argv[2])
def build(add):
    with notes.open("a") as file:
        file.write("built\\n")
    CODE
    return {"rows": 9}
try:
    print(open_or_build(directory, "key", "a.jsonl", build)[2])
except InputError as error:
    print("refused:", error)
"""
WRITE = "[add(block) for block in blocks(random_samples(40), 7)]"


def process(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROCESS.replace("CODE", code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def random_samples(n, seed=0, longest=30):
    """(row, part, tokens, weights): runs of 0, 1 and other weights, at the ends of samples too."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(1, n + 1):
        length = int(rng.integers(1, longest))
        weights = np.repeat(rng.choice([0, 0, 1, 0.5], length), rng.integers(1, 4, length))[
            :length
        ].astype(np.float32)
        weights[rng.integers(length)] = 1.0
        found.append(
            (
                row * 3,
                int(rng.integers(3)),
                rng.integers(0, 2**31, length).astype(np.int32),
                weights,
            )
        )
    return found


def blocks(samples, size):
    return [pack_block(samples[i : i + size]) for i in range(0, len(samples), size)]


def build_of(samples, size=7, report=None):
    def build(add):
        for block in blocks(samples, size):
            add(block)
        return report or {}

    return build


def never(add):
    raise AssertionError("built again")


def check(samples, expected, name="a.jsonl"):
    assert len(samples) == len(expected)
    assert samples.lengths.tolist() == [len(tokens) for _, _, tokens, _ in expected]
    for sample, (row, part, tokens, weights) in zip(samples, expected, strict=True):
        assert sample.id == (f"{name}:{row}/{part}" if part else f"{name}:{row}")
        assert (sample.tokens.dtype, sample.weights.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(sample.tokens, tokens)
        np.testing.assert_array_equal(sample.weights, weights)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_is_read_is_what_was_written(tmp_path, size):
    expected = random_samples(60)
    made, report, digest = open_or_build(
        tmp_path / "new" / "cache", "key", "a.jsonl", build_of(expected, size, {"rows": 9})
    )
    opened, again, same = open_or_build(tmp_path / "new" / "cache", "key", "a.jsonl", never)
    assert (report, digest) == (again, same) == ({"rows": 9}, digest)
    check(made, expected)
    check(opened, expected)
    check(
        open_or_build(tmp_path / "new" / "cache", "key", "moved.jsonl", never)[0],
        expected,
        "moved.jsonl",
    )


def test_samples_are_copies_and_indexed_like_a_list(tmp_path):
    expected = random_samples(5)
    samples = Samples("a.jsonl", pack_block(expected))
    samples[0].tokens[:] = -1
    check(samples, expected)
    assert samples[-1].id == samples[4].id == samples.id(4)
    assert [s.id for s in samples[1:4:2]] == [samples.id(1), samples.id(3)]
    for i in (5, -6):
        with pytest.raises(IndexError):
            samples[i]
    check(Samples("a.jsonl", pack_block([])), [])


def test_the_digest_is_of_the_content_alone(tmp_path):
    samples = random_samples(40)

    def digest(key, changed, size=7):
        return open_or_build(tmp_path, key, "a.jsonl", build_of(changed, size))[2]

    plain = digest("plain", samples)
    assert digest("in other blocks", samples, 11) == plain
    row, part, tokens, weights = samples[20]
    half = np.where(np.arange(len(weights)) == weights.argmax(), 0.25, weights).astype(np.float32)
    changes = [
        (row + 1, part, tokens, weights),
        (row, part + 1, tokens, weights),
        (row, part, tokens ^ 1, weights),
    ]
    for i, change in enumerate([*changes, (row, part, tokens, half)]):
        assert digest(f"change {i}", [*samples[:20], change, *samples[21:]]) != plain


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, os.remove])
@pytest.mark.parametrize("file", ["tokens.bin", "runs.bin", "index.bin", "meta.json"])
def test_a_damaged_cache_is_made_again_with_a_warning(tmp_path, file, damage):
    expected = random_samples(40)
    digest = open_or_build(tmp_path, "key", "a.jsonl", build_of(expected))[2]
    before = (tmp_path / "key" / file).read_bytes()
    damage(tmp_path / "key" / file)
    # may be JSON still, with another report: the rest is told by hashes
    if damage is flip and file == "meta.json":
        (tmp_path / "key" / file).write_bytes(before.replace(b"[", b"{"))
    with pytest.warns(UserWarning, match=r"key is damaged; a\.jsonl is tokenised again"):
        samples, _, again = open_or_build(tmp_path, "key", "a.jsonl", build_of(expected))
    assert again == digest
    check(samples, expected)
    check(open_or_build(tmp_path, "key", "a.jsonl", never)[0], expected)


def test_of_a_large_file_only_the_size_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "HASHED_WHEN_OPENED", 50)
    open_or_build(tmp_path, "key", "a.jsonl", build_of(random_samples(40)))
    flip(tmp_path / "key" / "tokens.bin")
    open_or_build(tmp_path, "key", "a.jsonl", never)
    truncate(tmp_path / "key" / "tokens.bin")
    with pytest.warns(UserWarning, match="damaged"):
        open_or_build(tmp_path, "key", "a.jsonl", build_of(random_samples(40)))


def test_what_a_killed_builder_left_is_not_opened(tmp_path):
    died = process(
        "for _ in range(200): " + WRITE + "\n    os.kill(os.getpid(), 9)",
        tmp_path,
        tmp_path / "notes",
    )
    assert died.communicate()[0] == ""
    assert died.returncode == -9
    assert (tmp_path / "key.partial" / "tokens.bin").stat().st_size > 0
    assert not (tmp_path / "key").exists()
    expected = random_samples(40)
    check(open_or_build(tmp_path, "key", "a.jsonl", build_of(expected))[0], expected)
    assert not list(tmp_path.glob("*.partial"))


def test_of_several_processes_one_builds_and_the_next_takes_over_when_it_is_killed(tmp_path):
    """The first one to build dies in the middle, while the others wait for it (or come later: the
    result is the same).
    """
    code = WRITE + "; time.sleep(0.5); notes.read_text() == 'built\\n' and os.kill(os.getpid(), 9)"
    running = [process(code, tmp_path / "cache", tmp_path / "notes") for _ in range(4)]
    said = [each.communicate()[0].strip() for each in running]
    assert sorted(each.returncode for each in running) == [-9, 0, 0, 0]
    assert (tmp_path / "notes").read_text() == "built\n" * 2
    samples, _, digest = open_or_build(tmp_path / "cache", "key", "a.jsonl", never)
    assert sorted(said) == ["", digest, digest, digest]
    check(samples, random_samples(40))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    full = process(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); " + WRITE,
        tmp_path / "cache",
        tmp_path / "notes",
    )
    said = full.communicate()[0]
    assert (
        said
        == f"refused: the cache in {tmp_path}/cache cannot be used (File too large); free space or "
        f"set --data.cache\n"
    )
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key.lock"]


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError,
        match=r"file cannot be used \(Not a directory\); .* "
        r"--data\.cache$",
    ):
        open_or_build(tmp_path / "file", "key", "a.jsonl", never)


def test_what_the_build_raises_leaves_nothing_to_open(tmp_path):
    def build(add):
        build_of(random_samples(40))(add)
        raise InputError("line 7")

    with pytest.raises(InputError, match=r"^line 7$"):
        open_or_build(tmp_path, "key", "a.jsonl", build)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_memory_does_not_grow_with_the_data(tmp_path):
    samples = random_samples(200, longest=300)

    def peak(times):
        def build(add):
            for _ in range(times):
                add(pack_block(samples))
            return {}

        tracemalloc.start()
        opened = open_or_build(tmp_path, f"key{times}", "a.jsonl", build)[0]
        assert sum(int(sample.tokens[0]) for sample in opened) == times * sum(
            int(tokens[0]) for _, _, tokens, _ in samples
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(2), peak(60)
    # Once all of it (200 samples of 150 tokens, 60 times) would be 7 MB.
    assert many < few + 200_000, f"{few} bytes at most for 400 samples, {many} for 12,000"


# ---------------------------------------------------------------- fingerprints


def source_of(path, split=None):
    """A source that counts how often it is read for its fingerprint."""
    source = SimpleNamespace(
        spec=SimpleNamespace(path=str(path), split=split), kind="jsonl", reads=0
    )

    def read():
        source.reads += 1
        return path.read_text() if path.is_file() else "hub"

    source.fingerprint = read
    source.paths = lambda: Source.paths(source)
    return source


def test_a_fingerprint_is_remembered_until_the_file_changes(tmp_path):
    path, directory = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text("one")
    source = source_of(path)
    assert [fingerprint(directory, source) for _ in range(3)] == ["one"] * 3
    assert source.reads == 1
    os.utime(path, ns=(1, 1))  # touched: read again, but the same
    assert fingerprint(directory, source) == "one"
    assert source.reads == 2
    path.write_text("two")  # of the same size
    os.utime(path, ns=(1, 1))
    assert [fingerprint(directory, source) for _ in range(2)] == ["two"] * 2
    assert source.reads == 3


def test_a_directory_changes_with_any_of_its_files(tmp_path):
    path = tmp_path / "set"
    (path / "deep").mkdir(parents=True)
    (path / "deep" / "a.arrow").write_text("one")
    source = source_of(path)
    for reads, change in ((1, "one"), (2, "three")):
        (path / "deep" / "a.arrow").write_text(change)
        for _ in range(2):
            fingerprint(tmp_path / "cache", source)
        assert source.reads == reads
    other = source_of(path, "test")
    fingerprint(tmp_path / "cache", other)
    assert other.reads == 1


def test_without_a_file_or_a_writable_directory_a_fingerprint_is_made_each_time(tmp_path):
    (tmp_path / "file").write_text("")
    for source, directory in (
        (source_of(Path("org/name")), tmp_path),
        (source_of(tmp_path / "file"), tmp_path / "file"),
    ):
        fingerprint(directory, source)
        fingerprint(directory, source)
        assert source.reads == 2


def test_a_key_changes_with_the_code(monkeypatch):
    cache._code.cache_clear()
    before = cache.key_of(1, {"a": 2})
    assert before == cache.key_of(1, {"a": 2}) != cache.key_of(1, {"a": 3})
    read = Path.read_text
    for changed in ("sources", "formats", "template", "prepare", "cache"):
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda path, name=changed: read(path) + "#" * (path.name == f"{name}.py"),
        )
        cache._code.cache_clear()
        assert cache.key_of(1, {"a": 2}) != before
    monkeypatch.undo()
    cache._code.cache_clear()
    assert cache.key_of(1, {"a": 2}) == before
