"""One chat template: the text that it makes of messages, and what it wants to be given.

Nothing about a template is known but what it writes: each property here is read off renderings of
small conversations.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from torchsft.data.rows import Object, RowError, Strings

Message = Object
Messages = Sequence[Message]

REASONING = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)  # in a content
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
PROBE_ARGUMENTS = {"key0": "value0"}
QUESTION, ANSWER, THOUGHT = "\ue000", "\ue001", "\ue002"  # what the messages of probes say


@dataclass(frozen=True, slots=True)
class Extras:
    """What a row gives to the template beside messages and variables."""

    tools: list[Object] | None = None
    documents: list[Object] | None = None


NO_EXTRAS = Extras()


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Texts of the added tokens of a tokenizer that can end a turn.

    Attributes:
        special: those that are marked special, and eos_token.
        others: those that are not.
        stops: those at which servers stop.
    """

    special: Strings
    others: Strings
    stops: Strings


@dataclass(slots=True)
class Rendering:
    """What a template makes of messages.

    Attributes:
        blocks: (start, end) characters of its generation blocks; empty where not asked for.
    """

    text: str
    blocks: list[tuple[int, int]]


def without_reasoning(message: Message) -> tuple[str, Message]:
    """Return the reasoning of a message, "" if it has none, and the message without it."""
    reasoning = message.get("reasoning_content")
    if reasoning:
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        return reasoning, rest
    in_content = REASONING.fullmatch(message.get("content") or "")
    if in_content:
        return in_content[1], {**message, "content": in_content[2]}
    return "", message


