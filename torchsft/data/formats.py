"""What rows mean: OpenAI messages, ShareGPT, Alpaca, prompt and completion, plain text, or tokens.

What a row says is followed, refused with a reason, or listed: see `keys.py` for its keys, and
`messages.py` and `pretokenised.py` for what stands inside. What would have to be guessed is
refused, as it would be trained without a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchsft.config.data_options import RESERVED
from torchsft.data import messages as chat
from torchsft.data import pretokenised
from torchsft.data.columns import suggestion
from torchsft.data.contents import parse_content
from torchsft.data.keys import (
    CONTEXT,
    DOCUMENT_BOUNDS,
    LOSS_MASKS,
    ROW_KEYS,
    TOKEN_MASKS,
    is_empty,
    misspelt,
    other_keys,
)
from torchsft.data.pretokenised import Tokens
from torchsft.data.rows import Example, Object, Row, RowError, Strings, located
from torchsft.data.values import check_json, expect, row_weight

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
_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Conversation(Example):
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
        row_weight: of the whole row; it is in `weights` of messages, and scales what else is
            trained under --data.mask all.
    """

    messages: list[Object]
    tools: list[Object] | None = None
    weights: tuple[float | None, ...] = ()
    template_kwargs: Object = field(default_factory=dict)
    documents: list[Object] | None = None
    row_weight: float = 1.0

    def __post_init__(self) -> None:
        if reserved := sorted(self.template_kwargs.keys() & RESERVED):
            raise RowError(
                "bad-chat_template_kwargs",
                f"the row's variables of the chat template have {reserved[0]!r}, which rendering "
                f"itself gives; remove it",
            )


@dataclass(frozen=True)
class Text(Example):
    """Text without a chat template.

    Attributes:
        prompt: context; may be empty.
        completion: what is trained, with `weight`.
    """

    prompt: str
    completion: str
    weight: float = 1.0


def recognise(row: Row) -> str:
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
            raise RowError("misspelt-key", f"key {key!r} is not known, but {meant!r} is; rename it")
    has = ", ".join(sorted(given)) or "(none)"
    formats = "; ".join(" and ".join(keys) for keys in KEYS.values())
    raise RowError(
        "unknown-format", f"no format has the keys {has}; give {formats}{suggestion(row)}"
    )


def parse(row: Row, form: str, name: str, system: str = "") -> Conversation | Text | Tokens:
    """Return the example that a row holds.

    Args:
        form: the row's format, one of `KEYS`.
        name: the example's id.
        system: system turn for conversations that have none.

    Raises:
        RowError: the row lacks or contradicts something, or says what cannot be followed.
    """
    ignored = other_keys(row, form)
    key = KEYS[form][-1]  # of what is trained
    is_rendered = form not in ("tokens", "text")
    if form == "prompt-completion":
        is_rendered = isinstance(row["prompt"], list) and isinstance(row[key], list)
    if is_rendered:
        return _conversation(row, form, name, system, ignored)
    for other in CONTEXT:
        if not is_empty(row.get(other)):
            raise RowError(
                "unsupported-key",
                f"{other} stands beside {key}, which no chat template renders; write messages or "
                f"remove {other}",
            )
    if form == "tokens":
        return pretokenised.parse(row, name, ignored)
    return _text(row, key, name, system, ignored)


def _text(row: Row, what: str, name: str, system: str, ignored: Strings) -> Text:
    """Return a row whose text is taken as it is.

    Args:
        what: the key that the trained text stands under.
    """
    if system:
        raise RowError(
            "unsupported-key",
            f"--data.system cannot be given to {what} as a string, which has no turns; write "
            f"messages or leave it out",
        )
    for key in LOSS_MASKS:
        if row.get(key) is not None:
            raise RowError(
                "unsupported-key", f"{key} says which messages are trained, but {what} is a string"
            )
    prompt = expect(str, row["prompt"], "prompt") if what == "completion" else ""
    return Text(name, prompt, expect(str, row[what], what), row_weight(row), ignored=ignored)


