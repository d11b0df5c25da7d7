"""What the user may write for a source of rows, taken apart without reading a file.

No slow imports: the command line is checked with this before torch is there.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchsft.config import InputError

DATA = ("jsonl", "json", "parquet", "pq", "csv", "tsv")
"""Endings of files of rows, also with .gz or .zst behind."""
FILE_OF_ROWS = re.compile(rf".*\.({'|'.join(DATA)})(\.gz|\.zst)?", re.IGNORECASE | re.DOTALL)
LISTED = 5
SAVED = ("state.json", "dataset_dict.json")
"""Either is in a directory of datasets' save_to_disk."""
ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", *SAVED)
"""What `datasets` and the hub write beside rows."""
WEIGHTED = re.compile(r"(.*):([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|inf|nan))", re.IGNORECASE)
SPLIT = re.compile(r"(.+?):([^:/\[\]]+(?:\[[^\]]*\])?)")  # the second may be train[:10%]
NO_FILE_ENDING = "".join(rf"(?<!\.{ending})" for ending in (*DATA, "gz", "zst"))
HUB = re.compile(rf"([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?{NO_FILE_ENDING}")
"""NAME or NAME/CONFIG of a data set on the hub."""
NAMED = re.compile(r"([\w.-]+)=(.+)")
"""NAME=SPEC of an evaluation set."""


@dataclass(frozen=True)
class Spec:
    """A source as the user gives it.

    Attributes:
        path: of a file or directory, or name on the hub.
        weight: how often each row is taken.
        split: of a data set.
    """

    path: str
    weight: float = 1.0
    split: str | None = None

    @property
    def given(self) -> str:
        """The path and the split."""
        return f"{self.path}:{self.split}" if self.split else self.path


def parse_spec(text: str) -> Spec:
    """Take `PATH`, `PATH:WEIGHT`, `PATH:SPLIT` or `PATH:SPLIT:WEIGHT` apart; a path that exists
    stays whole.

    Raises:
        InputError: nothing before the colon, or a weight that is not finite and above 0.
    """
    path, weight, split = text, "1", None
    if not os.path.exists(path):
        weighted = WEIGHTED.fullmatch(path)
        if weighted:
            path, weight = weighted.groups()
    if not os.path.exists(path):
        with_split = SPLIT.fullmatch(path)
        if with_split:
            path, split = with_split.groups()
    if not path or not 0 < float(weight) < float("inf"):
        raise InputError(
            f"{text!r} names no data; give PATH, PATH:WEIGHT (above 0), or NAME:SPLIT "
            f"for a dataset of the hub"
        )
    return Spec(path, float(weight), split)


def is_saved(path: str) -> bool:
    """Return whether a directory is one of datasets' save_to_disk."""
    return any(os.path.isfile(os.path.join(path, name)) for name in SAVED)


def is_several(spec: Spec) -> bool:
    """Return whether a spec names files that are one source: by a directory that is not `is_saved`,
    or by a glob.
    """
    if spec.split is not None:
        return False
    if os.path.exists(spec.path):
        return os.path.isdir(spec.path) and not is_saved(spec.path)
    return glob.has_magic(spec.path)


def files_of(path: str) -> tuple[list[str], list[str]]:
    """Find the files of rows below a directory, or below and among what a glob names.

    Hidden files are left out. Links to directories are followed, and each directory is read once.

    Returns:
        Paths of the files of rows, and the names of the other files.

    Raises:
        InputError: a directory cannot be read.
    """
    if os.path.isdir(path):
        root = path
        matches = [path]
    else:
        before_magic = re.split(r"[*?\[]", path, maxsplit=1)[0]
        root = os.path.dirname(before_magic) or "."
        matches = sorted(glob.glob(path, recursive=True))
    shown = [
        file
        for file in sorted(_unique_files(matches))
        if not _is_hidden(os.path.relpath(file, root))
    ]
    paths = [file for file in shown if _holds_rows(file)]
    known = set(paths)
    others = [
        os.path.relpath(file, root) for file in shown if file not in known and os.path.isfile(file)
    ]
    return paths, others


