"""What rows mean: OpenAI messages, ShareGPT, Alpaca, prompt and completion, plain text, or tokens.

What a row says is followed, refused with a reason, or listed: see `keys.py` for its keys, and
`messages.py` and `pretokenised.py` for what stands inside. What would have to be guessed is
refused, as it would be trained without a word.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchsft.data import messages as chat
from torchsft.data import pretokenised
from torchsft.data.columns import suggestion
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
    """Messages in OpenAI's shape: `role`, `content` (a string; None only beside `tool_calls`) and,
    where given, `tool_calls` (arguments as in the row, an object or a JSON string of it),
    `tool_call_id`, `name`, `reasoning_content`; with the tools for the chat template, and a weight
    for each message (None: what the mask says; empty: None for all).

    `template_kwargs`: further variables of the chat template that this row names; they win over
    --data.template-kwargs. `documents`: for templates that show documents. `notes`: what is to be
    told of this row, as codes that are counted. `ignored`: keys of the row that mean nothing
    here. `row_weight`: that of the whole row; it is in `weights` of messages, and scales what else
    is trained under --data.mask all.
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
    """Text without a chat template: `prompt` (may be empty) is context, `completion` is trained
    with `weight`.
    """

    id: str
    prompt: str
    completion: str
    weight: float = 1.0
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens as they are: `tokens` int32 [n] and `weights` float32 [n] of each as a target; n at
    least 1.

    `starts`: where the documents begin, 0 first; tokens of one document do not see those of
    another.
    """

    id: str
    tokens: np.ndarray
    weights: np.ndarray
    starts: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


Example = Conversation | Text | Tokens


def recognise(row: Row, where: str) -> str:
    """The format of a row, one of `KEYS`. Raises RowError: unknown-format."""
    given = {key for key, value in row.items() if value is not None}
    if "input_ids" in given and given & _OF_TOKENS:
        return "tokens"
    for name, keys in KEYS.items():
        if given.issuperset(keys):
            return name
    wanted = "; ".join(" and ".join(keys) for keys in KEYS.values())
    text = f"no format has the keys {', '.join(sorted(given)) or '(none)'}; give {wanted}"
    needed = frozenset(key for keys in KEYS.values() for key in keys)
    for key in sorted(given - frozenset().union(*ROW_KEYS.values())):
        if meant := misspelt(key, needed):
            raise RowError(
                where, "misspelt-key", f"key {key!r} is not known, but {meant!r} is; rename it"
            )
    raise RowError(where, "unknown-format", text + suggestion(row))


def parse(row: Row, form: str, name: str, where: str, system: str = "") -> Example:
    """The example that a row holds.

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
    prompt, completion = row.get("prompt"), row.get("completion")
    both_are_messages = isinstance(prompt, list) and isinstance(completion, list)
    if form == "text":
        return _text(row, name, "", row.get("text"), "text", where, system, ignored)
    if form == "prompt-completion" and not both_are_messages:
        return _text(row, name, prompt, completion, "completion", where, system, ignored)
    return _conversation(row, form, name, where, system, ignored)


def _text(
    row: Row,
    name: str,
    prompt: Any,
    completion: Any,
    what: str,
    where: str,
    system: str,
    ignored: tuple[str, ...],
) -> Text:
    for key in (
        "system",
        "system_prompt",
        "tools",
        "functions",
        "documents",
        "chat_template_kwargs",
    ):
        if row.get(key):
            said = (
                f"{key} stands beside {what} as a string, which no chat template renders; write "
                f"messages or remove {key}"
            )
            raise RowError(where, "unsupported-key", said)
    if system:
        said = (
            f"--data.system cannot be given to {what} as a string, which has no turns; write "
            f"messages or leave it out"
        )
        raise RowError(where, "unsupported-key", said)
    for key in ("loss_mask", "message_loss_mask"):
        if row.get(key) is not None:
            raise RowError(
                where,
                "unsupported-key",
                f"{key} says which messages are trained, but {what} is a string",
            )
    prompt = expect(str, prompt, "prompt", where)
    completion = expect(str, completion, what, where)
    weight = weight_of(row, where)
    return Text(name, prompt, completion, 1.0 if weight is None else weight, ignored=ignored)


def _conversation(
    row: Row, form: str, name: str, where: str, system: str, ignored: tuple[str, ...]
) -> Conversation:
    given = _given_messages(row, form, where)
    # messages that are not trained
    context = len(row["prompt"]) if form == "prompt-completion" else 0
    what = "turn" if form == "sharegpt" else "message"
    parsed = [
        chat.parse(message, f"{where}, {what} {i}") for i, message in enumerate(given, start=1)
    ]
    chat.follow_masks(parsed, where)
    _apply_loss_mask(row, parsed, where)
    parsed, merged = chat.merge_calls(parsed, context)
    context -= merged
    inner = [key for message in parsed for key in message.ignored]
    system_turn = _system_turn(row, parsed, where, system, inner)
    parsed = system_turn + parsed
    context += len(system_turn) if form == "prompt-completion" else 0

    messages = [message.fields for message in parsed]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[context:]:
        reason = "no-assistant" if messages else "no-messages"
        raise RowError(
            where,
            reason,
            "no assistant message, so there is nothing to learn; add one or remove the row",
        )
    of_row = weight_of(row, where)
    of_row = 1.0 if of_row is None else of_row
    weights = _weights(of_row, parsed, context)
    notes = chat.notes_of(parsed, context)
    return Conversation(
        name,
        messages,
        tools=_tools(row, where),
        weights=() if set(weights) == {None} else tuple(weights),
        template_kwargs=_template_kwargs(row, where),
        documents=_documents(row, where),
        notes=notes,
        ignored=ignored + tuple(dict.fromkeys(inner)),
        row_weight=of_row,
    )


