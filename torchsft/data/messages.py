"""One message of a conversation, in OpenAI's or ShareGPT's shape, and what its neighbours say about
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchsft.data.contents import parse_content
from torchsft.data.keys import (
    CALL_KEYS,
    FUNCTION_KEYS,
    REASONING,
    SWITCHES,
    TURN_KEYS,
    is_empty,
    other_keys_within,
)
from torchsft.data.rows import Object, RowError, Strings
from torchsft.data.values import check_json, expect, unpacked, weight_of

# What a role is called elsewhere, in any case.
_NAMES = {
    "system": "system",
    "developer": "developer",
    "user": "user human",
    "assistant": "assistant gpt chatgpt model bot",
    "tool": "tool function observation function_response tool_response ipython",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
# Roles whose content is a tool call, as JSON.
CALL_ROLES = ("function_call", "tool_call")
# What an answer can say, by the keys of its fields.
SAID = ("content", "reasoning_content", "tool_calls")
# What may follow a role in a usual conversation; behind the others comes the user.
FOLLOWS = {
    "": ("system", "developer", "user"),
    "user": ("assistant",),
    "tool": ("assistant", "tool"),
}


@dataclass
class Parsed:
    """A message as `formats.Conversation` describes it, and what else its row says of it.

    Attributes:
        fields: role, content and so on.
        weight: None: what the mask says.
        mask: what the key `mask` says, None where it is absent.
        is_call: whether it came as a role of its own that holds nothing but tool calls.
    """

    fields: Object
    weight: float | None = None
    mask: bool | None = None
    is_call: bool = False

    @property
    def role(self) -> str:
        """The role, as OpenAI calls it."""
        return self.fields["role"]

    @property
    def is_answer(self) -> bool:
        """Whether it is the assistant's."""
        return self.role == "assistant"

    def follow_mask(self, is_trained: bool, key: str) -> None:
        """Follow what a mask says of an answer.

        Args:
            key: under which the mask stands.

        Raises:
            RowError: the answer's weight says something else.
        """
        if self.weight is not None and bool(self.weight) != is_trained:
            raise RowError(
                "bad-weight", f"{key} contradicts the weight of a message; keep one of them"
            )
        if not is_trained:
            self.weight = 0.0


def parse(message: Any, ignored: list[str]) -> Parsed:
    """Return one message.

    Args:
        ignored: keys that mean nothing here, such as `messages[].timestamp`, are added to it.

    Raises:
        RowError: it says what cannot be followed.
    """
    message = expect(dict, message, "message")
    ignored += other_keys_within(message, TURN_KEYS, "messages[].")
    role = _one_of(message, "role", "from")
    given_content = _one_of(message, "content", "value")
    given_calls = [message.get("tool_calls"), message.get("function_call")]
    is_call = isinstance(role, str) and role.lower() in CALL_ROLES
    if is_call:
        role = "assistant"
        given_calls.insert(0, given_content)
        given_content = None
    else:
        role = _role(role)
    content = parse_content(given_content, "messages[].content[].", ignored)
    fields = {"role": role, "content": content.text}
    calls = _calls(given_calls, ignored)
    reasoning = _reasoning(message, content.reasoning)
    if content.text is None and not calls:
        if role != "assistant":
            expect(str, content.text, "content")  # raises
        fields["content"] = ""
    if calls:
        fields["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if message.get(key) is not None:
            fields[key] = expect(str, message[key], key)
    if reasoning:
        fields["reasoning_content"] = reasoning
    for key in ("tool_calls", "reasoning_content"):
        if key in fields and role != "assistant":
            raise RowError(
                f"misplaced-{key}", f"{key} in a message of role {role}, not assistant; remove it"
            )
    mask = _flag(message, "mask")
    return Parsed(fields, _weight(message), mask, is_call=is_call and bool(calls))


def _one_of(message: Object, name: str, other: str) -> Any:
    """Return the value under one of two names of the same thing."""
    value = message.get(name)
    other_value = message.get(other)
    if value is None:
        return other_value
    if other_value is not None and other_value != value:
        raise RowError(
            f"bad-{name}",
            f"{name} and {other} are two spellings of {name} and differ; keep one of them",
        )
    return value


def _role(role: Any) -> str:
    found = ROLES.get(role.lower()) if isinstance(role, str) else None
    if found is None:
        known = ", ".join([*ROLES, *CALL_ROLES])
        raise RowError("unknown-role", f"role is {role!r:.60}, but must be one of {known}")
    return found


def _reasoning(message: Object, parts: Sequence[str]) -> str:
    """Return the reasoning of a message, by its keys or the parts of its content."""
    texts = {expect(str, message[key], key) for key in REASONING if message.get(key)}
    names = list(REASONING)
    if parts:
        texts.add("\n".join(parts))
        names.append("content parts")
    if len(texts) > 1:
        raise RowError(
            "bad-reasoning", f"different texts under {' and '.join(names)}; give one of them"
        )
    return texts.pop() if texts else ""


# ---------------------------------------------------------------- tool calls


def _calls(places: Sequence[Any], ignored: list[str]) -> list[Object]:
    """Return the tool calls that stand in one of several places; in more, they are the same.

    Args:
        ignored: keys that mean nothing are added to it.
    """
    found = [calls for place in places if (calls := _calls_in(place, ignored))]
    functions = [[call["function"] for call in calls] for calls in found]
    if any(other != functions[0] for other in functions):
        raise RowError(
            "bad-tool-calls",
            "tool calls stand in two places of the message and differ; keep one of them",
        )
    return found[0] if found else []


def _calls_in(calls: Any, ignored: list[str]) -> list[Object]:
    """Return tool calls in OpenAI's shape: those of a list, or one alone."""
    if not calls or (isinstance(calls, str) and not calls.strip()):
        return []
    calls = unpacked(calls, "tool_calls")
    if isinstance(calls, dict):
        calls = [calls]
    return [_call(call, ignored) for call in expect(list, calls, "tool_calls")]


def _call(call: Any, ignored: list[str]) -> Object:
    call = expect(dict, call, "tool call")
    ignored += other_keys_within(call, CALL_KEYS, "tool_calls[].")
    function = expect(dict, call.get("function", call), "function of a tool call")
    if function is not call:
        ignored += other_keys_within(function, FUNCTION_KEYS, "tool_calls[].function.")
        _check_beside_function(call, function)
    if call.get("type") not in (None, "function"):
        raise RowError(
            "bad-tool-call",
            f"a tool call has type {call['type']!r:.60}, but only 'function' can be trained",
        )
    name = expect(str, function.get("name") or None, "name of a tool call")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}  # a function without parameters; Arrow cannot keep an empty object
    parsed = expect(dict, arguments, "arguments of a tool call")
    check_json(parsed, "arguments of a tool call")
    result = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is None:
        return result
    return {"id": expect(str, call["id"], "id of a tool call"), **result}


