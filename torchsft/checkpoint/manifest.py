"""The manifest `checkpoint.json`, which makes a checkpoint complete: size and checksum of every
other file. It is written last.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xxhash

from torchsft.checkpoint.storage import Folder, Output
from torchsft.config import InputError

MANIFEST = "checkpoint.json"
METADATA = ".metadata"
READ_BYTES = 2**20  # at once, so that bytes are hashed while they are in the processor's cache


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file.

    Attributes:
        checksum: hexadecimal.
        algorithm: "xxh3"; "crc32" in checkpoints that older versions wrote.
    """

    bytes: int
    checksum: str
    algorithm: str = "xxh3"


def entry_of(output: Output) -> FileEntry:
    """Return the entry of a file that has been written."""
    return FileEntry(output.size, output.checksum)


def write_manifest(folder: Folder, files: Mapping[str, FileEntry]) -> None:
    """Write the manifest of a checkpoint's other files by name."""
    entries = {
        name: {"bytes": entry.bytes, entry.algorithm: entry.checksum}
        for name, entry in sorted(files.items())
    }
    folder.write_text(MANIFEST, json.dumps({"files": entries}, indent=1) + "\n")


def read_manifest(folder: Folder) -> dict[str, FileEntry]:
    """Return the entry of every file by name.

    Raises:
        InputError: there is no manifest, or a damaged one.
    """
    if not folder.has(MANIFEST):
        raise InputError(
            f"{folder} has no {MANIFEST}: it is no checkpoint, or was never "
            f"completed; use another one"
        )
    try:
        entries = json.loads(folder.read(MANIFEST))["files"]
        return {str(name): _parsed(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}/{MANIFEST} is damaged ({error!r}); use another checkpoint"
        ) from error


def _parsed(entry: Mapping[str, str | int]) -> FileEntry:
    algorithm = "xxh3" if "xxh3" in entry else "crc32"
    checksum = entry[algorithm]
    int(checksum, 16)  # a ValueError or TypeError: not hexadecimal
    return FileEntry(int(entry["bytes"]), checksum, algorithm)


def incomplete(folder: Folder) -> list[str]:
    """Return what a look at names and sizes finds wrong, a phrase each; empty for a complete
    checkpoint.
    """
    if MANIFEST not in folder.names():  # remote file systems keep this listing for the sizes
        return [f"it has no {MANIFEST}"]
    try:
        files = read_manifest(folder)
    except InputError:
        return [f"it has a damaged {MANIFEST}"]
    problems = [] if METADATA in files else [f"its {MANIFEST} names no {METADATA}"]
    for name, entry in files.items():
        try:
            found = folder.size(name)
        except FileNotFoundError:
            problems.append(f"it has no {name}")
            continue
        if found != entry.bytes:
            problems.append(f"{name} has {found} bytes instead of {entry.bytes}")
    return problems


def damaged(folder: Folder, progress: Callable[[int], None] = lambda count: None) -> list[str]:
    """Return what `incomplete` and the checksums of all files find wrong; every byte is read.

    Args:
        progress: called with the number of bytes that have been read since the last call.
    """
    if problems := incomplete(folder):
        return problems
    for name, entry in read_manifest(folder).items():
        found = _checksum(folder, name, entry, progress)
        if found != entry.checksum:
            problems.append(f"{name} has the checksum {found} instead of {entry.checksum}")
    return problems


def _checksum(folder: Folder, name: str, entry: FileEntry, progress: Callable[[int], None]) -> str:
    xxh3, crc32 = xxhash.xxh3_64(), 0
    for start in range(0, entry.bytes, READ_BYTES):
        data = folder.read(name, start, min(start + READ_BYTES, entry.bytes))
        if entry.algorithm == "crc32":
            crc32 = zlib.crc32(data, crc32)
        else:
            xxh3.update(data)
        progress(len(data))
    return f"{crc32:08x}" if entry.algorithm == "crc32" else xxh3.hexdigest()
