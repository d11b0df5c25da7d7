"""Texts whose message contents are left open: turns are located once for many conversations.

Locating the turns of a conversation takes two renderings for each of them. Most templates only put
the contents between words of their own. So a conversation with the same sequence of roles is
rendered once with placeholders as its contents, and its turns are located there. A text becomes a
form for the operator `%`, and so does each position in it, as the text before that position. A
further conversation is rendered once: if that is the form with its contents filled in, then its
turns are where the filled form has them.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchsft.data.completeness import Missing
from torchsft.data.rendering import Message, Messages

CONTENT_KEYS = ("content", "reasoning_content")
PLACEHOLDER = re.compile("\ue002([0-9]+)\ue003")

Contents = Mapping[str, str]  # of a conversation, by the number of the placeholder, as a string


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
    rendering: str = ""
    stop: int = 0
    missing: tuple[Missing, ...] = ()


class Pattern:
    """A `TrainedText` whose contents are left open.

    Args:
        trained: the text that was made with placeholders.

    Attributes:
        text, rendering: forms of the text and of its rendering.
        positions: of each turn, the forms before it, before what is trained of it, and through
            that.
    """

    def __init__(self, trained: TrainedText) -> None:
        self.trained = trained
        self.text = _form(trained.text)
        self.rendering = _form(trained.rendering)
        self.positions = []
        for turn in trained.turns:
            ends = (turn.prompt_end, turn.trained_start, turn.trained_end)
            self.positions.append([_form(trained.text[:end]) for end in ends])

    def fill(self, contents: Contents, messages: Messages) -> TrainedText:
        """Return the text and turns with these contents, which are those of `messages`."""
        turns = []
        for turn, forms in zip(self.trained.turns, self.positions, strict=True):
            ends = [len(form % contents) for form in forms]
            turns.append(Turn(turn.index, *ends, turn.note))
        # a message that says nothing cannot be missing
        missing = tuple(
            item for item in self.trained.missing if messages[item.index or 0]["content"].strip()
        )
        return TrainedText(self.text % contents, turns, missing=missing)


def contents_of(messages: Messages) -> Contents:
    """Return the contents of a conversation, as placeholders are numbered."""
    found = [message[key] for message in messages for key in CONTENT_KEYS if key in message]
    return {str(number): content for number, content in enumerate(found)}


def with_placeholders(messages: Messages) -> list[Message]:
    """Return the messages with a placeholder in place of each content."""
    numbers = itertools.count()
    found = []
    for message in messages:
        keys = [key for key in CONTENT_KEYS if key in message]
        found.append(message | {key: f"\ue002{next(numbers)}\ue003" for key in keys})
    return found


def _form(text: str) -> str:
    """Return a text with placeholders as a form, with `%(number)s` at each of them."""
    return PLACEHOLDER.sub(r"%(\1)s", text.replace("%", "%%"))
