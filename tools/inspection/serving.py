"""What a server would give the model for the rows of a source, beside what training gives it.

A server renders a conversation up to the answer by `apply_chat_template(...,
add_generation_prompt=True)`, and tokenises plain text by `tokenizer(text)`. Training must put the
same tokens before each answer. The tokenizer here is the one that `AutoTokenizer` loads, with the
flags of tokenizer_config.json that transformers 5 drops; the code that makes samples has no part in
it, but for the reading of rows.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from tools.inspection.lint import Finding, runs_of
from tools.inspection.report import Inspected
from torchsft.config import Data
from torchsft.data.cache import row_id
from torchsft.data.formats import Conversation, Example, Text
from torchsft.data.preparer import Preparer
from torchsft.data.template import Encoded, Sample
from torchsft.data.tokenizer import at_day, read_chat_template

MOST_ROWS = 256  # of a source that are compared; of more, these many
BLOCKS = 16  # stretches of rows, spread over a source that has more
ROWS_AT_ONCE = 64
SHOWN = 12  # tokens of a difference
IGNORES_BOS_FLAG = ("Qwen2Tokenizer", "Qwen2TokenizerFast")  # in every version of transformers

Message = dict[str, Any]


class Server:
    """The tokenizer of a model directory as servers use it.

    Attributes:
        flags: tokenizer_config.json.
        backends: those that `add_prefix_space` of the flags allows.
    """

    def __init__(self, model: str, data: Data) -> None:
        self.data = data
        self.tokenizer = _load(model)
        self.tokenizer.chat_template = _chat_template(self.tokenizer, data)
        config = Path(model) / "tokenizer_config.json"
        self.flags = json.loads(config.read_bytes()) if config.is_file() else {}
        self.backends = _with_prefix_space(self.tokenizer, self.flags)

    def check(self, source: Inspected) -> list[Finding]:
        """Return a finding for each row of which training makes another text than serving;
        `source.served` counts the rows.

        Samples that were cut are left out: their beginnings are what fitted.
        """
        findings = []
        has_cut_samples = source.counts.get("truncated", 0) + source.counts.get("split", 0) > 0
        for number, example in read_examples(source):
            samples = samples_of(source, number)
            longest = max((len(sample.tokens) for sample in samples), default=0)
            if has_cut_samples and longest >= self.data.seq_len:
                continue
            problem = self.compare(example, samples)
            source.served += 1
            if problem:
                findings.append(Finding("serving-differs", source.name, samples[0].id, problem))
        return findings

    def compare(self, example: Example, samples: Sequence[Sample]) -> str:
        """Compare an example's samples with serving.

        Returns:
            What differs, as a sentence; "" where nothing does.
        """
        if isinstance(example, Text):
            return self._compare_text(example, samples[0])
        if not isinstance(example, Conversation):
            return ""  # tokens as they are
        if self.data.mask == "all":
            whole = self._renderings(example, len(example.messages), prompt=False)
            return self._difference(whole, samples, "the conversation", is_whole=True)
        for i in self._trained_messages(example):
            prompts = self._renderings(example, i, prompt=True)
            problem = self._difference(prompts, samples, f"the prompt of message {i + 1}")
            if problem and not self._is_too_long(example, i):
                return problem
        return ""

    def _trained_messages(self, example: Conversation) -> list[int]:
        """Return the messages that are answers to learn; the first message of all has no prompt, an
        empty one no answer.
        """
        weights = example.weights or (None,) * len(example.messages)
        roles = [message["role"] for message in example.messages]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        if self.data.mask == "last-turn" and answers:
            questions = [i for i, role in enumerate(roles) if role == "user" and i < answers[-1]]
            last_question = max(questions, default=-1)
            answers = [i for i in answers if i > last_question]
        return [i for i in answers if i and weights[i] != 0 and _has_content(example.messages[i])]

    def _is_too_long(self, example: Conversation, i: int) -> bool:
        """Return whether an answer has no sample because it does not fit.

        --data.truncation leaves such samples out.
        """
        lengths = [len(tokens) for tokens in self._renderings(example, i + 1, prompt=False)]
        return max(lengths, default=0) >= self.data.seq_len

    def _renderings(self, example: Conversation, stop: int, prompt: bool) -> Iterator[list[int]]:
        """Yield the tokens of the first `stop` messages, in each form in which a client may send
        them.
        """
        variables = {**self.data.template_variables(), **example.template_kwargs}
        for messages in _forms(example.messages[:stop]):
            # the template is a program of the model's author: it can fail in any way
            with contextlib.suppress(Exception):
                yield self.tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=prompt,
                    tokenize=True,
                    return_dict=False,
                    tools=example.tools,
                    documents=example.documents,
                    **variables,
                )

    def _compare_text(self, example: Text, sample: Sample) -> str:
        """Compare plain text: the prompt, or where there is none or all is trained, all of it."""
        if example.prompt and self.data.mask != "all":
            return self._difference(self._plain(example.prompt), [sample], "the prompt")
        whole = self._plain(example.prompt + example.completion)
        return self._difference(whole, [sample], "the text", is_whole=True)

    def _plain(self, text: str) -> Iterator[list[int]]:
        """Yield what `tokenizer(text)` may give with the flags of tokenizer_config.json, without
        the EOS that some put behind every text.
        """
        eos = self.tokenizer.eos_token_id
        for backend in self.backends:
            tokens = backend.encode(text).ids
            if tokens and tokens[-1] == eos and not text.endswith(self.tokenizer.eos_token):
                tokens = tokens[:-1]
            yield from self._with_bos(tokens)

    def _with_bos(self, tokens: list[int]) -> Iterator[list[int]]:
        """Yield tokens with the BOS that `add_bos_token` may give them, or without.

        Without the flag they are what the tokenizer gives. Some classes do not read it, so that
        both forms are right there.
        """
        bos = self.tokenizer.bos_token_id
        adds_bos = self.flags.get("add_bos_token")
        has_bos = tokens[:1] == [bos]
        if bos is None or adds_bos is None or (adds_bos and has_bos):
            yield tokens
        elif adds_bos:
            yield [bos, *tokens]
            if self.flags.get("tokenizer_class") in IGNORES_BOS_FLAG:
                yield tokens
        else:
            yield tokens
            yield tokens[1:] if has_bos else tokens

    def _difference(
        self,
        served: Iterable[list[int]],
        samples: Sequence[Sample],
        what: str,
        is_whole: bool = False,
    ) -> str:
        """Return a sentence on the first difference between serving and the sample that is nearest
        to it; "" where one agrees.

        Args:
            served: the tokens that serving may give; the first are what it mostly gives.
            what: these tokens, in words.
            is_whole: whether they are compared and no more; else they end where a stretch of
                trained tokens begins.
        """
        nearest: _Nearest | None = None
        for tokens in served:
            for sample in samples:
                equal = _equal_at_start(tokens, sample.tokens)
                agrees = equal == len(tokens)
                if agrees and (is_whole or _begins_answer(sample, equal)):
                    return ""
                is_first_form = nearest is None or tokens is nearest.tokens
                if nearest is None or (is_first_form and equal > nearest.equal):
                    nearest = _Nearest(tokens, sample, equal)
        if nearest is None:
            return (
                f"the chat template refuses {what}, so that no server can ask for it; change the "
                f"data or the chat template"
            )
        equal = nearest.equal
        if equal == len(nearest.tokens):
            return (
                f"{what} ends at token {equal} in serving, but no trained text begins there; check "
                f"the mask"
            )
        trained = self.tokenizer.decode(nearest.sample.tokens[equal : equal + SHOWN])
        given = self.tokenizer.decode(nearest.tokens[equal : equal + SHOWN])
        return (
            f"{what} differs at token {equal}: training has {trained!r} where serving has {given!r}"
        )


@dataclass
class _Nearest:
    """The sample that is nearest to what serving gives.

    Attributes:
        tokens: what serving gives.
        equal: with how many equal tokens the two begin.
    """

    tokens: list[int]
    sample: Sample
    equal: int


def _load(model: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer as servers do; code in its directory is never run."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception:  # a class whose code is in the directory: what tokenizer.json says
        return PreTrainedTokenizerFast.from_pretrained(model, local_files_only=True)
    finally:
        logging.set_verbosity(level)


def _chat_template(tokenizer: PreTrainedTokenizerBase, data: Data) -> Any:
    """Return the chat template, or several by their names, that the options ask for."""
    templates = tokenizer.chat_template
    if data.chat_template:
        templates = read_chat_template(data.chat_template)
    day = date.fromisoformat(data.template_date) if data.template_date else date.today()
    if isinstance(templates, dict):
        return {name: at_day(text, day) for name, text in templates.items()}
    return at_day(templates, day) if templates else templates


def _with_prefix_space(
    tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> list[Tokenizer]:
    """Return the backends that `add_prefix_space` of tokenizer_config.json allows.

    transformers 4 sets the flag of the pre-tokenizer, but not of one within a sequence; there both
    are right.
    """
    plain = tokenizer.backend_tokenizer
    flag = flags.get("add_prefix_space")
    state = json.loads(plain.to_str())
    outer = state.get("pre_tokenizer") or {}
    inner = outer.get("pretokenizers", ())
    with_flag = [part for part in (outer, *inner) if "add_prefix_space" in part]
    if flag is None or all(part["add_prefix_space"] == flag for part in with_flag):
        return [plain]
    for part in with_flag:
        part["add_prefix_space"] = flag
    changed = Tokenizer.from_str(json.dumps(state))
    return [changed] if outer in with_flag else [changed, plain]


# ---------------------------------------------------------------- rows as training reads them


def read_examples(source: Inspected, most: int | None = MOST_ROWS) -> Iterator[tuple[int, Example]]:
    """Yield rows of a source as training reads them: (number, example), without those that it
    cannot read.

    Args:
        most: so many of the rows that gave samples, all over the source where it has more; None:
            every row.
    """
    opened = source.origin.source
    # as for another process: without source and chat tokenizer
    preparer: Preparer = copy.copy(source.origin)
    preparer.format = source.format or None
    recorder = _Recorder()
    vars(preparer)["chat"] = recorder
    if most is None:
        yield from _examples(preparer, recorder, opened.rows())
        return
    numbers = np.unique(source.samples.rows)
    if not len(numbers):
        return
    blocks = [numbers]
    if len(numbers) > most:
        size = most // BLOCKS
        starts = np.linspace(0, len(numbers) - size, BLOCKS).astype(int)
        blocks = [numbers[start : start + size] for start in starts]
    if opened.kind not in ("parquet", "datasets"):  # read from the beginning in any case: once
        blocks = [np.concatenate(blocks)]
    for block in blocks:
        rows = _rows_of(opened, block)
        yield from _examples(preparer, recorder, rows)


def _rows_of(opened: Any, numbers: np.ndarray) -> Iterator[Any]:
    """Yield the rows of an open source with some numbers.

    Args:
        numbers: int64 [n], rising, n at least 1.
    """
    chosen = set(numbers.tolist())
    first = int(numbers[0])
    last = int(numbers[-1])
    for row in opened.rows(first - 1):
        number = row[0]
        if number > last:
            return
        if number in chosen:
            yield row


def _examples(
    preparer: Preparer, recorder: _Recorder, rows: Iterator[Any]
) -> Iterator[tuple[int, Example]]:
    """Yield the examples that a preparer makes of rows, each with the number of its row."""
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        preparer(batch)
        numbers = {row_id(preparer.name, number): number for number, _ in batch}
        for example in recorder.examples:
            yield numbers[example.id], example
        recorder.examples.clear()


def samples_of(source: Inspected, number: int) -> list[Sample]:
    """Return the samples that a row gave."""
    rows = source.samples.rows
    start = int(np.searchsorted(rows, number, "left"))
    end = int(np.searchsorted(rows, number, "right"))
    return source.samples[start:end]


@dataclass
class _Recorder:
    """Stands where a preparer has its chat tokenizer: it keeps the examples and tokenises
    nothing.
    """

    examples: list[Example] = field(default_factory=list)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Keep examples; none of them gives a sample."""
        self.examples += examples
        return [Encoded([]) for _ in examples]


