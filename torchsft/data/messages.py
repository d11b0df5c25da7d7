"""One message of a conversation, in OpenAI's or ShareGPT's shape, and what its neighbours say about
it.
"""

from dataclasses import dataclass
from typing import Any

from torchsft.data.keys import (
    CALL_KEYS,
    FUNCTION_KEYS,
    MEDIA,
    PART_KEYS,
    REASONING,
    SWITCHES,
    TURN_KEYS,
    WEIGHTS,
    is_empty,
    other_keys_within,
)
from torchsft.data.rows import RowError
from torchsft.data.values import check_json, expect, unpacked, weight_of

# What a role is called elsewhere, in any case.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
# Roles whose content is a tool call, as JSON.
CALL_ROLES = ("function_call", "tool_call")
# What may follow a role in a usual conversation; behind the others comes the user.
FOLLOWS = {
    "": ("system", "developer", "user"),
    "user": ("assistant",),
    "tool": ("assistant", "tool"),
}
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass
class Parsed:
    """A message as `formats.Conversation` describes it, and what is to be told of it.

    Attributes:
        fields: role, content and so on.
        weight: None: what the mask says.
        mask: what the key `mask` says, None where it is absent.
        is_call: whether it came as a role of its own that holds nothing but tool calls.
        ignored: keys that mean nothing here, such as `messages[].timestamp`.
    """

    fields: dict[str, Any]
    weight: float | None = None
    mask: bool | None = None
    is_call: bool = False
    ignored: tuple[str, ...] = ()


def parse(message: Any, where: str) -> Parsed:
    """One message. Raises RowError where it says what cannot be followed."""
    message = expect(dict, message, "message", where)
    ignored = list(other_keys_within(message, TURN_KEYS, "messages[].", where))
    role = _one_of(message, ("role", "from"), "role", where)
    content = _one_of(message, ("content", "value"), "content", where)
    is_call = isinstance(role, str) and role.lower() in CALL_ROLES
    calls = [message.get("tool_calls"), message.get("function_call")]
    if is_call:
        role, calls, content = "assistant", [content, *calls], None
    else:
        role = _role(role, where)
    content, reasoning_parts, more = _content(content, where)
    ignored += more
    found: dict[str, Any] = {"role": role, "content": content}
    called = _one_list_of_calls(calls, where, ignored)
    reasoning = _reasoning(message, reasoning_parts, where)
    if content is None and not called:
        if role != "assistant":
            expect(str, content, "content", where)
        found["content"] = ""
    if called:
        found["tool_calls"] = called
    for key in ("tool_call_id", "name"):
        if message.get(key) is not None:
            found[key] = expect(str, message[key], key, where)
    if reasoning:
        found["reasoning_content"] = reasoning
    for key in ("tool_calls", "reasoning_content"):
        if key in found and role != "assistant":
            said = f"{key} in a message of role {role}, not assistant; remove it"
            raise RowError(where, f"misplaced-{key}", said)
    weight, mask = _weight(message, where)
    return Parsed(found, weight, mask, is_call, tuple(ignored))


def _one_of(message: dict[str, Any], names: tuple[str, str], what: str, where: str) -> Any:
    """The value under one of two names of the same thing."""
    values = [message[name] for name in names if message.get(name) is not None]
    if len(values) == 2 and values[0] != values[1]:
        said = f"{names[0]} and {names[1]} are two spellings of {what} and differ; keep one of them"
        raise RowError(where, f"bad-{what}", said)
    return values[0] if values else None


def _role(role: Any, where: str) -> str:
    found = ROLES.get(role.lower()) if isinstance(role, str) else None
    if found is None:
        known = ", ".join([*ROLES, *CALL_ROLES])
        raise RowError(where, "unknown-role", f"role is {role!r:.60}, but must be one of {known}")
    return found


def content_of(value: Any, what: str, where: str) -> tuple[str | None, list[str]]:
    """The text of a content, a string or a list of parts, and ignored keys of parts."""
    text, reasoning, ignored = _content(value, where, f"{what}[].")
    if reasoning:
        raise RowError(
            where,
            f"bad-{what}",
            f"{what} holds reasoning, which only an assistant's message can have",
        )
    return None if text is None else expect(str, text, what, where), ignored


