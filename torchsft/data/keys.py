"""Which keys of a row mean something: each is followed or refused, a misspelt one is refused, every
other one is listed.

Keys are those that OpenAI, TRL, axolotl, LLaMA-Factory, ms-swift, Fireworks, Amazon Bedrock and
NeMo document for supervised fine-tuning, and what data sets on the hub have. A key whose value is
null counts as absent.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torchsft.data.rows import RowError, Strings, kind_of

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning."""

SWITCHES = ("train", "training", "trainable", "loss")
"""Names of a switch that says whether a message is trained."""

WEIGHTS = ("weight", "loss_weight")
"""Names of the weight of a message or a row."""

MEDIA = (
    "image images image_url video videos audio audios input_audio file document pixel_values"
).split()
"""Names of what is not text."""

CONTEXT = ("system", "system_prompt", "tools", "functions", "documents", "chat_template_kwargs")
"""Names of what a chat template renders beside the messages; the same for every format of
conversations.
"""

LOSS_MASKS = ("loss_mask", "message_loss_mask")
"""Names of what says which messages of a row are trained."""

_OF_CONVERSATIONS = {*CONTEXT, *WEIGHTS, "train", "trainable", *LOSS_MASKS}

DOCUMENT_BOUNDS = (
    "position_ids seq_lengths cu_seqlens cu_seq_lens document_ids seq_idx sequence_ids"
).split()
"""Names of what says where the documents of a pre-tokenised row begin."""

TOKEN_MASKS = ("completion_mask", "assistant_masks", "assistant_tokens_mask", "loss_mask")
"""Names of what says which tokens of a pre-tokenised row are trained, 1 for those that are."""

ROW_KEYS: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages", *_OF_CONVERSATIONS}),
    "sharegpt": frozenset({"conversations", *_OF_CONVERSATIONS}),
    "alpaca": frozenset({"instruction", "input", "output", "history", *_OF_CONVERSATIONS}),
    "prompt-completion": frozenset({"prompt", "completion", *_OF_CONVERSATIONS}),
    "text": frozenset({"text", *WEIGHTS, "train", "trainable"}),
    "tokens": frozenset(
        {
            *("input_ids", "labels", "loss_weights", "attention_mask", "train", "trainable"),
            *(*TOKEN_MASKS, *DOCUMENT_BOUNDS, *WEIGHTS),
        }
    ),
}
"""The keys that each format follows."""

MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "function_call"}
    | {*REASONING, *SWITCHES, *WEIGHTS, "mask", "masked"}
)
TURN_KEYS = MESSAGE_KEYS | {"from", "value"}
PART_KEYS = frozenset({"type", "text", "content", "value"})
CALL_KEYS = frozenset({"id", "type", "function", "name", "arguments"})
FUNCTION_KEYS = frozenset({"name", "arguments"})

