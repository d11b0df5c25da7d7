"""From the names of sources to their samples: read, parsed, tokenised, cut to seq_len, counted, and
kept in the cache.
"""

import functools
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from torchsft.config import Data, InputError
from torchsft.data import cache
from torchsft.data.cache import row_id
from torchsft.data.columns import mapped
from torchsft.data.files import Files, open_source, place_of
from torchsft.data.formats import parse, recognise
from torchsft.data.rendering import variables_of
from torchsft.data.rows import RowError, read_row
from torchsft.data.sources import Source
from torchsft.data.specs import evaluation_sets, parse_spec
from torchsft.data.template import ChatTokenizer, Sample, templates_of
from torchsft.data.tokenizer import eos_ids

# what is tokenised at once: the first of the two that is reached
CHUNK_BYTES, CHUNK_ROWS = 2**20, 1024
FEW_CHUNKS = 8  # as many are tokenised before further processes would have started
MAX_PROCESSES = 16  # more would wait for the one that reads and writes
LISTED_FAULTS = 100
SERVER = [sys.executable, "-c", "from torchsft.data import prepare; prepare.serve()"]

Row = tuple[int, "bytes | dict[str, Any] | RowError"]  # with its number, as `Source.rows` yields it
# rows that are tokenised at once, and the bytes of the source that are read behind them
Chunk = tuple[list[Row], int]


@dataclass
class Tally:
    """What became of some rows, beside their samples."""

    rows: int = 0
    """Rows read, usable or not."""
    counts: Counter[str] = field(default_factory=Counter)
    """What happened how often, as `Report.counts`."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Keys that no format knows, with the number of rows that have them."""
    ends: Counter[int] = field(default_factory=Counter)
    """Ids of the tokens that end trained turns, with the number of these turns."""
    faults: list[RowError] = field(default_factory=list)
    """Why rows cannot be used."""
    kept: list[str] = field(default_factory=list)
    """Why rows with a fault are kept nevertheless."""


Made = tuple[cache.Block, Tally]  # samples, and what became of the rows that they are of


@dataclass
class Report:
    """What became of the rows of one source; tokens are those of the samples that are left.

    `counts`: what happened how often, to samples (too-long, truncated, split, no-targets) or rows
    (notes of the template, skipped). `ignored`: keys that no format knows, with the number of rows
    that have them. `ends`: ids of the tokens that end trained turns (as strings, for JSON), with
    the number of these turns. `faults`: the first skipped rows. `kept`: the first rows that have a
    fault and are kept nevertheless.
    """

    name: str
    path: str
    format: str | None = None
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    max_id: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def add(self, block: cache.Block, tally: Tally) -> None:
        """Take in further rows."""
        self.rows += tally.rows
        self.samples += len(block.index) - 1
        self.tokens += len(block.tokens)
        self.supervised_tokens += int((block.runs["end"] - block.runs["start"]).sum())
        self.longest = max(self.longest, int(block.index["length"].max()))
        self.max_id = max(self.max_id, int(block.tokens.max(initial=0)))
        self.counts = dict(Counter(self.counts) + tally.counts)
        self.ignored = dict(Counter(self.ignored) + tally.ignored)
        self.ends = dict(
            Counter(self.ends) + Counter({str(token): n for token, n in tally.ends.items()})
        )
        self.faults = (self.faults + [str(fault) for fault in tally.faults])[:LISTED_FAULTS]
        self.kept = (self.kept + tally.kept)[:LISTED_FAULTS]

    def __str__(self) -> str:
        supervised = 100 * self.supervised_tokens / max(self.tokens, 1)
        return (
            f"{self.name} ({self.format}): {self.rows:,} rows, {self.samples:,} samples, "
            f"{self.tokens:,} tokens"
            f" ({supervised:.1f} % supervised), longest {self.longest:,}"
        ) + "".join(f"; {text}" for text in [*self._counted(), *self._ignored()])

    def _counted(self) -> list[str]:
        return [f"{name} {count:,}" for name, count in sorted(self.counts.items())]

    def _ignored(self) -> list[str]:
        """The keys that mean nothing, each once."""
        if not self.ignored:
            return []
        keys = (f"{key} ({count:,})" for key, count in sorted(self.ignored.items()))
        return [f"ignored keys {', '.join(keys)}"]


@dataclass
class Result:
    """What one row gave: samples of at most seq_len tokens (int32 [n], float32 [n]), or the fault
    that makes it useless.
    """

    number: int
    samples: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()
    fault: RowError | None = None


