"""From an example to tokens and loss weights, by the model's own chat template and tokenizer.

A conversation is rendered to text and tokenised once; what is trained is decided by characters, never by token ids, so a
pad token that equals the end-of-turn token changes nothing. Of assistant message i is trained what inference would write:

    <|im_start|>assistant\\n The answer. <|im_end|> \\n
    \\___ header, not ___/  \\_____ trained _____/  not

- `render(messages[:i], add_generation_prompt=True)` is given, the rest of `render(messages[:i + 1])` is trained, through its
  end-of-turn token. A `{% generation %}` block can only make it begin later.
- Where the template rewrites the history (drops earlier reasoning) the conversation is split by turn: a text serves the
  messages whose own renderings it begins with, so that each answer has the context that it has in inference.
- Where the generation prompt opens a reasoning block that the rendering lacks (DeepSeek-R1), the text is put together:
  prompt, reasoning (or none), closing tag, and what the rendering writes from the content on.
- A token is trained if it begins in a trained span. None may reach into it from before: where the tokenizer joins the end of
  the prompt with the beginning of the answer, the text is tokenised in pieces, as inference does.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from torchsft.config import InputError
from torchsft.data.formats import Conversation, Example, Text, Tokens
from torchsft.data.sources import RowError

Mask = Literal["assistant", "last-turn", "all"]
Message = dict[str, Any]
Span = tuple[int, int, int, float, bool]  # characters: end of the prompt, of masked reasoning, of the turn; weight; closed

REASONING = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)  # in a content
OPENED = re.compile(r"<think>(\s*)\Z")  # at the end of a generation prompt
EMPTY_BLOCK = re.compile(r"(?:<think>\s*)?(?:</think>\n{0,2})?")  # before an answer without reasoning
CONTENTS = ("content", "reasoning_content")
PLAIN = {"role", *CONTENTS}
PLACEHOLDER = re.compile("\ue002([0-9]+)\ue003")  # of a content
KNOWN_SHAPES = 1024  # that are remembered


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


def load_tokenizer(hf_dir: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory, with its chat template. Local files only; code in them is never run.
    Raises InputError: no tokenizer.json (Kimi-K2 and Moonlight ship tiktoken.model with Python code), an unreadable one, or no
    chat template."""
    hf_dir = Path(hf_dir)
    if not hf_dir.is_dir():
        raise InputError(f"{hf_dir} is not a directory; give --model.path a Hugging Face model directory")
    if not (hf_dir / "tokenizer.json").is_file():
        # transformers can convert tiktoken.model, but splits words by one pattern for all models, which is not Kimi's.
        other = [name for name in ("tiktoken.model", "tokenizer.model") if (hf_dir / name).is_file()]
        found = f", only {' and '.join(other)}" if other else ""
        remedy = "convert its tokenizer and add it (Python code in a model directory is never run)"
        raise InputError(f"{hf_dir} has no tokenizer.json{found}; {remedy}")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:  # the Rust parser raises plain Exception, a missing key is a KeyError, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the tokenizer of {hf_dir} cannot be read ({reason}); replace its tokenizer files") from error
    if not tokenizer.chat_template:
        raise InputError(f"{hf_dir} has no chat template; add a chat_template.jinja, such as that of the model's chat version")
    return tokenizer


class Encoded(NamedTuple):
    """Samples of one example (tokens int32 [n], weights float32 [n] as in `Sample`), of any length, and what happened.

    `notes`: split-by-turn (several samples, in the order of their last turns), closed-reasoning (a text put together).
    `ends`: the token that ends each trained turn, in any order.
    """

    samples: list[tuple[np.ndarray, np.ndarray]]
    notes: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


class _Turn(NamedTuple):
    """Message `index` in a `text` that ends with it; `written`: the rendering that this comes from, itself unless `closed`."""

    index: int
    begin: Any
    start: Any
    end: Any
    closed: bool
    text: str = ""
    written: str = ""


class _Part(NamedTuple):
    """A text, the turns trained in it, and the rendering of messages[:stop] that it comes from.

    In a mold, which is made with placeholders, each text and each place (by the text before it) is a `_blank`.
    """

    text: Any
    turns: list[_Turn]
    written: Any
    stop: int