def variables_of(template: str) -> set[str]:
    """Return the names of the variables that a template reads.

    Returns:
        All words in it, where it cannot be parsed: rendering it says so for each row.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(GENERATION_TAG.sub("", template))
        return jinja2.meta.find_undeclared_variables(parsed)
    except jinja2.TemplateError:
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
        self.has_blocks = GENERATION_BLOCK.search(text) is not None
        self.takes_parts = False
        if ANSWER not in self._probe({"content": ANSWER}):
            # templates of image models, which read a content as a list of parts only
            self.takes_parts = True
            self.takes_parts = ANSWER in self._probe({"content": ANSWER})

        question = self._probe()
        prompt = self._probe(generation_prompt=True)
        turn = self._probe({"content": ANSWER}).removeprefix(question)
        self.before_content, _, behind_content = turn.partition(ANSWER)
        self.header = ""
        if prompt == question and self.before_content.strip():
            self.header = self.before_content
        self.opening = prompt.removeprefix(question) + self.header
        self.closing = ""
        self.tail = ""
        self.openers: dict[str, str] = {}
        self._find_turn_ends(added, behind_content)

    @cached_property
    def reads(self) -> set[str]:
        """Names of the variables that it reads."""
        return variables_of(self.text)

    def render(
        self,
        messages: Messages,
        extras: Extras = NO_EXTRAS,
        *,
        generation_prompt: bool = False,
        blocks: bool = False,
    ) -> Rendering:
        """Render messages.

        Args:
            generation_prompt: whether the text ends with the prompt for an answer.
            blocks: whether generation blocks are to be found.

        Raises:
            RowError: the template refuses them.
        """
        if self.takes_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            texts, block_lists = render_jinja_template(
                [messages],
                **self.variables,
                tools=extras.tools,
                documents=extras.documents,
                add_generation_prompt=generation_prompt,
                return_assistant_tokens_mask=blocks,
            )
        # the template is a program of the model's author: it can fail in any way
        except Exception as error:
            raise RowError(
                "template",
                f"the chat template refuses the conversation ({error}); change the data or the "
                f"chat template",
            ) from None
        return Rendering(texts[0], block_lists[0] if blocks else [])

    def ending(self, message: Message, follower: str = "") -> str:
        """Return what is to be added behind an assistant message that comes last.

        Args:
            follower: role of the message behind it in the conversation; "" for none.
        """
        if follower not in ("user", "tool"):
            follower = "tool" if message.get("tool_calls") else "user"
        return self.openers.get(follower) or self.openers.get("user", "")

    def prepared(self, message: Message) -> Message:
        """Return the message with its reasoning and tool calls where this template reads them."""
        if message["role"] != "assistant":
            return message
        content = message.get("content")
        calls = message.get("tool_calls")
        reasoning = (message.get("reasoning_content") or "").strip("\n")
        in_content = None
        if content and "<think>" in content and not reasoning:
            in_content = REASONING.fullmatch(content)
        if content is not None and not (reasoning or in_content or calls):
            return message

        message = {**message, "content": content}  # None, not absent: some templates ask for that
        if calls:
            message["tool_calls"] = [self._prepared_call(call) for call in calls]
        if reasoning and self._reads_reasoning == "in the content":
            del message["reasoning_content"]
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
        elif reasoning:
            message["reasoning_content"] = reasoning
        # where the template cuts it out of the content, its blank lines would stay
        elif in_content and self._reads_reasoning != "in the content":
            message["reasoning_content"] = in_content[1]
            message["content"] = in_content[2]
        if calls and not message["content"]:
            message["content"] = self._no_content
        return message

    def _prepared_call(self, call: Object) -> Object:
        function = call["function"]
        return call | {"function": function | {"arguments": self._arguments(function)}}

    def _arguments(self, function: Object) -> Any:
        """Return the arguments of a tool call as this template reads them: an object or JSON."""
        arguments = function.get("arguments") or {}
        if not self._reads_objects:
            is_text = isinstance(arguments, str)
            return arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        parsed = arguments
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = None
        if not isinstance(parsed, dict):
            raise RowError(
                "tool-arguments",
                f"the arguments of the tool call {function['name']!r} must be a JSON object for "
                f"this chat template, but they are {str(arguments)[:40]!r}; correct them",
            )
        return parsed

    # ------------------------------------------------------------ how turns end

    def _find_turn_ends(self, added: AddedTokens, behind_content: str) -> None:
        """Set `enders`, `closing`, `tail` and `openers`.

        Args:
            behind_content: what stands behind the content of a last answer.
        """
        others = set(added.stops)
        found = re.match(rf"\s*(?:{_any_of(added.special)})", behind_content)
        if not found:
            found = _unmarked_end(behind_content, added)
            if found:
                behind_call = self._text_of(self._probe_call()).rpartition("value0")[2]
                end_of_call = _unmarked_end(behind_call, added)
                others |= {end[1] for end in (found, end_of_call) if end}
        if found:
            self.closing = found[0].strip()
            self.tail = behind_content[found.end() :]
        else:
            self._find_openers(added.stops)
        self.enders = (*added.special, *sorted(others - set(added.special)))

    def _find_openers(self, stops: Sequence[str]) -> None:
        """Set `openers`: the token with which the next turn begins, if servers stop there."""
        answer = {"role": "assistant", "content": ANSWER}
        question = {"role": "user", "content": THOUGHT}
        result = {"role": "tool", "content": THOUGHT, "tool_call_id": "call00000", "name": "f"}
        for answers, follower in (([answer], question), (self._probe_call(), result)):
            text = self._text_of(answers)
            longer = self._text_of([*answers, follower])
            opener = re.match(rf"\s*(?:{_any_of(stops)})", longer.removeprefix(text))
            if text and longer.startswith(text) and opener:
                self.openers[follower["role"]] = opener[0]

    # ------------------------------------------------------------ what the template reads

    @cached_property
    def _reads_reasoning(self) -> str:
        """Where the template takes reasoning from: "in its field", "in the content" or "nowhere".

        Nowhere means that reasoning is left to the generation prompt, or to a block of its own.
        """
        if THOUGHT in self._probe({"content": ANSWER, "reasoning_content": THOUGHT}):
            return "in its field"
        answered = self._probe({"content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"})
        written = answered.removeprefix(self._probe())
        if THOUGHT in written and written.count("think>") == 2:
            return "in the content"
        return "nowhere"

    @cached_property
    def _reads_objects(self) -> bool:
        """Whether the arguments of tool calls are to be given as an object, not as JSON."""
        written = self._text_of(_call_messages(None, PROBE_ARGUMENTS))
        if not written:
            written = self._text_of(_call_messages("", PROBE_ARGUMENTS))
        is_as_python_writes_it = "'key0'" in written
        return "key0" in written and "value0" in written and not is_as_python_writes_it

    @cached_property
    def _no_content(self) -> str | None:
        """What stands for no content beside tool calls: some templates write the word None, others
        refuse None or "".
        """
        arguments = self._probe_arguments()

        def faults(empty: str | None) -> tuple[bool, int]:
            written = self._text_of(_call_messages(empty, arguments))
            return "value0" not in written, written.count("None")

        return min((None, ""), key=faults)

    # ------------------------------------------------------------ probes

    def _probe_arguments(self) -> Any:
        return self._arguments({"name": "f", "arguments": PROBE_ARGUMENTS})

    def _probe_call(self) -> list[Message]:
        """Return a tool call as this template wants it."""
        return _call_messages(self._no_content, self._probe_arguments())

    def _probe(self, answer: Message | None = None, generation_prompt: bool = False) -> str:
        answers = [{"role": "assistant", **answer}] if answer else []
        return self._text_of(answers, generation_prompt)

    def _text_of(self, answers: list[Message], generation_prompt: bool = False) -> str:
        """Return the rendering of a question and answers; "" where the template refuses, as it then
        does with conversations.
        """
        messages = [{"role": "user", "content": QUESTION}, *answers]
        # some are written for conversations with tools alone
        for extras in (NO_EXTRAS, Extras(tools=[PROBE_TOOL])):
            try:
                return self.render(messages, extras, generation_prompt=generation_prompt).text
            except RowError:
                continue
        return ""


def _call_messages(content: str | None, arguments: Any) -> list[Message]:
    function = {"name": "f", "arguments": arguments}
    call = {"id": "call00000", "type": "function", "function": function}
    return [{"role": "assistant", "content": content, "tool_calls": [call]}]


def _unmarked_end(text: str, added: AddedTokens) -> re.Match[str] | None:
    """Find the last added token in a text, as group 1, where none is marked special."""
    if re.search(_any_of(added.special), text):
        return None
    return re.match(f".*({_any_of(added.others)})", text, re.DOTALL)


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _any_of(tokens: Sequence[str]) -> str:
    """Return a pattern of these texts, the longest first; of none, what matches nowhere."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return "|".join(re.escape(token) for token in longest_first) or "(?!)"
