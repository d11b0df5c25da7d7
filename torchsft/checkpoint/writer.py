"""DCP's storage writers: a rank's chunks in one file, then `.metadata` and the manifest, in a
folder that appears when all of it is there.
"""

import itertools
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo  # private, but part of the format
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from torchsft.checkpoint.archive import write_archive
from torchsft.checkpoint.manifest import METADATA, FileEntry, entry_of, write_manifest
from torchsft.checkpoint.publish import prepare_staging, publish, staging_of
from torchsft.checkpoint.storage import Folder, in_one_line

FORMAT_VERSION = "1.0.0"  # of DCP's files, as torch 2.11 to 2.13 write them


class WriteError(OSError):
    """Why a rank could not write, in one line: what a file system raised may not survive the way
    to the other ranks.
    """


@contextmanager
def _described() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WriteError(in_one_line(error)) from error


def completed(value: Any) -> Future[Any]:
    """Return a future that has ended with this value, as DCP wants results."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class OneCheckpoint:
    """What DCP asks of every storage writer and reader, and ours have no need of: each is for one
    checkpoint, whose folder it knows, and takes plans as they are.
    """

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return True."""
        return True

    def prepare_local_plan(self, plan: Any) -> Any:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        """Return the plans."""
        return plans


class DirectoryWriter(OneCheckpoint, StorageWriter):
    """Writes the files of a DCP checkpoint into a folder.

    Args:
        folder: where they are written; it must be there.
        file: the name of the one that this process writes.
        texts: contents of further files, by name; written by the coordinator.
    """

    def __init__(self, folder: Folder, file: str, texts: Mapping[str, str] | None = None) -> None:
        self.folder, self.file = folder, file
        self.texts = dict(texts or {})
        self.others: dict[str, FileEntry] = {}  # files of other writers, for the manifest
        self.bytes = 0  # of all files but the manifest, after `finish`

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder is there."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file, tensor by tensor; one of them is in memory at a time.

        Returns:
            For each chunk its index and `_StorageInfo`, and for the file, under its name, its
            `FileEntry`.

        Raises:
            OSError: the file could not be written.
        """
        results = []
        with self.folder.writer(self.file) as output:
            for item in plan.items:
                start = output.size
                write_archive(planner.resolve_data(item), output)
                place = _StorageInfo(self.file, start, output.size - start)
                results.append(WriteResult(item.index, place.length, place))
        entry = entry_of(output)
        results.append(WriteResult(MetadataIndex(self.file), entry.bytes, entry))
        return completed(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: write the texts, `.metadata` and, last, the manifest.

        Raises:
            OSError: one of them could not be written.
        """
        files = dict(self.others)
        metadata.storage_data = {}
        for result in itertools.chain.from_iterable(results):
            if isinstance(result.storage_data, FileEntry):
                files[result.index.fqn] = result.storage_data
            else:
                metadata.storage_data[result.index] = result.storage_data
        metadata.storage_meta = StorageMeta()
        metadata.version = FORMAT_VERSION
        for name, text in self.texts.items():
            files[name] = entry_of(self.folder.write_text(name, text))
        files[METADATA] = write_metadata(self.folder, metadata)
        write_manifest(self.folder, files)
        self.bytes = sum(entry.bytes for entry in files.values())


def write_metadata(folder: Folder, metadata: Metadata) -> FileEntry:
    """Write `.metadata`, by which DCP finds what the files hold."""
    with folder.writer(METADATA) as output:
        output.write(pickle.dumps(metadata))
    return entry_of(output)


class PublishingWriter(DirectoryWriter):
    """Writes a checkpoint aside; it appears when all ranks have written.

    Args:
        target: the place at which it appears; a remote one is written in place.
        rank: of this process.
        texts: see `DirectoryWriter`.
    """

    def __init__(self, target: Folder, rank: int, texts: Mapping[str, str]) -> None:
        super().__init__(staging_of(target), f"__{rank}_0.distcp", texts)
        self.target = target

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """On the coordinator: make an empty staging folder. The other ranks write when all plans
        have been made.

        Raises:
            WriteError: it could not be made.
        """
        if is_coordinator:
            with _described():
                prepare_staging(self.target)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; see `DirectoryWriter`.

        Raises:
            WriteError: it could not be written.
        """
        with _described():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: write what is left to write, and let the checkpoint appear.

        Raises:
            WriteError: that failed.
        """
        with _described():
            super().finish(metadata, results)
            publish(self.folder, self.target)
