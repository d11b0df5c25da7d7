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
HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?(?<!\.jsonl)(?<!\.json)(?<!\.parquet)(?<!\.gz)(?<!\.zst)")  # no file


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
    """The sources of each evaluation set. A spec is NAME=SPEC, or SPEC: the set has the name of the file then."""
    sets: dict[str, list[str]] = {}
    for spec in map(str, specs):
        named = None if os.path.exists(spec) else re.fullmatch(r"([\w.-]+)=(.+)", spec)
        rest = named[2] if named else spec
        found = parse_spec(rest)
        if found.weight != 1:
            raise InputError(f"{spec} has weight {found.weight:g}, but every row is evaluated once; leave the weight out")
        stem = re.sub(r"(\.(jsonl|json|parquet|pq|gz|zst))+$", "", Path(os.path.abspath(found.path)).name)
        sets.setdefault(named[1] if named else stem, []).append(rest)
    return sets
