"""Whether a rendered text holds all that a row says, in its answers and in their context."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchsft.data.rendering import ChatTemplate, Extras, Message
from torchsft.data.rows import RowError

KNOWN_DECLARATIONS = 1024  # that are remembered


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that a text lacks of its context.

    Attributes:
        index: of the message that says it; None where the tools or documents do.
        what: it, in words.
    """

    index: int | None
    what: str


@dataclass(frozen=True, slots=True)
class ToolDeclaration:
    """What a template must write of a tool.

    Attributes:
        details: its description, and the names of its parameters.
    """

    name: str
    details: list[str]


class ContextCheck:
    """Finds what the texts of one chat template lack of their context."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        # by the tool's name and the roles of the messages
        self._is_declared: dict[tuple[str, tuple[str, ...]], bool] = {}

    def missing(self, messages: Sequence[Message], extras: Extras, text: str) -> Iterator[Missing]:
        """Yield what a text lacks of the messages before its answers, of the tools and documents.

        Of an assistant message only the names that it calls are looked for: what it says is checked
        where it is trained, and templates leave earlier reasoning out by intent.
        """
        for i, message in enumerate(messages):
            role = message["role"]
            if role != "assistant" and not contains_loosely(text, message["content"] or ""):
                yield Missing(i, f"what the {role} message says")
            for call in message.get("tool_calls") or ():
                name = call["function"]["name"]
                if not _count(text, name):
                    yield Missing(i, f"the name of the tool that it calls ({name!r})")
        if extras.tools:
            yield from self._missing_tools(messages, extras, text)
        for document in extras.documents or ():
            yield from _missing_document(document, text)

    def _missing_tools(
        self, messages: Sequence[Message], extras: Extras, text: str
    ) -> Iterator[Missing]:
        """Yield the tools of which the text lacks name, description or the name of a parameter."""
        roles = tuple(message["role"] for message in messages)
        for tool in extras.tools or ():
            declaration = declaration_of(tool)
            is_written = _count(text, declaration.name) > 0 and all(
                contains_loosely(text, detail) for detail in declaration.details
            )
            if not (is_written and self._declares(declaration.name, roles, messages, extras, text)):
                yield Missing(
                    None, f"the tool {declaration.name!r}, or its description or parameters"
                )

    def _declares(
        self,
        name: str,
        roles: tuple[str, ...],
        messages: Sequence[Message],
        extras: Extras,
        text: str,
    ) -> bool:
        """Return whether the name of a tool stands in a text because the tool is declared.

        It can stand there because the tool is called. So it must occur more often than in the
        rendering without tools, which is made once for each tool and sequence of roles.
        """
        key = (name, roles)
        if key not in self._is_declared:
            if len(self._is_declared) >= KNOWN_DECLARATIONS:
                self._is_declared.clear()
            without_tools = self._render_without_tools(messages, extras)
            self._is_declared[key] = _count(text, name) > _count(without_tools, name)
        return self._is_declared[key]

    def _render_without_tools(self, messages: Sequence[Message], extras: Extras) -> str:
        """Return the rendering without tools; "" where the template refuses that, as it reads them
        then.
        """
        try:
            return self.template.render(messages, Extras(documents=extras.documents)).text
        except RowError:
            return ""


def _missing_document(document: dict[str, Any], text: str) -> Iterator[Missing]:
    for key in ("text", "content", "contents"):
        source = document.get(key)
        if isinstance(source, str) and not contains_loosely(text, source):
            yield Missing(None, f"the document {source.strip()[:40]!r}")


def declaration_of(tool: dict[str, Any]) -> ToolDeclaration:
    """Return what a template must write of a tool."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):  # in no form that is known: as it stands
        return ToolDeclaration(json.dumps(tool, ensure_ascii=False), [])
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    details = list(properties) if isinstance(properties, dict) else []
    description = function.get("description")
    if isinstance(description, str):
        details.insert(0, description)
    return ToolDeclaration(name, details)


def leaves(value: Any) -> Iterator[str]:
    """Yield the strings and numbers in a JSON value, as text."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def contains(text: str, source: str) -> bool:
    """Return whether a text holds a source string, trimmed, or escaped as in JSON; an empty one
    always.
    """
    source = source.strip()
    if source in text:
        return True
    escaped = (json.dumps(source, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return any(form in text for form in escaped)


def contains_loosely(text: str, source: str) -> bool:
    """Return whether a text holds a source string as in `contains`, as Python writes it, or with
    other white space.
    """
    if contains(text, source) or repr(source.strip())[1:-1] in text:
        return True
    return " ".join(source.split()) in " ".join(text.split())


def _count(text: str, name: str) -> int:
    """Count how often a name stands in a text, not as a part of another name."""
    plain = re.escape(name)
    escaped = re.escape(json.dumps(name)[1:-1])
    return len(re.findall(rf"(?<!\w)(?:{plain}|{escaped})(?!\w)", text))
