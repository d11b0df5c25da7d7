"""Texts whose message contents are left open: turns are located once for many conversations.

Locating the turns of a conversation takes two renderings for each of them. Most templates only put
the contents between words of their own. So a conversation with the same sequence of roles is
rendered once with placeholders as its contents, and its turns are located there. A text becomes a
`TextPattern`, and so does each position in it, as the text before that position. A further
conversation is rendered once: if that is the pattern with its contents filled in, then its turns
are where the filled pattern has them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchsft.data.completeness import Missing
from torchsft.data.rendering import Message

CONTENT_KEYS = ("content", "reasoning_content")
PLACEHOLDER = re.compile("\ue002([0-9]+)\ue003")


@dataclass(slots=True)
class Turn:
    """One message in a text that ends with it.

    Attributes:
        index: of the message in its conversation.
        prompt_end: number of characters before the turn, which are its prompt.
        trained_start: where what is trained of the turn begins.
        trained_end: where it ends, behind the token that ends the turn.
        note: how the text differs from the rendering, a code that is counted; "" if it does not.
        text: the text.
        rendering: what the template wrote, from which the text comes.
    """

    index: int
    prompt_end: int
    trained_start: int
    trained_end: int
    note: str = ""
    text: str = ""
    rendering: str = ""


@dataclass(slots=True)
class TrainedText:
    """A text and the turns that are trained in it.

    Attributes:
        rendering: the rendering of messages[:stop], from which the text comes.
        missing: what the text lacks of its context.
    """

    text: str
    turns: list[Turn]
    rendering: str
    stop: int
    missing: tuple[Missing, ...] = ()


@dataclass(slots=True)
class TextPattern:
    """A text with open places for contents.

    Attributes:
        form: the text with `%s` at each place, for the operator `%`.
        contents: which content stands at each place.
    """

    form: str
    contents: list[int]

    def fill(self, contents: Sequence[str]) -> str:
        """Return the text with these contents."""
        return self.form % tuple([contents[number] for number in self.contents])


@dataclass(slots=True)
class TurnPattern:
    """A turn; each of its positions is the text before it."""

    index: int
    before_turn: TextPattern
    before_trained: TextPattern
    through_trained: TextPattern
    note: str


@dataclass(slots=True)
class TrainedTextPattern:
    """A `TrainedText` whose contents are left open."""

    text: TextPattern
    turns: list[TurnPattern]
    rendering: TextPattern
    stop: int
    missing: tuple[Missing, ...]

    def fill(self, contents: Sequence[str], messages: Sequence[Message]) -> TrainedText:
        """Return the text and turns with these contents, which are those of `messages`."""
        turns = []
        for turn in self.turns:
            prompt_end = len(turn.before_turn.fill(contents))
            trained_start = len(turn.before_trained.fill(contents))
            trained_end = len(turn.through_trained.fill(contents))
            turns.append(Turn(turn.index, prompt_end, trained_start, trained_end, turn.note))
        # a message that says nothing cannot be missing
        missing = tuple(
            item for item in self.missing if messages[item.index or 0]["content"].strip()
        )
        return TrainedText(self.text.fill(contents), turns, "", self.stop, missing)


def contents_of(messages: Sequence[Message]) -> list[str]:
    """Return the contents of a conversation, in the order in which placeholders are numbered."""
    return [message[key] for message in messages for key in CONTENT_KEYS if key in message]


def with_placeholders(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with a placeholder in place of each content."""
    found = []
    number = 0
    for message in messages:
        probe = dict(message)
        for key in CONTENT_KEYS:
            if key in message:
                probe[key] = f"\ue002{number}\ue003"
                number += 1
        found.append(probe)
    return found


def pattern_of(trained: TrainedText) -> TrainedTextPattern:
    """Return the pattern of a text that was made with placeholders."""
    text = trained.text
    turns = [
        TurnPattern(
            index=turn.index,
            before_turn=_text_pattern(text[: turn.prompt_end]),
            before_trained=_text_pattern(text[: turn.trained_start]),
            through_trained=_text_pattern(text[: turn.trained_end]),
            note=turn.note,
        )
        for turn in trained.turns
    ]
    return TrainedTextPattern(
        text=_text_pattern(text),
        turns=turns,
        rendering=_text_pattern(trained.rendering),
        stop=trained.stop,
        missing=trained.missing,
    )


def _text_pattern(text: str) -> TextPattern:
    form = PLACEHOLDER.sub("%s", text.replace("%", "%%"))
    contents = [int(number) for number in PLACEHOLDER.findall(text)]
    return TextPattern(form, contents)
