"""Why a token differs between our sample and the document of another tool, as far as it shows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tools.inspection.reading import Block, Piece, Reader

REASONS = {
    "everything-trained": "Everything is trained",
    "split-by-turn": "The row is split by turn, so that each answer has the context of inference",
    "header": "Role header",
    "end-of-turn": "End of turn",
    "newline-behind-end": "White space behind the end of turn",
    "reasoning": "Reasoning",
    "tool-result": "Tool result",
    "context": "System or user turn, or prompt",
    "answer": "A whole answer (a weight of 0, --data.mask last-turn, a tool that trains fewer "
    "turns)",
    "part-of-answer": "Part of an answer",
    "bos": "BOS",
    "eos": "EOS or other tokens behind the last turn",
    "truncated": "Cut off on the other side",
    "other-tokens": "The tokens themselves differ",
}
THINKING = re.compile(r"<think>.*?(?:</think>\n*|\Z)", re.DOTALL)


class Explanation:
    """What shows why tokens of a pair differ.

    Args:
        tokens: int64 [n], those of both sides, in order.
        sides: [n] of "both", "ours", "theirs": who has the token.
        ours_trained, theirs_trained: bool [n]

    Attributes:
        block_of: [n], the turn that each token belongs to.
        is_one_sided: [n], whether one side alone has the token.
        is_thinking: [n], whether it is of a reasoning block.
        is_end: [n], whether it can end a turn.
        is_blank: [n], whether it writes white space only.
        trains_all: for each side, whether it trains all tokens that both have, but for the first.
        tail_start: where the tokens begin that one side alone has at the end; 0 if these are all.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        sides: Sequence[str],
        ours_trained: np.ndarray,
        theirs_trained: np.ndarray,
        reader: Reader,
    ) -> None:
        self.tokens = tokens
        self.sides = sides
        self.bos = reader.bos
        self.trained = {"ours": ours_trained, "theirs": theirs_trained}
        self.is_one_sided = [side != "both" for side in sides]
        pieces = reader.pieces(tokens)
        self.block_of: list[Block] = []
        for block in reader.blocks(pieces):
            self.block_of += [block] * (block.end - block.start)
        self.is_thinking = _is_thinking(pieces)
        self.is_end = [token in reader.special for token in tokens]
        self.is_blank = [not reader.piece(token).strip() for token in tokens]
        is_shared = np.array([not each for each in self.is_one_sided])
        self.trains_all = {
            side: trained[is_shared][1:].all() for side, trained in self.trained.items()
        }
        self.tail_start = self._tail_start()

    def _tail_start(self) -> int:
        """Return where the tokens begin that one side alone has at the end; 0 if these are all."""
        for i in reversed(range(len(self.tokens))):
            if not self.is_one_sided[i] or self.sides[i] != self.sides[-1]:
                return i + 1
        return 0

    def reason(self, i: int) -> str:
        """Return why token i differs.

        Returns:
            A key of REASONS; "" where it does not differ.
        """
        if self.is_one_sided[i]:
            return self._reason_of_token(i)
        if self.trained["ours"][i] != self.trained["theirs"][i]:
            return self._reason_of_mask(i)
        return ""

    def _reason_of_token(self, i: int) -> str:
        """Return why one side alone has token i.

        The BOS stands before everything, a tail behind everything that both have: the end of the
        text where it says nothing, or what was cut off on the other side.
        """
        if self.tokens[i] == self.bos and all(self.is_one_sided[: i + 1]):
            return "bos"
        if self.tail_start and i >= self.tail_start:
            tail = range(self.tail_start, len(self.tokens))
            says_nothing = all(self.is_end[j] or self.is_blank[j] for j in tail)
            return "eos" if says_nothing else "truncated"
        return "reasoning" if self.is_thinking[i] else "other-tokens"

    def _reason_of_mask(self, i: int) -> str:
        """Return why one side alone trains token i, by the turn that it belongs to.

        Tools train an answer from the end of its header through its end of turn; some train the
        header too, or the white space behind the end, or leave out reasoning.
        """
        block = self.block_of[i]
        alone, beside = ("ours", "theirs") if self.trained["ours"][i] else ("theirs", "ours")
        if self.trains_all[alone]:
            return "everything-trained"
        if i < block.content:
            return "end-of-turn" if self._opens_next_turn(i, block) else "header"
        if self.is_thinking[i]:
            return "reasoning"
        if block.role == "tool":
            return "tool-result"
        if block.role in ("system", "user"):
            return "context"
        if self.is_end[i]:
            return "end-of-turn"
        if self.is_blank[i] and self.is_end[self._last_text(i, block)]:
            return "newline-behind-end"
        if not block.role:
            is_answer = self.trained[beside][:i].any()
            return "part-of-answer" if is_answer else "context"
        answer = slice(block.content, block.end)
        trains_answer = self.trained[alone][answer].any()
        other_trains_answer = self.trained[beside][answer].any()
        return "answer" if trains_answer and not other_trains_answer else "part-of-answer"

    def _opens_next_turn(self, i: int, block: Block) -> bool:
        """Return whether a header's token i also ends the trained turn before it."""
        if i == 0 or i != block.start or not self.is_end[i]:
            return False
        return bool(self.trained["ours"][i - 1] or self.trained["theirs"][i - 1])

    def _last_text(self, i: int, block: Block) -> int:
        """Return the last token before i that is not blank.

        Returns:
            Its index; that of the block's first token if all are blank.
        """
        for j in range(i - 1, block.start - 1, -1):
            if not self.is_blank[j]:
                return j
        return block.start


def _is_thinking(pieces: Sequence[Piece]) -> list[bool]:
    """Return whether each token is of a reasoning block."""
    text = "".join(piece.text for piece in pieces)
    spans = [match.span() for match in THINKING.finditer(text)]
    found: list[bool] = []
    at = 0
    for piece in pieces:
        is_inside = any(start <= at < end for start, end in spans)
        found += [is_inside] * piece.count
        at += len(piece.text)
    return found
