"""What is wrong with samples, judged from their tokens, weights and text alone.

The code that made the mask is not asked: headers come from a probe of the chat template, everything
else from what a model would be trained on. What that code refused (a `RowError`) is a finding too,
under the reason that it gave.

errors      no-end-of-turn, header-in-targets, double-bos, no-targets, unknown-token,
            negative-weight, and every refused row; serving-differs (of `serving`)
warnings    duplicate, in-training-data, near-empty, non-finite-weight (also of a refused row),
            cut-off, after-end-of-turn, special-token-in-content, beyond-positions
notes       what is as it should be and worth knowing: NOTES below
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tools.inspection.headers import Header
from tools.inspection.reading import Reader
from torchsft.data.cache import Samples
from torchsft.data.template import Sample

WARNINGS = {
    *("duplicate", "in-training-data", "near-empty", "non-finite-weight", "cut-off"),
    *("after-end-of-turn", "special-token-in-content", "beyond-positions"),
    *("context-lost-kept", "doubtful-null"),
}
NOTES = {
    *("mask-differs", "ignored-key", "unusual-order", "empty-answer", "weight-on-context"),
    *("everything-trained", "unread-variable", "unread-name"),
}
LEVELS = ("error", "warning", "note")
TITLES = {
    "no-end-of-turn": "End of turn not trained",
    "header-in-targets": "Role header trained",
    "double-bos": "Two BOS tokens",
    "no-targets": "Nothing trained",
    "unknown-token": "Token id outside the vocabulary",
    "duplicate": "Duplicate",
    "in-training-data": "Also in the training data",
    "near-empty": "Near-empty answer",
    "context-lost": "Context lost in the chat template",
    "context-lost-kept": "Context lost in the chat template, row kept",
    "doubtful-null": "Nulls that mean something or are only Arrow's padding",
    "ignored-key": "Keys that mean nothing here",
    "unusual-order": "Roles in an unusual order, trained as the chat template writes them",
    "empty-answer": "Answers without content and calls",
    "weight-on-context": "Weights on messages that are not trained",
    "everything-trained": "Rows of input_ids alone, of which every token is trained",
    "unread-variable": "Variables that the chat template does not read",
    "unread-name": "Names of messages that the chat template does not write",
    "misspelt-key": "Misspelt key",
    "non-finite-weight": "Weight not finite",
    "negative-weight": "Weight below 0",
    "beyond-positions": "Longer than the model's positions",
    "cut-off": "Answer cut off",
    "special-token-in-content": "End of turn within an answer",
    "after-end-of-turn": "White space behind the end of turn trained",
    "reasoning-lost": "Reasoning lost in the chat template",
    "text-lost": "Text lost in the chat template",
    "not-prefix-stable": "Generation prompt no prefix of the rendering",
    "role-order": "Roles out of order",
    "mask-differs": "The other tool trains other tokens",
    "serving-differs": "Serving gives the model other tokens",
    "not-utf-8": "Invalid UTF-8",
    "not-json": "Not JSON",
    "too-long": "Longer than --data.seq-len",
}
SHORT = 8  # tokens; longer answers are not looked at for emptiness
WINDOW = 48  # tokens around the beginning of an answer, where a header may stand


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one sample or row.

    Attributes:
        reason: a word of the module's docstring or the reason of a `RowError`.
        sample: the id of a sample, or where the refused row is.
        text: a sentence.
    """

    reason: str
    source: str
    sample: str
    text: str

    @property
    def level(self) -> Literal["error", "warning", "note"]:
        """Whether it makes the inspection fail (error), should be looked at (warning), or is worth
        knowing (note).
        """
        if self.reason in NOTES:
            return "note"
        return "warning" if self.reason in WARNINGS else "error"


def title(reason: str) -> str:
    """Return the reason as a line for people."""
    return TITLES.get(reason, reason.replace("-", " ").capitalize())


