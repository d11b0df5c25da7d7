"""Several files as one source: a directory or a glob."""

import os
import re
import warnings
from collections.abc import Iterator
from hashlib import blake2b

from torchsft.config import InputError
from torchsft.data.rows import ROWS_OF_A_FILE, NumberedRow, Strings
from torchsft.data.sources import Source
from torchsft.data.specs import LISTED, Spec, files_of, is_several, nothing_in

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLITS = {
    "train": "train",
    "test": "test",
    "eval": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def open_source(spec: Spec, streaming: bool = False) -> Source:
    """Open a source of one file or data set, or of the files in a directory or of a glob.

    Raises:
        InputError: see `Source` and `Files`.
    """
    kind = Files if is_several(spec) else Source
    return kind(spec, streaming=streaming)


class Files(Source):
    """Files of rows that are one source, in the order of their names; each is read as what it is.

    Attributes:
        members: the files.

    Raises:
        InputError: no file of rows is there, or one cannot be opened.
    """

    def _open(self, streaming: bool) -> None:
        spec = self.spec
        self.kind = "files"
        paths, others = files_of(spec.path)
        if not paths:
            raise InputError(f"{spec.path} {nothing_in(others)}; name another place")
        if os.path.isdir(spec.path):
            _check_one_split(spec.path, paths)
        if others and os.environ.get("RANK", "0") == "0":  # once, not by every rank
            more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
            warnings.warn(
                f"{spec.path}: left out, as no files of rows: {', '.join(others[:LISTED])}{more}",
                stacklevel=2,
            )
        self.members = [Source(Spec(path), streaming=streaming) for path in paths]
        self.total_bytes = sum(member.total_bytes or 0 for member in self.members)

    def paths(self) -> list[str]:
        """Return the paths of the files."""
        return [member.spec.path for member in self.members]

    def places(self) -> Strings:
        """Return what stands before a row's number, for each file."""
        return tuple(place for member in self.members for place in member.places())

    def fingerprint(self) -> str:
        """Return a hash of the names and contents of all files."""
        digest = blake2b(digest_size=16)
        for member in self.members:
            digest.update(f"{os.path.basename(member.spec.path)}:{member.fingerprint()}".encode())
        return digest.hexdigest()

    def rows(self, start: int = 0) -> Iterator[NumberedRow]:
        """Yield rows as `Source.rows`; their numbers include that of the file."""
        first_file, rows_before = divmod(start, ROWS_OF_A_FILE)
        bytes_before = 0
        for file, member in enumerate(self.members, start=1):
            if file >= first_file:
                for number, payload in member.rows(rows_before if file == first_file else 0):
                    self.read_bytes = bytes_before + member.read_bytes
                    yield file * ROWS_OF_A_FILE + number, payload
            bytes_before += member.total_bytes or 0


def _check_one_split(directory: str, paths: list[str]) -> None:
    """Check that files are not named train and test, or the like, which nobody wants to train
    together unasked.
    """
    splits = set()
    for path in paths:
        stem = _SHARD.sub("", os.path.basename(path).partition(".")[0])
        if stem in _SPLITS:
            splits.add(_SPLITS[stem])
    if len(splits) > 1:
        names = sorted(splits)
        every = os.path.join(directory, "**/*")
        raise InputError(
            f"{directory} holds the splits {', '.join(names)}; give {directory}:{names[0]}, name "
            f"its files, or give '{every}' to take all as one"
        )