def _content(
    content: Any, where: str, path: str = "messages[].content[]."
) -> tuple[str | None, list[str], list[str]]:
    """The text, what reasoning parts hold, and ignored keys of parts."""
    if not isinstance(content, list):
        return (None if content is None else expect(str, content, "content", where)), [], []
    texts, reasoning, ignored = [], [], []
    for i, part in enumerate(content, start=1):
        place = f"{where}, part {i}"
        if isinstance(part, str):
            texts.append(part)
            continue
        part = expect(dict, part, "content part", place)
        kind = part.get("type")
        _refuse_flags(part, place)
        for key in ("role", "from"):
            if part.get(key) is not None:
                said = f"a content part has {key}, as a message has; write it as one of its own"
                raise RowError(place, "bad-content", said)
        if kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
            if any(texts):
                said = (
                    "reasoning stands behind text, but is written before the whole answer; split "
                    "the message there"
                )
                raise RowError(place, "bad-content", said)
            reasoning.append(part[kind])
            ignored += other_keys_within(part, frozenset({"type", kind}), path, place)
            continue
        texts.append(_part_text(part, place))
        ignored += other_keys_within(part, PART_KEYS | {"content", "value"}, path, place)
    return "".join(texts), reasoning, ignored


def _part_text(part: dict[str, Any], where: str) -> str:
    """The text of one part, whose type may be missing."""
    kind = part.get("type")
    held = [key for key in MEDIA if not is_empty(part.get(key))]
    if (kind is not None and kind not in TEXT_PARTS) or held:
        name = held[0] if held and kind in (None, *TEXT_PARTS) else kind
        said = (
            f"a content part has type {name!r:.60}, but only text can be trained; remove it or the "
            f"row"
        )
        raise RowError(where, "bad-content", said)
    texts = [part[key] for key in ("text", "content", "value") if part.get(key) is not None]
    if not texts:
        return expect(str, None, "text of a content part", where)
    if len(texts) > 1:
        keys = ", ".join(part) or "none"
        said = (
            f"a content part needs one text, but has the keys {keys}; write it as {{'type': "
            f"'text', 'text': ...}}"
        )
        raise RowError(where, "bad-content", said)
    return expect(str, texts[0], "text of a content part", where)


def _refuse_flags(part: dict[str, Any], where: str) -> None:
    for key in (*SWITCHES, *WEIGHTS, "mask", "masked"):
        if part.get(key) is not None:
            said = (
                f"a content part has {key}, but only whole messages can be weighted; split the "
                f"message in two"
            )
            raise RowError(where, "unsupported-key", said)


def _reasoning(message: dict[str, Any], parts: list[str], where: str) -> str:
    texts = {expect(str, message[key], key, where) for key in REASONING if message.get(key)}
    texts |= {"\n".join(parts)} if parts else set()
    if len(texts) > 1:
        names = " and ".join([*REASONING, *(["content parts"] if parts else [])])
        raise RowError(where, "bad-reasoning", f"different texts under {names}; give one of them")
    return texts.pop() if texts else ""