@dataclass
class Prepared:
    """The samples of one source, each with a supervised token. An epoch takes each `weight`
    times.
    """

    name: str
    weight: float
    samples: cache.Samples
    report: Report
    digest: str


class Preparer:
    """Makes samples of the rows of one source. Can be pickled. The first good row decides the
    `format` of all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        source: Source | Files,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer, self.data, self.source, self.vocab_size = (
            tokenizer,
            data,
            source,
            vocab_size,
        )
        self.name, self.places = source.name, source.places()
        self.format: str | None = None
        self.columns, self.system = data.columns(), data.system_text()
        # Absent where the tokenizer is of no directory.
        self.eos_ids = eos_ids(tokenizer.name_or_path) if tokenizer.name_or_path else ()

    @functools.cached_property
    def chat(self) -> ChatTokenizer:
        """Made when it is needed, which it is not to open a cache."""
        data, variables = self.data, self.data.template_variables()
        read = {
            name
            for template in templates_of(self.tokenizer).values()
            for name in variables_of(template)
        }
        if unknown := sorted(variables.keys() - read):
            raise InputError(
                f"--data.template-kwargs has {unknown[0]!r}, which is no variable of "
                f"the chat template"
            )
        how = {
            "mask": data.mask,
            "reasoning": data.reasoning,
            "on_lost_context": data.on_lost_context,
        }
        return ChatTokenizer(self.tokenizer, template_kwargs=variables, eos_ids=self.eos_ids, **how)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("chat", "source")}

    def __call__(self, rows: Sequence[Row]) -> list[Result]:
        """A result for each row, in order."""
        results, parsed = [Result(number) for number, _ in rows], []
        for result, (number, payload) in zip(results, rows, strict=True):
            where = place_of(self.places, number)
            try:
                if isinstance(payload, RowError):
                    raise payload
                row, notes = read_row(payload, where)
                result.notes += notes
                if self.columns:
                    row = mapped(row, self.columns, where)
                found = recognise(row, where)
                if self.format not in (None, found):
                    text = (
                        f"format {found} where the rows before are {self.format}; give different "
                        f"formats as different files"
                    )
                    raise RowError(where, "mixed-format", text)
                example = parse(row, found, row_id(self.name, number), where, self.system)
                parsed.append((result, example))
                result.notes += example.notes
                result.ignored = example.ignored
                self.format = found
            except RowError as error:
                result.fault = error
        for (result, _), found in zip(
            parsed, self.chat.encode([example for _, example in parsed]), strict=True
        ):
            try:
                if isinstance(found, RowError):
                    raise found
                result.notes += found.notes
                for tokens, weights in found.samples:
                    self._fit(result, tokens, weights)
                result.ends = found.ends if result.samples else ()
                result.kept = tuple(
                    f"{place_of(self.places, result.number)}: {text}" for text in found.kept
                )
            except RowError as error:
                where = place_of(self.places, result.number)
                result.samples, result.fault = [], RowError(where, error.reason, error.text)
        return results

    def _fit(self, result: Result, tokens: np.ndarray, weights: np.ndarray) -> None:
        """Add a sample, cut as `data.truncation` says; what has no target (left) is dropped."""
        pieces, limit, how = [slice(None)], self.data.seq_len, self.data.truncation
        if self.vocab_size is not None and (largest := tokens.max(initial=0)) >= self.vocab_size:
            text = (
                f"token id {largest}, but the model's vocabulary has {self.vocab_size}; use the "
                f"model's tokenizer"
            )
            raise RowError("", "unknown-token", text)
        if len(tokens) > limit:
            if how == "raise":
                text = (
                    f"{len(tokens)} tokens, but --data.seq-len is {limit}; raise it or set "
                    f"--data.truncation"
                )
                raise RowError("", "too-long", text)
            result.notes += ({"drop": "too-long", "split": "split"}.get(how, "truncated"),)
            every = [slice(i, i + limit) for i in range(0, len(tokens), limit)]
            pieces = {
                "drop": [],
                "left": [slice(-limit, None)],
                "right": every[:1],
                "split": every,
            }[how]
        for piece in pieces:
            kept = weights[piece].copy()
            kept[:1] = 0.0  # nothing comes before it
            if kept.any():
                result.samples.append((tokens[piece], kept))
            else:
                result.notes += ("no-targets",)

    def block(self, rows: Sequence[Row]) -> Made:
        """The samples of some rows as the cache keeps them, and what became of the rows."""
        results = self(rows)
        parts = [
            (r.number, part, *s)
            for r in results
            for part, s in enumerate(r.samples, start=int(len(r.samples) > 1))
        ]
        tally = Tally(rows=len(rows))
        for result in results:
            tally.counts.update(result.notes)
            tally.ignored.update(result.ignored)
            tally.ends.update(result.ends)
            tally.kept += result.kept
            if result.fault:
                tally.faults.append(result.fault)
                tally.counts["skipped"] += 1
        return cache.pack_block(parts), tally


class Stream:
    """A source that is tokenised while it is read, for `stream.StreamLoader`; `report` counts."""

    def __init__(self, preparer: Preparer) -> None:
        source, self.preparer = preparer.source, preparer
        self.name, self.weight, self.report = (
            source.name,
            source.spec.weight,
            Report(source.name, source.spec.path),
        )

    def open(self, start: int) -> Iterator[tuple[int, int, Sample]]:
        """Yield (row number, part, sample) of the rows behind the first `start`. Raises InputError
        as `prepare` does.
        """
        preparer, source = self.preparer, self.preparer.source
        first = source.rows() if start else iter(())
        # here too the first good row decides
        while not preparer.format and (row := next(first, None)):
            preparer([row])
        for rows, _ in _chunks(source, start):
            block, tally = preparer.block(rows)
            for fault in tally.faults:
                if preparer.data.on_error == "raise":
                    raise fault
                warnings.warn(f"skipped: {fault}", stacklevel=2)
            self.report.add(block, tally)
            self.report.format = preparer.format
            samples = cache.Samples(self.name, block)
            yield from zip(samples.rows.tolist(), samples.parts.tolist(), samples, strict=True)


def open_sources(specs: Sequence[str], streaming: bool = False) -> list[Source | Files]:
    """The sources of `--data.train`, named by the last part of their path, or by all of it where
    that occurs twice.
    Raises InputError: one cannot be opened, or is given twice.
    """
    parsed = [parse_spec(str(spec)) for spec in specs]
    places = [(os.path.realpath(spec.path), spec.split) for spec in parsed]
    # a link's own: the hub's cache links to hashes
    names = [Path(os.path.abspath(spec.path)).name for spec in parsed]
    if twice := [
        spec.path for spec, place in zip(parsed, places, strict=True) if places.count(place) > 1
    ]:
        raise InputError(
            f"{twice[0]} is given twice; name it once, as {twice[0]}:2.0 to take each "
            f"of its samples twice"
        )
    whole = [spec.path + (f":{spec.split}" if spec.split else "") for spec in parsed]
    chosen = [
        name if names.count(name) == 1 else path for name, path in zip(names, whole, strict=True)
    ]
    sources = [
        open_source(spec, name, streaming) for spec, name in zip(parsed, chosen, strict=True)
    ]
    owner: dict[str, str] = {}
    for source in sources:
        for path in source.paths() if isinstance(source, Files) else [source.spec.path]:
            place = os.path.realpath(path)
            if os.path.isfile(place) and owner.setdefault(place, source.given) != source.given:
                both = f"{owner[place]} and {source.given}"
                raise InputError(
                    f"{path} is in both {both}; name it once, with a weight to take "
                    f"each of its samples twice"
                )
    return sources


def open_streams(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    vocab_size: int | None = None,
) -> list[Stream]:
    """The sources of `--data.train` under `--data.streaming`; arguments as in `prepare`."""
    return [
        Stream(Preparer(tokenizer, data, source, vocab_size))
        for source in open_sources(specs, streaming=True)
    ]


def prepare(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    vocab_size: int | None = None,
    progress: bool = False,
) -> list[Prepared]:
    """The samples of each source, from the cache or made now, under the options of `data`.
    `vocab_size`: the model's; absent:
    ids are not checked. `progress`: show a bar while this process makes them. Raises InputError: an
    unusable source, tokenizer or cache; under `on_error` raise, a row that cannot be used; a source
    of which nothing is left to train.
    """
    return [
        _prepare(Preparer(tokenizer, data, source, vocab_size), progress)
        for source in open_sources(specs)
    ]


def prepare_eval(
    specs: Sequence[str], *arguments: Any, **options: Any
) -> dict[str, list[Prepared]]:
    """`prepare` for each of `evaluation_sets`."""
    return {
        name: prepare(rest, *arguments, **options) for name, rest in evaluation_sets(specs).items()
    }


def _prepare(preparer: Preparer, progress: bool) -> Prepared:
    data, source, directory = (
        preparer.data,
        preparer.source,
        cache.cache_directory(preparer.data.cache),
    )
    path, name, content = source.spec.path, source.name, cache.fingerprint(directory, source)
    options = [
        data.mask,
        data.reasoning,
        data.template_variables(),
        data.seq_len,
        data.truncation,
        preparer.vocab_size,
    ]
    options += [preparer.columns, preparer.system]
    options += [data.on_lost_context, preparer.eos_ids]
    key = cache.key_of(
        content, source.kind, source.spec.split, _tokenizer_state(preparer.tokenizer), options
    )

    def build(add: Callable[[cache.Block], None]) -> dict[str, Any]:
        # None: where standard error is no terminal
        report, hidden = Report(name, path), None if progress else True
        bar = tqdm(
            total=source.total_bytes,
            unit="B",
            unit_scale=True,
            desc=f"tokenising {name}",
            disable=hidden,
        )
        with bar, closing(_blocks(preparer, _chunks(source))) as made:
            for (block, tally), read in made:
                if tally.faults and data.on_error == "raise":
                    raise tally.faults[0]
                add(block)
                report.add(block, tally)
                bar.update(read - bar.n)
        report.format = preparer.format
        if not report.rows:
            raise InputError(f"{path} holds no rows; remove it or give a file with at least one")
        if not report.samples:
            used = (
                f"--data.seq-len {data.seq_len}, --data.truncation {data.truncation}, --data.mask "
                f"{data.mask}"
            )
            faults = "".join(f"; first fault: {fault}" for fault in report.faults[:1])
            raise InputError(
                f"no supervised token is left: {report} ({used}); raise "
                f"--data.seq-len or change the data{faults}"
            )
        if cache.fingerprint(directory, source) != content:
            raise InputError(f"{path} changed while it was read; start again when it is complete")
        return asdict(report)

    samples, kept, digest = cache.open_or_build(directory, key, name, build)
    # The file may have moved since.
    faults, still = (
        [_moved(text, kept["path"], path) for text in kept[name]] for name in ("faults", "kept")
    )
    if faults and data.on_error == "raise":
        raise InputError(faults[0])
    report = Report(**kept | {"name": name, "path": path, "faults": faults, "kept": still})
    return Prepared(name, source.spec.weight, samples, report, digest)


def _moved(text: str, old: str, new: str) -> str:
    """A sentence on a row of a source that may have another path now."""
    return new + text.removeprefix(old) if text.startswith(old) else text


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All of it that decides how a conversation is tokenised."""
    # before: how it was called last
    backend = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')[2]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    around = tokenizer("").input_ids  # what the post-processor adds
    return [
        backend,
        around,
        templates_of(tokenizer),
        special,
        tokenizers.__version__,
        transformers.__version__,
    ]


