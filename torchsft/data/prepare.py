"""From the names of sources to their samples, made by `preparer.py` and kept in the cache."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from torchsft.config import Data, InputError
from torchsft.data import cache
from torchsft.data.files import Files, open_source
from torchsft.data.pool import tokenise
from torchsft.data.preparer import Chunk, Preparer
from torchsft.data.report import Report
from torchsft.data.rows import NumberedRow
from torchsft.data.sources import Source
from torchsft.data.specs import Spec, evaluation_sets, parse_spec
from torchsft.data.template import Sample, templates_of

# what is tokenised at once: the first of the two that is reached
CHUNK_BYTES = 2**20
CHUNK_ROWS = 1024


@dataclass
class Prepared:
    """The samples of one source, each with a supervised token.

    Attributes:
        weight: how often an epoch takes each sample.
        digest: a hash of the samples.
    """

    name: str
    weight: float
    samples: cache.Samples
    report: Report
    digest: str


class Stream:
    """A source that is tokenised while it is read, for `stream.StreamLoader`; `report` counts."""

    def __init__(self, preparer: Preparer) -> None:
        spec = preparer.source.spec
        self.preparer = preparer
        self.name = preparer.source.name
        self.weight = spec.weight
        self.report = Report(self.name, spec.path)

    def open(self, start: int) -> Iterator[tuple[int, int, Sample]]:
        """Yield (row number, part, sample) of the rows behind the first `start`.

        Raises:
            InputError: as `prepare`.
        """
        preparer = self.preparer
        if start:
            self._find_format()
        for chunk in _chunks(preparer.source, start):
            tokenised = preparer.tokenised(chunk)
            for fault in tokenised.faults:
                if preparer.data.on_error == "raise":
                    raise fault
                warnings.warn(f"skipped: {fault}", stacklevel=2)
            self.report.add(tokenised.block, tokenised.results)
            self.report.format = preparer.format
            samples = cache.Samples(self.name, tokenised.block)
            yield from zip(samples.rows.tolist(), samples.parts.tolist(), samples, strict=True)

    def _find_format(self) -> None:
        """Let the first good row of all decide the format, as where reading begins with it."""
        for row in self.preparer.source.rows():
            if self.preparer.format:
                return
            self.preparer([row])


def open_sources(specs: Sequence[str], streaming: bool = False) -> list[Source]:
    """Open the sources of `--data.train`, named by the last part of their path, or by all of it
    where that occurs twice.

    Raises:
        InputError: one cannot be opened, or is given twice.
    """
    parsed = [parse_spec(str(spec)) for spec in specs]
    _check_given_once(parsed)
    sources = [open_source(spec, streaming) for spec in parsed]
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            source.name = source.spec.given
    _check_no_file_twice(sources)
    return sources


def _check_given_once(specs: Sequence[Spec]) -> None:
    places = [(os.path.realpath(spec.path), spec.split) for spec in specs]
    for spec, place in zip(specs, places, strict=True):
        if places.count(place) > 1:
            raise InputError(
                f"{spec.path} is given twice; name it once, as {spec.path}:2.0 to take each "
                f"of its samples twice"
            )


def _check_no_file_twice(sources: Sequence[Source]) -> None:
    owner: dict[str, str] = {}  # the source of each file
    for source in sources:
        given = source.spec.given
        paths = source.paths() if isinstance(source, Files) else [source.spec.path]
        for path in paths:
            place = os.path.realpath(path)
            if os.path.isfile(place) and owner.setdefault(place, given) != given:
                raise InputError(
                    f"{path} is in both {owner[place]} and {given}; name it once, with a weight to "
                    f"take each of its samples twice"
                )


def open_streams(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    vocab_size: int | None = None,
) -> list[Stream]:
    """Open the sources of `--data.train` under `--data.streaming`; arguments as in `prepare`."""
    sources = open_sources(specs, streaming=True)
    return [Stream(Preparer(tokenizer, data, source, vocab_size)) for source in sources]


def prepare(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    vocab_size: int | None = None,
    progress: bool = False,
) -> list[Prepared]:
    """Return the samples of each source, from the cache or made now, under the options of `data`.

    Args:
        vocab_size: the model's; None: ids are not checked.
        progress: whether to show a bar while this process makes them.

    Raises:
        InputError: an unusable source, tokenizer or cache; under `on_error` raise, a row that
            cannot be used; a source of which nothing is left to train.
    """
    sources = open_sources(specs)
    return [_prepare(Preparer(tokenizer, data, source, vocab_size), progress) for source in sources]


def prepare_eval(
    specs: Sequence[str], *arguments: Any, **options: Any
) -> dict[str, list[Prepared]]:
    """Return what `prepare` returns, for each of `evaluation_sets`."""
    sets = evaluation_sets(specs)
    return {name: prepare(sources, *arguments, **options) for name, sources in sets.items()}


def _prepare(preparer: Preparer, progress: bool) -> Prepared:
    data, source = preparer.data, preparer.source
    path, name = source.spec.path, source.name
    directory = cache.cache_directory(data.cache)
    content = cache.fingerprint(directory, source)
    key = _cache_key(preparer, content)

    def build(add: cache.AddBlock) -> dict[str, Any]:
        report = _build(preparer, add, progress)
        if cache.fingerprint(directory, source) != content:
            raise InputError(f"{path} changed while it was read; start again when it is complete")
        return vars(report)

    opened = cache.open_or_build(directory, key, name, build)
    report = Report(**opened.report)
    # the cache is that of the content, which may have had another name and path
    for sentences in (report.faults, report.kept):
        for i, sentence in enumerate(sentences):
            if sentence.startswith(report.path):
                sentences[i] = path + sentence.removeprefix(report.path)
    report.name = name
    report.path = path
    if report.faults and data.on_error == "raise":
        raise InputError(report.faults[0])
    return Prepared(name, source.spec.weight, opened.samples, report, opened.digest)


def _build(preparer: Preparer, add: cache.AddBlock, progress: bool) -> Report:
    """Tokenise a source, and add its samples to the cache."""
    data, source = preparer.data, preparer.source
    report = Report(source.name, source.spec.path)
    bar = tqdm(
        total=source.total_bytes,
        unit="B",
        unit_scale=True,
        desc=f"tokenising {source.name}",
        disable=None if progress else True,  # None: where standard error is no terminal
    )
    with bar, closing(tokenise(preparer, _chunks(source))) as chunks:
        for chunk in chunks:
            if chunk.faults and data.on_error == "raise":
                raise chunk.faults[0]
            add(chunk.block)
            report.add(chunk.block, chunk.results)
            bar.update(chunk.read_bytes - bar.n)
    report.format = preparer.format
    if not report.rows:
        raise InputError(f"{report.path} holds no rows; remove it or give a file with at least one")
    if not report.samples:
        first_fault = f"; first fault: {report.faults[0]}" if report.faults else ""
        raise InputError(
            f"no supervised token is left: {report} (--data.seq-len {data.seq_len}, "
            f"--data.truncation {data.truncation}, --data.mask {data.mask}); raise --data.seq-len "
            f"or change the data{first_fault}"
        )
    return report


def _cache_key(preparer: Preparer, content: str) -> str:
    """Return the name of a source's samples, of all that decides them."""
    data, spec = preparer.data, preparer.source.spec
    options = [
        data.mask,
        data.reasoning,
        data.template_variables(),
        data.seq_len,
        data.truncation,
        preparer.vocab_size,
        preparer.columns,
        preparer.system,
        data.on_lost_context,
        preparer.eos_ids,
    ]
    tokenizer = _tokenizer_state(preparer.tokenizer)
    return cache.key_of(content, preparer.source.kind, spec.split, tokenizer, options)


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return all of a tokenizer that decides how a conversation is tokenised."""
    # what stands before depends on how it was called last
    backend = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')[2]
    added_by_post_processor = tokenizer("").input_ids
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [
        backend,
        added_by_post_processor,
        templates_of(tokenizer),
        special,
        tokenizers.__version__,
        transformers.__version__,
    ]


def _chunks(source: Source, start: int = 0) -> Iterator[Chunk]:
    """Yield the rows behind the first `start`, in chunks."""
    rows: list[NumberedRow] = []
    size = 0
    for number, payload in source.rows(start):
        rows.append((number, payload))
        size += len(payload) if isinstance(payload, bytes) else len(repr(payload))
        if size >= CHUNK_BYTES or len(rows) >= CHUNK_ROWS:
            yield Chunk(rows, source.read_bytes)
            rows = []
            size = 0
    if rows:
        yield Chunk(rows, source.read_bytes)