def _calls(calls: Any, where: str, ignored: list[str]) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape: a list, or one alone."""
    if calls is None or (isinstance(calls, str) and not calls.strip()):
        return []
    calls = unpacked(calls, "tool_calls", where)
    calls = [calls] if isinstance(calls, dict) else calls
    return [_call(call, where, ignored) for call in expect(list, calls, "tool_calls", where)]


def _one_list_of_calls(given: list[Any], where: str, ignored: list[str]) -> list[dict[str, Any]]:
    """The tool calls that stand in one of several places; in more, the same."""
    found = [calls for value in given if (calls := _calls(value or None, where, ignored))]
    functions = [[call["function"] for call in calls] for calls in found]
    if any(other != functions[0] for other in functions):
        said = "tool calls stand in two places of the message and differ; keep one of them"
        raise RowError(where, "bad-tool-calls", said)
    return found[0] if found else []


def _call(call: Any, where: str, ignored: list[str]) -> dict[str, Any]:
    call = expect(dict, call, "tool call", where)
    ignored += other_keys_within(call, CALL_KEYS, "tool_calls[].", where)
    function = expect(dict, call.get("function", call), "function of a tool call", where)
    if function is not call:
        ignored += other_keys_within(function, FUNCTION_KEYS, "tool_calls[].function.", where)
        for key in ("name", "arguments"):
            if not is_empty(call.get(key)) and call[key] != function.get(key):
                said = f"a tool call has {key} beside its function, which says something else"
                raise RowError(where, "bad-tool-call", f"{said}; write it in the function alone")
    if call.get("type") not in (None, "function"):
        said = f"a tool call has type {call['type']!r:.60}, but only 'function' can be trained"
        raise RowError(where, "bad-tool-call", said)
    name = expect(str, function.get("name") or None, "name of a tool call", where)
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}  # a function without parameters; Arrow cannot keep an empty object
    found = expect(dict, arguments, "arguments of a tool call", where)
    check_json(found, "arguments of a tool call", where)
    result = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        result = {"id": expect(str, call["id"], "id of a tool call", where), **result}
    return result


def _weight(message: dict[str, Any], where: str) -> tuple[float | None, bool | None]:
    """The weight, and what `mask` says. torchtune's `masked` is true where a message is not
    trained.
    """
    weight = weight_of(message, where, SWITCHES)
    masked, mask = message.get("masked"), message.get("mask")
    for key, value in (("masked", masked), ("mask", mask)):
        if value not in (None, 0, 1):
            raise RowError(
                where, "bad-weight", f"{key} is {value!r:.60}, but must be true or false"
            )
    if masked is not None:
        if weight is not None and bool(weight) == bool(masked):
            said = (
                f"masked is {masked!r}, which contradicts the weight {weight:g}; keep one of them"
            )
            raise RowError(where, "bad-weight", said)
        weight = (1.0 if weight is None else weight) if not masked else 0.0
    return weight, None if mask is None else bool(mask)


def follow_masks(parsed: list[Parsed], where: str) -> None:
    """Turn `mask` of messages into weights.

    In some files true means trained, in others not trained. What the row says of messages that are
    never trained (the user's) shows which; where it says nothing of them, or contradicts itself, it
    is refused rather than guessed.
    """
    if not any(
        message.mask is not None and message.fields["role"] == "assistant" for message in parsed
    ):
        return
    of_context = {message.mask for message in parsed if message.fields["role"] != "assistant"} - {
        None
    }
    if len(of_context) != 1:
        said = (
            "`mask` of a message means 'trained' to some tools and 'not trained' to others; write "
            "`train`"
        )
        raise RowError(where, "bad-weight", said)
    untrained = of_context.pop()
    for message in parsed:
        if message.mask is None or message.fields["role"] != "assistant":
            continue
        is_trained = message.mask is not untrained
        if message.weight is not None and bool(message.weight) != is_trained:
            raise RowError(
                where, "bad-weight", "`mask` of a message contradicts its weight; keep one of them"
            )
        if not is_trained:
            message.weight = 0.0


def merge_calls(parsed: list[Parsed], context: int) -> tuple[list[Parsed], int]:
    """Neighbours that are nothing but tool calls become one message of the assistant, as one turn
    makes several calls.

    Args:
        context: so many messages at the beginning are a prompt; nothing is merged across its end.

    Returns:
        The messages, and by how many those of the prompt have become fewer.
    """
    merged: list[Parsed] = []
    fewer = 0
    for i, message in enumerate(parsed):
        before = merged[-1] if merged and i != context else None
        if before and before.is_call and message.is_call and before.weight == message.weight:
            calls = before.fields["tool_calls"] + message.fields["tool_calls"]
            fields = {**before.fields, "tool_calls": calls}
            ignored = before.ignored + message.ignored
            merged[-1] = Parsed(fields, before.weight, before.mask, is_call=True, ignored=ignored)
            fewer += i < context
        else:
            merged.append(message)
    return merged, fewer


def notes_of(parsed: list[Parsed], context: int) -> tuple[str, ...]:
    """Codes of what is to be told of a conversation: unusual-order, empty-answer,
    weight-on-context.
    """
    notes = []
    wanted = FOLLOWS[""]
    for message in parsed:
        role = message.fields["role"]
        if role not in wanted:
            notes.append("unusual-order")
            break
        calls = "tool_calls" in message.fields
        wanted = ("user", "tool") if calls else FOLLOWS.get(role, ("user",))
    for i, message in enumerate(parsed):
        says = message.fields.get("reasoning_content") or message.fields.get("tool_calls")
        if message.fields["role"] == "assistant" and not message.fields["content"] and not says:
            notes.append("empty-answer")
        if message.weight and (message.fields["role"] != "assistant" or i < context):
            notes.append("weight-on-context")
    return tuple(dict.fromkeys(notes))
