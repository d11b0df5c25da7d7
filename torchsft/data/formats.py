"""What rows mean: OpenAI messages, ShareGPT, Alpaca, prompt and completion, plain text, or tokens.

What would have to be guessed is refused, as it would be trained without a word. Keys of other names are ignored.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchsft.data.sources import Row, RowError, kind_of, load_json

MAX_WEIGHT = 3e38  # of float32
REASONING = ("reasoning_content", "reasoning", "thinking")
ROLES = ("system", "developer", "user", "assistant", "tool")
# What may follow a role; behind the others comes the user.
FOLLOWS = {"": ("system", "developer", "user"), "user": ("assistant",), "tool": ("assistant", "tool")}
SHAREGPT = {role: role for role in ROLES} | {"human": "user", "observation": "tool", "function_response": "tool"}
SHAREGPT |= dict.fromkeys(("gpt", "chatgpt", "model", "function_call"), "assistant")
# The keys of each format; the first that fits is taken.
KEYS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output")}
KEYS |= {"prompt-completion": ("prompt", "completion"), "text": ("text",), "tokens": ("input_ids",)}


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's shape: `role`, `content` (a string; None only beside `tool_calls`) and, where given, `tool_calls`
    (arguments as in the row, an object or a JSON string of it), `tool_call_id`, `name`, `reasoning_content`; with the
    tools for the chat template, and a weight for each message (None: what the mask says; empty: None for all).

    `template_kwargs`: further variables of the chat template that this row names; they win over --data.template-kwargs.
    `documents`: for templates that show documents. `notes`: what is to be told of this row, as codes that are counted."""

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    weights: tuple[float | None, ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    documents: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """Text without a chat template: `prompt` (may be empty) is context, `completion` is trained with `weight`."""

    id: str
    prompt: str
    completion: str
    weight: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens as they are: `tokens` int32 [n] and `weights` float32 [n] of each as a target; n at least 1."""

    id: str
    tokens: np.ndarray
    weights: np.ndarray
    notes: tuple[str, ...] = ()


Example = Conversation | Text | Tokens


def recognise(row: Row, where: str) -> str:
    """The format of a row, one of `KEYS`. Raises RowError: unknown-format."""
    given = {key for key, value in row.items() if value is not None}
    if "input_ids" in given and given & {"labels", "loss_weights"}:  # beside which the text of them may stand
        return "tokens"
    for name, keys in KEYS.items():
        if given.issuperset(keys):
            return name
    wanted = "; ".join(" and ".join(keys) for keys in KEYS.values())
    raise RowError(where, "unknown-format", f"no format has the keys {', '.join(sorted(given)) or '(none)'}; give {wanted}")


def parse(row: Row, form: str, name: str, where: str) -> Example:
    """The example `name` in a row of the format `form`. Raises RowError: it lacks or contradicts something."""
    if form == "tokens":
        return _tokens(row, name, where)
    prompt, completion = ("", row.get("text")) if form == "text" else (row.get("prompt"), row.get("completion"))
    if form == "text" or (form == "prompt-completion" and not (isinstance(prompt, list) and isinstance(completion, list))):
        weight = _weight(row, where)
        prompt, completion = _is(str, prompt, "prompt", where), _is(str, completion, form.rpartition("-")[2], where)
        return Text(name, prompt, completion, 1.0 if weight is None else weight)
    context = len(prompt) if form == "prompt-completion" else 0  # messages that are not trained
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if form == "prompt-completion":
        given = [*prompt, *completion]
    elif form == "messages":
        given = _is(list, row.get("messages"), "messages", where)
    elif form == "alpaca":
        given = [*system, *_from_alpaca(row, where)]
    else:
        turns = _is(list, row.get("conversations"), "conversations", where)
        given = [*system, *(_from_sharegpt(turn, f"{where}, turn {i}") for i, turn in enumerate(turns, start=1))]
    parsed = [_message(message, f"{where}, message {i}") for i, message in enumerate(given, start=1)]
    messages, weights = [message for message, _ in parsed], [weight for _, weight in parsed]
    _check_order(messages, context, where)
    if any(weights[:context]):
        raise RowError(where, "bad-weight", "a weight in the prompt, of which nothing is trained; remove it")
    weights[:context] = [0.0] * context
    tools = [_is(dict, tool, "tool", where) for tool in _is(list, row.get("tools") or [], "tools", where)]
    if tools:
        _check_json(tools, "tools", where)
    return Conversation(name, messages, tools or None, () if set(weights) == {None} else tuple(weights))


def _message(message: Any, where: str) -> tuple[dict[str, Any], float | None]:
    """The message as `Conversation` describes it, and its weight."""
    message = _is(dict, message, "message", where)
    role, content, weight = message.get("role"), message.get("content"), _weight(message, where)
    if role not in ROLES:
        raise RowError(where, "unknown-role", f"role is {role!r:.60}, but must be one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    calls = _unpacked(message.get("tool_calls") or message.get("function_call"), "tool_calls", where)
    calls = [calls] if isinstance(calls, dict) else calls
    if content is not None or not calls:
        _is(str, content, "content", where)
    found = {"role": role, "content": content}
    if calls:
        found["tool_calls"] = [_call(call, where) for call in _is(list, calls, "tool_calls", where)]
    found |= {k: _is(str, message[k], k, where) for k in ("tool_call_id", "name") if message.get(k) is not None}
    reasoning = {_is(str, message[key], key, where) for key in REASONING if message.get(key)}
    if len(reasoning) > 1:
        raise RowError(where, "bad-reasoning", f"different texts under {' and '.join(REASONING)}; give one of them")
    if reasoning:
        found["reasoning_content"] = reasoning.pop()
    for key, value in ("tool_calls", calls), ("reasoning_content", "reasoning_content" in found), ("weight", weight):
        if value and role != "assistant":
            raise RowError(where, f"misplaced-{key}", f"{key} in a message of role {role}, not assistant; remove it")
    return found, weight


def _part(part: Any, where: str) -> str:
    part = _is(dict, part, "content part", where)
    if part.get("type", "text") != "text":
        raise RowError(where, "bad-content", f"a content part has type {part['type']!r:.60}, but only text can be trained")
    return _is(str, part.get("text"), "text of a content part", where)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's shape."""
    call = _is(dict, call, "tool call", where)
    function = _is(dict, call.get("function", call), "function of a tool call", where)
    name = _is(str, function.get("name") or None, "name of a tool call", where)
    arguments = {} if function.get("arguments") is None else function["arguments"]  # Arrow cannot keep an empty object
    _check_json(_is(dict, arguments, "arguments of a tool call", where), "arguments of a tool call", where)
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": _is(str, call["id"], "id of a tool call", where), **found} if call.get("id") is not None else found


def _check_order(messages: list[dict[str, Any]], context: int, where: str) -> None:
    wanted = FOLLOWS[""]
    for i, message in enumerate(messages, start=1):
        if message["role"] not in wanted:
            text = f"role {message['role']} where {' or '.join(wanted)} is expected; reorder, merge or remove messages"
            raise RowError(f"{where}, message {i}", "role-order", text)
        wanted = ("user", "tool") if "tool_calls" in message else FOLLOWS.get(message["role"], ("user",))
    if not any(message["role"] == "assistant" for message in messages[context:]):
        reason = "no-assistant" if messages else "no-messages"
        raise RowError(where, reason, "no assistant message, so there is nothing to learn; add one or remove the row")


def _from_sharegpt(turn: Any, where: str) -> dict[str, Any]:
    """As a message, with its further keys; some files have role and content under `conversations`."""
    turn = _is(dict, turn, "turn", where)
    role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in SHAREGPT:
        raise RowError(where, "unknown-role", f"role is {role!r:.60}, but must be one of {', '.join(SHAREGPT)}")
    return {**turn, "role": SHAREGPT[role], **({"tool_calls": value} if role == "function_call" else {"content": value})}


def _from_alpaca(row: Row, where: str) -> list[dict[str, Any]]:
    messages = []
    for pair in _is(list, row.get("history") or [], "history", where):
        if len(_is(list, pair, "pair of the history", where)) != 2:
            raise RowError(where, "bad-history", f"the history has {len(pair)} texts together, but needs [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [_is(str, row.get(key) or "", key, where) for key in ("instruction", "input")]
    output = {"role": "assistant", "content": row["output"], "weight": row.get("weight"), "train": row.get("train")}
    return [*messages, {"role": "user", "content": "\n\n".join(text for text in asked if text.strip())}, output]


def _tokens(row: Row, name: str, where: str) -> Tokens:
    keys = [key for key in ("labels", "loss_weights") if row.get(key) is not None]
    if len(keys) != 1:
        raise RowError(where, "bad-labels", f"input_ids with {' and '.join(keys) or 'neither'}; give labels or loss_weights")
    ids, given = (_numbers(row[key], key, where) for key in ("input_ids", *keys))
    if ids.dtype.kind == "f" or not len(ids) or not 0 <= ids.min() <= ids.max() < 2**31:
        raise RowError(where, "bad-tokens", "input_ids must be at least one whole number, all from 0 to 2**31 - 1")
    if len(given) != len(ids):
        raise RowError(where, "bad-labels", f"{len(ids)} input_ids, but {len(given)} {keys[0]}; give one for each token")
    if keys[0] == "labels":
        for i in np.flatnonzero((given != -100) & (given != ids))[:1]:
            said = f"label {given[i]} of token {i + 1} is neither -100 nor its id {ids[i]}; labels must not be shifted"
            raise RowError(where, "bad-labels", said)
        given = given != -100
    for i in np.flatnonzero(~((given >= 0) & (given < MAX_WEIGHT)))[:1]:
        _weight({"weight": given[i].item()}, f"{where}, token {i + 1}")
    return Tokens(name, ids.astype(np.int32), given.astype(np.float32))


def _numbers(value: Any, what: str, where: str) -> np.ndarray:
    try:
        found = np.asarray(_is(list, value, what, where))
    except (ValueError, OverflowError):  # lists of different lengths
        found = np.array(0)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iuf"):
        raise RowError(where, "bad-tokens", f"{what} must be a list of numbers, none of them nested or too large")
    return found


def _weight(row: Row, where: str) -> float | None:
    """What `weight` (a number) and `train` (true or false) say together."""
    weight, train = row.get("weight"), row.get("train")
    weight = train if weight is None else weight
    if weight is None:
        return None
    good = train in (None, 0, 1) and isinstance(weight, int | float)
    if not good or (train is not None and bool(train) != bool(weight)):
        said = (
            f"weight is {row.get('weight')!r:.60} and train {train!r:.60}; give a number or true or false, and no contradiction"
        )
        raise RowError(where, "bad-weight", said)
    if not 0 <= weight < MAX_WEIGHT:
        reason = "negative-weight" if weight < 0 else "non-finite-weight"
        raise RowError(where, reason, f"weight is {weight}, but must be finite and at least 0")
    return float(weight)


def _is(kind: type, value: Any, what: str, where: str) -> Any:
    """The value, if it is of this kind; objects and lists may stand in a string as JSON."""
    found = value if kind is str else _unpacked(value, what, where)
    if not isinstance(found, kind):
        raise RowError(where, f"bad-{what}".replace(" ", "-"), f"{what} must be {kind_of(kind())}, but it is {kind_of(found)}")
    return found


def _unpacked(value: Any, what: str, where: str) -> Any:
    """What stands in a string as JSON: many files keep values in this way whose shapes differ from row to row."""
    try:
        return load_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(where, "not-json", f"{what} is a string that is not JSON ({error})") from None


def _check_json(value: Any, what: str, where: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError(where, "not-json", f"{what} cannot be written as JSON ({error})") from None
