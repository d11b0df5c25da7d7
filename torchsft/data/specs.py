"""What the user may write for a source of rows, taken apart without reading a file.

No slow imports: the command line is checked with this before torch is there."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchsft.config import InputError

WEIGHTED = re.compile(r"(.*):([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|inf|nan))", re.IGNORECASE)
SPLIT = re.compile(r"(.+?):([^:/\[\]]+(?:\[[^\]]*\])?)")  # the second may be train[:10%]
ROWS = ("jsonl", "json", "parquet", "pq", "csv", "tsv")
"""Endings of files of rows, also with .gz or .zst behind."""
_OF_A_FILE = "".join(rf"(?<!\.{ending})" for ending in (*ROWS, "gz", "zst"))
_ENDING = re.compile(rf"\.(?:{'|'.join(ROWS)})(?:\.gz|\.zst)?$", re.IGNORECASE)
LISTED = 5
HUB = re.compile(rf"([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?{_OF_A_FILE}")


@dataclass(frozen=True)
class Spec:
    """A file, directory or name on the hub; how often each row is taken; and for `datasets` the split."""

    path: str
    weight: float = 1.0
    split: str | None = None


def parse_spec(text: str) -> Spec:
    """`PATH`, `PATH:WEIGHT`, `PATH:SPLIT` or `PATH:SPLIT:WEIGHT`; a path that exists is never taken apart.
    Raises InputError: nothing in front of the colon, or a weight that is not finite and above 0."""
    path, weight, split = text, "1", None
    if not os.path.exists(path) and (found := WEIGHTED.fullmatch(path)):
        path, weight = found.groups()
    if not os.path.exists(path) and (found := SPLIT.fullmatch(path)):
        path, split = found.groups()
    if not path or not 0 < float(weight) < float("inf"):
        raise InputError(f"{text!r} names no data; give PATH, PATH:WEIGHT (above 0), or NAME:SPLIT for a dataset of the hub")
    return Spec(path, float(weight), split)


def is_saved(path: str) -> bool:
    """Whether a directory is one of datasets' save_to_disk."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def is_several(spec: Spec) -> bool:
    """Whether a spec names files that are one source: by a directory that is not `is_saved`, or by a glob."""
    if spec.split is not None:
        return False
    if os.path.exists(spec.path):
        return os.path.isdir(spec.path) and not is_saved(spec.path)
    return glob.has_magic(spec.path)


def files_of(path: str) -> tuple[list[str], list[str]]:
    """The files of rows below a directory or what a glob matches, in order, and the names of other files.

    What is hidden, or begins with `_` (_SUCCESS), counts as neither.

    Raises:
        InputError: a directory cannot be read.
    """
    is_directory = os.path.isdir(path)
    matches = [path] if is_directory else sorted(glob.glob(path, recursive=True))
    constant = re.split(r"[*?\[]", path, maxsplit=1)[0]  # what stands in front of the first sign of a glob
    root = path if is_directory else os.path.dirname(constant) or "."
    seen: set[str] = set()
    found: list[str] = []
    for match in matches:
        found += _below(match, seen) if os.path.isdir(match) else [match]
    every: dict[tuple[str, str], str] = {}  # by real places: `**` matches a directory, and what is in it as well
    for file in sorted(found, key=lambda file: (file.count(os.sep), file)):
        place, name = os.path.split(file)
        every.setdefault((os.path.realpath(place), name), file)
    shown = [file for file in sorted(every.values()) if not _is_hidden(os.path.relpath(file, root))]
    rows = [file for file in shown if _stem_length(file) < len(file)]
    others = [os.path.relpath(file, root) for file in shown if file not in set(rows) and os.path.isfile(file)]
    return rows, others


def nothing_in(others: Sequence[str]) -> str:
    """What is wrong where `files_of` finds no file of rows."""
    endings = ", ".join(f".{ending}" for ending in ROWS)
    has = f"; it has {', '.join(others[:LISTED])}" if others else ""
    return f"holds no file of rows ({endings}, also with .gz or .zst){has}"


def _below(directory: str, seen: set[str]) -> list[str]:
    """Files below a directory, through links too; a directory that is in `seen` is not entered again."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); check its permissions") from None

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
    """Whether a file, or a directory that it is in, is hidden or somebody's note that all is written (_SUCCESS)."""
    return any(part.startswith((".", "_")) for part in path.split(os.sep))


def _stem_length(path: str) -> int:
    """How long a path is without the ending of a file of rows."""
    found = _ENDING.search(path)
    return found.start() if found else len(path)


def evaluation_sets(specs: Sequence[str]) -> dict[str, list[str]]:
    """The sources of each evaluation set.

    A spec is NAME=SPEC, or SPEC: the set has the name of the file then, with as much of its path as tells it apart from the
    other sets, and with the split where one data set has several.

    Raises:
        InputError: a spec is none, or has a weight.
    """
    named: list[tuple[str | None, str, Spec]] = []
    for text in map(str, specs):
        found = None if os.path.exists(text) else re.fullmatch(r"([\w.-]+)=(.+)", text)
        name, rest = found.groups() if found else (None, text)
        spec = parse_spec(rest)
        if spec.weight != 1:
            raise InputError(f"{text} has weight {spec.weight:g}, but every row is evaluated once; leave the weight out")
        named.append((name, rest, spec))
    given = {name for name, _, _ in named if name is not None}
    unnamed = [spec for name, _, spec in named if name is None]
    sets: dict[str, list[str]] = {}
    for name, rest, spec in named:
        sets.setdefault(_name(spec, unnamed, given) if name is None else name, []).append(rest)
    return sets


def _name(spec: Spec, every: Sequence[Spec], taken: set[str]) -> str:
    """A name for one of several sources: none of `taken`, and the same only for what is the same."""
    place = os.path.realpath(spec.path)
    others = [other for other in every if os.path.realpath(other.path) != place]
    splits = {other.split for other in every if os.path.realpath(other.path) == place}
    behind = f":{spec.split}" if spec.split and len(splits) > 1 else ""
    names = _names(spec.path)
    theirs = {name for other in others for name in _names(other.path)}
    free = (name for name in names if name not in theirs and name + behind not in taken)
    return next(free, names[-1]) + behind


def _names(path: str) -> list[str]:
    """What a path may be called, the best first: its end without the ending, from the name to the whole path; then with it."""
    absolute = os.path.abspath(path)
    found = []
    for text in (absolute[: _stem_length(absolute)], absolute):
        parts = text.strip(os.sep).split(os.sep)
        found += ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
    return found
