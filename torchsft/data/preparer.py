"""From the rows of one source to its samples: parsed, tokenised, cut to seq_len, counted."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from torchsft.config import Data, InputError
from torchsft.data import cache
from torchsft.data.cache import row_id
from torchsft.data.columns import mapped
from torchsft.data.formats import Example, parse, recognise
from torchsft.data.rendering import variables_of
from torchsft.data.report import Result
from torchsft.data.rows import NumberedRow, Object, Payload, RowError, place_of, read_row
from torchsft.data.sources import Source
from torchsft.data.template import ChatTokenizer, Encoded, WeightedTokens, templates_of
from torchsft.data.tokenizer import eos_ids


@dataclass
class Chunk:
    """Rows that are tokenised at once.

    Attributes:
        read_bytes: of the source that are read behind them.
    """

    rows: list[NumberedRow]
    read_bytes: int


@dataclass
class TokenisedChunk:
    """The samples of a chunk as the cache keeps them, and what became of its rows.

    Attributes:
        results: of its rows; their samples are in `block`.
    """

    block: cache.Block
    results: list[Result]
    read_bytes: int

    @property
    def faults(self) -> list[RowError]:
        """Why rows cannot be used."""
        return [result.fault for result in self.results if result.fault]


@dataclass(eq=False)
class Preparer:
    """Makes samples of the rows of one source. Can be pickled.

    Args:
        vocab_size: the model's; None: ids are not checked.

    Attributes:
        format: of all rows, decided by the first good one.
    """

    tokenizer: PreTrainedTokenizerBase
    data: Data
    source: Source
    vocab_size: int | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        self.name = self.source.name
        self.places = self.source.places()
        self.columns = self.data.columns()
        self.system = self.data.system_text()
        directory = self.tokenizer.name_or_path  # "" where the tokenizer is of none
        self.eos_ids = eos_ids(directory) if directory else ()

    @functools.cached_property
    def chat(self) -> ChatTokenizer:
        """Made when it is needed, which it is not to open a cache."""
        data = self.data
        variables = data.template_variables()
        read = set().union(*map(variables_of, templates_of(self.tokenizer).values()))
        if unknown := sorted(variables.keys() - read):
            raise InputError(
                f"--data.template-kwargs has {unknown[0]!r}, which is no variable of the chat "
                f"template"
            )
        return ChatTokenizer(
            self.tokenizer,
            mask=data.mask,
            reasoning=data.reasoning,
            template_kwargs=variables,
            on_lost_context=data.on_lost_context,
            eos_ids=self.eos_ids,
        )

    def __getstate__(self) -> Object:
        return {name: value for name, value in vars(self).items() if name not in ("chat", "source")}

    def __call__(self, rows: Sequence[NumberedRow]) -> list[Result]:
        """Return a result for each row, in order."""
        results = [Result(number) for number, _ in rows]
        parsed = []
        examples = []
        for result, (_, payload) in zip(results, rows, strict=True):
            try:
                examples.append(self._parse(result, payload))
                parsed.append(result)
            except RowError as error:
                result.fault = error.at(self._place(result))
        for result, encoded in zip(parsed, self.chat.encode(examples), strict=True):
            try:
                self._take(result, encoded)
            except RowError as error:
                result.samples = []
                result.fault = RowError(error.reason, error.text, self._place(result))
        return results

    def _place(self, result: Result) -> str:
        return place_of(self.places, result.number)

    def _parse(self, result: Result, payload: Payload) -> Example:
        """Return the example of a row, and note in its result what is to be counted."""
        if isinstance(payload, RowError):
            raise payload
        row, notes = read_row(payload)
        result.notes += notes
        if self.columns:
            row = mapped(row, self.columns)
        form = recognise(row)
        if self.format not in (None, form):
            raise RowError(
                "mixed-format",
                f"format {form} where the rows before are {self.format}; give different formats as "
                f"different files",
            )
        example = parse(row, form, row_id(self.name, result.number), self.system)
        result.notes += example.notes
        result.ignored = example.ignored
        self.format = form
        return example

    def _take(self, result: Result, encoded: Encoded | RowError) -> None:
        """Put the samples of a row into its result, cut to seq_len."""
        if isinstance(encoded, RowError):
            raise encoded
        result.notes += encoded.notes
        for sample in encoded.samples:
            self._add_sample(result, sample)
        if result.samples:
            result.ends = encoded.ends
        result.kept = tuple(f"{self._place(result)}: {sentence}" for sentence in encoded.kept)

    def _add_sample(self, result: Result, sample: WeightedTokens) -> None:
        """Add a sample, cut as `data.truncation` says; what has no target (left) is dropped."""
        largest = sample.tokens.max(initial=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise RowError(
                "unknown-token",
                f"token id {largest}, but the model's vocabulary has {self.vocab_size}; use the "
                f"model's tokenizer",
            )
        for piece in self._pieces(result, len(sample.tokens)):
            weights = sample.weights[piece].copy()
            weights[:1] = 0.0  # nothing comes before it
            if weights.any():
                result.samples.append(WeightedTokens(sample.tokens[piece], weights))
            else:
                result.notes += ("no-targets",)

    def _pieces(self, result: Result, length: int) -> list[slice]:
        """Return what is left of a sample of some length."""
        limit = self.data.seq_len
        if length <= limit:
            return [slice(None)]
        how = self.data.truncation
        if how == "raise":
            raise RowError(
                "too-long",
                f"{length} tokens, but --data.seq-len is {limit}; raise it or set "
                f"--data.truncation",
            )
        if how == "drop":
            result.notes += ("too-long",)
            return []
        if how == "split":
            result.notes += ("split",)
            return [slice(i, i + limit) for i in range(0, length, limit)]
        result.notes += ("truncated",)
        return [slice(-limit, None)] if how == "left" else [slice(0, limit)]

    def tokenised(self, chunk: Chunk) -> TokenisedChunk:
        """Return the samples of a chunk, and what became of its rows."""
        samples = []
        results = self(chunk.rows)
        for result in results:
            first_part = 1 if len(result.samples) > 1 else 0
            for part, sample in enumerate(result.samples, start=first_part):
                samples.append(cache.RowSample(result.number, part, *sample))
            result.samples = []
        return TokenisedChunk(cache.pack_block(samples), results, chunk.read_bytes)
