"""What is checked and set before torch is imported: paths, how many threads a rank may use, what it
does with memory that it frees, what it records of its collectives.

Nothing slow is imported here."""

import ctypes
import json
import os
import re
import sys
from pathlib import Path

from torchsft.cli import is_main
from torchsft.config import Data, InputError
from torchsft.data.specs import HUB, evaluation_sets, files_of, is_several, nothing_in, parse_spec

# the others are refused with more words later
TOKENIZER_FILES = ("tokenizer.json", "tiktoken.model", "tokenizer.model")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a model: org/name
MOST_NAMED = 10  # paths in one sentence


def check_data(data: Data) -> None:
    """Look whether all sources and the chat template are there.

    Raises:
        InputError: some are not; all that are missing stand in one sentence.
    """
    specs = {"--data.train": list(map(str, data.train))}
    specs["--data.eval"] = [
        spec for members in evaluation_sets(data.eval).values() for spec in members
    ]
    faults = []
    for option, texts in specs.items():
        faults += [f"{option} {text} {fault}" for text in texts if (fault := _source_fault(text))]
    template = data.chat_template
    if template and (fault := _file_fault(template)):
        faults.append(f"--data.chat-template {template} {fault}")
    if faults:
        listed = "; ".join(faults[:MOST_NAMED])
        more = f"; and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        raise InputError(
            f"{listed}{more}; give existing files or directories, or NAME:SPLIT for a dataset of "
            "the hub"
        )


def _source_fault(text: str) -> str:
    """Return what is wrong with a source as far as the file system shows it, or nothing."""
    spec = parse_spec(text)
    if is_several(spec):
        files, others = files_of(spec.path)
        faults = (f"holds {file}, which {fault}" for file in files if (fault := _file_fault(file)))
        return next(faults, "") if files else nothing_in(others)
    if os.path.exists(spec.path):
        return _file_fault(spec.path)
    of_hub = spec.split is not None and HUB.fullmatch(spec.path)
    return "" if of_hub else "does not exist"


def _file_fault(path: str) -> str:
    if not os.path.exists(path):
        return "does not exist"
    return "" if os.access(path, os.R_OK) else "cannot be read (permissions)"


def check_output(output: str) -> None:
    """Look whether the output directory can be made and written.

    Raises:
        InputError: it is a file, is in one, or cannot be written.
    """
    place = Path(os.path.abspath(output))
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(
            f"--output {output} cannot be a directory, as {place} is a file; choose "
            f"another --output"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"--output {output} cannot be written, as {place} does not permit it; "
            f"choose another --output"
        )


def model_directory(path: str) -> str:
    """Return the directory of `--model.path`: itself, or for a name on the hub, the snapshot in the
    local cache (said on stderr).

    Raises:
        InputError: there is none; the sentence says how to download it.
    """
    if os.path.exists(path) or not HUB_NAME.fullmatch(path):
        return path
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(path, local_files_only=True)
    except (OSError, ValueError):  # no such snapshot; no such cache; not a name that the hub allows
        where = path.rpartition("/")[2]
        raise InputError(
            f"--model.path {path} is no directory; if it is a model on the hub, download it first: "
            f"hf download {path} --local-dir {where}, then --model.path {where}"
        ) from None
    if is_main():
        print(
            f"--model.path {path}: taken from the local cache, {found}", file=sys.stderr, flush=True
        )
    return found


def check_model(path: str, config: bool = True, weights: bool = True) -> None:
    """Look whether a model directory has all that a run needs.

    Raises:
        InputError: it is none, or lacks its tokenizer, or its config.json or weights where they are
            needed.
    """
    directory = Path(path)
    option = f"--model.path {path}"
    if not directory.is_dir():
        fault = "is a file" if directory.exists() else "does not exist"
        raise InputError(
            f"{option} {fault}; give a Hugging Face model directory (config.json, "
            f"tokenizer, safetensors)"
        )
    lacking = []
    if config and not (directory / "config.json").is_file():
        lacking.append("config.json")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        lacking.append("tokenizer.json")
    if weights:
        lacking += _lacking_weights(directory)
    if lacking:
        raise InputError(
            f"{option} lacks {', '.join(lacking)}; give a whole Hugging Face model directory, or "
            f"download it again"
        )


def _lacking_weights(directory: Path) -> list[str]:
    """Return what is missing of a directory's weights: safetensors, all that an index names, or
    what convert_checkpoint.py wrote.
    """
    if (directory / ".metadata").is_file():
        return []
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError):
            return []  # told where the index is read
        missing = [name for name in named if not (directory / name).is_file()]
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        return [f"{len(missing)} of {len(named)} weight files ({listed})"] if missing else []
    if any(directory.glob("*.safetensors")):
        return []
    old = sorted(path.name for path in directory.glob("*.bin"))
    return [
        f"safetensors weights (it has {old[0]}, which is not read; convert it)"
        if old
        else "safetensors weights"
    ]


def set_threads(local_ranks: int) -> int | None:
    """Share the cores among the ranks of this machine where torchrun has set OMP_NUM_THREADS to 1
    because nobody had set it.

    Call it before torch is imported. torchrun sets the variable in its own environment, so the one
    that it was started with, in /proc, still tells whether the user had. Where that cannot be seen,
    or the user had, nothing is changed.

    Returns:
        The number of threads that was set, if any.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if not by_torchrun or local_ranks < 2:
        return None
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with):
        return None
    threads = max(len(os.sched_getaffinity(0)) // local_ranks, 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


# What torch reads, and the older names that it still knows (2.11 to 2.13).
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
RECORDED = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
RECORD_PLACE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
RECORD_ON_TIMEOUT = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)


def use_expandable_segments() -> None:
    """Let torch's allocator of GPU memory grow its blocks in place, unless the environment says how
    it works: the rows of experts have other sizes in each step, for which fixed blocks leave gaps.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def record_collectives(entries: int, output: str) -> None:
    """Let torch keep the last `entries` collectives of this rank, and write them to
    `output`/flight-recorder/rank_N when one waits too long (0: not).

    Call it before the process group is made; see `parallel/cluster.py::write_record` for gloo.

    Raises:
        InputError: the environment says otherwise.
    """
    if not entries:
        return
    place = Path(os.path.abspath(output), "flight-recorder")
    wanted = {RECORDED: str(entries), RECORD_PLACE: f"{place}/rank_", RECORD_ON_TIMEOUT: "1"}
    for names, value in wanted.items():
        for name in names:
            if (given := os.environ.get(name, value)) != value:
                raise InputError(
                    f"--parallel.flight-recorder {entries} needs {name} to be {value}, but it is "
                    f"{given}; unset it, or set the option to 0"
                )
        os.environ[names[0]] = value
    place.mkdir(parents=True, exist_ok=True)


# mallopt's numbers in glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory of what it frees, which glibc otherwise gives back to the
    system from 32 MB a block on: a step on the CPU would fault the same pages in again and again.

    Where the environment says how to allocate (MALLOC_..., GLIBC_TUNABLES), that is followed.

    Returns:
        Whether memory is kept.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    # No block is mapped by itself, and the end of the heap is never given back.
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