def _chunks(source: Source, start: int = 0) -> Iterator[Chunk]:
    rows, size = [], 0
    for number, payload in source.rows(start):
        rows.append((number, payload))
        size += len(payload) if isinstance(payload, bytes) else len(repr(payload))
        if size >= CHUNK_BYTES or len(rows) >= CHUNK_ROWS:
            yield rows, source.read_bytes
            rows, size = [], 0
    if rows:
        yield rows, source.read_bytes


def _blocks(preparer: Preparer, chunks: Iterator[Chunk]) -> Iterator[tuple[Made, int]]:
    """`Preparer.block` of each chunk, in order; where there is much to do by further processes,
    each with one chunk at a time.

    Not multiprocessing: its processes import the main program (and torch) again, and live on when
    this one is killed.
    """
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    for i, (rows, read) in enumerate(chunks, start=1):
        yield preparer.block(rows), read
        if i >= FEW_CHUNKS and processes > 1 and preparer.format:  # which the others have to know
            break
    settings = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    children: deque[subprocess.Popen] = deque()  # the one that has worked longest comes first
    try:
        for chunk in chunks:
            done = []
            if len(children) == processes:
                done = [pickle.load(children[0].stdout)]
                children.rotate(-1)
            else:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                children.append(subprocess.Popen(SERVER, **pipes, env=os.environ | settings))
                pickle.dump(preparer, children[-1].stdin)
            pickle.dump(chunk, children[-1].stdin)
            children[-1].stdin.flush()
            yield from done
        for child in children:
            yield pickle.load(child.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        text = (
            f"a process that tokenises {preparer.name} ended, perhaps for lack of memory; see "
            f"above, and start again"
        )
        raise InputError(text) from error
    finally:
        for child in children:
            child.kill()
            child.communicate()


def serve() -> None:
    """A further process: reads the preparer and then chunks, and answers with their blocks, until
    there is nobody to ask.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    preparer = pickle.load(sys.stdin.buffer)
    while sys.stdin.buffer.peek(1):
        rows, read = pickle.load(sys.stdin.buffer)
        pickle.dump((preparer.block(rows), read), answers)
        answers.flush()
