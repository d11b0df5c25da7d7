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
from collections.abc import Iterator, Sequence
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
    """The tokenizer of a model directory as servers use it."""

    def __init__(self, model: str, data: Data) -> None:
        self.data = data
        self.tokenizer = _load(model)
        if data.chat_template:
            self.tokenizer.chat_template = read_chat_template(data.chat_template)
        day = date.fromisoformat(data.template_date) if data.template_date else date.today()
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict):
            self.tokenizer.chat_template = {
                name: at_day(text, day) for name, text in templates.items()
            }
        elif templates:
            self.tokenizer.chat_template = at_day(templates, day)
        config = Path(model) / "tokenizer_config.json"
        self.flags = json.loads(config.read_bytes()) if config.is_file() else {}
        self.spaced = _with_prefix_space(self.tokenizer, self.flags)

    def check(self, source: Inspected) -> list[Finding]:
        """A finding for each row of which training makes another text than serving; `source.served`
        counts the rows.

        Samples that were cut are left out: their beginnings are what fitted.
        """
        found = []
        cut = source.counts.get("truncated", 0) + source.counts.get("split", 0) > 0
        for number, example in read_examples(source):
            samples = samples_of(source, number)
            if cut and any(len(sample.tokens) >= self.data.seq_len for sample in samples):
                continue
            problem = self.compare(example, samples)
            source.served += 1
            if problem:
                found.append(Finding("serving-differs", source.name, samples[0].id, problem))
        return found

    def compare(self, example: Example, samples: Sequence[Sample]) -> str:
        """What differs between an example's samples and serving, as a sentence; "" where nothing
        does.
        """
        if isinstance(example, Text):
            return self._text(example, samples[0])
        if not isinstance(example, Conversation):
            return ""  # tokens as they are
        if self.data.mask == "all":
            whole = self._renderings(example, len(example.messages), prompt=False)
            return _difference(whole, samples, self.tokenizer, "the conversation", trained_from=0)
        for i in self._trained(example):
            prompts = self._renderings(example, i, prompt=True)
            said = _difference(prompts, samples, self.tokenizer, f"the prompt of message {i + 1}")
            if said and not self._is_too_long(example, i):
                return said
        return ""

    def _trained(self, example: Conversation) -> list[int]:
        """The messages that are answers to learn; the first message of all has no prompt, an empty
        one no answer.
        """
        weights = example.weights or (None,) * len(example.messages)
        roles = [message["role"] for message in example.messages]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        if self.data.mask == "last-turn" and answers:
            asked = [i for i, role in enumerate(roles) if role == "user" and i < answers[-1]]
            answers = [i for i in answers if i > max(asked, default=-1)]
        said = ("content", "tool_calls", "reasoning_content")
        return [
            i
            for i in answers
            if i and weights[i] != 0 and any(example.messages[i].get(key) for key in said)
        ]

    def _is_too_long(self, example: Conversation, i: int) -> bool:
        """Whether an answer has no sample because it does not fit, as --data.truncation leaves such
        samples out.
        """
        lengths = [len(tokens) for tokens in self._renderings(example, i + 1, prompt=False)]
        return max(lengths, default=0) >= self.data.seq_len

    def _renderings(self, example: Conversation, stop: int, prompt: bool) -> Iterator[list[int]]:
        """The tokens of the first `stop` messages, in each form in which a client may send them."""
        variables = {**self.data.template_variables(), **example.template_kwargs}
        given = {"tools": example.tools, "documents": example.documents}
        for messages in _forms(example.messages[:stop]):
            # the template is a program of the model's author: it can fail in any way
            with contextlib.suppress(Exception):
                yield self.tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=prompt,
                    tokenize=True,
                    return_dict=False,
                    **given,
                    **variables,
                )

    def _text(self, example: Text, sample: Sample) -> str:
        """Of plain text: the prompt, or where there is none or all is trained, all of it."""
        if example.prompt and self.data.mask != "all":
            return _difference(self._plain(example.prompt), [sample], self.tokenizer, "the prompt")
        whole = self._plain(example.prompt + example.completion)
        return _difference(whole, [sample], self.tokenizer, "the text", trained_from=0)

    def _plain(self, text: str) -> Iterator[list[int]]:
        """`tokenizer(text)` with the flags of tokenizer_config.json, without the EOS that some put
        behind every text.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        flag = self.flags.get("add_bos_token")
        for backend in self.spaced:
            tokens = backend.encode(text).ids
            if tokens and tokens[-1] == eos and not text.endswith(self.tokenizer.eos_token):
                tokens = tokens[:-1]
            begins = tokens[:1] == [bos]
            if bos is None or flag is None or (flag and begins):
                yield tokens
            elif flag:
                yield [bos, *tokens]
                if self.flags.get("tokenizer_class") in IGNORES_BOS_FLAG:
                    yield tokens
            else:
                yield tokens
                yield tokens[1:] if begins else tokens


def read_examples(source: Inspected, most: int | None = MOST_ROWS) -> Iterator[tuple[int, Example]]:
    """Rows of a source as training reads them: (number, example), without those that it cannot
    read.

    Args:
        most: so many of the rows that gave samples, all over the source where it has more; None:
            every row.
    """
    opened = source.origin.source
    # as for another process: without source and chat tokenizer
    preparer: Preparer = copy.copy(source.origin)
    preparer.format = source.format or None
    listener = vars(preparer)["chat"] = _Listener()
    if most is None:
        yield from _heard(preparer, listener, opened.rows())
        return
    numbers = np.unique(source.samples.rows)
    size = most // BLOCKS
    blocks = [numbers]
    if len(numbers) > most:
        starts = np.linspace(0, len(numbers) - size, BLOCKS).astype(int)
        blocks = [numbers[start : start + size] for start in starts]
    if opened.kind not in ("parquet", "datasets"):  # read from the beginning in any case: once
        blocks = [np.concatenate(blocks)]
    for block in blocks if len(numbers) else ():
        wanted, first, last = set(block.tolist()), int(block[0]), int(block[-1])
        rows = itertools.takewhile(lambda row, last=last: row[0] <= last, opened.rows(first - 1))
        yield from _heard(preparer, listener, (row for row in rows if row[0] in wanted))


def _heard(
    preparer: Preparer, listener: _Listener, rows: Iterator[Any]
) -> Iterator[tuple[int, Example]]:
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        preparer(batch)
        numbers = {row_id(preparer.name, number): number for number, _ in batch}
        yield from ((numbers[example.id], example) for example in listener.heard)
        listener.heard.clear()


def samples_of(source: Inspected, number: int) -> list[Sample]:
    """The samples that a row gave."""
    first, behind = (
        int(np.searchsorted(source.samples.rows, number, side)) for side in ("left", "right")
    )
    return source.samples[first:behind]


class _Listener:
    """Stands where a preparer has its chat tokenizer: it keeps the examples and tokenises
    nothing.
    """

    def __init__(self) -> None:
        self.heard: list[Example] = []

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        self.heard += examples
        return [Encoded([]) for _ in examples]


def _load(model: str) -> PreTrainedTokenizerBase:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception:  # a class whose code is in the directory: what tokenizer.json says
        return PreTrainedTokenizerFast.from_pretrained(model, local_files_only=True)
    finally:
        logging.set_verbosity(level)


def _with_prefix_space(
    tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> list[Tokenizer]:
    """The backends that `add_prefix_space` of tokenizer_config.json allows.

    transformers 4 sets the flag of the pre-tokenizer, but not of one within a sequence; there both
    are right.
    """
    plain = tokenizer.backend_tokenizer
    flag = flags.get("add_prefix_space")
    state = json.loads(plain.to_str())
    pre = state.get("pre_tokenizer") or {}
    parts = [part for part in (pre, *pre.get("pretokenizers", ())) if "add_prefix_space" in part]
    if flag is None or all(part["add_prefix_space"] == flag for part in parts):
        return [plain]
    for part in parts:
        part["add_prefix_space"] = flag
    changed = Tokenizer.from_str(json.dumps(state))
    return [changed] if pre in parts else [changed, plain]


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages in the forms of which templates take one or another; alike ones once.

    Arguments of tool calls are objects (what most servers make of them) or JSON; reasoning stands
    in its field or in the content; no content is null or empty.
    """
    seen: list[list[Message]] = []
    for as_json, inside, empty in itertools.product((False, True), (None, True, False), (None, "")):
        form = [_form(message, as_json, inside, empty) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def _form(message: Message, as_json: bool, inside: bool | None, empty: str | None) -> Message:
    made = dict(message)
    if message.get("tool_calls"):
        made["tool_calls"] = [_call(call, as_json) for call in message["tool_calls"]]
    content, reasoning = message.get("content"), message.get("reasoning_content")
    if inside and reasoning:
        made.pop("reasoning_content")
        made["content"] = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
    elif inside is False and message["role"] == "assistant" and content and "</think>" in content:
        head, _, rest = content.partition("</think>")
        made["reasoning_content"] = head.partition("<think>")[2].strip("\n")
        made["content"] = rest.lstrip("\n")
    if message["role"] == "assistant" and not made.get("content"):
        made["content"] = empty
    return made


def _call(call: dict[str, Any], as_json: bool) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if as_json and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str) and not as_json:
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments) if arguments.strip() else {}
    function["arguments"] = arguments
    return {**call, "function": function}