def _check_beside_function(call: Object, function: Object) -> None:
    """Check that a tool call contradicts its function nowhere."""
    for key in ("name", "arguments"):
        if not is_empty(call.get(key)) and call[key] != function.get(key):
            raise RowError(
                "bad-tool-call",
                f"a tool call has {key} beside its function, which says something else; write it "
                f"in the function alone",
            )


# ---------------------------------------------------------------- weights


def _weight(message: Object) -> float | None:
    """Return the weight of a message. torchtune's `masked` is true where a message is not
    trained.
    """
    weight = weight_of(message, SWITCHES)
    masked = _flag(message, "masked")
    if weight is not None and bool(weight) == masked:
        raise RowError(
            "bad-weight",
            f"masked is {message['masked']!r}, which contradicts the weight {weight:g}; keep one "
            f"of them",
        )
    if weight is None and masked is not None:
        return float(not masked)
    return weight


def _flag(message: Object, key: str) -> bool | None:
    """Return a value that is true or false, or None where it is absent."""
    value = message.get(key)
    if value not in (None, 0, 1):
        raise RowError("bad-weight", f"{key} is {value!r:.60}, but must be true or false")
    return None if value is None else bool(value)


def follow_masks(parsed: Sequence[Parsed]) -> None:
    """Turn `mask` of messages into weights.

    In some files true means trained, in others not trained. What the row says of messages that are
    never trained (the user's) shows which; where it says nothing of them, or contradicts itself, it
    is refused rather than guessed.
    """
    answers = [each for each in parsed if each.is_answer and each.mask is not None]
    if not answers:
        return
    of_context = {each.mask for each in parsed if not each.is_answer} - {None}
    if len(of_context) != 1:
        raise RowError(
            "bad-weight",
            "`mask` of a message means 'trained' to some tools and 'not trained' to others; write "
            "`train`",
        )
    untrained = of_context.pop()
    for answer in answers:
        answer.follow_mask(answer.mask is not untrained, "mask")


# ---------------------------------------------------------------- several messages


def merge_calls(parsed: Sequence[Parsed], context: int) -> tuple[list[Parsed], int]:
    """Make one message of the assistant of neighbours that are nothing but tool calls, as one turn
    makes several calls.

    Args:
        context: so many messages at the beginning are a prompt; nothing is merged across its end.

    Returns:
        The messages, and by how many those of the prompt have become fewer.
    """
    merged: list[Parsed] = []
    fewer = 0
    for i, message in enumerate(parsed):
        last = merged[-1] if merged and i != context else None
        if last and last.is_call and message.is_call and last.weight == message.weight:
            calls = last.fields["tool_calls"] + message.fields["tool_calls"]
            merged[-1] = replace(last, fields={**last.fields, "tool_calls": calls})
            if i < context:
                fewer += 1
        else:
            merged.append(message)
    return merged, fewer


def notes_of(parsed: Sequence[Parsed], context: int) -> Strings:
    """Return the codes that are counted of a conversation: unusual-order, empty-answer,
    weight-on-context.

    Args:
        context: so many messages at the beginning are a prompt.
    """
    notes = []
    if not _is_usual_order(parsed):
        notes.append("unusual-order")
    for i, message in enumerate(parsed):
        if message.is_answer and not any(map(message.fields.get, SAID)):
            notes.append("empty-answer")
        is_context = not message.is_answer or i < context
        if message.weight and is_context:
            notes.append("weight-on-context")
    return tuple(dict.fromkeys(notes))


def _is_usual_order(parsed: Sequence[Parsed]) -> bool:
    expected = FOLLOWS[""]
    for message in parsed:
        if message.role not in expected:
            return False
        if "tool_calls" in message.fields:
            expected = ("user", "tool")
        else:
            expected = FOLLOWS.get(message.role, ("user",))
    return True
