"""Files of conversations: JSONL, one `{"messages": [{"role", "content"}, ...]}` a line.

A conversation is an optional system turn, then user and assistant turns in alternation, with at least one assistant
turn. Everything else is refused with the file and the line: whatever is guessed here is trained without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchsft.config import InputError

ROLES = ("system", "user", "assistant")
# Keys of a message that change what is rendered or trained: ignoring them would train something else than was meant.
UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "reasoning_content", "thinking", "weight", "train")


@dataclass(frozen=True)
class Conversation:
    """One line of a file.

    Attributes:
        id: `<file name>:<line number>`, counted from 1.
        messages: `{"role", "content"}` in order, both strings; the roles are as the module's docstring says.
    """

    id: str
    messages: list[dict[str, str]]


def read_jsonl(path: str | Path, name: str | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a JSONL file in order; blank lines are skipped, other keys beside `messages` ignored.

    Args:
        path: a UTF-8 file.
        name: what ids call the file; absent: the last part of the path.

    Raises:
        InputError: the file cannot be read, or a line is not a conversation; the sentence names file and line.
    """
    path = Path(path)
    name = path.name if name is None else name
    if path.is_dir():
        raise InputError(f"{path} is a directory; name the JSONL files in it one by one")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give an existing JSONL file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Conversation(f"{name}:{number}", parse_messages(line, f"{path}, line {number}"))


def parse_messages(line: bytes, where: str) -> list[dict[str, str]]:
    """The messages of one JSONL line, as role and content alone.

    Raises:
        InputError: a sentence that begins with `where`.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))  # -sig: some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8") from None
    except RecursionError:
        raise InputError(f"{where}: the JSON is nested too deeply; a line is one object of messages") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(row, dict) or "messages" not in row:
        found = f"an object with {', '.join(sorted(row)) or 'no keys'}" if isinstance(row, dict) else _kind(row)
        raise InputError(f'{where}: no messages, found {found}; give {{"messages": [{{"role", "content"}}, ...]}}')
    if row.get("tools"):
        raise InputError(f"{where}: tools are not supported by this version; leave such conversations out")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else _kind(messages)
        raise InputError(f"{where}: messages must be a list of at least one message, but it is {found}")
    turns = [_parse_message(message, f"{where}, message {i}") for i, message in enumerate(messages, start=1)]
    _check_role_order([turn["role"] for turn in turns], where)
    return turns


def _parse_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InputError(f"{where}: a message must be an object with role and content, but it is {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise InputError(f"{where}: no {key}; a message must have role and content")
    role, content = message["role"], message["content"]
    if role == "tool":
        raise InputError(f"{where}: role tool is not supported by this version; leave conversations with tools out")
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if message.get(key) is not None and message[key] != []:
            raise InputError(f"{where}: {key} is not supported by this version; remove it or the conversation")
    if not isinstance(content, str):
        raise InputError(f"{where}: content must be a string, but it is {_kind(content)}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        code = hex(ord(content[error.start]))
        raise InputError(f"{where}: content has half a surrogate pair ({code}); write whole characters") from None
    return {"role": role, "content": content}


def _check_role_order(roles: list[str], where: str) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    first = len(roles) - len(turns)
    for i, role in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            raise InputError(
                f"{where}, message {first + i + 1}: role {role} where {wanted} is expected; the order is an"
                " optional system message, then user and assistant in alternation"
            )
    if "assistant" not in turns:
        raise InputError(f"{where}: no assistant message, so there is nothing to learn; add one or remove the line")


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
