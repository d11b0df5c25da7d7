"""Tokens as text: what each of them writes, and which turn of the conversation they belong to.

Nothing here knows how samples were made. The turns are found in the decoded text, by the headers
that the chat template writes for a probe conversation, so that a mask can be judged by somebody who
did not make it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character
MOST_TOKENS_OF_A_CHARACTER = 8
CALL = {"name": "\ue000call\ue001", "arguments": {"a": "b"}}


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


class Piece(NamedTuple):
    """Tokens that write whole characters: one, or the few that share a character."""

    count: int
    text: str


class Block(NamedTuple):
    """A turn: tokens [start, end), of which [start, content) are the header. role is "" where no
    header is known.
    """

    role: str
    start: int
    content: int
    end: int


class Reader:
    """Reads the tokens of one tokenizer and its chat template.

    Attributes:
        headers: of system, user, assistant and tool, as far as the template writes any; longest
            first.
        prompt: what it writes for the answer to come (add_generation_prompt); "" where it does not.
        special: ids of special tokens, EOS among them, and of those that the template writes behind
            an answer: these end turns.
        added: ids of all added tokens, marked special or not.
        bos, eos: id or None.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any] | None = None
    ) -> None:
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        added = tokenizer.added_tokens_decoder
        self.added = set(added)
        self.special = {i for i, token in added.items() if token.special} | set(
            tokenizer.all_special_ids
        )
        written = _behind_answers(tokenizer, variables or {})
        for i, token in added.items():  # not all that end a turn are marked special
            if any(text.startswith(token.content) for text in written):
                self.special.add(i)
        self.special_texts = sorted(
            (added[i].content for i in self.special if i in added), key=len, reverse=True
        )
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        letters = (
            i
            for i in range(self.backend.get_vocab_size())
            if self.text([i]).isalpha() and self.text([i]).isascii()
        )
        self._anchor = [next(letters, 0)]
        self._pieces: dict[int, str] = {}
        self._broken: list[int] = []  # how a text that holds BROKEN itself is written
        with contextlib.suppress(Exception):  # a vocabulary of words alone may refuse it
            self._broken = self.backend.encode(BROKEN, add_special_tokens=False).ids
        self.headers, self.prompt = _learn(tokenizer, variables or {}, self.special_texts)
        # A reasoning block that the header opens is shown with the answer.
        texts = [(header.text.partition("<think")[0], header.role) for header in self.headers]
        self._roles = {
            form: role
            for text, role in reversed(texts)
            for form in (text.rstrip(), text)
            if form.strip()
        }
        forms = sorted(self._roles, key=len, reverse=True)
        self._header = re.compile("|".join(map(re.escape, forms)) or "(?!)")

    def text(self, tokens: Sequence[int]) -> str:
        """The decoded text, special tokens included."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=False)

    def texts(self, samples: Sequence[Sequence[int]]) -> list[str]:
        """`text` of many."""
        return self.backend.decode_batch(
            [list(map(int, tokens)) for tokens in samples], skip_special_tokens=False
        )

    def piece(self, token: int) -> str:
        """What one token writes behind another one; BROKEN in it where that is no whole character,
        "" of an unknown id.
        """
        if token not in self._pieces:
            self._pieces[token] = self._behind([token])
        return self._pieces[token]

    def pieces(self, tokens: Sequence[int]) -> list[Piece]:
        """The tokens in order, those that share a character together."""
        tokens = list(map(int, tokens))
        found = []
        while tokens:
            count, text = 1, self.piece(tokens[0])
            whole = len(self._broken) > 1 and tokens[: len(self._broken)] == self._broken
            if whole:
                count, text = len(self._broken), self._behind(self._broken)
            while (
                not whole
                and BROKEN in text
                and count < min(MOST_TOKENS_OF_A_CHARACTER, len(tokens))
            ):
                count += 1
                text = self._behind(tokens[:count])
            if not whole and BROKEN in text:  # bytes that never become a character
                count, text = 1, self.piece(tokens[0])
            found.append(Piece(count, text))
            del tokens[:count]
        return found

    def blocks(self, pieces: Sequence[Piece]) -> list[Block]:
        """The turns of a sample, in order and without gaps."""
        # ends[i]: first character behind i pieces; tokens[i]: tokens of them
        ends, tokens, characters = [0], [0], 0
        for piece in pieces:
            characters += len(piece.text)
            ends.append(characters)
            tokens.append(tokens[-1] + piece.count)
        found: list[Block] = []
        at = 0
        for match in self._header.finditer("".join(piece.text for piece in pieces)):
            while at + 1 < len(ends) and ends[at + 1] <= match.start():
                at += 1
            start = at
            while ends[at] < match.end():
                at += 1
            found.append(Block(self._roles[match.group()], tokens[start], tokens[at], 0))
        before = found[0].start if found else tokens[-1]
        if found and all(piece.text in self.special_texts for piece in pieces[:before]):
            found[0] = found[0]._replace(start=0)  # BOS alone is no turn
        elif before:
            found.insert(0, Block("system" if found else "", 0, 0, 0))
        nexts = [block.start for block in found[1:]] + [tokens[-1]]
        return [block._replace(end=end) for block, end in zip(found, nexts, strict=True)]

    def _behind(self, tokens: list[int]) -> str:
        # Behind an anchor, as some decoders take the space from the beginning of a text.
        before = self.backend.decode(self._anchor, skip_special_tokens=False)
        return self.backend.decode(self._anchor + tokens, skip_special_tokens=False)[len(before) :]


def _behind_answers(tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]) -> list[str]:
    """What the template writes behind an answer, before a further question and at the end."""
    mark = "\ue000answer\ue001"
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": mark},
        {"role": "user", "content": "b"},
    ]
    found = []
    for messages in (turns, turns[:2]):
        # the template is a program of the model's author: it can fail in any way
        with contextlib.suppress(Exception):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
            found.append(text.partition(mark)[2].lstrip())
    return found


def _learn(
    tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], special: list[str]
) -> tuple[list[Header], str]:
    """The headers of a template, from renderings of a probe conversation, and its generation
    prompt.
    """

    def render(messages: list[dict[str, Any]], prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **variables
            )
        except Exception:  # the template is a program of the model's author: it can fail in any way
            return ""

    def between(text: str, first: str, second: str, opening: str = "") -> str:
        """What stands between two contents, behind the token that ends the first turn unless that
        opens the next one.
        """
        found = (
            text.partition(first)[2].partition(second)[0]
            if first in text and second in text
            else ""
        )
        return found if opening and found.lstrip().startswith(opening) else behind_end(found)

    end = re.compile(r"\s*(?:" + ("|".join(map(re.escape, special)) or "(?!)") + r")\s*")

    def behind_end(text: str) -> str:
        match = end.match(text)
        return text[match.end() :] if match and match.end() < len(text) else text

    mark = [f"\ue000{i}\ue001" for i in range(5)]
    turns = [{"role": ("user", "assistant")[i % 2], "content": mark[i]} for i in range(4)]
    plain = render(turns)
    with_system = render([{"role": "system", "content": mark[4]}, *turns])
    before = render(turns[:3])
    asked = render(turns[:3], prompt=True)
    prompt = asked[len(before) :] if before and asked.startswith(before) else ""
    opening = next((token for token in special if prompt.lstrip().startswith(token)), "")

    user = between(plain, mark[1], mark[2])
    answer = between(plain, mark[0], mark[1], opening)
    headers = [Header(user, "user"), Header(answer, "assistant")]
    if prompt and prompt.startswith(answer.rstrip()):
        headers.insert(1, Header(prompt, "assistant"))
    elif opening and opening not in user and answer.lstrip().startswith(opening):
        # A token that opens answers alone, such as <|Assistant|>, with <think> behind it in the
        # prompt and </think> in history.
        headers.append(Header(prompt, "assistant"))
    if opening and opening not in user and answer.lstrip().startswith(opening):
        headers.append(Header(opening, "assistant"))
    if mark[4] in with_system:
        head = with_system.partition(mark[4])[0]
        headers.append(
            Header(head.removeprefix(tokenizer.bos_token or "").removeprefix("\n"), "system")
        )
    for arguments in (CALL["arguments"], '{"a": "b"}'):
        call = {"id": "call00001", "type": "function", "function": {**CALL, "arguments": arguments}}
        tool = {
            "role": "tool",
            "name": CALL["name"],
            "tool_call_id": "call00001",
            "content": mark[2],
        }
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        text = render([turns[0], calls, tool, {"role": "assistant", "content": mark[3]}])
        if CALL["name"] in text and mark[2] in text:
            last = text.partition(mark[2])[0].rpartition(CALL["name"])[2]
            ended = [
                last.rpartition(token)[2].lstrip()
                for token in _ends_of(headers, plain, mark, special)
                if token in last
            ]
            if ended and '"b"' not in ended[0]:
                headers.append(Header(ended[0], "tool"))
            follows = between(text, mark[2], mark[3], opening)
            # DeepSeek's has none of its own
            if not any(header.core and header.core in follows for header in headers):
                headers.append(Header(follows, "assistant"))
            break
    known = {header.text: header for header in headers if len(header.core) > 2}
    return sorted(known.values(), key=lambda header: -len(header.text)), prompt


def _ends_of(headers: list[Header], plain: str, mark: list[str], special: list[str]) -> list[str]:
    """The special token with which an assistant's turn ends."""
    tail = plain.partition(mark[1])[2].lstrip()
    return [token for token in special if tail.startswith(token)][:1]
