"""What rows mean: OpenAI messages, ShareGPT, Alpaca, prompt and completion, plain text, or tokens.

What a row says is followed, refused with a reason, or listed: see `keys.py` for its keys, and
`messages.py` and `pretokenised.py` for what stands inside. What would have to be guessed is
refused, as it would be trained without a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchsft.data import messages as chat
from torchsft.data import pretokenised
from torchsft.data.columns import suggestion
from torchsft.data.contents import parse_plain_content
from torchsft.data.keys import DOCUMENT_BOUNDS, ROW_KEYS, TOKEN_MASKS, misspelt, other_keys
from torchsft.data.rows import Row, RowError
from torchsft.data.values import check_json, expect, unpacked, weight_of

# The keys that make a row one of a format; the first that fits is taken.
KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
# Beside input_ids these say that tokens are meant, and any text is that of the tokens.
_OF_TOKENS = {"labels", "loss_weights", *TOKEN_MASKS, *DOCUMENT_BOUNDS}
# What only rows with a chat template can have.
_OF_TEMPLATES = (
    "system",
    "system_prompt",
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
)
_LOSS_MASKS = ("loss_mask", "message_loss_mask")
_SYSTEM_ROLES = ("system", "developer")
# What rendering itself gives to a chat template.
_RESERVED = {
    "messages",
    "conversations",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
}


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's shape, with what the chat template gets beside them.

    Attributes:
        messages: `role`, `content` (a string; None only beside `tool_calls`) and, where given,
            `tool_calls` (arguments as in the row, an object or a JSON string of it),
            `tool_call_id`, `name`, `reasoning_content`.
        tools: for the chat template.
        weights: of each message (None: what the mask says); empty: None for all.
        template_kwargs: further variables of the chat template that this row names; they win over
            --data.template-kwargs.
        documents: for templates that show documents.
        notes: codes that are counted.
        ignored: keys of the row that mean nothing here.
        row_weight: of the whole row; it is in `weights` of messages, and scales what else is
            trained under --data.mask all.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    weights: tuple[float | None, ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    documents: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)
    row_weight: float = 1.0


@dataclass(frozen=True)
class Text:
    """Text without a chat template.

    Attributes:
        prompt: context; may be empty.
        completion: what is trained, with `weight`.
    """

    id: str
    prompt: str
    completion: str
    weight: float = 1.0
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens as they are.

    Attributes:
        tokens: int32 [n], n at least 1.
        weights: float32 [n], of each token as a target.
        starts: where the documents begin, 0 first; tokens of one document do not see those of
            another.
    """

    id: str
    tokens: np.ndarray
    weights: np.ndarray
    starts: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


Example = Conversation | Text | Tokens


@dataclass
class _RowText:
    """A row whose text is taken as it is.

    Attributes:
        what: the key that the trained text stands under.
    """

    prompt: Any
    completion: Any
    what: str


def recognise(row: Row, where: str) -> str:
    """Return the format of a row, one of `KEYS`.

    Raises:
        RowError: unknown-format, misspelt-key.
    """
    given = {key for key, value in row.items() if value is not None}
    if "input_ids" in given and given & _OF_TOKENS:
        return "tokens"
    for name, keys in KEYS.items():
        if given.issuperset(keys):
            return name
    needed = frozenset(key for keys in KEYS.values() for key in keys)
    known = frozenset().union(*ROW_KEYS.values())
    for key in sorted(given - known):
        meant = misspelt(key, needed)
        if meant:
            problem = f"key {key!r} is not known, but {meant!r} is; rename it"
            raise RowError(where, "misspelt-key", problem)
    has = ", ".join(sorted(given)) or "(none)"
    formats = "; ".join(" and ".join(keys) for keys in KEYS.values())
    problem = f"no format has the keys {has}; give {formats}{suggestion(row)}"
    raise RowError(where, "unknown-format", problem)


def parse(row: Row, form: str, name: str, where: str, system: str = "") -> Example:
    """Return the example that a row holds.

    Args:
        form: the row's format, one of `KEYS`.
        name: the example's id.
        where: file and line, for errors.
        system: system turn for conversations that have none.

    Raises:
        RowError: the row lacks or contradicts something, or says what cannot be followed.
    """
    ignored = other_keys(row, form, where)
    if form == "tokens":
        found = pretokenised.parse(row, where)
        return Tokens(name, found.tokens, found.weights, found.starts, found.notes, ignored)
    text = _text_in(row, form)
    if text is not None:
        return _text(row, text, name, where, system, ignored)
    return _conversation(row, form, name, where, system, ignored)


