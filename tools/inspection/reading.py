"""Tokens as text: what each of them writes, and which turn of the conversation they belong to.

Nothing here knows how samples were made. The turns are found in the decoded text, by the headers
that the chat template writes for a probe conversation (`headers.py`), so that a mask can be judged
by somebody who did not make it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from tools.inspection.headers import find_headers, texts_behind_answers

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character
MOST_TOKENS_OF_A_CHARACTER = 8


class Piece(NamedTuple):
    """Tokens that write whole characters: one, or the few that share a character.

    Attributes:
        count: of tokens.
        text: that they write.
    """

    count: int
    text: str


class Block(NamedTuple):
    """A turn: tokens [start, end).

    Attributes:
        role: "" where no header is known.
        content: where the header ends; it is tokens [start, content).
    """

    role: str
    start: int
    content: int
    end: int


class Reader:
    """Reads the tokens of one tokenizer and its chat template.

    Attributes:
        backend: a copy of the tokenizer's.
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
        """Learn the headers and end-of-turn tokens of a chat template with these variables."""
        variables = variables or {}
        added = tokenizer.added_tokens_decoder
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.bos = tokenizer.bos_token_id
        self.eos = tokenizer.eos_token_id
        self.added = set(added)
        self.special = set(tokenizer.all_special_ids)
        behind_answers = texts_behind_answers(tokenizer, variables)
        for i, token in added.items():
            # not all that end a turn are marked special
            ends_turn = any(text.startswith(token.content) for text in behind_answers)
            if token.special or ends_turn:
                self.special.add(i)
        special_texts = [added[i].content for i in self.special if i in added]
        self.special_texts = sorted(special_texts, key=len, reverse=True)
        self._anchor = [self._first_letter()]
        self._pieces: dict[int, str] = {}
        self._broken: list[int] = []  # how a text that holds BROKEN itself is written
        with contextlib.suppress(Exception):  # a vocabulary of words alone may refuse it
            self._broken = self.backend.encode(BROKEN, add_special_tokens=False).ids
        found = find_headers(tokenizer, variables, self.special_texts)
        self.headers = found.headers
        self.prompt = found.prompt
        self._roles = self._roles_by_text()
        forms = sorted(self._roles, key=len, reverse=True)
        self._header = re.compile("|".join(re.escape(form) for form in forms) or "(?!)")

    def _first_letter(self) -> int:
        """Return the first token that writes letters and nothing else.

        Returns:
            Its id; 0 where there is none.
        """
        for i in range(self.backend.get_vocab_size()):
            text = self.text([i])
            if text.isalpha() and text.isascii():
                return i
        return 0

    def _roles_by_text(self) -> dict[str, str]:
        """Return the roles of headers, by their texts with and without the white space behind."""
        roles: dict[str, str] = {}
        for header in reversed(self.headers):
            # a reasoning block that the header opens is shown with the answer
            text = header.text.partition("<think")[0]
            for form in (text.rstrip(), text):
                if form.strip():
                    roles[form] = header.role
        return roles

    def text(self, tokens: Sequence[int]) -> str:
        """Return the decoded text, special tokens included."""
        ids = list(map(int, tokens))
        return self.backend.decode(ids, skip_special_tokens=False)

    def texts(self, samples: Sequence[Sequence[int]]) -> list[str]:
        """Return `text` of many samples."""
        ids = [list(map(int, tokens)) for tokens in samples]
        return self.backend.decode_batch(ids, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """Return what one token writes behind another one; BROKEN in it where that is no whole
        character, "" of an unknown id.
        """
        if token not in self._pieces:
            self._pieces[token] = self._behind_anchor([token])
        return self._pieces[token]

    def pieces(self, tokens: Sequence[int]) -> list[Piece]:
        """Return the tokens in order, those that share a character together."""
        rest = list(map(int, tokens))
        found = []
        while rest:
            piece = self._first_piece(rest)
            found.append(piece)
            del rest[: piece.count]
        return found

    def _first_piece(self, tokens: list[int]) -> Piece:
        """Return the piece with which tokens begin.

        Bytes of one character may lie in several tokens: these write BROKEN until the character is
        whole. A text may hold BROKEN itself.
        """
        writes_broken = len(self._broken) > 1 and tokens[: len(self._broken)] == self._broken
        if writes_broken:
            return Piece(len(self._broken), self._behind_anchor(self._broken))
        text = self.piece(tokens[0])
        if BROKEN not in text:
            return Piece(1, text)
        for count in range(2, min(MOST_TOKENS_OF_A_CHARACTER, len(tokens)) + 1):
            longer = self._behind_anchor(tokens[:count])
            if BROKEN not in longer:
                return Piece(count, longer)
        return Piece(1, text)  # bytes that never become a character

    def blocks(self, pieces: Sequence[Piece]) -> list[Block]:
        """Return the turns of a sample, in order and without gaps.

        Headers are found in the text; a turn begins with the token in which its header begins, and
        its content with the token behind that in which the header ends.

        Args:
            pieces: those of all of the sample's tokens.
        """
        # characters and tokens before each piece, and of all pieces
        characters = [0]
        tokens = [0]
        for piece in pieces:
            characters.append(characters[-1] + len(piece.text))
            tokens.append(tokens[-1] + piece.count)
        found: list[Block] = []
        at = 0  # a piece
        for match in self._header.finditer("".join(piece.text for piece in pieces)):
            while at + 1 < len(characters) and characters[at + 1] <= match.start():
                at += 1
            first = at
            while characters[at] < match.end():
                at += 1
            role = self._roles[match.group()]
            found.append(Block(role, tokens[first], tokens[at], 0))
        before = found[0].start if found else tokens[-1]
        if found and all(piece.text in self.special_texts for piece in pieces[:before]):
            found[0] = found[0]._replace(start=0)  # BOS alone is no turn
        elif before:
            found.insert(0, Block("system" if found else "", 0, 0, 0))
        ends = [block.start for block in found[1:]]
        ends.append(tokens[-1])
        return [block._replace(end=end) for block, end in zip(found, ends, strict=True)]

    def _behind_anchor(self, tokens: list[int]) -> str:
        """Return what tokens write behind a letter.

        Some decoders take the space from the beginning of a text.
        """
        before = self.backend.decode(self._anchor, skip_special_tokens=False)
        text = self.backend.decode(self._anchor + tokens, skip_special_tokens=False)
        return text[len(before) :]
