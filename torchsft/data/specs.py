"""What the user may write for a source of rows, taken apart without opening anything.

No slow imports: the command line is checked with this before torch is there."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchsft.config import InputError

WEIGHTED = re.compile(r"(.*):([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|inf|nan))", re.IGNORECASE)
SPLIT = re.compile(r"(.+?):([^:/\[\]]+(?:\[[^\]]*\])?)")  # the second may be train[:10%]
_OF_A_FILE = "".join(rf"(?<!\.{ending})" for ending in ("jsonl", "json", "csv", "tsv", "parquet", "gz", "zst"))
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


def evaluation_sets(specs: Sequence[str]) -> dict[str, list[str]]:
    """The sources of each evaluation set.

    A spec is NAME=SPEC, or SPEC: the set has the name of the file then, as much of the path as tells it apart from others of
    that name, and the split where one data set has several.
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
            raise InputError(f"{spec} has weight {found.weight:g}, but every row is evaluated once; leave the weight out")
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
    """A name for each source, the same one only for what is the same; `given`: names that the user gave to others."""
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
        name = free[0] if free else os.path.abspath(spec.path)  # files that only their endings tell apart
        found.append(f"{name}:{spec.split}" if spec.split and len(splits) > 1 else name)
    return found


def _suffixes(path: str) -> list[str]:
    """What a source may be called, from its name to its whole path, without the ending of a file of rows."""
    absolute = Path(os.path.abspath(path))
    stem = re.sub(r"(\.(jsonl|json|parquet|pq|csv|tsv|gz|zst))+$", "", absolute.name)
    parts = [part for part in absolute.parts[:-1] if part != os.sep] + [stem]
    while len(parts) > 1 and not re.search(r"\w", parts[-1]):
        parts.pop()  # the stars of a glob
    return ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]