def _text_in(row: Row, form: str) -> _RowText | None:
    """Return the text of a row that is no conversation."""
    if form == "text":
        return _RowText("", row.get("text"), "text")
    prompt = row.get("prompt")
    completion = row.get("completion")
    are_messages = isinstance(prompt, list) and isinstance(completion, list)
    if form == "prompt-completion" and not are_messages:
        return _RowText(prompt, completion, "completion")
    return None


def _text(
    row: Row, text: _RowText, name: str, where: str, system: str, ignored: tuple[str, ...]
) -> Text:
    what = text.what
    for key in _OF_TEMPLATES:
        if row.get(key):
            raise RowError(
                where,
                "unsupported-key",
                f"{key} stands beside {what} as a string, which no chat template renders; write "
                f"messages or remove {key}",
            )
    if system:
        raise RowError(
            where,
            "unsupported-key",
            f"--data.system cannot be given to {what} as a string, which has no turns; write "
            f"messages or leave it out",
        )
    for key in _LOSS_MASKS:
        if row.get(key) is not None:
            problem = f"{key} says which messages are trained, but {what} is a string"
            raise RowError(where, "unsupported-key", problem)
    prompt = expect(str, text.prompt, "prompt", where)
    completion = expect(str, text.completion, what, where)
    return Text(name, prompt, completion, _row_weight(row, where), ignored=ignored)


def _row_weight(row: Row, where: str) -> float:
    weight = weight_of(row, where)
    return 1.0 if weight is None else weight


def _conversation(
    row: Row, form: str, name: str, where: str, system: str, ignored: tuple[str, ...]
) -> Conversation:
    given = _given_messages(row, form, where)
    has_prompt = form == "prompt-completion"
    context = len(row["prompt"]) if has_prompt else 0  # messages that are not trained
    what = "turn" if form == "sharegpt" else "message"
    parsed = [
        chat.parse(message, f"{where}, {what} {i}") for i, message in enumerate(given, start=1)
    ]
    chat.follow_masks(parsed, where)
    _follow_loss_masks(row, parsed, where)
    parsed, fewer = chat.merge_calls(parsed, context)
    context -= fewer
    inner_ignored = [key for message in parsed for key in message.ignored]
    system_turn = _system_turn(row, parsed, where, system, inner_ignored)
    if system_turn is not None:
        parsed.insert(0, system_turn)
        context += 1 if has_prompt else 0

    if not any(message.is_answer for message in parsed[context:]):
        reason = "no-assistant" if parsed else "no-messages"
        problem = "no assistant message, so there is nothing to learn; add one or remove the row"
        raise RowError(where, reason, problem)
    row_weight = _row_weight(row, where)
    weights = _weights(row_weight, parsed, context)
    return Conversation(
        name,
        [message.fields for message in parsed],
        tools=_tools(row, where),
        weights=() if set(weights) == {None} else tuple(weights),
        template_kwargs=_template_kwargs(row, where),
        documents=_documents(row, where),
        notes=chat.notes_of(parsed, context),
        ignored=ignored + tuple(dict.fromkeys(inner_ignored)),
        row_weight=row_weight,
    )


def _given_messages(row: Row, form: str, where: str) -> list[Any]:
    """Return the messages of a row as it has them, in OpenAI's shape or ShareGPT's."""
    if form == "prompt-completion":
        return [*row["prompt"], *row["completion"]]
    if form == "messages":
        return expect(list, row.get("messages"), "messages", where)
    if form == "sharegpt":
        return expect(list, row.get("conversations"), "conversations", where)
    return _alpaca_messages(row, where)


def _alpaca_messages(row: Row, where: str) -> list[dict[str, Any]]:
    messages = []
    for given in expect(list, row.get("history") or [], "history", where):
        pair = expect(list, given, "pair of the history", where)
        if len(pair) != 2:
            problem = f"the history has {len(pair)} texts together, but needs [question, answer]"
            raise RowError(where, "bad-history", problem)
        question, answer = pair
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    texts = [expect(str, row.get(key) or "", key, where) for key in ("instruction", "input")]
    question = "\n\n".join(text for text in texts if text.strip())
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": row["output"]})
    return messages