class Linter:
    """Checks samples one after the other; it remembers a hash of each, to know duplicates.

    Args:
        mask: of config.Data: under `all`, headers and what follows an end of turn are trained on
            purpose.
        seq_len: a sample of this length may have been cut.
        vocab_size: rows of the model's embedding; None: not known, not checked.
        eos_ids: tokens at which generation stops; one of them may open the next turn (GLM) and is
            trained as the end then.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        mask: str,
        seq_len: int,
        vocab_size: int | None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.reader, self.mask, self.seq_len, self.vocab_size = reader, mask, seq_len, vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.special = np.array(sorted(reader.special), dtype=np.int64)
        self.added = np.array(sorted(reader.special | reader.added), dtype=np.int64)
        self._seen: dict[bytes, tuple[str, bool]] = {}
        self._spellings: list[tuple[Header, np.ndarray]] = []
        for header in reader.headers:
            ids = np.array(
                reader.backend.encode(header.core, add_special_tokens=False).ids, dtype=np.int64
            )
            rare = ids[np.isin(ids, self.special)]
            # A token that is in the header for certain: only samples that train it need to be read.
            self._spellings.append((header, rare[:1]))
        # Where every header begins with a special token, an answer behind the whole generation
        # prompt is clean at its start.
        self._prompt = np.array(
            reader.backend.encode(reader.prompt, add_special_tokens=False).ids, dtype=np.int64
        )
        if not all(
            header.core.startswith(tuple(reader.special_texts)) for header in reader.headers
        ):
            self._prompt = self._prompt[:0]

    def check(
        self, samples: Iterable[Sample], source: str, kind: str = "", evaluation: bool = False
    ) -> list[Finding]:
        """Findings of samples, in order.

        Args:
            source: name of where they come from.
            kind: format of the source: plain text has no headers, and the weights of pre-tokenised
                rows are the user's.
            evaluation: of a held-out set, which should not be trained on.
        """
        found = []
        for sample in samples:
            for reason, text in self._sample(sample, kind, evaluation):
                found.append(Finding(reason, source, sample.id, text))
        return found

    def _sample(self, sample: Sample, kind: str, evaluation: bool) -> Iterable[tuple[str, str]]:
        tokens, weights = sample.tokens.astype(np.int64), sample.weights
        yield from self._weights(weights)
        yield from self._tokens(tokens)
        yield from self._duplicate(sample, evaluation)
        runs = runs_of(weights)
        if not runs:
            yield "no-targets", "no token has a weight above 0"
            return
        if self.mask == "all" or kind in ("text", "tokens"):
            if not np.isin(tokens[weights > 0], self.added).any() and len(tokens) < self.seq_len:
                yield (
                    "no-end-of-turn",
                    "no added token is trained, so the model never learns to stop",
                )
        else:
            for start, end in runs:
                yield from self._end(tokens, start, end)
        headers = list(self._headers(tokens, runs)) if self.mask != "all" and kind != "text" else []
        yield from headers
        if self.mask != "all" and kind not in ("text", "tokens") and not headers:
            yield from self._inner_end(tokens, runs)
        yield from self._short(tokens, runs)

    def _weights(self, weights: np.ndarray) -> Iterable[tuple[str, str]]:
        if not np.isfinite(weights).all():
            i = int(np.flatnonzero(~np.isfinite(weights))[0])
            yield "non-finite-weight", f"token {i} has weight {weights[i]}"
        elif (weights < 0).any():
            i = int(np.flatnonzero(weights < 0)[0])
            yield "negative-weight", f"token {i} has weight {weights[i]:g}"

    def _tokens(self, tokens: np.ndarray) -> Iterable[tuple[str, str]]:
        bos = self.reader.bos
        if bos is not None and tokens[:2].tolist() == [bos, bos]:
            yield (
                "double-bos",
                f"it begins with two tokens {bos}; the chat template or the data writes one too "
                f"many",
            )
        largest = int(tokens.max(initial=-1))
        if self.vocab_size is not None and largest >= self.vocab_size:
            yield (
                "unknown-token",
                f"token id {largest}, but the model's vocabulary has {self.vocab_size}",
            )

    def _duplicate(self, sample: Sample, evaluation: bool) -> Iterable[tuple[str, str]]:
        content = sample.tokens.tobytes() + b"|" + sample.weights.tobytes()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        first, trained = self._seen.setdefault(digest, (sample.id, not evaluation))
        if first == sample.id and trained is not evaluation:
            return
        if trained and evaluation:
            yield "in-training-data", f"the training data has the same tokens in {first}"
        else:
            yield "duplicate", f"the same tokens and weights as {first}"

    def _end(self, tokens: np.ndarray, start: int, end: int) -> Iterable[tuple[str, str]]:
        """Yield a finding unless the trained tokens [start, end) end with one that ends turns."""
        if tokens[end - 1] in self.reader.special:
            return
        if tokens[end - 1] in self.reader.added and not self._is_end(tokens[end:]):
            return  # any added token may end a turn, unless one that certainly does comes next
        if end == len(tokens) and len(tokens) >= self.seq_len:
            yield (
                "cut-off",
                f"the answer at token {start} is cut at --data.seq-len ({self.seq_len}) and does "
                f"not end",
            )
            return
        behind = next(
            (i for i in range(end - 1, start, -1) if self.reader.piece(int(tokens[i])).strip()),
            start,
        )
        last = self.reader.text(tokens[max(start, end - 4) : end])
        if tokens[behind] in self.reader.special:
            yield "after-end-of-turn", f"the answer at token {start} ends with {last!r}"
        else:
            yield (
                "no-end-of-turn",
                f"the answer at token {start} ends with {last!r}, which is no end-of-turn token",
            )

    def _is_end(self, behind: np.ndarray) -> bool:
        """Return whether the first of these tokens that is no white space ends turns."""
        first = next(
            (int(token) for token in behind if self.reader.piece(int(token)).strip()), None
        )
        return first in self.reader.special

    def _headers(
        self, tokens: np.ndarray, runs: Sequence[tuple[int, int]]
    ) -> Iterable[tuple[str, str]]:
        length = len(self._prompt)
        for start, end in runs:
            run, near = tokens[start:end], None
            # the end of the answer, also where it begins the next header
            if int(run[-1]) in self.eos_ids:
                run = run[:-1]
            if not len(run):
                continue
            if length and start >= length and run[0] not in self.reader.special:
                near = (
                    ("", "")
                    if np.array_equal(tokens[start - length : start], self._prompt)
                    else None
                )
            for header, rare in self._spellings:
                if len(rare) and (run == rare[0]).any() and header.core in self.reader.text(run):
                    yield (
                        "header-in-targets",
                        f"the answer at token {start} holds the {header.role} header "
                        f"{header.core!r}",
                    )
                    return
                if near is None:
                    near = (
                        self.reader.text(tokens[max(0, start - WINDOW) : start]),
                        self.reader.text(run[:WINDOW]),
                    )
                if near[1] and (part := _part(header, self.reader.prompt, *near)):
                    yield (
                        "header-in-targets",
                        f"the answer at token {start} begins with {part!r} of the {header.role} "
                        f"header",
                    )
                    return

    def _inner_end(
        self, tokens: np.ndarray, runs: Sequence[tuple[int, int]]
    ) -> Iterable[tuple[str, str]]:
        """Return a token that ends a turn, before the one that does: content with its text in it
        forges turns.
        """
        for start, end in runs:
            last = start + int(
                np.flatnonzero(np.isin(tokens[start:end], self.special)).max(initial=0)
            )
            ends = {int(tokens[last]), self.reader.eos} & self.reader.special
            if inner := [i for i in range(start, last) if tokens[i] in ends]:
                said = self.reader.text(tokens[inner[0] : inner[0] + 1])
                yield (
                    "special-token-in-content",
                    f"the answer at token {start} holds {said!r} at token {inner[0]}, before its "
                    f"end",
                )
                return

    def _short(
        self, tokens: np.ndarray, runs: Sequence[tuple[int, int]]
    ) -> Iterable[tuple[str, str]]:
        for start, end in runs:
            if end - start <= SHORT:
                said = self.reader.text(
                    [i for i in tokens[start:end] if i not in self.reader.special]
                ).strip()
                if len(said) < 2 or not any(character.isalnum() for character in said):
                    yield "near-empty", f"the answer at token {start} is {said!r}"
                    return


def beyond_positions(samples: Samples, source: str, positions: int) -> list[Finding]:
    """Return a finding for each sample with more tokens than the model has positions, the longest
    first.
    """
    lengths = samples.lengths
    beyond = np.flatnonzero(lengths > positions)
    order = beyond[np.argsort(-lengths[beyond], kind="stable")]
    limit = f"max_position_embeddings of the model is {positions:,}"
    among = f"{len(beyond):,} such samples, the longest of {int(lengths.max(initial=0)):,} tokens"
    texts = [f"{int(lengths[i]):,} tokens, but {limit} ({among})" for i in order]
    return [
        Finding("beyond-positions", source, samples.id(i), text)
        for i, text in zip(order, texts, strict=True)
    ]


def runs_of(weights: np.ndarray) -> list[tuple[int, int]]:
    """Return where tokens with a weight above 0 begin and end, for each contiguous run."""
    trained = np.concatenate([[False], weights > 0, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _part(header: Header, prompt: str, before: str, run: str) -> str:
    """Return the part of a header with which a run of trained text begins, if the rest of the
    header stands before it.
    """
    # What the generation prompt writes is the header to its last character; of others, the last
    # space may be content's.
    whole = header.text if header.text == prompt else header.core
    for cut in range(len(whole)):
        if run.startswith(whole[cut:]) and before.endswith(whole[:cut]):
            return whole[cut:]
    return ""
