"""Show what is trained, and find what is wrong with it, before a GPU is touched.

python tools/inspect_data.py --model.path HF_DIR --data.train chats.jsonl
python tools/inspect_data.py ... --html inspection.html     a page to read conversations on
python tools/inspect_data.py ... --json samples.jsonl --max-samples 100    one object a sample
python tools/inspect_data.py ... --show chats.jsonl:17 3    sample 17, and three with findings
python tools/inspect_data.py ... --compare trl              where TRL's mask of these rows differs
python tools/inspect_data.py ... --compare FILE             the same of a dump (input_ids, labels)

Options of --model, --data and --train are those of training, and so is the cache that it fills.
Exit code 1: errors were found (rows that cannot be used, no end-of-turn token trained, ...), or
there is nothing to inspect. Warnings leave it at 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchsft import config
from torchsft.cli import parse_tool, refusals
from torchsft.config import InputError
from torchsft.data.specs import evaluation_sets, files_of, is_several, parse_spec
from torchsft.launch import check_data, check_model, model_directory

if TYPE_CHECKING:
    from tools.inspection.report import Inspection

PARTIAL = ".partial"  # behind the name of a file that is being written
STREAMED = 10_000  # samples of a source that is streamed, as it may have no end


@dataclass(kw_only=True)
class Model:
    """Whose tokenizer, chat template and vocabulary."""

    path: str
    """Hugging Face directory: tokenizer, and config.json (else ids and lengths are not compared
    with it).
    """


@dataclass(kw_only=True)
class Train:
    """For the estimate of steps and epochs."""

    steps: int | None = None
    """Optimizer steps. Give this or epochs."""
    epochs: int | float | None = None
    """Passes over the training data, such as 0.5. Neither given: 1 epoch."""
    global_batch_size: int = config.Train().global_batch_size
    """Rows per optimizer step, over all ranks."""
    seed: int = 0
    """Seed of the order, on which it depends what shares a row."""

    def __post_init__(self) -> None:
        config.Train(**vars(self))  # which refuses what cannot be


@dataclass(kw_only=True)
class Options:
    """The command line."""

    model: Model
    data: config.Data = field(default_factory=config.Data)
    train: Train = field(default_factory=Train)
    html: str | None = None
    """File for a page that shows samples with their trained tokens, packed rows and findings; it
    loads nothing.
    """
    json: str | None = None
    """File for one JSON object a line and sample: id, source, tokens, weights, text."""
    compare: tuple[str, ...] = ()
    """Another tool whose mask is put beside ours: `trl` (run on the rows), or FILE, its dump of
    input_ids and labels (JSONL, Parquet, Arrow, save_to_disk); `axolotl-file FILE` is the same.
    """
    max_samples: int | None = None
    """Samples of each source that are read, the first ones; absent: all."""
    show: tuple[str, ...] = ("1",)
    """Samples to print: ids, or how many (those with findings first); 0: none."""
    color: Literal["auto", "always", "never"] = "auto"
    """Trained tokens in colour, or in brackets; auto: colour on a terminal unless NO_COLOR is
    set.
    """

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise InputError(f"--max-samples is {self.max_samples}, but it must be at least 1")


def inspect(options: Options, progress: bool) -> Inspection:
    """Read, tokenise and check everything."""
    from tqdm import tqdm

    from tools.inspection import compare, gather, lint, others, report, serving
    from tools.inspection.reading import Reader
    from torchsft.data.tokenizer import load_tokenizer

    theirs = others.open_other(options.compare)
    data = options.data
    tokenizer = load_tokenizer(
        options.model.path, chat_template=data.chat_template, date=data.template_date
    )
    facts = gather.facts(options.model.path)
    most = options.max_samples or (STREAMED if data.streaming else None)
    sources, findings = gather.gather(
        tokenizer, data, vocab_size=facts.vocab_size, most=most, progress=progress
    )
    reader = Reader(tokenizer, data.template_variables())
    known = {"vocab_size": facts.vocab_size, "eos_ids": facts.eos_ids}
    linter = lint.Linter(reader, mask=data.mask, seq_len=data.seq_len, **known)

    def watch(samples: Any) -> Any:
        return tqdm(
            samples,
            desc="checking",
            unit=" samples",
            disable=None if progress else True,
            leave=False,
            delay=1,
        )

    findings += report.lint(linter, sources, watch, facts.positions)
    server = serving.Server(options.model.path, data)
    for source in sources:
        findings += server.check(source)
    trained = [source for source in sources if not source.evaluation]
    comparison = theirs and compare.compare(
        theirs(trained, options.model.path, data), trained, reader, findings
    )
    findings += comparison.findings() if comparison else ()
    streamed = (
        f"--data.streaming reads the first {STREAMED:,} of each source; --max-samples N is another "
        f"number"
    )
    left_out = "--max-samples left out the others" if options.max_samples else streamed
    return report.Inspection(
        model=options.model.path,
        data=data,
        training=dataclasses.asdict(options.train),
        reader=reader,
        sources=sources,
        findings=findings,
        plan=report.plan(trained, data, **dataclasses.asdict(options.train)),
        left_out=left_out
        if most and any(len(source.samples) >= most for source in trained)
        else "",
        comparison=comparison,
    )


def _check_outputs(options: Options) -> None:
    """Look whether the files to write can be written.

    Raises:
        InputError: one cannot, or is also read.
    """
    specs = [
        *options.data.train,
        *(spec for specs in evaluation_sets(options.data.eval).values() for spec in specs),
    ]
    parsed = [parse_spec(str(spec)) for spec in specs]
    sources = {os.path.realpath(spec.path) for spec in parsed}
    sources |= {
        os.path.realpath(file)
        for spec in parsed
        if is_several(spec)
        for file in files_of(spec.path)[0]
    }
    outputs = {"--json": options.json, "--html": options.html}
    for option, path in outputs.items():
        if not path or _is_device(path):
            continue
        for place in (Path(os.path.realpath(path)), Path(os.path.realpath(path) + PARTIAL)):
            if str(place) in sources or (
                place.exists() and any(str(above) in sources for above in place.parents)
            ):
                raise InputError(
                    f"{option} {path} would overwrite data that is inspected "
                    f"({place}); name another file"
                )
        if os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.realpath(path))):
            raise InputError(
                f"{option} {path} is a directory, or in none; name a file in a "
                f"directory that exists"
            )
    if (
        options.json
        and options.html
        and os.path.realpath(options.json) == os.path.realpath(options.html)
    ):
        raise InputError(f"--json and --html are both {options.html}; name two files")


def _is_device(path: str) -> bool:
    """Return whether it is a pipe, a terminal or the like, such as /dev/stdout."""
    return path.startswith("/dev/") or (
        os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    )


def _write(path: str, write: Callable[[Path], object]) -> None:
    """A file that is there in whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    whole = Path(path if _is_device(path) else os.path.realpath(path))
    partial = whole if _is_device(path) else Path(f"{whole}{PARTIAL}")
    try:
        write(partial)
        if partial != whole:
            partial.replace(whole)
    except BrokenPipeError:
        raise
    except OSError as error:
        if partial != whole:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error.strerror}); name another file or make room"
        ) from None