def _system_turn(
    row: Row, parsed: Sequence[chat.Parsed], where: str, system: str, ignored: list[str]
) -> chat.Parsed | None:
    """Return the turn that `system` or `system_prompt` beside the messages gives, or else
    --data.system; None where the messages have one, or none is given.

    Args:
        ignored: keys of its parts that mean nothing are added to it.
    """
    texts = []  # of the row's keys
    for key in ("system", "system_prompt"):
        if row.get(key):
            content = parse_plain_content(row[key], key, where)
            ignored += content.ignored
            if content.text:
                texts.append(content.text)
    first_text = None  # of a system turn with which the messages begin
    if parsed and parsed[0].role in _SYSTEM_ROLES:
        first_text = parsed[0].fields["content"]
    different = set(texts)
    if texts and first_text is not None:
        different.add(first_text)
    if len(different) > 1:
        raise RowError(
            where,
            "bad-system",
            "system stands beside the messages and says something else than the row's other system "
            "text; keep one of them",
        )
    if first_text is not None:
        return None
    if texts:
        text = texts[0]
    else:
        has_later_turn = any(message.role in _SYSTEM_ROLES for message in parsed)
        text = "" if has_later_turn else system
    return chat.Parsed({"role": "system", "content": text}) if text else None


def _follow_loss_masks(row: Row, parsed: Sequence[chat.Parsed], where: str) -> None:
    """Turn LLaMA-Factory's `loss_mask` and NeMo's `message_loss_mask`, a 0 or 1 for each message of
    the row, into weights.
    """
    for key in _LOSS_MASKS:
        if row.get(key) is None:
            continue
        mask = expect(list, row[key], key, where)
        if len(mask) != len(parsed) or any(value not in (0, 1) for value in mask):
            raise RowError(
                where,
                "bad-weight",
                f"{key} must have a 0 or 1 for each of the {len(parsed)} messages, but has "
                f"{len(mask)} values ({mask!r:.60})",
            )
        for message, value in zip(parsed, mask, strict=True):
            _follow_loss_mask(message, key, value, where)


def _follow_loss_mask(message: chat.Parsed, key: str, value: Any, where: str) -> None:
    if not message.is_answer:
        if value:  # 0 as a rule; else a note counts it
            message.weight = 1.0
        return
    if message.weight is not None and bool(message.weight) != bool(value):
        problem = f"{key} contradicts the weight of a message; keep one of them"
        raise RowError(where, "bad-weight", problem)
    if not value:
        message.weight = 0.0


def _weights(row_weight: float, parsed: Sequence[chat.Parsed], context: int) -> list[float | None]:
    """Return the weight of each message, that of the row in it; messages of a prompt have none."""
    weights: list[float | None] = []
    for i, message in enumerate(parsed):
        weight = message.weight
        has_weight = message.is_answer or weight is not None
        if row_weight != 1.0 and has_weight:
            weight = row_weight * (1.0 if weight is None else weight)
        weights.append(0.0 if i < context else weight)
    return weights


def _tools(row: Row, where: str) -> list[dict[str, Any]] | None:
    """Return the tools, those of the older key `functions` in the shape of `tools`."""
    tools = _objects(row.get("tools") or [], "tools", "tool", where)
    given_functions = _objects(row.get("functions") or [], "functions", "function", where)
    functions = []
    for function in given_functions:
        is_wrapped = "function" in function
        wrapped = function if is_wrapped else {"type": "function", "function": function}
        functions.append(wrapped)
    if tools and functions and tools != functions:
        problem = "tools and functions say different things; keep one of them"
        raise RowError(where, "bad-tools", problem)
    found = tools or functions
    if not found:
        return None
    check_json(found, "tools", where)
    return found


def _objects(value: Any, what: str, what_of_one: str, where: str) -> list[dict[str, Any]]:
    """Return a list of objects."""
    objects = expect(list, value, what, where)
    return [expect(dict, each, what_of_one, where) for each in objects]


def _template_kwargs(row: Row, where: str) -> dict[str, Any]:
    if not row.get("chat_template_kwargs"):
        return {}
    found = expect(dict, row["chat_template_kwargs"], "chat_template_kwargs", where)
    reserved = sorted(found.keys() & _RESERVED)
    if reserved:
        raise RowError(
            where,
            "bad-chat_template_kwargs",
            f"chat_template_kwargs has {reserved[0]!r}, which rendering itself gives to the chat "
            f"template; remove it",
        )
    check_json(found, "chat_template_kwargs", where)
    return found


def _documents(row: Row, where: str) -> list[dict[str, Any]] | None:
    if not row.get("documents"):
        return None
    given = unpacked(row["documents"], "documents", where)
    documents = _objects(given, "documents", "document", where)
    check_json(documents, "documents", where)
    return documents