def _difference(
    served: Iterator[list[int]],
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    trained_from: int | None = None,
) -> str:
    """A sentence on the first difference between serving and the sample that is nearest to it; ""
    where one agrees.

    Args:
        served: the tokens that serving may give; the first are what it mostly gives.
        trained_from: None: `served` ends where a stretch of trained tokens begins; else it is
            compared, and no more.
    """
    first: tuple[int, Sample, list[int]] | None = None
    for tokens in served:
        for sample in samples:
            same = _common(tokens, sample.tokens)
            if same == len(tokens) and (trained_from is not None or _begins_answer(sample, same)):
                return ""
            if first is None or (tokens is first[2] and same > first[0]):
                first = same, sample, tokens
    if first is None:
        return (
            f"the chat template refuses {what}, so that no server can ask for it; change the data "
            f"or the chat template"
        )
    same, sample, tokens = first
    if same == len(tokens):
        return (
            f"{what} ends at token {same} in serving, but no trained text begins there; check the "
            f"mask"
        )
    trained = tokenizer.decode(sample.tokens[same : same + SHOWN])
    given = tokenizer.decode(tokens[same : same + SHOWN])
    return f"{what} differs at token {same}: training has {trained!r} where serving has {given!r}"


def _common(one: Sequence[int], other: np.ndarray) -> int:
    """Tokens that are the same from the beginning on."""
    n = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:n], np.int64) != other[:n])
    return int(different[0]) if len(different) else n


def _begins_answer(sample: Sample, at: int) -> bool:
    """Whether the tokens from `at` on are context up to the next trained one, and those before it
    are over.
    """
    runs = runs_of(sample.weights)
    return any(
        behind <= at <= start for (_, behind), (start, _) in itertools.pairwise([(0, 0), *runs])
    )