def run(options: Options) -> int:
    """Inspect, print and write; the exit code."""
    options.model.path = model_directory(options.model.path)
    check_model(options.model.path, config=False, weights=False)
    check_data(options.data)
    _check_outputs(options)
    from tools.inspection import page, report, terminal

    inspection = inspect(options, progress=sys.stderr.isatty())
    automatic = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    pen = terminal.Pen(automatic if options.color == "auto" else options.color == "always")
    if options.json:
        _write(options.json, lambda file: report.write_json(file, inspection))
    if options.html:
        _write(
            options.html, lambda file: file.write_text(page.render(inspection), encoding="utf-8")
        )
    for source, sample in terminal.choose(inspection, options.show):
        pairs = inspection.comparison.pairs if inspection.comparison is not None else ()
        pair = next(
            (
                p
                for p in pairs
                if p.source == source.name and p.ours is not None and p.ours.id == sample.id
            ),
            None,
        )
        if pair is not None and pair.differs:
            print(
                *terminal.pair_lines(pair, inspection.comparison.other, inspection.reader, pen),
                sep="\n",
            )
            continue
        mine = [f for f in inspection.findings if (f.source, f.sample) == (source.name, sample.id)]
        print(*terminal.sample_lines(sample, inspection.reader, mine, pen), sep="\n")
    print(*terminal.overview(inspection, pen), sep="\n", flush=True)
    return 1 if inspection.level("error") else 0


def main() -> int:
    """Parse and run; what can be mended is told in one sentence."""
    with refusals():
        options = parse_tool(Options, sys.argv[1:], __doc__ or "")
    try:
        return run(options)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
