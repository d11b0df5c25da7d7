"""The content of a message: a text, or a list of parts that are text or reasoning."""

from dataclasses import dataclass, field
from typing import Any

from torchsft.data.keys import MEDIA, PART_KEYS, SWITCHES, WEIGHTS, is_empty, other_keys_within
from torchsft.data.rows import Object, RowError, located
from torchsft.data.values import expect

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
TEXT_KEYS = ("text", "content", "value")
FLAGS = (*SWITCHES, *WEIGHTS, "mask", "masked")


@dataclass
class Content:
    """What a content says.

    Attributes:
        text: None where there is no content.
        reasoning: what its parts of reasoning say.
    """

    text: str | None
    reasoning: list[str] = field(default_factory=list)


def parse_content(content: Any, path: str, ignored: list[str]) -> Content:
    """Return what a content says.

    Args:
        path: what is put before a key of a part where it is listed as ignored.
        ignored: keys of parts that mean nothing here are added to it.

    Raises:
        RowError: bad-content, unsupported-key, or a key that cannot be followed.
    """
    if content is None:
        return Content(None)
    if not isinstance(content, list):
        return Content(expect(str, content, "content"))
    found = Content("")
    for i, part in enumerate(content, start=1):
        if isinstance(part, str):
            found.text += part
            continue
        with located(f"part {i}"):
            part = expect(dict, part, "content part")
            ignored += other_keys_within(part, _add_part(found, part), path)
    return found


def _add_part(found: Content, part: Object) -> frozenset[str]:
    """Add what a part says to what those before it say; return the keys that it may have."""
    _check_keys(part)
    kind = part.get("type")
    if kind in REASONING_PARTS and isinstance(part.get(kind), str):
        if found.text:
            raise RowError(
                "bad-content",
                "reasoning stands behind text, but is written before the whole answer; split "
                "the message there",
            )
        found.reasoning.append(part[kind])
        return frozenset({"type", kind})
    found.text += _text_of(part)
    return PART_KEYS


def _check_keys(part: Object) -> None:
    """Check that a part has no keys that only whole messages can have."""
    for key in FLAGS:
        if part.get(key) is not None:
            raise RowError(
                "unsupported-key",
                f"a content part has {key}, but only whole messages can be weighted; split the "
                f"message in two",
            )
    for key in ("role", "from"):
        if part.get(key) is not None:
            raise RowError(
                "bad-content",
                f"a content part has {key}, as a message has; write it as one of its own",
            )


def _text_of(part: Object) -> str:
    """Return the text of one part, whose type may be missing."""
    kind = part.get("type")
    is_text = kind is None or kind in TEXT_PARTS
    media = [key for key in MEDIA if not is_empty(part.get(key))]
    if media or not is_text:
        name = media[0] if is_text else kind
        raise RowError(
            "bad-content",
            f"a content part has type {name!r:.60}, but only text can be trained; remove it or the "
            f"row",
        )
    texts = [part[key] for key in TEXT_KEYS if part.get(key) is not None]
    if len(texts) > 1:
        keys = ", ".join(part) or "none"
        raise RowError(
            "bad-content",
            f"a content part needs one text, but has the keys {keys}; write it as {{'type': "
            f"'text', 'text': ...}}",
        )
    return expect(str, texts[0] if texts else None, "text of a content part")