def _conversation(row: Row, form: str, name: str, system: str, ignored: Strings) -> Conversation:
    has_prompt = form == "prompt-completion"
    context = len(row["prompt"]) if has_prompt else 0  # messages that are not trained
    what = "turn" if form == "sharegpt" else "message"
    inner_ignored: list[str] = []
    parsed = []
    for i, message in enumerate(_given_messages(row, form), start=1):
        with located(f"{what} {i}"):
            parsed.append(chat.parse(message, inner_ignored))
    chat.follow_masks(parsed)
    _follow_loss_masks(row, parsed)
    parsed, fewer = chat.merge_calls(parsed, context)
    context -= fewer
    system_text = _system_text(row, parsed, system, inner_ignored)
    if system_text:
        parsed.insert(0, chat.Parsed({"role": "system", "content": system_text}))
        context += has_prompt

    if not any(message.is_answer for message in parsed[context:]):
        reason = "no-assistant" if parsed else "no-messages"
        raise RowError(
            reason, "no assistant message, so there is nothing to learn; add one or remove the row"
        )
    weight = row_weight(row)
    weights = _weights(weight, parsed, context)
    template_kwargs = expect(dict, row.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    check_json(template_kwargs, "chat_template_kwargs")
    return Conversation(
        name,
        [message.fields for message in parsed],
        tools=_tools(row),
        weights=() if set(weights) == {None} else tuple(weights),
        template_kwargs=template_kwargs,
        documents=_objects(row, "documents") or None,
        notes=chat.notes_of(parsed, context),
        ignored=ignored + tuple(dict.fromkeys(inner_ignored)),
        row_weight=weight,
    )


def _given_messages(row: Row, form: str) -> list[Any]:
    """Return the messages of a row as it has them, in OpenAI's shape or ShareGPT's."""
    if form == "prompt-completion":
        return [*row["prompt"], *row["completion"]]
    if form == "messages":
        return expect(list, row["messages"], "messages")
    if form == "sharegpt":
        return expect(list, row["conversations"], "conversations")
    return _alpaca_messages(row)


def _alpaca_messages(row: Row) -> list[Object]:
    pairs = []
    for given in expect(list, row.get("history") or [], "history"):
        pair = expect(list, given, "pair of the history")
        if len(pair) != 2:
            raise RowError(
                "bad-history",
                f"the history has {len(pair)} texts together, but needs [question, answer]",
            )
        pairs.append(pair)
    texts = [expect(str, row.get(key) or "", key) for key in ("instruction", "input")]
    pairs.append(["\n\n".join(filter(str.strip, texts)), row["output"]])
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _system_text(row: Row, parsed: Sequence[chat.Parsed], system: str, ignored: list[str]) -> str:
    """Return what `system` or `system_prompt` beside the messages says, or else --data.system; ""
    where the messages have a system turn, or nothing is given.

    Args:
        ignored: keys of its parts that mean nothing are added to it.
    """
    texts = set()  # of the row's keys
    for key in ("system", "system_prompt"):
        if row.get(key):
            content = parse_content(row[key], f"{key}[].", ignored)
            if content.reasoning:
                raise RowError(
                    f"bad-{key}",
                    f"{key} holds reasoning, which only an assistant's message can have",
                )
            texts |= {content.text} - {""}
    begins = [message.fields["content"] for message in parsed[:1] if message.role in _SYSTEM_ROLES]
    if texts and len(texts.union(begins)) > 1:
        raise RowError(
            "bad-system",
            "system stands beside the messages and says something else than the row's other system "
            "text; keep one of them",
        )
    if texts:
        return "" if begins else texts.pop()
    return "" if any(message.role in _SYSTEM_ROLES for message in parsed) else system


def _follow_loss_masks(row: Row, parsed: Sequence[chat.Parsed]) -> None:
    """Turn LLaMA-Factory's `loss_mask` and NeMo's `message_loss_mask`, a 0 or 1 for each message of
    the row, into weights.
    """
    for key in LOSS_MASKS:
        if row.get(key) is None:
            continue
        mask = expect(list, row[key], key)
        if len(mask) != len(parsed) or any(value not in (0, 1) for value in mask):
            raise RowError(
                "bad-weight",
                f"{key} must have a 0 or 1 for each of the {len(parsed)} messages, but has "
                f"{len(mask)} values ({mask!r:.60})",
            )
        for message, value in zip(parsed, mask, strict=True):
            if message.is_answer:
                message.follow_mask(bool(value), key)
            elif value:  # 0 as a rule; else a note counts it
                message.weight = 1.0


def _weights(row_weight: float, parsed: Sequence[chat.Parsed], context: int) -> list[float | None]:
    """Return the weight of each message, that of the row in it; messages of a prompt have none."""
    weights = []
    for i, message in enumerate(parsed):
        weight = message.weight
        has_weight = message.is_answer or weight is not None
        if row_weight != 1.0 and has_weight:
            weight = row_weight * (1.0 if weight is None else weight)
        weights.append(0.0 if i < context else weight)
    return weights


def _tools(row: Row) -> list[Object] | None:
    """Return the tools, those of the older key `functions` in the shape of `tools`."""
    tools = _objects(row, "tools")
    functions = [
        function if "function" in function else {"type": "function", "function": function}
        for function in _objects(row, "functions")
    ]
    if tools and functions and tools != functions:
        raise RowError("bad-tools", "tools and functions say different things; keep one of them")
    return tools or functions or None


def _objects(row: Row, key: str) -> list[Object]:
    """Return the list of objects under a key, named by the plural of what they are."""
    given = expect(list, row.get(key) or [], key)
    objects = [expect(dict, each, key.removesuffix("s")) for each in given]
    check_json(objects, key)
    return objects
