"""What the user may write for a source of rows, taken apart without reading a file.

No slow imports: the command line is checked with this before torch is there."""

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchsft.config import InputError

DATA = ("jsonl", "json", "parquet", "pq", "csv", "tsv")
"""Endings of files of rows, also with .gz or .zst behind."""
LISTED = 5
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` and the hub write beside rows."""
WEIGHTED = re.compile(r"(.*):([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|inf|nan))", re.IGNORECASE)
SPLIT = re.compile(r"(.+?):([^:/\[\]]+(?:\[[^\]]*\])?)")  # the second may be train[:10%]
_OF_A_FILE = "".join(
    rf"(?<!\.{ending})" for ending in ("jsonl", "json", "csv", "tsv", "parquet", "gz", "zst")
)
HUB = re.compile(rf"([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?{_OF_A_FILE}")


@dataclass(frozen=True)
class Spec:
    """A file, directory or name on the hub; how often each row is taken; and for `datasets` the
    split.
    """

    path: str
    weight: float = 1.0
    split: str | None = None


def parse_spec(text: str) -> Spec:
    """`PATH`, `PATH:WEIGHT`, `PATH:SPLIT` or `PATH:SPLIT:WEIGHT`; a path that exists is never taken
    apart.
    Raises InputError: nothing in front of the colon, or a weight that is not finite and above 0.
    """
    path, weight, split = text, "1", None
    if not os.path.exists(path) and (found := WEIGHTED.fullmatch(path)):
        path, weight = found.groups()
    if not os.path.exists(path) and (found := SPLIT.fullmatch(path)):
        path, split = found.groups()
    if not path or not 0 < float(weight) < float("inf"):
        raise InputError(
            f"{text!r} names no data; give PATH, PATH:WEIGHT (above 0), or NAME:SPLIT "
            f"for a dataset of the hub"
        )
    return Spec(path, float(weight), split)


def is_saved(path: str) -> bool:
    """Whether a directory is one of datasets' save_to_disk."""
    return any(
        os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")
    )


def is_several(spec: Spec) -> bool:
    """Whether a spec names files that are one source: by a directory that is not `is_saved`, or by
    a glob.
    """
    if spec.split is not None:
        return False
    if os.path.exists(spec.path):
        return os.path.isdir(spec.path) and not is_saved(spec.path)
    return glob.has_magic(spec.path)


def files_of(path: str) -> tuple[list[str], list[str]]:
    """Files of rows below a directory, or below and among what a glob names, and the names of the
    others.

    Hidden ones count as neither. Links to directories are followed, and each directory is read
    once.

    Raises:
        InputError: a directory cannot be read.
    """
    is_directory = os.path.isdir(path)
    seen: set[str] = set()
    found: list[str] = []
    for match in [path] if is_directory else sorted(glob.glob(path, recursive=True)):
        found += _below(match, seen) if os.path.isdir(match) else [match]
    # by real places: `**` matches a directory, and what is in it as well
    every: dict[tuple[str, str], str] = {}
    for file in sorted(found, key=lambda file: (file.count(os.sep), file)):
        place, name = os.path.split(file)
        every.setdefault((os.path.realpath(place), name), file)
    before = re.split(r"[*?\[]", path, maxsplit=1)[0]  # of the first sign of a glob
    root = path if is_directory else os.path.dirname(before) or "."
    shown = [file for file in sorted(every.values()) if not _is_hidden(os.path.relpath(file, root))]
    patterns = [f"*.{ending}{packed}" for ending in DATA for packed in ("", ".gz", ".zst")]
    rows = [file for file in shown if os.path.basename(file) not in _ABOUT_DATA]
    paths = [
        file for file in rows if any(fnmatch.fnmatch(file.lower(), pattern) for pattern in patterns)
    ]
    others = [
        os.path.relpath(file, root)
        for file in shown
        if file not in set(paths) and os.path.isfile(file)
    ]
    return paths, others


def nothing_in(others: Sequence[str]) -> str:
    """What is wrong where `files_of` finds no file of rows."""
    endings = ", ".join(f".{ending}" for ending in DATA)
    has = f"; it has {', '.join(others[:LISTED])}" if others else ""
    return f"holds no file of rows ({endings}, also with .gz or .zst){has}"


def _below(directory: str, seen: set[str]) -> list[str]:
    """Files below a directory; a directory that is in `seen` is not entered again."""

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
    """Whether a file, or a directory that it is in, is hidden or somebody's note that all is
    written (_SUCCESS).
    """
    return any(part.startswith((".", "_")) for part in path.split(os.sep))


def evaluation_sets(specs: Sequence[str]) -> dict[str, list[str]]:
    """The sources of each evaluation set.

    A spec is NAME=SPEC, or SPEC: the set has the name of the file then, as much of the path as
    tells it apart from others of that name, and the split where one data set has several.
    """
    sets: dict[str, list[str]] = {}
    unnamed: list[tuple[str, Spec]] = []
    order: list[tuple[str | None, str]] = []
    given: set[str] = set()
    for spec in map(str, specs):
        named = None if os.path.exists(spec) else re.fullmatch(r"([\w.-]+)=(.+)", spec)
        rest = named[2] if named else spec
        found = parse_spec(rest)
        if found.weight != 1:
            raise InputError(
                f"{spec} has weight {found.weight:g}, but every row is evaluated "
                f"once; leave the weight out"
            )
        order.append((named[1] if named else None, rest))
        if named:
            given.add(named[1])
        else:
            unnamed.append((rest, found))
    names = iter(_names([spec for _, spec in unnamed], given))
    for name, rest in order:
        sets.setdefault(next(names) if name is None else name, []).append(rest)
    return sets


def _names(specs: Sequence[Spec], given: set[str]) -> list[str]:
    """A name for each source, the same one only for what is the same; `given`: names that the user
    gave to others.
    """
    paths = [os.path.realpath(spec.path) for spec in specs]
    found = []
    for spec, path in zip(specs, paths, strict=True):
        taken = set(given)
        splits = set()
        for other, place in zip(specs, paths, strict=True):
            if place == path:
                splits.add(other.split)
            else:
                taken.update(_suffixes(other.path))
        free = [name for name in _suffixes(spec.path) if name not in taken]
        # files that only their endings tell apart
        name = free[0] if free else os.path.abspath(spec.path)
        found.append(f"{name}:{spec.split}" if spec.split and len(splits) > 1 else name)
    return found


def _suffixes(path: str) -> list[str]:
    """What a source may be called, from its name to its whole path, without the ending of a file of
    rows.
    """
    absolute = Path(os.path.abspath(path))
    stem = re.sub(r"(\.(jsonl|json|parquet|pq|csv|tsv|gz|zst))+$", "", absolute.name)
    parts = [part for part in absolute.parts[:-1] if part != os.sep] + [stem]
    while len(parts) > 1 and not re.search(r"\w", parts[-1]):
        parts.pop()  # the stars of a glob
    return ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]