def _unique_files(matches: Sequence[str]) -> list[str]:
    """Return the matches that are files, and the files below the others, each once: the pattern
    `**` matches a directory, and what is in it as well.
    """
    seen: set[str] = set()
    found: list[str] = []
    for match in matches:
        found += _below(match, seen) if os.path.isdir(match) else [match]
    unique: dict[tuple[str, str], str] = {}  # by their real directory and name
    for file in sorted(found, key=lambda file: (file.count(os.sep), file)):
        directory, name = os.path.split(file)
        unique.setdefault((os.path.realpath(directory), name), file)
    return list(unique.values())


def _holds_rows(file: str) -> bool:
    """Return whether a file is one of rows, by its name."""
    return os.path.basename(file) not in ABOUT_DATA and FILE_OF_ROWS.fullmatch(file) is not None


def nothing_in(others: Sequence[str]) -> str:
    """Return what is wrong where `files_of` finds no file of rows."""
    endings = ", ".join(f".{ending}" for ending in DATA)
    has = f"; it has {', '.join(others[:LISTED])}" if others else ""
    return f"holds no file of rows ({endings}, also with .gz or .zst){has}"


def _below(directory: str, seen: set[str]) -> list[str]:
    """Return the files below a directory.

    Args:
        seen: real paths of directories that are not entered again; those that are entered are added
            to it.

    Raises:
        InputError: a directory cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); check its permissions"
        ) from None

    found = []
    for place, directories, names in os.walk(directory, onerror=refuse, followlinks=True):
        directories.sort()
        real = os.path.realpath(place)
        if real in seen:  # a link that leads in a circle, or to its neighbour
            directories.clear()
            continue
        seen.add(real)
        found += [os.path.join(place, name) for name in names]
    return found


def _is_hidden(path: str) -> bool:
    """Return whether a file, or a directory that it is in, is hidden or somebody's note that all is
    written (_SUCCESS).
    """
    return any(part.startswith((".", "_")) for part in path.split(os.sep))


def evaluation_sets(specs: Sequence[str]) -> dict[str, list[str]]:
    """Divide the sources of `--data.eval` into evaluation sets.

    A spec is NAME=SPEC, or SPEC: the set has the name of the file then, as much of the path as
    tells it apart from others of that name, and the split where one data set has several.

    Returns:
        The specs of each set, without its name.

    Raises:
        InputError: a weight is given.
    """
    given = []  # the name of a set, or "", and the source
    unnamed = []
    for text in map(str, specs):
        named = None if os.path.exists(text) else NAMED.fullmatch(text)
        name, source = named.groups() if named else ("", text)
        given.append((name, source))
        spec = parse_spec(source)
        if spec.weight != 1:
            raise InputError(
                f"{text} has weight {spec.weight:g}, but every row is evaluated "
                f"once; leave the weight out"
            )
        if not named:
            unnamed.append(spec)
    names = _names(unnamed, {name for name, _ in given})
    sets: dict[str, list[str]] = {}
    for name, source in given:
        sets.setdefault(name or next(names), []).append(source)
    return sets


def _names(specs: Sequence[Spec], taken: set[str]) -> Iterator[str]:
    """Yield a name for each source, the same one only for what is the same.

    Args:
        taken: names that the user gave to others.
    """
    paths = [os.path.realpath(spec.path) for spec in specs]
    for spec, path in zip(specs, paths, strict=True):
        same = [other for other, place in zip(specs, paths, strict=True) if place == path]
        others = [other for other in specs if other not in same]
        names_of_others = taken.union(*(_possible_names(other.path) for other in others))
        free = (name for name in _possible_names(spec.path) if name not in names_of_others)
        # files that only their endings tell apart have their whole path
        name = next(free, os.path.abspath(spec.path))
        splits = {other.split for other in same}
        yield f"{name}:{spec.split}" if spec.split and len(splits) > 1 else name


def _possible_names(path: str) -> list[str]:
    """Return what a source may be called, from its name to its whole path, without the ending of a
    file of rows.
    """
    absolute = Path(os.path.abspath(path))
    stem = re.sub(rf"(\.({'|'.join(DATA)}|gz|zst))+$", "", absolute.name)
    parts = [*absolute.parts[1:-1], stem]
    while len(parts) > 1 and not re.search(r"\w", parts[-1]):
        parts.pop()  # the stars of a glob
    return ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]