class ChatTokenizer:
    """Turns examples into tokens and weights. Safe to keep: it works on a copy of the tokenizer's backend.

    `mask`: assistant: every assistant message; last-turn: those after the last user message that has an answer; all: every
    token but the first. `reasoning` mask: reasoning, through its closing tag, is context only. `template_kwargs`: further
    variables of the chat template. Raises InputError: a slow tokenizer, which knows not where in the text a token comes from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask: Mask = "assistant",
        reasoning: str = "train",
        template_kwargs: Any = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} is a slow tokenizer; give a directory with a tokenizer.json")
        self.mask, self.masks_reasoning = mask, reasoning == "mask"
        template = tokenizer.get_chat_template()
        self.has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self.variables = {**tokenizer.special_tokens_map, **(template_kwargs or {}), "chat_template": template}
        self.enders = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token
        self.adds_bos = self.bos is not None and tokenizer("").input_ids[:1] == [self.bos]
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.post_processor = None  # it would take the spaces out of the offsets (ByteLevel's trim_offsets)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.molds: dict[tuple, list[_Part]] = {}
        # What a template without generation prompt writes before an answer; what any writes behind the end of the last turn.
        before, prompt, answered = self._probe(), self._probe(generation_prompt=True), self._probe({"content": "\ue001"})
        header, _, rest = answered.removeprefix(before).partition("\ue001")
        self.header = header if prompt == before and header.strip() else ""
        enders = "|".join(map(re.escape, sorted(self.enders, key=len, reverse=True)))
        found = re.match(rf"\s*(?:{enders})", rest)
        self.tail = rest[found.end() :] if found else ""

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """The samples of each example, or why it cannot be used; an error names the example by its id."""
        found = [self._texts(example) for example in examples]
        texts = [text for one in found if isinstance(one, list) for text, _ in one]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        for place, one in enumerate(found):
            if isinstance(one, list):
                own = [(*text, next(encodings)) for text in one]
                closed = any(span[4] for _, spans in one for span in spans)
                try:
                    made = [self._sample(*marked) for marked in own]
                    samples = [(ids, weights) for ids, weights, _ in made]
                    ends = tuple(end for *_, ended in made for end in ended)
                    notes = ("split-by-turn",) * (len(one) > 1) + ("closed-reasoning",) * closed
                    found[place] = Encoded(samples, notes, ends)
                except RowError as error:
                    found[place] = RowError(examples[place].id, error.reason, error.text)
        return found

    def _sample(self, text: str, spans: list[Span], encoding: Encoding) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens and weights, with exactly one BOS if the template or the tokenizer writes any; what ends trained turns."""
        pieces = [(0, 0, encoding)]  # character and token with which it begins
        tokens = {at: _token_at(pieces, at) for at in {at for span in spans for at in span[:3]}}
        if self.mask != "all" and any(tokens[span[0]][1] for span in spans):
            pieces = self._in_pieces(text, [0, *(span[0] for span in spans), len(text)], encoding)
            tokens = {at: _token_at(pieces, at) for at in tokens}
        ids = np.array(encoding.ids if len(pieces) == 1 else [i for _, _, e in pieces for i in e.ids], dtype=np.int32)
        weights = np.full(len(ids), self.mask == "all", dtype=np.float32)
        for begin, start, end, weight, _ in spans:
            weights[tokens[begin][0] : tokens[start][0]] = 0.0
            weights[tokens[start][0] : tokens[end][0]] = weight
        ends = [int(ids[tokens[end][0] - 1]) for _, start, end, weight, _ in spans if weight and start < end]
        if self.bos is not None:
            if len(ids) > 1 and ids[0] == ids[1] == self.bos:
                problem = f"the text begins with two BOS tokens (id {self.bos}); take one out of the chat template"
                raise RowError("", "double-bos", problem)
            if self.adds_bos and (not len(ids) or ids[0] != self.bos):
                ids, weights = np.insert(ids, 0, self.bos), np.insert(weights, 0, 0.0)
        weights[:1] = 0.0  # nothing comes before it
        return ids, weights, ends

    def _in_pieces(self, text: str, edges: list[int], whole: Encoding) -> list[tuple[int, int, Encoding]]:
        """The text with no token across an edge; must decode to what the whole does."""
        encodings = self.backend.encode_batch([text[a:b] for a, b in itertools.pairwise(edges)], add_special_tokens=False)
        ids = [i for encoding in encodings for i in encoding.ids]
        if self.backend.decode(ids, skip_special_tokens=False) != self.backend.decode(whole.ids, skip_special_tokens=False):
            problem = "a token reaches from the prompt into an assistant turn, and this tokenizer changes the text when it is"
            raise RowError("", "straddling-token", problem + " split there; change the whitespace there or the chat template")
        return list(zip(edges, itertools.accumulate(map(len, encodings), initial=0), encodings, strict=False))

    def _texts(self, example: Example) -> list[tuple[str, list[Span]]] | Encoded | RowError:
        """What to tokenise for an example."""
        if isinstance(example, Tokens):
            tokens = np.array(example.tokens, dtype=np.int32)
            weights = np.array(example.weights, dtype=np.float32)
            weights[list(example.starts)] = 0.0  # nothing comes before them
            edges = itertools.pairwise([*example.starts, len(tokens)])
            return Encoded([(tokens[start:end], weights[start:end]) for start, end in edges])
        try:
            if isinstance(example, Text):
                if not self.eos:
                    raise RowError("", "no-end-of-turn", "the tokenizer has no eos_token to end the text with; name one")
                begin, text = len(example.prompt), example.prompt + example.completion
                text += "" if text.endswith(self.eos) else self.eos
                return [(text, [(begin, begin, len(text), example.weight, False)])]
            messages, weights = [self._for_template(message) for message in example.messages], self._weights(example)
            parts = None if example.tools else self._molded(messages, weights)
            parts = parts or self._located(messages, example.tools, weights)
            return [(part.text, [(*t[1:4], weights[t.index], t.closed) for t in part.turns]) for part in parts]
        except RowError as error:
            return RowError(example.id, error.reason, error.text)

    def _weights(self, example: Conversation) -> dict[int, float]:
        """The messages to locate, with their weights: those that are trained; with the mask `all`, those that differ."""
        given = {i: weight for i, weight in enumerate(example.weights) if weight is not None}
        roles = [message["role"] for message in example.messages]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        if self.mask == "all":
            hidden = {i: 1.0 for i in answers if self.masks_reasoning and _without_reasoning(example.messages[i])[0]}
            return dict(sorted((hidden | {i: weight for i, weight in given.items() if weight != 1.0}).items()))
        if self.mask == "last-turn":
            asked = max((i for i, role in enumerate(roles[: max(answers, default=0)]) if role == "user"), default=-1)
            answers = [i for i in answers if i > asked]
        return {i: given.get(i, 1.0) for i in answers if given.get(i) != 0.0}

    def _molded(self, messages: list[Message], weights: dict[int, float]) -> list[_Part] | None:
        """By one rendering for each text; None where the template does not just put the contents between its own words.

        Locating the turns takes two renderings for each of them. It is done once for a sequence of roles, with placeholders;
        it holds for every conversation whose rendering is the same with other contents.
        """
        if any(m["content"] is None or "think>" in m["content"] or not m.keys() <= PLAIN for m in messages):
            return None
        shape = (*((message["role"], len(message)) for message in messages), *weights)
        if shape not in self.molds:
            if len(self.molds) >= KNOWN_SHAPES:
                self.molds.clear()
            number = itertools.count()
            probes = [m | {key: f"\ue002{next(number)}\ue003" for key in CONTENTS if key in m} for m in messages]
            try:
                self.molds[shape] = [_mold(part) for part in self._located(probes, None, weights)]
            except RowError:  # to be told of the real conversation, if it is true of that one too
                self.molds[shape] = []
        molds = self.molds[shape]
        renderings = [self._render(messages[: mold.stop])[0] for mold in molds]
        contents = [message[key] for message in messages for key in CONTENTS if key in message]
        for filled in (contents, [content.strip() for content in contents]):  # the second: as templates that trim write it
            if all(_fill(mold.written, filled) == text for mold, text in zip(molds, renderings, strict=True)):
                return [_cast(mold, filled) for mold in molds]
        return None

    def _located(self, messages: list[Message], tools: list[dict] | None, weights: dict[int, float]) -> list[_Part]:
        """Texts with the messages of `weights`, each as in its own rendering; in the order of their last turns."""
        turns = [self._turn(messages, tools, i) for i in weights]
        text = written = self._render(messages, tools)[0]
        stop, parts = len(messages), [] if turns else [_Part(text, [], text, len(messages))]
        while turns:
            held = [text.startswith(turn.text[: turn.end]) for turn in turns]
            if self.mask == "all" and not all(held):  # which has one text only
                problem = "the chat template changes it once others follow, so that it can have no weight or mask of its own"
                name = f"message {turns[held.index(False)].index + 1}"
                raise RowError("", "not-prefix-stable", f"{name}: {problem}; set --data.mask assistant")
            if any(held):
                parts.append(_Part(text, list(itertools.compress(turns, held)), written, stop))
                turns = [turn for turn, is_held in zip(turns, held, strict=True) if not is_held]
            if turns:
                text, written, stop = turns[-1].text, turns[-1].written, turns[-1].index + 1
        for i, message in enumerate(messages if self.mask == "all" else ()):
            if message["role"] == "assistant":
                self._check(i, message, parts[0].text)
        return sorted(parts, key=lambda part: part.turns[-1].index if part.turns else 0)

    def _turn(self, messages: list[Message], tools: list[dict] | None, i: int) -> _Turn:
        """Where message i is written; checked against what it says."""
        name = f"message {i + 1}: the chat template"
        written, blocks = self._render(messages[: i + 1], tools, blocks=self.has_blocks)
        if messages[i]["role"] != "assistant":  # a weight 0 with the mask `all`
            begin = len(self._render(messages[:i], tools)[0].removesuffix(self.tail)) if i else 0
            return _Turn(i, begin, begin, len(written.removesuffix(self.tail)), False, written, written)
        prompt = self._render(messages[:i], tools, generation_prompt=True)[0] + self.header
        reasoning, bare = _without_reasoning(messages[i])
        opened = OPENED.search(prompt)
        text, begin = written, len(prompt)
        header = opened.start() if opened else begin
        closed = not written.startswith(prompt) or bool(opened and not _is_in(reasoning, written[begin:]))
        if closed:
            if opened and reasoning:
                written, blocks = self._render([*messages[:i], bare], tools, blocks=self.has_blocks)
            if not opened or not written.startswith(prompt[:header]):
                at = next((n for n, (a, b) in enumerate(zip(prompt, written, strict=False)) if a != b), len(written))
                problem = f"writes the turn ({written[at : at + 30]!r}) in another way than its generation prompt"
                problem += f" ({prompt[at : at + 30]!r}), so that inference would see another text"
                raise RowError("", "not-prefix-stable", f"{name} {problem}; change it or --data.template-kwargs")
            closing = "\n</think>\n\n" if "\n" in opened[1] else "</think>"
            text = prompt + reasoning + closing + EMPTY_BLOCK.sub("", written[header:], count=1)
        end = len(text.removesuffix(self.tail))
        end = end if text.endswith(self.enders, begin, end) else len(text.rstrip())
        if not text.endswith(self.enders, begin, end):
            problem = "writes no special token that ends the turn; add one, such as the token with which the next turn begins"
            raise RowError("", "no-end-of-turn", f"{name} {problem}")
        start, stop = begin, end
        if self.has_blocks:
            inside = [(a, b) for a, b in blocks if b > max(a, header if closed else begin)] or [(0, 0)]
            start = begin if closed else max(begin, inside[0][0])
            stop = min(end, inside[-1][1] + len(text) - len(written))
        self._check(i, messages[i], text[begin:end])
        problem = "has {{% generation %}} blocks that do not hold its {}; move or remove them"
        self._check(i, messages[i], text[start:stop], "generation-blocks", problem)
        if self.masks_reasoning and (reasoning or re.compile(r"\s*<think>").match(text, header)):
            answer = begin + len(reasoning + closing) if closed else self._answer(messages[: i + 1], tools, text, begin, end)
            start = max(start, answer)
            problem = "writes its {} before the end of its reasoning, which is masked; set --data.reasoning train"
            self._check(i, messages[i], text[start:end], "text-lost", problem)
        return _Turn(i, begin, start, end, closed, text, written)

    def _check(self, i: int, message: Message, text: str, reason: str = "text-lost", problem: str = "") -> None:
        """That a text has all that assistant message i says."""
        reasoning, bare = _without_reasoning(message)
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in bare.get("tool_calls") or ()]
        said = {"reasoning": "" if self.masks_reasoning else reasoning, "content": bare["content"] or "", "tool call": calls}
        for what, source in [(what, leaf) for what, value in said.items() for leaf in _leaves(value)]:
            if not _is_in(source, text):
                remedy = "write it as the template does, or use another one"
                if what == "reasoning" and not problem:
                    reason, remedy = "reasoning-lost", "see --data.template-kwargs, set --data.reasoning mask, or take it out"
                    remedy = "set --data.mask assistant" if self.mask == "all" else remedy  # which can split by turn
                problem = problem.format(what) or f"leaves out or changes its {what} ({source.strip()[:40]!r}); {remedy}"
                raise RowError("", reason, f"message {i + 1}: the chat template {problem}")

    def _answer(self, messages: list[Message], tools: list[dict] | None, text: str, begin: int, end: int) -> int:
        """Where content or tool calls of the last message begin in its rendering, behind its reasoning and what closes that."""
        content = messages[-1]["content"] or ""
        reasoning = REASONING.fullmatch(content)
        head, answer = (content[: reasoning.start(2)], reasoning[2]) if reasoning else ("", content)
        try:
            marked = self._render([*messages[:-1], messages[-1] | {"content": head + "\ue001" + answer}], tools)[0]
        except RowError:  # some refuse content beside reasoning and tool calls
            marked = ""
        if "\ue001" in marked and marked.replace("\ue001", "").endswith(text[begin:]):
            return marked.index("\ue001") + len(text) - len(marked) + 1
        thought = _without_reasoning(messages[-1])[0]
        at = max(begin, text.find(thought, begin, end) + len(thought))  # no content, or trimmed
        at = max(at, text.find("</think>", at, end) + len("</think>"))
        return end - len(text[at:end].lstrip("\n"))

    def _for_template(self, message: Message) -> Message:
        """The message with its reasoning and tool calls where this template reads them."""
        content, reasoning = message.get("content"), (message.get("reasoning_content") or "").strip("\n")
        calls = message.get("tool_calls")
        found = REASONING.fullmatch(content) if content and "<think>" in content and not reasoning else None
        if message["role"] != "assistant" or (content is not None and not (reasoning or found or calls)):
            return message
        message = {**message, "content": content}  # None, not absent: some templates ask for that
        if calls:
            functions = [call["function"] | {"arguments": self._arguments(call["function"])} for call in calls]
            message["tool_calls"] = [call | {"function": f} for call, f in zip(calls, functions, strict=True)]
        if reasoning and self._reads_reasoning == "in the content":
            del message["reasoning_content"]
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
        elif reasoning:
            message["reasoning_content"] = reasoning
        elif found and self._reads_reasoning != "in the content":  # where it is cut out, its blank lines would stay
            message |= {"reasoning_content": found[1], "content": found[2]}
        return message | {"content": self._no_content} if calls and not message["content"] else message

    def _arguments(self, function: dict[str, Any]) -> Any:
        arguments = function.get("arguments") or {}
        if not self._reads_objects:
            return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        try:
            found = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            found = None
        if not isinstance(found, dict):
            problem = f"must be a JSON object for this chat template, but they are {str(arguments)[:40]!r}; correct them"
            raise RowError("", "tool-arguments", f"the arguments of the tool call {function['name']!r} {problem}")
        return found

    @cached_property
    def _reads_reasoning(self) -> str:
        """Where the template takes reasoning from. Nowhere: that is left to the generation prompt, or to its own block."""
        if "\ue002" in self._probe({"content": "\ue001", "reasoning_content": "\ue002"}):
            return "in its field"
        written = self._probe({"content": "<think>\n\ue002\n</think>\n\n\ue001"}).removeprefix(self._probe())
        return "in the content" if "\ue002" in written and written.count("think>") == 2 else "nowhere"

    @cached_property
    def _reads_objects(self) -> bool:
        """Whether the arguments of tool calls are to be given as an object, not as JSON."""
        written = self._probe_call(None, {"key0": "value0"}) or self._probe_call("", {"key0": "value0"})
        return "key0" in written and "value0" in written and "'key0'" not in written  # not as Python writes an object

    @cached_property
    def _no_content(self) -> str | None:
        """What stands for no content beside tool calls: some templates write the word None, others refuse None or ""."""
        arguments = self._arguments({"name": "f", "arguments": {"key0": "value0"}})
        written = {empty: self._probe_call(empty, arguments) for empty in (None, "")}
        return min(written, key=lambda empty: ("value0" not in written[empty], written[empty].count("None")))

    def _probe_call(self, content: str | None, arguments: Any) -> str:
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return self._probe({"content": content, "tool_calls": [call]})

    def _probe(self, answer: Message | None = None, generation_prompt: bool = False) -> str:
        """The rendering of a question, and an answer; "" where the template refuses, as it then does with conversations."""
        messages = [{"role": "user", "content": "\ue000"}] + ([{"role": "assistant", **answer}] if answer else [])
        try:
            return self._render(messages, generation_prompt=generation_prompt)[0]
        except RowError:
            return ""

    def _render(
        self, messages: list[Message], tools: list[dict] | None = None, *, generation_prompt: bool = False, blocks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and, where asked for, the characters of its generation blocks."""
        asked = {"tools": tools, "add_generation_prompt": generation_prompt, "return_assistant_tokens_mask": blocks}
        try:
            texts, found = render_jinja_template([messages], **self.variables, **asked)
        except Exception as error:  # the template is a program of the model's author: it can fail in any way
            problem = f"the chat template refuses the conversation ({error}); change the data or the chat template"
            raise RowError("", "template", problem) from None
        return texts[0], found[0] if blocks else []


def _mold(part: _Part) -> _Part:
    turns = [_Turn(turn.index, *(_blank(part.text[:at]) for at in turn[1:4]), turn.closed) for turn in part.turns]
    return _Part(_blank(part.text), turns, _blank(part.written), part.stop)


def _cast(mold: _Part, contents: list[str]) -> _Part:
    turns = [_Turn(turn.index, *(len(_fill(blank, contents)) for blank in turn[1:4]), turn.closed) for turn in mold.turns]
    return _Part(_fill(mold.text, contents), turns, "", mold.stop)


def _blank(text: str) -> tuple[str, list[int]]:
    """A text made with placeholders, as a format and the numbers of its contents."""
    return PLACEHOLDER.sub("%s", text.replace("%", "%%")), [int(number) for number in PLACEHOLDER.findall(text)]


def _fill(blank: tuple[str, list[int]], contents: list[str]) -> str:
    return blank[0] % tuple([contents[number] for number in blank[1]])


def _without_reasoning(message: Message) -> tuple[str, Message]:
    """The reasoning of a message, "" if it has none, and the message without it."""
    if message.get("reasoning_content"):
        return message["reasoning_content"], {k: v for k, v in message.items() if k != "reasoning_content"}
    found = REASONING.fullmatch(message.get("content") or "")
    return (found[1], {**message, "content": found[2]}) if found else ("", message)


def _leaves(value: Any) -> Iterator[str]:
    """The strings and numbers in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value if isinstance(value, str) else json.dumps(value)


def _is_in(source: str, text: str) -> bool:
    """Whether a text has a source string, trimmed or escaped as in JSON if need be; an empty one always."""
    source = source.strip()
    return source in text or any(json.dumps(source, ensure_ascii=a)[1:-1] in text for a in (False, True))


def _token_at(pieces: list[tuple[int, int, Encoding]], at: int) -> tuple[int, bool]:
    """The first token that begins at character `at` or later, and whether the one before it reaches behind `at`."""
    first, tokens, encoding = pieces[0] if len(pieces) == 1 else next(p for p in reversed(pieces) if p[0] <= at)
    token = encoding.char_to_token(at - first)
    if token is None:  # the end of the text, or a character that no token has
        ended = encoding.char_to_token(at - first - 1) == len(encoding) - 1
        return tokens + (len(encoding) if ended else sum(start < at - first for start, _ in encoding.offsets)), False
    before = encoding.token_to_chars(token)[0] < at - first
    return tokens + token + before, before
