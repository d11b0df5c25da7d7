"""Where in the rendered text of a conversation each assistant turn stands, and whether all that the
row says is there.

A conversation is rendered to text. What is trained is decided by characters, never by token ids, so
a pad token that equals the end-of-turn token changes nothing. Of assistant message i is trained
what inference would write:

    <|im_start|>assistant\\n The answer. <|im_end|> \\n
    \\___ header, not ___/  \\_____ trained _____/  not

- `render(messages[:i], add_generation_prompt=True)` is given, the rest of `render(messages[:i +
  1])` is trained, through its end-of-turn token. A `{% generation %}` block can only make it begin
  later.
- Where turns end with the token that opens the next one (GLM), that token ends the turn, also
  behind the last one.
- Where the template rewrites the history (drops earlier reasoning) the conversation is split by
  turn: a text serves the messages whose own renderings it begins with, so that each answer has the
  context that it has in inference.
- Where the template rewrites it as soon as the answer is there (the system turn of Mistral-Nemo,
  the analysis of gpt-oss), the text is put together: the messages before the answer as they are
  rendered alone, and the answer as it is written.
- Where the generation prompt opens a reasoning block that the rendering lacks (DeepSeek-R1), the
  text is put together too: prompt, reasoning (or none), closing tag, and what the rendering writes
  from the content on.
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torchsft.data.rendering import (
    ANSWER,
    REASONING,
    ChatTemplate,
    Given,
    Message,
    without_reasoning,
)
from torchsft.data.rows import RowError

Mask = Literal["assistant", "last-turn", "all"]
Weights = dict[int, float]  # of the messages to locate

OPENED = re.compile(r"<think>(\s*)\Z")  # at the end of a generation prompt
# there, a block that stays empty
CLOSED = re.compile(r"(?:<think>\s*</think>|<\|channel>thought\s*<channel\|>)\s*\Z")
# before an answer without reasoning
EMPTY_BLOCK = re.compile(r"(?:<think>\s*)?(?:</think>\n{0,2})?")
CONTENTS = ("content", "reasoning_content")
PLAIN = {"role", *CONTENTS}
PLACEHOLDER = re.compile("\ue002([0-9]+)\ue003")  # of a content
KNOWN_SHAPES = 1024  # that are remembered


class Turn(NamedTuple):
    """Message `index` in a `text` that ends with it. `begin`, `start`, `end`: characters behind the
    prompt, behind what is not trained of the turn, and behind the turn. `written`: the rendering
    that `text` comes from. `note`: how that was changed, a code that is counted, "" if it was
    not.
    """

    index: int
    begin: Any
    start: Any
    end: Any
    note: str
    text: str = ""
    written: str = ""


class Lost(NamedTuple):
    """What a text lacks of its context: something of message `index` (None: of the tools or
    documents), in words.
    """

    index: int | None
    what: str


class Part(NamedTuple):
    """A text, the turns trained in it, and the rendering of messages[:stop] that it comes from.

    In a mold, which is made with placeholders, each text and each place (by the text before it) is
    a `_blank`.
    """

    text: Any
    turns: list[Turn]
    written: Any
    stop: int
    lost: tuple[Lost, ...] = ()


class TurnFinder:
    """Finds the turns of conversations under one chat template. `mask`, `masks_reasoning`: as in
    `ChatTokenizer`.
    """

    def __init__(self, template: ChatTemplate, mask: Mask, masks_reasoning: bool) -> None:
        self.template, self.mask, self.masks_reasoning = template, mask, masks_reasoning
        self.molds: dict[tuple, list[Part]] = {}
        self.declares: dict[tuple[str, tuple[str, ...]], bool] = {}  # by name of a tool and roles

    def parts(self, messages: list[Message], given: Given, weights: Weights) -> list[Part]:
        """Texts with the messages of `weights`, in the order of their last turns. Raises RowError:
        one cannot be trained.
        """
        messages = [self.template.prepared(message) for message in messages]
        parts = None if any(given) else self._molded(messages, weights)
        return parts or self._located(messages, given, weights)

    def _molded(self, messages: list[Message], weights: Weights) -> list[Part] | None:
        """By one rendering for each text; None where the template does not just put the contents
        between its own words.

        Locating the turns takes two renderings for each of them. It is done once for a sequence of
        roles, with placeholders; it holds for every conversation whose rendering is the same with
        other contents.
        """
        if any(
            m["content"] is None or "think>" in m["content"] or not m.keys() <= PLAIN
            for m in messages
        ):
            return None
        shape = (*((message["role"], len(message)) for message in messages), *weights)
        if shape not in self.molds:
            if len(self.molds) >= KNOWN_SHAPES:
                self.molds.clear()
            self.molds[shape] = self._new_molds(messages, weights)
        molds = self.molds[shape]
        renderings = [self.template.render(messages[: mold.stop])[0] for mold in molds]
        contents = [message[key] for message in messages for key in CONTENTS if key in message]
        # the second: as templates that trim write it
        for filled in (contents, [content.strip() for content in contents]):
            if all(
                _fill(mold.written, filled) == text
                for mold, text in zip(molds, renderings, strict=True)
            ):
                return [_cast(mold, filled, messages) for mold in molds]
        return None

    def _new_molds(self, messages: list[Message], weights: Weights) -> list[Part]:
        number = itertools.count()
        probes = [
            m | {key: f"\ue002{next(number)}\ue003" for key in CONTENTS if key in m}
            for m in messages
        ]
        try:
            parts = self._located(probes, Given(), weights)
        except RowError:  # to be told of the real conversation, if it is true of that one too
            return []
        if any(turn.note == "context-restored" for part in parts for turn in part.turns):
            return []  # of such a text, `written` does not show all
        return [_mold(part) for part in parts]

    def _located(self, messages: list[Message], given: Given, weights: Weights) -> list[Part]:
        """By renderings of their own for each turn."""
        turns = [self._turn(messages, given, i) for i in weights]
        text = written = self.template.render(messages, given)[0]
        last = len(messages) - 1
        if (
            messages
            and messages[last]["role"] == "assistant"
            and (self.mask == "all" or last in weights)
        ):
            text += self.template.ending(messages[last])
        stop, found = len(messages), [] if turns else [Part(text, [], text, len(messages))]
        while turns:
            last_turn = turns[-1]
            if self.mask != "all" and not text.startswith(last_turn.text[: last_turn.end]):
                text, written, stop = last_turn.text, last_turn.written, last_turn.index + 1
            held = [text.startswith(turn.text[: turn.end]) for turn in turns]
            if self.mask == "all" and not all(held):  # which has one text only
                problem = (
                    "the chat template changes it once others follow, so that it can have no "
                    "weight or mask of its own"
                )
                name = f"message {turns[held.index(False)].index + 1}"
                raise RowError(
                    "", "not-prefix-stable", f"{name}: {problem}; set --data.mask assistant"
                )
            found.append(Part(text, list(itertools.compress(turns, held)), written, stop))
            turns = [turn for turn, is_held in zip(turns, held, strict=True) if not is_held]
        for i, message in enumerate(messages if self.mask == "all" else ()):
            if message["role"] == "assistant":
                self._check(i, message, found[0].text)
        parts = [
            part._replace(lost=tuple(self._lost(messages[: part.stop], given, part.text)))
            for part in found
        ]
        return sorted(parts, key=lambda part: part.turns[-1].index if part.turns else 0)

    def _turn(self, messages: list[Message], given: Given, i: int) -> Turn:
        """Where message i is written; checked against what it says."""
        template, name = self.template, f"message {i + 1}: the chat template"
        written, blocks = template.render(messages[: i + 1], given, blocks=template.has_blocks)
        if messages[i]["role"] != "assistant":  # a weight 0 with the mask `all`
            before = template.render(messages[:i], given)[0] if i else ""
            begin = len(before.removesuffix(template.tail))
            return Turn(
                i, begin, begin, len(written.removesuffix(template.tail)), "", written, written
            )
        reasoning, bare = without_reasoning(messages[i])
        prompt = self._prompt(messages, given, i, written)
        opened = OPENED.search(prompt)
        text, begin, note = written, len(prompt), ""
        header = opened.start() if opened else begin
        if opened and not (written.startswith(prompt) and _is_in(reasoning, written[begin:])):
            if reasoning:
                written, blocks = template.render(
                    [*messages[:i], bare], given, blocks=template.has_blocks
                )
            if written.startswith(prompt[:header]):
                closing = "\n</think>\n\n" if "\n" in opened[1] else "</think>"
                text = prompt + reasoning + closing + EMPTY_BLOCK.sub("", written[header:], count=1)
                note = "closed-reasoning"
        if not text.startswith(prompt):
            text, note = self._restored(messages, given, i, prompt, written), "context-restored"

        bare_text = text
        follower = messages[i + 1]["role"] if i + 1 < len(messages) else ""
        text += template.ending(messages[i], follower)
        end = len(text.removesuffix(template.tail))
        end = end if text.endswith(template.enders, begin, end) else len(text.rstrip())
        if not text.endswith(template.enders, begin, end):
            problem = (
                "writes no special token that ends the turn; add one, such as the token with which "
                "the next turn begins"
            )
            problem += (
                " (the model's own templates may rely on that: name it in eos_token_id of "
                "generation_config.json then)"
            )
            raise RowError("", "no-end-of-turn", f"{name} {problem}")
        start, stop = begin, end
        if template.has_blocks:
            start, stop = self._inside(
                blocks, begin, end, header, len(bare_text) - len(written), note
            )
        self._check(i, messages[i], text[begin:end])
        problem = "has {{% generation %}} blocks that do not hold its {}; move or remove them"
        self._check(i, messages[i], text[start:stop], "generation-blocks", problem)
        if self.masks_reasoning and (reasoning or re.compile(r"\s*<think>").match(text, header)):
            if note == "closed-reasoning":
                answer = begin + len(reasoning + closing)
            else:
                answer = self._answer(
                    messages[: i + 1], given, bare_text, begin, min(end, len(bare_text))
                )
            start = max(start, answer)
            problem = (
                "writes its {} before the end of its reasoning, which is masked; set "
                "--data.reasoning train"
            )
            self._check(i, messages[i], text[start:end], "text-lost", problem)
        return Turn(i, begin, start, end, note, text, written)

    def _inside(
        self,
        blocks: list[tuple[int, int]],
        begin: int,
        end: int,
        header: int,
        shift: int,
        note: str,
    ) -> tuple[int, int]:
        """Characters of a turn from its first generation block to its last one. `shift`: of the
        text to the rendering that the blocks are of; it holds behind the prompt, or behind the
        reasoning that was put into the text.
        """
        if note == "context-restored":
            blocks, shift = [(a + shift, b + shift) for a, b in blocks], 0
        inside = [
            (a, b) for a, b in blocks if b > max(a, header if note == "closed-reasoning" else begin)
        ] or [(0, 0)]
        start = begin if note == "closed-reasoning" else max(begin, inside[0][0])
        return start, min(end, inside[-1][1] + shift)

    def _prompt(self, messages: list[Message], given: Given, i: int, written: str) -> str:
        """What inference is given before message i."""
        template = self.template
        if i:
            return template.render(messages[:i], given, generation_prompt=True)[0] + template.header
        try:
            prompt = template.render([], given, generation_prompt=True)[0] + template.header
            if written.startswith(prompt):
                return prompt
        except RowError:  # many look at the first message
            pass
        opening = template.opening
        head = opening[: opened.start()] if (opened := OPENED.search(opening)) else opening
        if head.strip() and head in written:
            return written[: written.index(head)] + opening
        problem = "writes no header of its own before an assistant message that comes first"
        raise RowError(
            "",
            "not-prefix-stable",
            f"message 1: the chat template {problem}; put a user message before it",
        )

    def _restored(
        self, messages: list[Message], given: Given, i: int, prompt: str, written: str
    ) -> str:
        """The messages before i as they are rendered alone, and message i as it is written behind
        what became of them.

        Raises:
            RowError: not-prefix-stable, inference would see another text.
        """
        template = self.template
        if i:
            marked = template.render(
                [*messages[:i], {"role": "assistant", "content": ANSWER}], given
            )[0]
            before, context = template.render(messages[:i], given)[0], marked.partition(ANSWER)[0]
            rewritten = context.removesuffix(template.before_content)
            if context.endswith(template.before_content) and written.startswith(rewritten):
                text = before + written[len(rewritten) :]
                if text.startswith(prompt):
                    return text
                # an empty block that the prompt has and the answer has not
                closed = CLOSED.search(prompt)
                if (
                    closed
                    and not without_reasoning(messages[i])[0]
                    and text.startswith(prompt[: closed.start()])
                ):
                    return prompt + text[closed.start() :]
        at = next(
            (n for n, (a, b) in enumerate(zip(prompt, written, strict=False)) if a != b),
            len(written),
        )
        problem = (
            f"writes the turn ({written[at : at + 30]!r}) in another way than its generation prompt"
        )
        problem += f" ({prompt[at : at + 30]!r}), so that inference would see another text"
        remedy = "change it or --data.template-kwargs"
        raise RowError(
            "", "not-prefix-stable", f"message {i + 1}: the chat template {problem}; {remedy}"
        )

    def _check(
        self, i: int, message: Message, text: str, reason: str = "text-lost", problem: str = ""
    ) -> None:
        """That a text has all that assistant message i says."""
        reasoning, bare = without_reasoning(message)
        calls = [
            [call["function"]["name"], call["function"]["arguments"]]
            for call in bare.get("tool_calls") or ()
        ]
        said = {
            "reasoning": "" if self.masks_reasoning else reasoning,
            "content": bare["content"] or "",
            "tool call": calls,
        }
        for what, source in [
            (what, leaf) for what, value in said.items() for leaf in _leaves(value)
        ]:
            if not _is_in(source, text):
                remedy = "write it as the template does, or use another one"
                if what == "reasoning" and not problem:
                    reason, remedy = (
                        "reasoning-lost",
                        "see --data.template-kwargs, set --data.reasoning mask, or take it out",
                    )
                    # which can split by turn
                    remedy = "set --data.mask assistant" if self.mask == "all" else remedy
                problem = (
                    problem.format(what)
                    or f"leaves out or changes its {what} ({source.strip()[:40]!r}); {remedy}"
                )
                raise RowError("", reason, f"message {i + 1}: the chat template {problem}")

    def _lost(self, messages: list[Message], given: Given, text: str) -> Iterator[Lost]:
        """What a text lacks of the messages before its answers, and of the tools and documents.

        Of an assistant message, only the names that it calls are asked for: what it says is checked
        where it is trained, and templates leave earlier reasoning out by intent.
        """
        for i, message in enumerate(messages):
            if message["role"] != "assistant" and not _is_said(message["content"] or "", text):
                yield Lost(i, f"what the {message['role']} message says")
            for call in message.get("tool_calls") or ():
                if not _count(call["function"]["name"], text):
                    yield Lost(
                        i, f"the name of the tool that it calls ({call['function']['name']!r})"
                    )
        if given.tools:
            yield from self._lost_tools(messages, given, text)
        for document in given.documents or ():
            said = [
                document[key]
                for key in ("text", "content", "contents")
                if isinstance(document.get(key), str)
            ]
            for source in said:
                if not _is_said(source, text):
                    yield Lost(None, f"the document {source.strip()[:40]!r}")

    def _lost_tools(self, messages: list[Message], given: Given, text: str) -> Iterator[Lost]:
        """The tools of which the text lacks the name, the description, or the name of a parameter.

        A name can stand in the text because it is called: that it is declared, too, is seen beside
        the rendering without tools. That is made once for each tool and sequence of roles.
        """
        roles = tuple(message["role"] for message in messages)
        for tool in given.tools or ():
            name, further = declared(tool)
            found = _count(name, text) > 0 and all(_is_said(source, text) for source in further)
            if found and (name, roles) not in self.declares:
                if len(self.declares) >= KNOWN_SHAPES:
                    self.declares.clear()
                without = self._without_tools(messages, given)
                self.declares[name, roles] = _count(name, text) > _count(name, without)
            if not (found and self.declares[name, roles]):
                yield Lost(None, f"the tool {name!r}, or its description or parameters")

    def _without_tools(self, messages: list[Message], given: Given) -> str:
        """The rendering of the messages alone; "" where the template refuses that, as it then reads
        the tools.
        """
        try:
            return self.template.render(messages, given._replace(tools=None))[0]
        except RowError:
            return ""

    def _answer(
        self, messages: list[Message], given: Given, text: str, begin: int, end: int
    ) -> int:
        """Where content or tool calls of the last message begin in its rendering, behind its
        reasoning and what closes that.
        """
        content = messages[-1]["content"] or ""
        reasoning = REASONING.fullmatch(content)
        head, answer = (content[: reasoning.start(2)], reasoning[2]) if reasoning else ("", content)
        try:
            marked = self.template.render(
                [*messages[:-1], messages[-1] | {"content": head + ANSWER + answer}], given
            )[0]
        except RowError:  # some refuse content beside reasoning and tool calls
            marked = ""
        if ANSWER in marked and marked.replace(ANSWER, "").endswith(text[begin:]):
            return marked.index(ANSWER) + len(text) - len(marked) + 1
        thought = without_reasoning(messages[-1])[0]
        at = max(begin, text.find(thought, begin, end) + len(thought))  # no content, or trimmed
        at = max(at, text.find("</think>", at, end) + len("</think>"))
        return end - len(text[at:end].lstrip("\n"))


def declared(tool: dict[str, Any]) -> tuple[str, list[str]]:
    """What a template must write of a tool: its name; its description and the names of its
    parameters.
    """
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):  # in no form that is known: as it stands
        return json.dumps(tool, ensure_ascii=False), []
    description, parameters = function.get("description"), function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    names = list(properties) if isinstance(properties, dict) else []
    return name, [description, *names] if isinstance(description, str) else names


def _mold(part: Part) -> Part:
    turns = [
        Turn(turn.index, *(_blank(part.text[:at]) for at in turn[1:4]), turn.note)
        for turn in part.turns
    ]
    return Part(_blank(part.text), turns, _blank(part.written), part.stop, part.lost)


def _cast(mold: Part, contents: list[str], messages: list[Message]) -> Part:
    turns = [
        Turn(turn.index, *(len(_fill(blank, contents)) for blank in turn[1:4]), turn.note)
        for turn in mold.turns
    ]
    lost = tuple(one for one in mold.lost if messages[one.index or 0]["content"].strip())
    return Part(_fill(mold.text, contents), turns, "", mold.stop, lost)


def _blank(text: str) -> tuple[str, list[int]]:
    """A text made with placeholders, as a format and the numbers of its contents."""
    return PLACEHOLDER.sub("%s", text.replace("%", "%%")), [
        int(number) for number in PLACEHOLDER.findall(text)
    ]


def _fill(blank: tuple[str, list[int]], contents: list[str]) -> str:
    return blank[0] % tuple([contents[number] for number in blank[1]])


def _leaves(value: Any) -> Iterator[str]:
    """The strings and numbers in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value if isinstance(value, str) else json.dumps(value)


def _is_in(source: str, text: str) -> bool:
    """Whether a text has a source string, trimmed or escaped as in JSON if need be; an empty one
    always.
    """
    source = source.strip()
    return source in text or any(
        json.dumps(source, ensure_ascii=a)[1:-1] in text for a in (False, True)
    )


def _is_said(source: str, text: str) -> bool:
    """Whether a text has a source string as in `_is_in`, as Python writes it, or with other white
    space.
    """
    if _is_in(source, text) or repr(source.strip())[1:-1] in text:
        return True
    return " ".join(source.split()) in " ".join(text.split())


def _count(name: str, text: str) -> int:
    """How often a name stands in a text, not as a part of another one."""
    plain, escaped = re.escape(name), re.escape(json.dumps(name)[1:-1])
    if escaped == plain:  # what begins with a literal is found 12 times as fast
        return len(re.findall(rf"{plain}(?<!\w{plain})(?!\w)", text))
    return len(re.findall(rf"(?<!\w)(?:{plain}|{escaped})(?!\w)", text))
