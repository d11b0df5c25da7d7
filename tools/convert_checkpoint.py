"""Convert, compare and describe checkpoints of any size, without a GPU.

python tools/convert_checkpoint.py to-dcp HF DCP        Hugging Face weights as DCP, for training
python tools/convert_checkpoint.py to-hf DCP HF --dtype bf16    back; also a training checkpoint
python tools/convert_checkpoint.py verify A [B]         check files; compare two directories
python tools/convert_checkpoint.py info DIR             what a directory holds

A conversion that was interrupted continues with the same command; its output appears when it is
complete.
"""

from __future__ import annotations

import argparse
import difflib
import math
import multiprocessing.forkserver
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchsft.config import InputError

if TYPE_CHECKING:
    from tools.conversion.verify import Findings

UNITS = {
    "": 1,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
MOST_LINES = 50


def size(text: str) -> float:
    """Return bytes of "5GB", "500MB", "4GiB" and the like."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.upper())
    if not match or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 5GB or 500MB")
    return float(match[1]) * UNITS[match[2] or ""]


def place(text: str) -> Path:
    """Return a local path."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is a URL; this tool works on local directories, so copy it first"
        )
    return Path(text)


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """Return a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0, such as 1e-2")
    return value


class Once(argparse.Action):
    """Stores the value of an option, and refuses a second one, of which argparse would keep the
    last without a word.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        value: Any,
        name: str | None = None,
    ) -> None:
        """Keep `value`."""
        given = vars(options).setdefault("given", {})
        if self.dest in given:
            parser.error(
                f"{name} is given twice, as {given[self.dest]} and as {value}; give it once"
            )
        given[self.dest] = value
        setattr(options, self.dest, value)


class Parser(argparse.ArgumentParser):
    """Errors are one sentence, which names the nearest options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.register("action", None, Once)  # of options and arguments that name no action

    def error(self, message: str) -> NoReturn:
        """Say it and end with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is not understood here, where the options of the subcommand are known."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = list(self._option_string_actions)
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 2)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            self.error(f"{unknown[0]!r} is not understood{meant}")
        return options, unknown


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_dcp = commands.add_parser("to-dcp", help="Hugging Face directory to DCP directory")
    to_dcp.add_argument(
        "source",
        type=place,
        metavar="HF",
        help="directory with config.json and safetensors weights",
    )
    to_dcp.add_argument(
        "out",
        type=place,
        metavar="DCP",
        help="new directory; --model.path of a training run takes it",
    )
    to_hf = commands.add_parser(
        "to-hf", help="DCP directory or training checkpoint to Hugging Face directory"
    )
    to_hf.add_argument(
        "source",
        type=place,
        metavar="DCP",
        help="what to-dcp wrote, or RUN/checkpoints/step-00000100",
    )
    to_hf.add_argument("out", type=place, metavar="HF", help="new directory")
    to_hf.add_argument(
        "--dtype",
        choices=("bf16", "fp32", "fp8", "int4", "mxfp4"),
        default="bf16",
        help="of the weights (default: %(default)s)",
    )
    to_hf.add_argument(
        "--base",
        type=place,
        metavar="DIR",
        help="where configuration, tokenizer, MTP layers and unknown tensors come from (default: "
        "DCP itself, of a training "
        "checkpoint the model that its run began with)",
    )
    to_hf.add_argument(
        "--max-shard-size", type=size, default="5GB", help="of a weight file (default: %(default)s)"
    )
    verify = commands.add_parser(
        "verify", help="check one directory, or compare two; exit code 1 where something is wrong"
    )
    verify.add_argument(
        "a", type=place, metavar="A", help="Hugging Face or DCP directory, or training checkpoint"
    )
    verify.add_argument("b", type=place, metavar="B", nargs="?", help="another one, of any kind")
    verify.add_argument(
        "--tolerance",
        type=share,
        default=0.0,
        metavar="X",
        help="values may differ by this share of their tensor's largest value, and dtypes may "
        "differ (default: equal bits)",
    )
    for command in (to_dcp, to_hf, verify):
        command.add_argument(
            "--workers",
            type=positive,
            default=2,
            metavar="N",
            help="processes (default: %(default)s)",
        )
    info = commands.add_parser("info", help="say what a directory holds")
    info.add_argument("directory", type=place, metavar="DIR")
    return parser.parse_args(argv)


def check_sources(options: argparse.Namespace) -> None:
    """Look whether the directories to read are there.

    Raises:
        InputError: one does not exist, or is a run's; the sentence names its checkpoints.
    """
    places = {
        name: getattr(options, name, None) for name in ("source", "base", "a", "b", "directory")
    }
    for place in filter(None, places.values()):
        for checkpoints in (place / "checkpoints", place):
            found = sorted(
                path.name for path in checkpoints.glob("step-*") if (path / ".metadata").is_file()
            )
            is_run = checkpoints != place and (
                checkpoints.is_dir() or (place / "metrics.jsonl").is_file()
            )
            if found or is_run:
                what = (
                    "a run's directory"
                    if checkpoints != place
                    else "the directory of a run's checkpoints"
                )
                named = f"give one of {', '.join(str(checkpoints / name) for name in found)}"
                raise InputError(
                    f"{place} is {what}; {named if found else 'it holds no complete checkpoint'}"
                )
        if not place.exists():
            near = sorted(
                str(path) for path in place.parent.glob("step-*") if (path / ".metadata").is_file()
            )
            remedy = f"there are {', '.join(near)}" if near else "give an existing directory"
            raise InputError(f"{place} does not exist; {remedy}")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; the exit code."""
    import torch

    from tools.conversion import convert, verify

    torch.set_num_threads(1)
    if options.command == "to-dcp":
        lines = convert.to_dcp(options.source, options.out, workers=options.workers)
    elif options.command == "to-hf":
        lines = convert.to_hf(
            options.source,
            options.out,
            dtype=options.dtype,
            base=options.base,
            workers=options.workers,
            max_shard_bytes=options.max_shard_size,
        )
    elif options.command == "verify":
        return report(
            verify.verify(
                options.a, options.b, tolerance=options.tolerance, workers=options.workers
            )
        )
    else:
        lines = verify.info(options.directory)
    print("\n".join(lines))
    return 0


def report(findings: Findings) -> int:
    """Print what a comparison found; the exit code."""
    for line in findings.notes:
        print(f"note: {line}")
    for line in findings.differences[:MOST_LINES]:
        print(line)
    if len(findings.differences) > MOST_LINES:
        print(f"and {len(findings.differences) - MOST_LINES} more differences")
    print("not the same, or damaged" if findings.differences else "no differences")
    return 1 if findings.differences else 0


def main() -> int:
    """Parse and run; what can be mended is told in one sentence."""
    options = parse(sys.argv[1:])
    try:
        check_sources(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # its imports take seconds as those here do, and go on beside them
    if getattr(options, "workers", 1) > 1:
        multiprocessing.forkserver.set_forkserver_preload(["tools.conversion.verify"])
        multiprocessing.forkserver.ensure_running()

    try:
        return run(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