def _given_messages(row: Row, form: str, where: str) -> list[Any]:
    """The messages of a row as it has them, in OpenAI's shape or ShareGPT's."""
    if form == "prompt-completion":
        return [*row["prompt"], *row["completion"]]
    if form == "messages":
        return expect(list, row.get("messages"), "messages", where)
    if form == "sharegpt":
        return expect(list, row.get("conversations"), "conversations", where)
    messages = []
    for pair in expect(list, row.get("history") or [], "history", where):
        if len(expect(list, pair, "pair of the history", where)) != 2:
            fault = f"the history has {len(pair)} texts together, but needs [question, answer]"
            raise RowError(where, "bad-history", fault)
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    asked = [expect(str, row.get(key) or "", key, where) for key in ("instruction", "input")]
    question = "\n\n".join(text for text in asked if text.strip())
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


def _system_turn(
    row: Row, parsed: list[chat.Parsed], where: str, system: str, ignored: list[str]
) -> list[chat.Parsed]:
    """The turn that `system` or `system_prompt` beside the messages gives, or else --data.system;
    ignored keys of its parts are added to `ignored`.
    """
    given = [
        chat.content_of(row[key], key, where) for key in ("system", "system_prompt") if row.get(key)
    ]
    ignored += [key for _, keys in given for key in keys]
    texts = [text for text, _ in given if text]
    first = parsed[0].fields if parsed else {}
    own = first["content"] if first.get("role") in ("system", "developer") else None
    if len({*texts, *([] if own is None else [own])} if texts else ()) > 1:
        fault = (
            "system stands beside the messages and says something else than the row's other system "
            "text"
        )
        raise RowError(where, "bad-system", f"{fault}; keep one of them")
    has_own = any(message.fields["role"] in ("system", "developer") for message in parsed)
    text = texts[0] if texts else "" if has_own else system
    if not text or own is not None:
        return []
    return [chat.Parsed({"role": "system", "content": text})]


def _apply_loss_mask(row: Row, parsed: list[chat.Parsed], where: str) -> None:
    """LLaMA-Factory's `loss_mask` and NeMo's `message_loss_mask`: a 0 or 1 for each message of the
    row.
    """
    for key in ("loss_mask", "message_loss_mask"):
        if row.get(key) is None:
            continue
        mask = expect(list, row[key], key, where)
        if len(mask) != len(parsed) or any(value not in (0, 1) for value in mask):
            fault = (
                f"{key} must have a 0 or 1 for each of the {len(parsed)} messages, but has "
                f"{len(mask)} values"
            )
            raise RowError(where, "bad-weight", f"{fault} ({mask!r:.60})")
        for message, value in zip(parsed, mask, strict=True):
            if message.fields["role"] != "assistant":
                message.weight = 1.0 if value else message.weight  # 0 as a rule; else it is told
                continue
            if message.weight is not None and bool(message.weight) != bool(value):
                raise RowError(
                    where,
                    "bad-weight",
                    f"{key} contradicts the weight of a message; keep one of them",
                )
            if not value:
                message.weight = 0.0


def _weights(of_row: float, parsed: list[chat.Parsed], context: int) -> list[float | None]:
    """The weight of each message, that of the row in it; messages of a prompt have none."""
    weights = [message.weight for message in parsed]
    if of_row != 1.0:
        answers = [message.fields["role"] == "assistant" for message in parsed]
        weights = [
            weight
            if weight is None and not answer
            else of_row * (1.0 if weight is None else weight)
            for weight, answer in zip(weights, answers, strict=True)
        ]
    weights[:context] = [0.0] * context
    return weights


def _tools(row: Row, where: str) -> list[dict[str, Any]] | None:
    """The tools, those of the older key `functions` in the shape of `tools`."""
    tools = [
        expect(dict, tool, "tool", where)
        for tool in expect(list, row.get("tools") or [], "tools", where)
    ]
    functions = []
    for function in expect(list, row.get("functions") or [], "functions", where):
        function = expect(dict, function, "function", where)
        wrapped = function if "function" in function else {"type": "function", "function": function}
        functions.append(wrapped)
    if tools and functions and tools != functions:
        raise RowError(
            where, "bad-tools", "tools and functions say different things; keep one of them"
        )
    found = tools or functions
    if found:
        check_json(found, "tools", where)
    return found or None


def _template_kwargs(row: Row, where: str) -> dict[str, Any]:
    if not row.get("chat_template_kwargs"):
        return {}
    found = expect(dict, row["chat_template_kwargs"], "chat_template_kwargs", where)
    if wrong := sorted(found.keys() & _RESERVED):
        fault = (
            f"chat_template_kwargs has {wrong[0]!r}, which rendering itself gives to the chat "
            f"template; remove it"
        )
        raise RowError(where, "bad-chat_template_kwargs", fault)
    check_json(found, "chat_template_kwargs", where)
    return found


def _documents(row: Row, where: str) -> list[dict[str, Any]] | None:
    if not row.get("documents"):
        return None
    found = unpacked(row["documents"], "documents", where)
    documents = [
        expect(dict, document, "document", where)
        for document in expect(list, found, "documents", where)
    ]
    check_json(documents, "documents", where)
    return documents
