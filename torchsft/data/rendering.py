"""One chat template: the text that it makes of messages, and what it wants to be given.

Nothing about a template is known but what it writes: each property here is read off renderings of
small conversations.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from torchsft.data.rows import RowError

Message = dict[str, Any]

REASONING = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)  # in a content
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
QUESTION, ANSWER, THOUGHT = "\ue000", "\ue001", "\ue002"  # what the messages of probes say


class Given(NamedTuple):
    """What a row gives to the template beside messages and variables."""

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None


NOTHING = Given()


class AddedTokens(NamedTuple):
    """Texts of the added tokens of a tokenizer that can end a turn.

    `special`: marked so, eos_token among them. `others`: not marked. `stops`: those at which
    servers stop.
    """

    special: tuple[str, ...]
    others: tuple[str, ...]
    stops: tuple[str, ...]


def without_reasoning(message: Message) -> tuple[str, Message]:
    """The reasoning of a message, "" if it has none, and the message without it."""
    if message.get("reasoning_content"):
        return message["reasoning_content"], {
            k: v for k, v in message.items() if k != "reasoning_content"
        }
    found = REASONING.fullmatch(message.get("content") or "")
    return (found[1], {**message, "content": found[2]}) if found else ("", message)


def variables_of(template: str) -> set[str]:
    """Names of the variables that a template reads; those of all words in it, where it cannot be
    parsed.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return jinja2.meta.find_undeclared_variables(
            environment.parse(GENERATION.sub("", template))
        )
    except jinja2.TemplateError:  # which rows are told when it is rendered
        return set(re.findall(r"\w+", template))


