"""From a conversation to tokens and loss weights, by the model's own chat template and tokenizer.

Each conversation is rendered to one text and tokenised once; which tokens are trained is decided by characters, never
by token ids, so a pad token that equals the end-of-turn token changes nothing. What is trained of an assistant turn:

    <|im_start|>assistant\\n The answer. <|im_end|> \\n
    \\___ header, not ___/  \\_____ trained _____/  not

- The span begins where the generation prompt ends, as the model writes everything after it. Where the generation prompt
  is no prefix of the rendering (DeepSeek-R1's ends in `<think>`, which its template writes for no answer), the span
  begins with the content. A `{% generation %}` block can only make the span begin later.
- The span ends with the end-of-turn token: the first special token after the content, which has to belong to this turn.
- A token is trained if it begins inside a span. No token may begin before a span and reach into it: where the tokenizer
  would join the end of the header with the beginning of the answer, the text is tokenised in pieces that begin at the
  spans, which is what inference sees, where the generation prompt is tokenised on its own.

A template that leaves out or changes the text of a trained turn, or that does not end it, is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from torchsft import config
from torchsft.config import InputError
from torchsft.data.formats import Conversation, read_jsonl

Mask = Literal["assistant", "last-turn", "all"]
CONVERSATIONS_AT_ONCE = 256  # per call of the tokenizer, which works on them in parallel


@dataclass(slots=True, eq=False)
class Sample:
    """One tokenised conversation. Accepts any sequences and keeps arrays, which take a fifth of the memory of lists.

    Attributes:
        id: `<file name>:<line number>`.
        tokens: int32 [n], n at least 1.
        weights: float32 [n], loss weight of token i as a *target*, that is of predicting it from the tokens before it.
            The first one is 0, as nothing comes before it.
    """

    id: str
    tokens: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, dtype=np.int32)
        self.weights = np.asarray(self.weights, dtype=np.float32)


def answer_prompts(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """For each contiguous run of supervised tokens: the tokens before it, and the run with its end-of-turn token."""
    trained = np.concatenate([[False], sample.weights > 0, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    tokens = sample.tokens.tolist()
    return [(tokens[:start], tokens[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


# ---------------------------------------------------------------- tokenizer


def load_tokenizer(hf_dir: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory, with its chat template. Local files only; code in them is never run.

    Raises:
        InputError: the directory has no tokenizer.json (Kimi-K2 and Moonlight ship tiktoken.model with Python code of
            their own), it cannot be read, or there is no chat template.
    """
    hf_dir = Path(hf_dir)
    if not hf_dir.is_dir():
        raise InputError(f"{hf_dir} is not a directory; give --model.path a Hugging Face model directory")
    if not (hf_dir / "tokenizer.json").is_file():
        # transformers can convert tiktoken.model, but splits words by one pattern for all models, which is not Kimi's.
        other = [name for name in ("tiktoken.model", "tokenizer.model") if (hf_dir / name).is_file()]
        found = f", only {' and '.join(other)}" if other else ""
        raise InputError(
            f"{hf_dir} has no tokenizer.json{found}; convert its tokenizer and add it (Python code in a model"
            " directory is never run)"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:  # the Rust parser raises plain Exception, a missing key is a KeyError, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the tokenizer of {hf_dir} cannot be read ({reason}); replace its tokenizer files") from error
    if not tokenizer.chat_template:
        raise InputError(f"{hf_dir} has no chat template; add a chat_template.jinja, such as that of the model's chat version")
    return tokenizer


# ---------------------------------------------------------------- spans of characters


@dataclass(frozen=True)
class _Turn:
    """Where a trained assistant turn lies in a rendering, in characters."""

    content: tuple[int, int]
    span: tuple[int, int]  # what is trained: from the end of the header to the end of the end-of-turn token
    has_prompt: bool  # the generation prompt is a prefix of the rendering


@dataclass(frozen=True)
class _Skeleton:
    """A sequence of roles, rendered with placeholders for the contents."""

    literals: list[str]  # what the template writes before, between and after the contents; one more than messages
    around: dict[int, tuple[int, int]]  # assistant message: characters of its span before and after the content


class ChatTokenizer:
    """Turns conversations into samples. Safe to keep: it works on a copy of the tokenizer's backend."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Raises:
            InputError: the tokenizer is not a fast one, which alone knows where in the text a token comes from.
        """
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} is a slow tokenizer; give a directory with a tokenizer.json")
        self.template = tokenizer.get_chat_template()
        self.has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self.special_tokens = dict(tokenizer.special_tokens_map)  # the template's bos_token, eos_token, ...
        added = tokenizer.added_tokens_decoder.values()
        enders = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self.end_of_turn = re.compile(r"\s*(?:" + ("|".join(map(re.escape, enders)) or "(?!)") + ")")
        self.bos = tokenizer.bos_token_id
        self.adds_bos = self.bos is not None and tokenizer("").input_ids[:1] == [self.bos]
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None  # it would take the spaces out of the offsets (ByteLevel's trim_offsets)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.skeletons: dict[tuple[str, ...], _Skeleton | None] = {}

    def samples(self, conversations: Sequence[Conversation], mask: Mask) -> list[Sample]:
        """One sample for each conversation, of whatever length.

        Args:
            mask: assistant: every assistant turn; last-turn: the last of them; all: every token but the first.

        Raises:
            InputError: the template refuses, rewrites or does not end a conversation, or begins it with two BOS tokens;
                the sentence names its id.
        """
        rendered = [self._spans(conversation, mask) for conversation in conversations]
        encodings = self.backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        samples = []
        for conversation, (text, spans), encoding in zip(conversations, rendered, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            if any(_straddled(offsets, start) for start, _ in spans):
                ids, offsets = self._encode_in_pieces(text, [start for start, _ in spans], ids, conversation.id)
            weights = np.full(len(ids), 1.0 if mask == "all" else 0.0, dtype=np.float32)
            for start, end in spans:
                weights[(offsets[:, 0] >= start) & (offsets[:, 0] < end)] = 1.0
            samples.append(self._sample(conversation.id, ids, weights))
        return samples

    def _sample(self, name: str, ids: np.ndarray, weights: np.ndarray) -> Sample:
        """With exactly one BOS, if the template or the tokenizer writes any."""
        if self.bos is not None:
            if ids[:2].tolist() == [self.bos, self.bos]:
                raise InputError(
                    f"{name}: the text begins with two BOS tokens (id {self.bos}); take one out of the chat template"
                )
            if self.adds_bos and ids[:1].tolist() != [self.bos]:
                ids = np.concatenate([[self.bos], ids])
                weights = np.concatenate([[0.0], weights])
        weights[:1] = 0.0
        return Sample(name, ids, weights)

    def _encode_in_pieces(
        self, text: str, starts: list[int], whole_ids: np.ndarray, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and offsets of the text when no token may reach across one of `starts`; must decode to the same text."""
        edges = [0, *starts, len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
        encodings = self.backend.encode_batch(pieces, add_special_tokens=False)
        ids = [i for encoding in encodings for i in encoding.ids]
        offsets = [(a + s, a + e) for a, encoding in zip(edges, encodings, strict=False) for s, e in encoding.offsets]
        if self._decode(ids) != self._decode(whole_ids.tolist()):
            raise InputError(
                f"{name}: a token reaches from the header into an assistant turn, and this tokenizer changes the text"
                " when it is split there; change the whitespace at the beginning of the turn or the chat template"
            )
        return np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64)

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def _spans(self, conversation: Conversation, mask: Mask) -> tuple[str, list[tuple[int, int]]]:
        """The rendering and the trained spans in it (characters, in order); no spans for the mask `all`."""
        messages, name = conversation.messages, conversation.id
        if mask == "all":
            return self._render(messages, name)[0], []
        trained = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if mask == "last-turn":
            trained = trained[-1:]
        skeleton = self._skeleton(tuple(message["role"] for message in messages))
        if skeleton:
            text, _ = self._render(messages, name)
            contents = _walk(text, skeleton.literals, [message["content"] for message in messages])
            if contents:
                spans = [(contents[i][0] - skeleton.around[i][0], contents[i][1] + skeleton.around[i][1]) for i in trained]
                return text, spans
        text, turns = self._locate(messages, trained, name)
        return text, [turn.span for turn in turns]

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        """What the template writes around the contents of such conversations; None where that depends on the contents.

        Locating the turns takes several renderings for each of them. It is done once for a sequence of roles; a
        conversation whose rendering is the skeleton with its contents filled in then needs only that one rendering.
        """
        if roles not in self.skeletons:
            placeholders = [f"\ue002{i}\ue003" for i in range(len(roles))]
            messages = [{"role": r, "content": p} for r, p in zip(roles, placeholders, strict=True)]
            trained = [i for i, role in enumerate(roles) if role == "assistant"]
            try:
                text, turns = self._locate(messages, trained, "a conversation")
            except InputError:  # to be raised for the real conversation, if it is true for that one too
                self.skeletons[roles] = None
                return None
            literals = re.split("\ue002[0-9]+\ue003", text)
            filled = literals[0] + "".join(p + after for p, after in zip(placeholders, literals[1:], strict=False))
            usable = filled == text and len(literals) == len(roles) + 1 and all(turn.has_prompt for turn in turns)
            around = {
                i: (turn.content[0] - turn.span[0], turn.span[1] - turn.content[1])
                for i, turn in zip(trained, turns, strict=True)
            }
            self.skeletons[roles] = _Skeleton(literals, around) if usable else None
        return self.skeletons[roles]

    def _locate(self, messages: list[dict[str, str]], trained: list[int], name: str) -> tuple[str, list[_Turn]]:
        """The rendering, and where in it the assistant messages `trained` lie, for any template.

        A second rendering with a mark at the end of each trained content finds the contents: it must be the first one
        when the marks are taken out again.
        """
        text, blocks = self._render(messages, name)
        for clean in (str, str.rstrip):  # the second for templates that trim
            marked = [dict(message) for message in messages]
            for i in trained:
                marked[i]["content"] = clean(marked[i]["content"]) + _mark(i)
            pieces = re.split("(\ue000[0-9]+\ue001)", self._render(marked, name)[0])
            if "".join(pieces[::2]) == text and pieces[1::2] == [_mark(i) for i in trained]:
                break
        else:
            raise InputError(self._rewritten(name, "a trained assistant message"))
        ends = itertools.accumulate(len(piece) for piece in pieces[::2])
        return text, [
            self._locate_turn(messages, marked, i, end, text, blocks, name) for i, end in zip(trained, ends, strict=False)
        ]

    def _locate_turn(
        self,
        messages: list[dict[str, str]],
        marked: list[dict[str, str]],
        i: int,
        end: int,
        text: str,
        blocks: list[tuple[int, int]],
        name: str,
    ) -> _Turn:
        """Assistant message i, whose content ends at character `end` of the rendering."""
        where = f"{name}, message {i + 1}"
        written = [content for content in _trimmed(messages[i]["content"]) if text.endswith(content, 0, end)]
        if not written:
            raise InputError(self._rewritten(name, f"assistant message {i + 1}"))
        content = (end - len(written[0]), end)

        before, _ = self._render(messages[:i], name)
        prompt, _ = self._render(messages[:i], name, generation_prompt=True)
        has_prompt = text.startswith(prompt) and len(prompt) <= end
        start = content[0]
        # A template may write no generation prompt because its turns have no header, or because it knows no such thing.
        if has_prompt and (prompt != before or not text[len(prompt) : start].strip()):
            start = len(prompt)

        tail = self._render(marked[: i + 1], name)[0].rpartition(_mark(i))[2]
        end_of_turn = self.end_of_turn.match(tail)
        if not end_of_turn or not text.startswith(end_of_turn.group(), end):
            raise InputError(
                f"{where}: the chat template writes no special token that ends the assistant turn, so the model would"
                " never learn to stop; add the end-of-turn token to the chat template"
            )
        if self.has_blocks:
            starts = [a for a, b in blocks if a <= end <= b]
            if not starts:
                raise InputError(
                    f"{where}: the chat template's {{% generation %}} blocks do not hold the assistant's text; move"
                    " the block around it, or remove the blocks from the chat template"
                )
            start = max(start, starts[0])
        return _Turn(content, (start, end + end_of_turn.end()), has_prompt)

    def _render(
        self, messages: list[dict[str, str]], name: str, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters of its generation blocks."""
        try:
            texts, blocks = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_blocks,
                add_generation_prompt=generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # the template is a program of the model's author: it can fail in any way
            raise InputError(
                f"{name}: the chat template refuses the conversation ({error}); change the data or the chat template"
            ) from None
        return texts[0], blocks[0] if self.has_blocks else []

    @staticmethod
    def _rewritten(name: str, what: str) -> str:
        return (
            f"{name}: the chat template leaves out or changes text of {what}, so that it cannot be trained as given;"
            " write it as the template does (reasoning left out), or set --data.mask last-turn"
        )


def _mark(i: int) -> str:
    return f"\ue000{i}\ue001"  # private-use characters, which no template treats as space or as anything else


def _trimmed(content: str) -> list[str]:
    """The content as a template may write it, longest first."""
    return [content, content.rstrip(), content.lstrip(), content.strip()]


def _walk(text: str, literals: list[str], contents: list[str]) -> list[tuple[int, int]] | None:
    """Where the contents lie if the text is made of `literals` with the (trimmed) contents between, else None."""
    if not text.startswith(literals[0]):
        return None
    found = []
    at = len(literals[0])
    for content, after in zip(contents, literals[1:], strict=True):
        fitting = [written for written in _trimmed(content) if text.startswith(written + after, at)]
        if not fitting:
            return None
        found.append((at, at + len(fitting[0])))
        at += len(fitting[0]) + len(after)
    return found if at == len(text) else None


def _straddled(offsets: np.ndarray, start: int) -> bool:
    """Whether a token begins before character `start` and ends behind it."""
    return bool(((offsets[:, 0] < start) & (offsets[:, 1] > start)).any())


# ---------------------------------------------------------------- files to samples


@dataclass
class FileReport:
    """What became of the conversations of one file; tokens are those of the samples that are left."""

    conversations: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_no_targets: int = 0


@dataclass
class Report:
    """`FileReport` of each file, by its path."""

    files: dict[str, FileReport] = field(default_factory=dict)

    @property
    def total(self) -> FileReport:
        """Sums over the files."""
        return FileReport(**{f.name: sum(getattr(r, f.name) for r in self.files.values()) for f in fields(FileReport)})

    def __str__(self) -> str:
        total = self.total
        name = Path(next(iter(self.files))).name if len(self.files) == 1 else f"{len(self.files)} files"
        supervised = 100 * total.supervised_tokens / max(total.tokens, 1)
        return (
            f"{name}: {total.conversations:,} conversations, {total.samples:,} samples, {total.tokens:,} tokens"
            f" ({supervised:.1f} % supervised); dropped {total.dropped_too_long:,} too long and"
            f" {total.dropped_no_targets:,} without targets, truncated {total.truncated:,}"
        )


@dataclass
class Prepared:
    """Samples of at most seq_len tokens, each with at least one supervised token, and what was left out."""

    samples: list[Sample]
    report: Report


def prepare(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    data: config.Data,
    *,
    vocab_size: int | None = None,
    progress: bool = False,
) -> Prepared:
    """Read JSONL files and tokenise them under `data.mask` and `data.truncation`.

    Args:
        paths: JSONL files; ids name a file by the last part of its path, or by all of it where that occurs twice.
        vocab_size: the model's; absent: ids are not checked against it.
        progress: show a progress bar for each file.

    Raises:
        InputError: an unusable file, line, conversation or template; a file twice; a sample that is too long under the
            policy `raise`; a token id that the model does not have; no supervised token in all of the files.
    """
    paths = [Path(path) for path in paths]
    chat = ChatTokenizer(tokenizer)
    names = [path.name for path in paths]
    report = Report()
    samples = []
    for path in paths:
        if str(path) in report.files:
            raise InputError(f"{path} is given twice; name each data file once")
        counts = report.files[str(path)] = FileReport()
        conversations = read_jsonl(path, path.name if names.count(path.name) == 1 else str(path))
        bar = tqdm(conversations, desc=f"tokenising {path.name}", unit=" conversations", disable=None if progress else True)
        for batch in _batched(bar, CONVERSATIONS_AT_ONCE):
            for sample in chat.samples(batch, data.mask):
                if vocab_size is not None and sample.tokens.max() >= vocab_size:
                    raise InputError(
                        f"{sample.id} has token id {sample.tokens.max()}, but the model's vocabulary has {vocab_size};"
                        " use the tokenizer that belongs to the model"
                    )
                kept = _fit(sample, data, counts)
                if kept is not None:
                    samples.append(kept)
                    counts.samples += 1
                    counts.tokens += len(kept.tokens)
                    counts.supervised_tokens += int((kept.weights > 0).sum())
            counts.conversations += len(batch)
        if not counts.conversations:
            raise InputError(f"{path} holds no conversations; remove it or give a file with at least one")
    if not samples:
        raise InputError(
            f"no supervised token is left: {report} (--data.seq-len {data.seq_len}, --data.truncation"
            f" {data.truncation}, --data.mask {data.mask}); raise --data.seq-len"
        )
    return Prepared(samples, report)


def _fit(sample: Sample, data: config.Data, counts: FileReport) -> Sample | None:
    """The sample in at most seq_len tokens, or None where it is dropped; counts what happened."""
    if len(sample.tokens) > data.seq_len:
        if data.truncation == "raise":
            raise InputError(
                f"{sample.id} has {len(sample.tokens)} tokens, but --data.seq-len is {data.seq_len}; raise it, or set"
                " --data.truncation to drop or right"
            )
        if data.truncation == "drop":
            counts.dropped_too_long += 1
            return None
        counts.truncated += 1
        sample = Sample(sample.id, sample.tokens[: data.seq_len].copy(), sample.weights[: data.seq_len].copy())
    if not sample.weights.any():
        counts.dropped_no_targets += 1
        return None
    return sample


def _batched(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
