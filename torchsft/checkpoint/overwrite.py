"""What an earlier run has left in an output directory makes way for a new run: nothing that
torchsft has not written.
"""

import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchsft.checkpoint.publish import discard, remove_unread
from torchsft.checkpoint.storage import Folder, root_of
from torchsft.config import Config, InputError, to_dict
from torchsft.data.specs import evaluation_sets, files_of, is_several, parse_spec

_CHECKPOINT = re.compile(r"step-\d{8,}|\.step-\d+\.(incomplete|removed)")
_EXPORT = re.compile(r"hf-step-\d{8,}|\.hf-step-\d{8,}\.(incomplete|removed)")
# and config.json, which the new run's replaces
FILES = ("metrics.jsonl", "answers-before.jsonl", "answers-after.jsonl")


def _strings(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield all texts among nested options."""
    for value in options.values():
        if isinstance(value, Mapping):
            yield from _strings(value)
        elif isinstance(value, list):
            yield from (each for each in value if isinstance(each, str))
        elif isinstance(value, str) and value:
            yield value


def _inputs_in(config: Config, place: str) -> list[str]:
    """Return what `config` names in the directory or URL `place`: a path, NAME=PATH, or files that
    are one source.
    """
    asked = to_dict(config)
    del asked["output"], asked["checkpoint"]["remote"]
    inside = []
    for text in [*_strings(asked), *_files_of_sources(config)]:
        path = text.partition("=")[2] or text
        if "://" in place or "://" in path:
            found = f"{path}/".startswith(f"{place}/")
        else:
            found = Path(path).resolve().is_relative_to(Path(place).resolve())
        if found:
            inside.append(text)
    return inside


def _files_of_sources(config: Config) -> Iterator[str]:
    """Yield the files of sources that are directories or globs."""
    members = evaluation_sets(config.data.eval).values()
    for text in [*config.data.train, *itertools.chain.from_iterable(members)]:
        spec = parse_spec(str(text))
        if is_several(spec):
            yield from files_of(spec.path)[0]


def refuse_to_delete_inputs(config: Config) -> None:
    """Look whether --overwrite would delete what the run reads.

    Raises:
        InputError: it would.
    """
    root, output = root_of(config.output, config.checkpoint.remote), Path(config.output)
    exports = map(str, [output / "hf", *output.glob("hf-step-*")])
    for place in (f"{root}/checkpoints", f"{root}/hf", *exports):
        if inside := _inputs_in(config, place):
            raise InputError(
                f"--overwrite would delete {place}, but this run reads {inside[0]} there; choose "
                "another --output"
            )


def make_way(config: Config) -> list[str]:
    """Remove an earlier run from the output directory; links are removed, not followed.

    Args:
        config: of the new run. Without --overwrite only what a run without a checkpoint leaves is
            removed.

    Returns:
        What was removed, as paths and URLs.

    Raises:
        InputError: a checkpoint is being read.
    """
    output = Path(config.output)
    removed = [str(output / name) for name in FILES if _remove_file(output / name)]
    if _remove_some(output / "tensorboard", "events.out.tfevents.*"):
        removed.append(str(output / "tensorboard"))
    if not config.overwrite:
        return removed
    records = output / "flight-recorder"
    if _remove_some(records, "rank_*"):
        removed.append(str(records))
    if config.parallel.flight_recorder:
        records.mkdir(exist_ok=True)  # torch, which knows it already, does not make it
    root = Folder(root_of(output, config.checkpoint.remote))
    removed += _remove_checkpoints(f"{root}/checkpoints")
    if root.remote:
        for export in [root.child(name) for name in root.names() if _EXPORT.fullmatch(name)]:
            export.remove()
            removed.append(str(export))
    directories = [
        output / "hf",
        *(output / name for name in sorted(os.listdir(output)) if _EXPORT.fullmatch(name)),
    ]
    if not _inputs_in(config, str(output / "generated")):
        directories.append(output / "generated")
    for directory in directories:
        if directory.is_symlink():
            directory.unlink()
        elif directory.is_dir():
            shutil.rmtree(directory)
        else:
            continue
        removed.append(str(directory))
    return removed


def _remove_file(path: Path) -> bool:
    if not (path.is_symlink() or path.is_file()):
        return False
    path.unlink()
    return True


def _remove_some(directory: Path, pattern: str) -> bool:
    """Remove the files that an earlier run has written; other ones in their directory stay."""
    if directory.is_symlink():
        directory.unlink()
        return True
    files = list(directory.glob(pattern))
    for path in files:
        path.unlink()
    if directory.is_dir() and not os.listdir(directory):
        directory.rmdir()
    return bool(files)


def _remove_checkpoints(place: str) -> list[str]:
    """Return all of them; their directory stays, or becomes one where it was a link."""
    folder = Folder(place)
    if not folder.remote and folder.path.is_symlink():
        folder.path.unlink()
        folder.make()
        return [place]
    removed = []
    for name in filter(_CHECKPOINT.fullmatch, folder.names()):
        checkpoint = folder.child(name)
        if not folder.remote and checkpoint.path.is_symlink():
            checkpoint.path.unlink()
        elif not folder.remote and checkpoint.has("trainer.json"):
            remove_unread(checkpoint)
            if checkpoint.names():
                raise InputError(
                    f"checkpoint {checkpoint} is being read; wait for that, then give "
                    f"the same command again"
                )
        else:
            discard(checkpoint)
        removed.append(str(checkpoint))
    return removed