class ChatTemplate:
    """A chat template with its variables.

    Attributes:
        has_blocks: whether it marks what the assistant writes with `{% generation %}`.
        header: what it writes before an answer, where its generation prompt is empty.
        opening: what it writes before an answer, by its generation prompt or `header`.
        before_content: what it writes before the content of an answer, its header among it.
        closing: the token with which it ends the last turn, if it writes one.
        tail: what it writes behind the end of the last turn.
        enders: tokens that end turns.
        openers: where turns end with the token that opens the next one (GLM), what is to be added
            behind a last turn: before a "user" message, before a "tool" message. Empty for other
            templates.
    """

    def __init__(self, text: str, variables: Mapping[str, Any], added: AddedTokens) -> None:
        self.text = text
        self.variables = {**variables, "chat_template": text}
        self.has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        self.as_parts = False
        if ANSWER not in self._probe({"content": ANSWER}):
            # templates of image models, which read a content as a list of parts only
            self.as_parts = True
            self.as_parts = ANSWER in self._probe({"content": ANSWER})

        before, prompt = self._probe(), self._probe(generation_prompt=True)
        self.before_content, _, rest = (
            self._probe({"content": ANSWER}).removeprefix(before).partition(ANSWER)
        )
        self.header = (
            self.before_content if prompt == before and self.before_content.strip() else ""
        )
        self.opening = prompt.removeprefix(before) + self.header
        self._find_ends(added, rest)

    @cached_property
    def reads(self) -> set[str]:
        """Names of the variables that it reads."""
        return variables_of(self.text)

    def render(
        self,
        messages: Sequence[Message],
        given: Given = NOTHING,
        *,
        generation_prompt: bool = False,
        blocks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and, where asked for, the characters of its generation blocks. Raises RowError:
        the template refuses.
        """
        if self.as_parts:
            messages = [_in_parts(message) for message in messages]
        asked = {
            **given._asdict(),
            "add_generation_prompt": generation_prompt,
            "return_assistant_tokens_mask": blocks,
        }
        try:
            texts, found = render_jinja_template([messages], **self.variables, **asked)
        # the template is a program of the model's author: it can fail in any way
        except Exception as error:
            problem = (
                f"the chat template refuses the conversation ({error}); change the data or the "
                f"chat template"
            )
            raise RowError("", "template", problem) from None
        return texts[0], found[0] if blocks else []

    def ending(self, message: Message, follower: str = "") -> str:
        """What is to be added behind an assistant message that comes last; `follower`: role of the
        message behind it.
        """
        if follower not in ("user", "tool"):
            follower = "tool" if message.get("tool_calls") else "user"
        return self.openers.get(follower) or self.openers.get("user", "")

    def prepared(self, message: Message) -> Message:
        """The message with its reasoning and tool calls where this template reads them."""
        content, reasoning = (
            message.get("content"),
            (message.get("reasoning_content") or "").strip("\n"),
        )
        calls = message.get("tool_calls")
        found = (
            REASONING.fullmatch(content)
            if content and "<think>" in content and not reasoning
            else None
        )
        if message["role"] != "assistant" or (
            content is not None and not (reasoning or found or calls)
        ):
            return message
        message = {**message, "content": content}  # None, not absent: some templates ask for that
        if calls:
            functions = [
                call["function"] | {"arguments": self._arguments(call["function"])}
                for call in calls
            ]
            message["tool_calls"] = [
                call | {"function": f} for call, f in zip(calls, functions, strict=True)
            ]
        if reasoning and self._reads_reasoning == "in the content":
            del message["reasoning_content"]
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
        elif reasoning:
            message["reasoning_content"] = reasoning
        # where it is cut out, its blank lines would stay
        elif found and self._reads_reasoning != "in the content":
            message |= {"reasoning_content": found[1], "content": found[2]}
        return (
            message | {"content": self._no_content} if calls and not message["content"] else message
        )

    def _find_ends(self, added: AddedTokens, rest: str) -> None:
        """Set `enders`, `closing`, `tail` and `openers`. `rest`: what stands behind the content of
        a last answer.
        """
        self.closing, self.tail, self.openers = "", "", {}
        closing = re.match(rf"\s*(?:{_any(added.special)})", rest)
        others = set(added.stops)
        if not closing and (found := self._unmarked_end(rest, added)):
            closing = found
            called = self._text_of(self._call_of_key0()).rpartition("value0")[2]
            ends = [found, self._unmarked_end(called, added)]
            others |= {end[1] for end in ends if end}
        if closing:
            self.closing = rest[closing.start() : closing.end()].strip()
            self.tail = rest[closing.end() :]
        else:
            self._find_openers(added.stops)
        self.enders = (*added.special, *sorted(others - set(added.special)))

    def _unmarked_end(self, rest: str, added: AddedTokens) -> re.Match[str] | None:
        """The last token in a text that is not marked special, as group 1; none where one stands
        there that is.
        """
        if re.search(_any(added.special), rest):
            return None
        return re.match(f".*({_any(added.others)})", rest, re.DOTALL)

    def _find_openers(self, stops: Sequence[str]) -> None:
        """Set `openers`: the token with which the next turn begins, if servers stop there."""
        called = self._call_of_key0()
        answered = [{"role": "assistant", "content": ANSWER}]
        result = {"role": "tool", "content": THOUGHT, "tool_call_id": "call00000", "name": "f"}
        followers = {
            "user": (answered, {"role": "user", "content": THOUGHT}),
            "tool": (called, result),
        }
        for role, (before, follower) in followers.items():
            text, longer = self._text_of(before), self._text_of([*before, follower])
            opener = re.match(rf"\s*(?:{_any(stops)})", longer.removeprefix(text))
            if text and longer.startswith(text) and opener:
                self.openers[role] = opener[0]

    def _arguments(self, function: dict[str, Any]) -> Any:
        arguments = function.get("arguments") or {}
        if not self._reads_objects:
            return (
                arguments
                if isinstance(arguments, str)
                else json.dumps(arguments, ensure_ascii=False)
            )
        try:
            found = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            found = None
        if not isinstance(found, dict):
            problem = (
                f"must be a JSON object for this chat template, but they are "
                f"{str(arguments)[:40]!r}; correct them"
            )
            raise RowError(
                "",
                "tool-arguments",
                f"the arguments of the tool call {function['name']!r} {problem}",
            )
        return found

    @cached_property
    def _reads_reasoning(self) -> str:
        """Where the template takes reasoning from. Nowhere: that is left to the generation prompt,
        or to its own block.
        """
        if THOUGHT in self._probe({"content": ANSWER, "reasoning_content": THOUGHT}):
            return "in its field"
        written = self._probe(
            {"content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}
        ).removeprefix(self._probe())
        return (
            "in the content" if THOUGHT in written and written.count("think>") == 2 else "nowhere"
        )

    @cached_property
    def _reads_objects(self) -> bool:
        """Whether the arguments of tool calls are to be given as an object, not as JSON."""
        written = self._probe_call(None, {"key0": "value0"}) or self._probe_call(
            "", {"key0": "value0"}
        )
        # not as Python writes an object
        return "key0" in written and "value0" in written and "'key0'" not in written

    @cached_property
    def _no_content(self) -> str | None:
        """What stands for no content beside tool calls: some templates write the word None, others
        refuse None or "".
        """
        arguments = self._arguments({"name": "f", "arguments": {"key0": "value0"}})
        written = {empty: self._probe_call(empty, arguments) for empty in (None, "")}
        return min(
            written,
            key=lambda empty: ("value0" not in written[empty], written[empty].count("None")),
        )

    def _call_of_key0(self) -> list[Message]:
        """A tool call as this template wants it."""
        return self._call_messages(
            self._no_content, self._arguments({"name": "f", "arguments": {"key0": "value0"}})
        )

    def _call_messages(self, content: str | None, arguments: Any) -> list[Message]:
        call = {
            "id": "call00000",
            "type": "function",
            "function": {"name": "f", "arguments": arguments},
        }
        return [{"role": "assistant", "content": content, "tool_calls": [call]}]

    def _probe_call(self, content: str | None, arguments: Any) -> str:
        return self._text_of(self._call_messages(content, arguments))

    def _probe(self, answer: Message | None = None, generation_prompt: bool = False) -> str:
        answers = [{"role": "assistant", **answer}] if answer else []
        return self._text_of(answers, generation_prompt)

    def _text_of(self, answers: list[Message], generation_prompt: bool = False) -> str:
        """The rendering of a question, and answers; "" where the template refuses, as it then does
        with conversations.
        """
        messages = [{"role": "user", "content": QUESTION}, *answers]
        # some are written for conversations with tools alone
        for given in (NOTHING, Given(tools=[PROBE_TOOL])):
            try:
                return self.render(messages, given, generation_prompt=generation_prompt)[0]
            except RowError:
                continue
        return ""


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, str)
        else message
    )


def _any(tokens: Sequence[str]) -> str:
    """A pattern of these texts, the longest first; of none, what matches nowhere."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
