"""The headers that a chat template writes before the content of each role, read off renderings of a
probe conversation.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

# contents of probes, which no template or tokenizer has
MARKS = [f"\ue000{i}\ue001" for i in range(5)]
ANSWER = "\ue000answer\ue001"
CALL_NAME = "\ue000call\ue001"
SHORTEST = 3  # characters of a header without the white space behind it


class Header(NamedTuple):
    """What the template writes before the content of a role."""

    text: str
    role: str

    @property
    def core(self) -> str:
        """Without the white space behind it, which a template or tokenizer may treat as part of the
        content.
        """
        return self.text.rstrip()


@dataclass
class FoundHeaders:
    """What a template writes before contents.

    Attributes:
        headers: longest first.
        prompt: for the answer to come; "" for none.
    """

    headers: list[Header]
    prompt: str


def texts_behind_answers(
    tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]
) -> list[str]:
    """Return what the template writes behind an answer, before a further question and at the
    end.
    """
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "b"},
    ]
    found = []
    for messages in (turns, turns[:2]):
        # the template is a program of the model's author: it can fail in any way
        with contextlib.suppress(Exception):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
            found.append(text.partition(ANSWER)[2].lstrip())
    return found


def find_headers(
    tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], special: list[str]
) -> FoundHeaders:
    """Find the headers of a template.

    Args:
        variables: of the template.
        special: texts of the tokens that end turns, longest first.
    """
    return _Probe(tokenizer, variables, special).find()


class _Probe:
    """Renderings of a conversation of two questions and two answers.

    Attributes:
        turns: the conversation.
        plain: its rendering.
        prompt: what the template writes for the answer to come.
        opening: the token with which the prompt begins; "" for none.
        turn_end: a token that ends turns, with the white space around it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], special: list[str]
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = variables
        self.special = special
        any_special = "|".join(re.escape(text) for text in special) or "(?!)"
        self.turn_end = re.compile(rf"\s*(?:{any_special})\s*")
        self.turns = [{"role": ("user", "assistant")[i % 2], "content": MARKS[i]} for i in range(4)]
        self.plain = self.render(self.turns)
        self.prompt = self._generation_prompt()
        self.opening = next(
            (token for token in special if self.prompt.lstrip().startswith(token)), ""
        )

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """Render messages; "" where the template fails."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **self.variables
            )
        except Exception:  # the template is a program of the model's author: it can fail in any way
            return ""

    def find(self) -> FoundHeaders:
        """Find the headers of all roles; of one text, the role that was found last."""
        headers = [*self._of_user_and_assistant(), *self._of_system()]
        headers += self._around_tool_result(headers)
        long_enough = [header for header in headers if len(header.core) >= SHORTEST]
        by_text = {header.text: header for header in long_enough}
        longest_first = sorted(by_text.values(), key=lambda header: -len(header.text))
        return FoundHeaders(headers=longest_first, prompt=self.prompt)

    def _generation_prompt(self) -> str:
        """Return what the template writes for the answer to come; "" for nothing."""
        before = self.render(self.turns[:3])
        asked = self.render(self.turns[:3], prompt=True)
        return asked[len(before) :] if before and asked.startswith(before) else ""

    def _of_user_and_assistant(self) -> list[Header]:
        """Find what stands before questions and answers.

        The generation prompt is a header of answers too: it may be longer than what the template
        writes in the history. So is the token with which it begins, if that opens answers alone.
        """
        user = self._behind_turn_end(_between(self.plain, MARKS[1], MARKS[2]))
        answer = self._answer_header(self.plain, MARKS[0], MARKS[1])
        # such as <|Assistant|>, with <think> behind it in the prompt and </think> in history
        opens_answers_alone = (
            self.opening != ""
            and self.opening not in user
            and answer.lstrip().startswith(self.opening)
        )
        headers = [Header(user, "user")]
        begins_as_answers = self.prompt.startswith(answer.rstrip())
        if self.prompt and begins_as_answers:
            headers.append(Header(self.prompt, "assistant"))
        headers.append(Header(answer, "assistant"))
        if opens_answers_alone:
            if not (self.prompt and begins_as_answers):
                headers.append(Header(self.prompt, "assistant"))
            headers.append(Header(self.opening, "assistant"))
        return headers

    def _of_system(self) -> list[Header]:
        """Find what stands before a system turn with which a conversation begins."""
        text = self.render([{"role": "system", "content": MARKS[4]}, *self.turns])
        if MARKS[4] not in text:
            return []
        before = text.partition(MARKS[4])[0]
        bos = self.tokenizer.bos_token or ""
        return [Header(before.removeprefix(bos).removeprefix("\n"), "system")]

    def _around_tool_result(self, known: list[Header]) -> list[Header]:
        """Find the header of a tool's result, and that of the answer behind it if it is none of
        those that are known.
        """
        text = self._with_tool_result()
        if not text:
            return []
        headers = []
        behind_call = text.partition(MARKS[2])[0].rpartition(CALL_NAME)[2]
        end = self._end_of_answers()
        if end and end in behind_call:
            header = behind_call.rpartition(end)[2].lstrip()
            if '"b"' not in header:  # which is of the call's arguments
                headers.append(Header(header, "tool"))
        follows = self._answer_header(text, MARKS[2], MARKS[3])
        all_known = [*known, *headers]
        # DeepSeek's has none of its own
        if not any(header.core and header.core in follows for header in all_known):
            headers.append(Header(follows, "assistant"))
        return headers

    def _with_tool_result(self) -> str:
        """Render a tool call, its result and an answer, with arguments in the form that the
        template takes; "" where it takes none.
        """
        for arguments in ({"a": "b"}, '{"a": "b"}'):
            function = {"name": CALL_NAME, "arguments": arguments}
            call = {"id": "call00001", "type": "function", "function": function}
            messages = [
                self.turns[0],
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {
                    "role": "tool",
                    "name": CALL_NAME,
                    "tool_call_id": "call00001",
                    "content": MARKS[2],
                },
                {"role": "assistant", "content": MARKS[3]},
            ]
            text = self.render(messages)
            if CALL_NAME in text and MARKS[2] in text:
                return text
        return ""

    def _end_of_answers(self) -> str:
        """Return the special token with which an answer ends; "" for none."""
        behind = self.plain.partition(MARKS[1])[2].lstrip()
        return next((token for token in self.special if behind.startswith(token)), "")

    def _answer_header(self, text: str, first: str, second: str) -> str:
        """Return what stands between a content and the answer behind it: all of it where it begins
        as the generation prompt does, else without the token that ends the first turn.
        """
        found = _between(text, first, second)
        if self.opening and found.lstrip().startswith(self.opening):
            return found
        return self._behind_turn_end(found)

    def _behind_turn_end(self, text: str) -> str:
        """Return a text without the token with which it begins, if it ends a turn and is not
        all.
        """
        match = self.turn_end.match(text)
        return text[match.end() :] if match and match.end() < len(text) else text


def _between(text: str, first: str, second: str) -> str:
    """Return what stands between two contents; "" where one is not there."""
    if first not in text or second not in text:
        return ""
    return text.partition(first)[2].partition(second)[0]
