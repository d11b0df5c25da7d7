"""Whether a rendered text holds all that a row says, in its answers and in their context."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchsft.data.rendering import ChatTemplate, Extras, Messages
from torchsft.data.rows import Object, RowError, Strings

KNOWN_RESULTS = 1024  # that are remembered


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that a text lacks of its context.

    Attributes:
        index: of the message that says it; None where the tools or documents do.
        what: it, in words.
    """

    index: int | None
    what: str


Roles = Strings  # of the messages of a conversation


class ContextCheck:
    """Finds what the texts of one chat template lack of their context.

    What takes a rendering of its own to find out is remembered: it holds for every conversation
    with the same sequence of roles.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        # by the tool's name and the roles of the messages
        self._is_declared: dict[tuple[str, Roles], bool] = {}
        # messages that the template writes, by their index and the roles of all messages
        self._is_written: set[tuple[int, Roles]] = set()
        # of tools and documents, by how they are written; rows have the same ones, mostly
        self._words: dict[str, str] = {}

    def missing(self, messages: Messages, extras: Extras, text: str) -> Iterator[Missing]:
        """Yield what a text lacks of the messages before its answers, of the tools and documents.

        It lacks a tool if it lacks its name, its description or the name of a parameter.

        Of an assistant message only the names that it calls are looked for: what it says is checked
        where it is trained, and templates leave earlier reasoning out by intent.
        """
        roles = tuple(message["role"] for message in messages)
        left_out = self._left_out(messages, extras, roles)
        for i, (role, message) in enumerate(zip(roles, messages, strict=True)):
            is_left_out = i in left_out or not contains_loosely(text, message["content"] or "")
            if is_left_out and role != "assistant":
                yield Missing(i, f"what the {role} message says")
            for call in message.get("tool_calls") or ():
                name = call["function"]["name"]
                if not _count(text, name):
                    yield Missing(i, f"the name of the tool that it calls ({name!r})")
        for tool in extras.tools or ():
            name, details = declaration_of(tool)
            is_written = _count(text, name) > 0
            is_written = is_written and all(contains_loosely(text, detail) for detail in details)
            if not is_written or not self._declares(name, roles, messages, extras, text):
                yield Missing(None, f"the tool {name!r}, or its description or parameters")
        for document in extras.documents or ():
            yield from _missing_document(document, text)

    def _left_out(self, messages: Messages, extras: Extras, roles: Roles) -> set[int]:
        """Return messages of context that the template leaves out although their words stand in the
        text, as other messages, the tools or the template have the same words.

        Such messages are rendered with a mark behind what they say, once for a message and sequence
        of roles.

        Returns:
            Indices of the messages.
        """
        ambiguous = self._ambiguous(messages, extras, roles)
        if not ambiguous:
            return set()
        marks = {i: f"\ue002{i}\ue003" for i in ambiguous}
        marked = list(messages)
        for i, mark in marks.items():
            marked[i] = marked[i] | {"content": marked[i]["content"] + mark}
        last_answer = max((i for i, role in enumerate(roles) if role == "assistant"), default=0)
        try:
            text = self.template.render(marked, extras).text
            # some templates write the context before the prompt of an answer alone
            before = marked[:last_answer]
            text += self.template.render(before, extras, generation_prompt=True).text
        except RowError:
            return set()
        if len(self._is_written) >= KNOWN_RESULTS:
            self._is_written.clear()
        written = {i for i, mark in marks.items() if contains_loosely(text, mark)}
        self._is_written |= {(i, roles) for i in written}
        return marks.keys() - written

    def _ambiguous(self, messages: Messages, extras: Extras, roles: Roles) -> list[int]:
        """Return messages of context whose words also stand elsewhere, and of which it is not known
        that the template writes them.

        Elsewhere is in another message, in tools or documents, or in the template itself.

        Returns:
            Indices of the messages.
        """
        sources = ["\n".join(leaves(message)) for message in messages]
        sources.append(self._words_of_extras(extras))
        sources.append(self.template.text)
        found = []
        for i, message in enumerate(messages):
            words = (message["content"] or "").strip()
            if roles[i] == "assistant" or not words or (i, roles) in self._is_written:
                continue
            if any(words in source for j, source in enumerate(sources) if j != i):
                found.append(i)
        return found

    def _words_of_extras(self, extras: Extras) -> str:
        """Return the strings and numbers in tools and documents, one a line."""
        key = repr((extras.tools, extras.documents))
        if key not in self._words:
            if len(self._words) >= KNOWN_RESULTS:
                self._words.clear()
            self._words[key] = "\n".join(leaves([extras.tools, extras.documents]))
        return self._words[key]

    def _declares(
        self,
        name: str,
        roles: Roles,
        messages: Messages,
        extras: Extras,
        text: str,
    ) -> bool:
        """Return whether the name of a tool stands in a text because the tool is declared.

        It can stand there because the tool is called. So it must occur more often than in the
        rendering without tools, which is made once for each tool and sequence of roles.
        """
        key = (name, roles)
        if key not in self._is_declared:
            if len(self._is_declared) >= KNOWN_RESULTS:
                self._is_declared.clear()
            try:
                bare = self.template.render(messages, Extras(documents=extras.documents)).text
            except RowError:  # it reads the tools then
                bare = ""
            self._is_declared[key] = _count(text, name) > _count(bare, name)
        return self._is_declared[key]


def _missing_document(document: Object, text: str) -> Iterator[Missing]:
    """Yield the texts of a document that a text lacks."""
    texts = [document.get(key) for key in ("text", "content", "contents")]
    sources = [source for source in texts if isinstance(source, str)]
    for source in sources or leaves(document):  # Command R's may have keys of any name
        if not contains_loosely(text, source):
            yield Missing(None, f"the document {source.strip()[:40]!r}")


def declaration_of(tool: Object) -> tuple[str, list[str]]:
    """Return what a template must write of a tool: its name, and its description and the names of
    its parameters.

    Args:
        tool: in OpenAI's shape, or its function alone. In any other form it must be written as it
            stands.
    """
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):  # in no form that is known: as it stands
        return json.dumps(tool, ensure_ascii=False), []
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    details = list(properties) if isinstance(properties, dict) else []
    description = function.get("description")
    if isinstance(description, str):
        details.insert(0, description)
    return name, details


def leaves(value: Any) -> Iterator[str]:
    """Yield the strings and numbers in a JSON value, as text.

    Keys, true, false and null are no leaves: templates write them in ways of their own.
    """
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
    """Return whether a text holds a source string, trimmed, or escaped as in JSON.

    An empty string is in every text.
    """
    source = source.strip()
    return (
        source in text
        or json.dumps(source, ensure_ascii=False)[1:-1] in text
        or json.dumps(source)[1:-1] in text
    )


def contains_loosely(text: str, source: str) -> bool:
    """Return whether a text holds a source string as in `contains`, as Python writes it, or with
    other white space.
    """
    return (
        contains(text, source)
        or repr(source.strip())[1:-1] in text  # as Python writes it
        or " ".join(source.split()) in " ".join(text.split())
    )


def _count(text: str, name: str) -> int:
    """Count how often a name stands in a text, not as a part of another name.

    It may be written as it is, or escaped as in JSON.
    """
    plain = re.escape(name)
    escaped = re.escape(json.dumps(name)[1:-1])
    if escaped == plain:  # what begins with a literal is found 12 times as fast
        return len(re.findall(rf"{plain}(?<!\w{plain})(?!\w)", text))
    return len(re.findall(rf"(?<!\w)(?:{plain}|{escaped})(?!\w)", text))