_OTHER_TEXT = "it is not part of the conversation"
_REFUSED = {
    "toolConfig": "Bedrock's tools are not read; write them as OpenAI's `tools`",
    "segments": "axolotl's segments are not read; write messages, or input_ids with labels",
    "train_detail": "parts of a message cannot be trained; split the message or use `train`",
    "training_detail": "parts of a message cannot be trained; split the message or use `train`",
    "loss_scale": "write it as `weight`",
    "refusal": f"{_OTHER_TEXT} as it stands; write it as `content`",
    "function_calls": "write it as `tool_calls`",
}
_HUMANS = ("user", "human", "system")
_UNWANTED = (
    "marks an answer that is not wanted (KTO), which fine-tuning would teach; remove the row"
)
# Switches of a row: the value that says what happens anyway, and what the other one asks for.
_DEFAULTS = {
    "label": (True, _UNWANTED),
    "kto_tag": (True, _UNWANTED),
    "unmask": (
        False,
        "asks to train every token of this row; --data.mask all does so for all rows of a run",
    ),
}
# What a `mask` of a row asks for that is no text, and one that is.
_OTHER_MASKS = (
    "means 'trained' to some tools and 'not trained' to others; write `train` into the messages",
    "names whose turns are not trained, which here are all but the assistant's; remove it",
)
# The kind of values of keys; a list may also be written as JSON.
_KINDS: dict[Any, set[str]] = {
    list: {
        *("messages", "conversations", "tools", "functions", "documents", "history"),
        *("tool_calls", "input_ids", "labels", "loss_weights", "attention_mask"),
        *(*TOKEN_MASKS, *DOCUMENT_BOUNDS),
    },
    str: {
        *("role", "from", "value", "name", "tool_call_id", "system", "system_prompt"),
        *("text", "instruction", "output", "input", *REASONING),
    },
    (bool, int, float): {*SWITCHES, *WEIGHTS, "mask", "masked", "unmask", "label", "kto_tag"},
    (dict, str): {"chat_template_kwargs", "function", "function_call", "arguments"},
}
_KNOWN_ROW_KEYS = frozenset().union(*ROW_KEYS.values())


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, false, or a string, list or object that is empty
    or holds nulls only.
    """
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        return all(each is None for each in inner)
    return value is None or value is False or value == ""


def other_keys(row: Mapping[str, Any], form: str) -> Strings:
    """Return the keys of a row that its format does not know; they change nothing and are listed.

    Raises:
        RowError: misspelt-key; or a key that means something which cannot be followed here.
    """
    known = ROW_KEYS[form]
    if known.issuperset(row):
        return ()
    others = [key for key in row if key not in known and row[key] is not None]
    others = [key for key in others if not _is_followed_as_default(key, row[key])]
    others = [key for key in others if key not in MEDIA or not is_empty(row[key])]
    for key in others:
        is_name = key in ("file", "document") and isinstance(row[key], str)  # where it comes from
        if not is_name and not (key in MEDIA and isinstance(row[key], bool)):
            _check_followed(key, row[key])
    # those of another format are spelt right
    _check_spelling([key for key in others if key not in _KNOWN_ROW_KEYS], row, known)
    return tuple(others)


def _is_followed_as_default(key: str, value: Any) -> bool:
    """Return whether the key says what happens anyway.

    Raises:
        RowError: it says that the row is to be trained otherwise.
    """
    if key == "mask":
        is_default = str(value).lower() in _HUMANS  # NeMo: whose turns are not trained
        fault = _OTHER_MASKS[isinstance(value, str)]
    elif key in _DEFAULTS and isinstance(value, bool):  # a label may be one of a classification
        default, fault = _DEFAULTS[key]
        is_default = value is default
    else:
        return False
    if not is_default:
        raise RowError("unsupported-key", f"{key} is {value!r:.60}; it {fault}")
    return True


def other_keys_within(value: Mapping[str, Any], known: frozenset[str], path: str) -> Strings:
    """Return what `other_keys` does, for an object inside a row: a message, content part, tool call
    or function.

    Args:
        path: what is put in front of the key where it is listed, such as `messages[].`
    """
    if known.issuperset(value):
        return ()
    others = [key for key in value if key not in known and value[key] is not None]
    for key in others:
        _check_followed(key, value[key])
    _check_spelling(others, value, known)
    return tuple(path + key for key in others)


def _check_followed(key: str, value: Any) -> None:
    """Refuse a key that means something which cannot be followed, unless its value is empty."""
    if is_empty(value):
        return
    if key in _REFUSED:
        raise RowError("unsupported-key", f"{key} cannot be followed: {_REFUSED[key]}")
    if key in MEDIA:
        raise RowError(
            "not-text",
            f"{key} holds {_described(key, value)}, but only text can be trained; remove it or "
            f"the row",
        )


def _check_spelling(others: list[str], value: Mapping[str, Any], known: frozenset[str]) -> None:
    """Check that none of these keys of an object is a misspelling of a known key that is absent."""
    for key in others:
        meant = misspelt(key, known)
        if meant and value.get(meant) is None and _could_be(meant, value[key]):
            raise RowError(
                "misspelt-key",
                f"key {key!r} is not known, but {meant!r} is; rename it, or rename it to something "
                f"else if it is not that",
            )


@functools.lru_cache(maxsize=4096)
def misspelt(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that `key` is a misspelling of, if any.

    Written in another style (toolCalls, tool-calls), or within one edit (two, from eight letters
    on) with the
    same first letter: insertion, deletion, another letter, or two neighbours exchanged. Short names
    are taken for
    misspelt only if letters are exchanged: `test` is not `text`.
    """
    plain = _plain(key)
    found = []
    for meant in known:
        target = _plain(meant)
        edits = _edits(plain, target)
        if len(target) <= 4:
            exchanged = edits == 1 and sorted(plain) == sorted(target)
            near = edits == 0 or exchanged or _is_doubled(plain, target)
        else:
            near = edits <= (2 if len(target) >= 8 else 1)
        if near and plain[:1] == target[:1]:
            found.append((edits, meant))
    return min(found)[1] if found else None


def _plain(key: str) -> str:
    return key.replace("_", "").replace("-", "").replace(" ", "").lower()


def _is_doubled(longer: str, shorter: str) -> bool:
    """Return whether one is the other with one letter written twice."""
    return any(shorter[: i + 1] + shorter[i:] == longer for i in range(len(shorter)))


def _edits(a: str, b: str) -> int:
    """Count insertions, deletions, replaced letters and exchanged neighbours between two words
    (optimal string alignment).
    """
    if abs(len(a) - len(b)) > 2:
        return 3
    before = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        before, above, row = row, before, [i]
        for j, other in enumerate(b, start=1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, above[j - 2] + 1)
            row.append(best)
    return row[-1]


def _could_be(meant: str, value: Any) -> bool:
    """Whether a value is of the kind that the key takes: `tool: "search"` is no misspelling of
    `tools`.
    """
    if meant in _KINDS[list] and isinstance(value, str):  # it may be JSON
        return value.lstrip().startswith(("[", "{"))
    return all(isinstance(value, kind) for kind, keys in _KINDS.items() if meant in keys)


def _described(key: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} of them" if key.endswith("s") else f"a list of {len(value)}"
    return kind_of(value)