# ---------------------------------------------------------------- forms of messages


def _has_content(message: Message) -> bool:
    """Return whether a message says anything."""
    return any(message.get(key) for key in ("content", "tool_calls", "reasoning_content"))


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages in the forms of which templates take one or another; alike ones once.

    Arguments of tool calls are objects (what most servers make of them) or JSON; reasoning stands
    in its field or in the content; no content is null or empty.
    """
    seen: list[list[Message]] = []
    for as_json, in_content, empty in itertools.product(
        (False, True), (None, True, False), (None, "")
    ):
        form = [_form(message, as_json, in_content, empty) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def _form(message: Message, as_json: bool, in_content: bool | None, empty: str | None) -> Message:
    """Return a message in one form.

    Args:
        as_json: whether arguments are JSON.
        in_content: whether reasoning stands in the content; None: where the row has it.
        empty: what stands for no content.
    """
    form = dict(message)
    if message.get("tool_calls"):
        form["tool_calls"] = [_call(call, as_json) for call in message["tool_calls"]]
    content = message.get("content")
    reasoning = message.get("reasoning_content")
    is_answer = message["role"] == "assistant"
    if in_content and reasoning:
        form.pop("reasoning_content")
        form["content"] = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
    elif in_content is False and is_answer and content and "</think>" in content:
        before, _, answer = content.partition("</think>")
        form["reasoning_content"] = before.partition("<think>")[2].strip("\n")
        form["content"] = answer.lstrip("\n")
    if is_answer and not form.get("content"):
        form["content"] = empty
    return form


def _call(call: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """Return a tool call in one form.

    Args:
        as_json: whether its arguments are JSON; else they are an object.
    """
    arguments = call["function"].get("arguments") or {}
    is_text = isinstance(arguments, str)
    if as_json and not is_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif is_text and not as_json:
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments) if arguments.strip() else {}
    return {**call, "function": {**call["function"], "arguments": arguments}}


# ---------------------------------------------------------------- tokens of two sides


def _equal_at_start(one: Sequence[int], other: np.ndarray) -> int:
    """Return with how many equal tokens two texts begin; they may have different lengths."""
    n = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:n], np.int64) != other[:n])
    return int(different[0]) if len(different) else n


def _begins_answer(sample: Sample, at: int) -> bool:
    """Return whether the tokens from `at` on are context up to the next trained one, and trained
    tokens before it are over.
    """
    last_end = 0
    for start, end in runs_of(sample.weights):
        if last_end <= at <= start:
            return True
        last_end = end
    return False
