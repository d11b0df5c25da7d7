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

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchsft.data.completeness import ContextCheck, contains, leaves
from torchsft.data.patterns import (
    CONTENT_KEYS,
    Pattern,
    TrainedText,
    Turn,
    contents_of,
    with_placeholders,
)
from torchsft.data.rendering import (
    ANSWER,
    NO_EXTRAS,
    REASONING,
    ChatTemplate,
    Extras,
    Message,
    Messages,
    Rendering,
    without_reasoning,
)
from torchsft.data.rows import RowError

Located = Sequence[int]  # indices of messages, in rising order
Mask = Literal["assistant", "last-turn", "all"]

# at the end of a generation prompt: a reasoning block that it opens, and one that it leaves empty
OPENED_BLOCK = re.compile(r"<think>(\s*)\Z")
CLOSED_BLOCK = re.compile(r"(?:<think>\s*</think>|<\|channel>thought\s*<channel\|>)\s*\Z")
# what a template may write before an answer without reasoning
EMPTY_BLOCK = re.compile(r"(?:<think>\s*)?(?:</think>\n{0,2})?")
OPENING_TAG = re.compile(r"\s*<think>")
PLAIN_KEYS = {"role", *CONTENT_KEYS}
KNOWN_SHAPES = 1024  # sequences of roles whose patterns are remembered


@dataclass(slots=True)
class _Answer:
    """A text that ends with an answer, behind exactly what inference is given before it.

    Attributes:
        text: prompt and answer.
        prompt_end: characters of the prompt.
        header_end: of the prompt before the reasoning block that it opens, if it opens one.
        rendering: what the template wrote, with the generation blocks.
        note: how `text` was made from the rendering; "" where it is the rendering.
        reasoning_end: where reasoning that was put into the text is closed; None where none was.
    """

    text: str
    prompt_end: int
    header_end: int
    rendering: Rendering
    note: str = ""
    reasoning_end: int | None = None


@dataclass
class TurnFinder:
    """Finds the turns of conversations under one chat template.

    Args:
        mask: as in `ChatTokenizer`.
        masks_reasoning: whether reasoning is context only.
    """

    template: ChatTemplate
    mask: Mask
    masks_reasoning: bool

    def __post_init__(self) -> None:
        self.context = ContextCheck(self.template)
        self.patterns: dict[tuple, list[Pattern]] = {}

    def trained_texts(
        self, messages: Messages, extras: Extras, located: Located
    ) -> list[TrainedText]:
        """Return texts in which some messages of a conversation are located.

        Args:
            located: indices of these messages, in rising order.

        Returns:
            The texts, in the order of their last turns.

        Raises:
            RowError: a message cannot be trained.
        """
        messages = [self.template.prepared(message) for message in messages]
        by_pattern = None
        if not extras.tools and not extras.documents:
            by_pattern = self._by_pattern(messages, located)
        return by_pattern or self._by_renderings(messages, extras, located)

    # ------------------------------------------------------------ by one rendering for each text

    def _by_pattern(self, messages: Messages, located: Located) -> list[TrainedText] | None:
        """Locate the turns by the patterns of this sequence of roles.

        Returns:
            None where the template does not only put the contents between its own words.
        """
        if not all(_is_plain(message) for message in messages):
            return None
        patterns = self._patterns(messages, located)
        stops = [pattern.trained.stop for pattern in patterns]
        renderings = [self.template.render(messages[:stop]).text for stop in stops]
        contents = contents_of(messages)
        # as some templates write them
        trimmed = {number: content.strip() for number, content in contents.items()}
        for form in (contents, trimmed):
            if [pattern.rendering % form for pattern in patterns] == renderings:
                return [pattern.fill(form, messages) for pattern in patterns]
        return None

    def _patterns(self, messages: Messages, located: Located) -> list[Pattern]:
        """Return the patterns of a sequence of roles, made when it occurs for the first time."""
        roles = ((message["role"], len(message)) for message in messages)
        shape = (*roles, *located)
        if shape not in self.patterns:
            if len(self.patterns) >= KNOWN_SHAPES:
                self.patterns.clear()
            self.patterns[shape] = self._new_patterns(messages, located)
        return self.patterns[shape]

    def _new_patterns(self, messages: Messages, located: Located) -> list[Pattern]:
        """Return the patterns of a sequence of roles; none where it cannot have any."""
        try:
            texts = self._by_renderings(with_placeholders(messages), NO_EXTRAS, located)
        except RowError:  # raised again for the conversation itself, if it holds for that too
            return []
        if any(turn.note == "context-restored" for text in texts for turn in text.turns):
            return []  # the rendering does not show all of such a text
        return [Pattern(text) for text in texts]

    # ------------------------------------------------------------ by renderings for each turn

    def _by_renderings(
        self, messages: Messages, extras: Extras, located: Located
    ) -> list[TrainedText]:
        """Locate each turn by renderings of its own, and find texts that hold them."""
        talk = _Talk(self.template, self.mask, self.masks_reasoning, messages, extras)
        texts = talk.texts(located)
        for text in texts:
            missing = self.context.missing(messages[: text.stop], extras, text.text)
            text.missing = tuple(missing)
        return sorted(texts, key=lambda text: text.turns[-1].index if text.turns else 0)


@dataclass(slots=True)
class _Talk:
    """A conversation whose turns are located by renderings of its own."""

    template: ChatTemplate
    mask: Mask
    masks_reasoning: bool
    messages: Messages
    extras: Extras

    def _render(self, stop: int, *behind: Message, **options: bool) -> Rendering:
        """Render the messages before `stop`, and those that are to be behind them."""
        return self.template.render([*self.messages[:stop], *behind], self.extras, **options)

    def texts(self, located: Located) -> list[TrainedText]:
        """Return texts in which these messages are located."""
        turns = [self._locate(i) for i in located]
        whole = self._whole_text(located)
        if self.mask == "all":
            self._check_single_text(whole, turns)
            whole.turns = turns
        is_whole = self.mask == "all" or not turns
        return [whole] if is_whole else _texts_with(turns, whole)

    def _whole_text(self, located: Located) -> TrainedText:
        """Return the text of the whole conversation, without turns."""
        stop = len(self.messages)
        rendering = self._render(stop).text
        text = rendering
        ends_with_answer = stop > 0 and self.messages[-1]["role"] == "assistant"
        if ends_with_answer and (self.mask == "all" or stop - 1 in located):
            text += self.template.ending(self.messages[-1])
        return TrainedText(text, [], rendering, stop)

    def _check_single_text(self, whole: TrainedText, turns: Sequence[Turn]) -> None:
        """Check that the whole text holds all turns and answers, as there is no other text under
        the mask `all`.
        """
        for turn in turns:
            if not _holds(whole.text, turn):
                raise RowError(
                    "not-prefix-stable",
                    f"message {turn.index + 1}: the chat template changes it once others follow, "
                    f"so that it can have no weight or mask of its own; set --data.mask assistant",
                )
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant":
                self._check_answer(i, whole.text)

    def _locate(self, i: int) -> Turn:
        """Locate message i in a text that ends with it, and check that its text is there."""
        message = self.messages[i]
        if message["role"] != "assistant":
            return self._locate_context(i)
        answer = self._answer(i)
        followers = [follower["role"] for follower in self.messages[i + 1 : i + 2]]
        text = answer.text + self.template.ending(message, *followers)
        start = answer.prompt_end
        end = self._turn_end(text, start, i)
        self._check_answer(i, text[start:end])
        if self.template.has_blocks:
            start, block_end = self._generation_span(answer, end)
            self._check_part(
                i,
                text[start:block_end],
                "generation-blocks",
                "has {{% generation %}} blocks that do not hold its {}; move or remove them",
            )
        if self.masks_reasoning and _has_reasoning(message, text, answer.header_end):
            reasoning_end = answer.reasoning_end
            if reasoning_end is None:
                bare_end = min(end, len(answer.text))
                reasoning_end = self._reasoning_end(i, answer, bare_end)
            start = max(start, reasoning_end)
            self._check_part(
                i,
                text[start:end],
                "text-lost",
                "writes its {} before the end of its reasoning, which is masked; set "
                "--data.reasoning train",
            )
        return Turn(i, answer.prompt_end, start, end, answer.note, text, answer.rendering.text)

    def _locate_context(self, i: int) -> Turn:
        """Locate message i, which is no answer: it has a weight of its own under the mask `all`."""
        tail = self.template.tail
        rendering = self._render(i + 1).text
        before = self._render(i).text if i else ""
        start = len(before.removesuffix(tail))
        end = len(rendering.removesuffix(tail))
        return Turn(i, start, start, end, "", rendering, rendering)

    def _answer(self, i: int) -> _Answer:
        """Return assistant message i behind what inference is given before it."""
        blocks = self.template.has_blocks
        rendering = self._render(i + 1, blocks=blocks)
        prompt = self._prompt(i, rendering.text)
        opened = OPENED_BLOCK.search(prompt)
        header_end = opened.start() if opened else len(prompt)
        if opened:
            reasoning, bare = without_reasoning(self.messages[i])
            follows_prompt = rendering.text.startswith(prompt)
            if not (follows_prompt and contains(rendering.text[len(prompt) :], reasoning)):
                if reasoning:
                    rendering = self._render(i, bare, blocks=blocks)
                if rendering.text.startswith(prompt[:header_end]):
                    return _with_closed_reasoning(prompt, opened, reasoning, rendering)
        if rendering.text.startswith(prompt):
            return _Answer(rendering.text, len(prompt), header_end, rendering)
        text = self._restored(i, prompt, rendering.text)
        return _Answer(text, len(prompt), header_end, rendering, note="context-restored")

    def _prompt(self, i: int, rendering: str) -> str:
        """Return what inference is given before message i, with which `rendering` ends."""
        template = self.template
        try:
            prompt = self._render(i, generation_prompt=True).text + template.header
            if i or rendering.startswith(prompt):
                return prompt
        except RowError:  # many templates look at the first message
            if i:
                raise
        # the header of an answer, and what the template writes before it
        opened = OPENED_BLOCK.search(template.opening)
        header = template.opening[: opened.start()] if opened else template.opening
        if header.strip() and header in rendering:
            return rendering[: rendering.index(header)] + template.opening
        raise RowError(
            "not-prefix-stable",
            "message 1: the chat template writes no header of its own before an assistant message "
            "that comes first; put a user message before it",
        )

    def _restored(self, i: int, prompt: str, rendering: str) -> str:
        """Return the messages before i as they are rendered alone, and message i as it is written
        behind what became of them.

        Raises:
            RowError: not-prefix-stable, inference would see another text.
        """
        text = self._context_and_answer(i, rendering) if i else None
        if text is not None:
            if text.startswith(prompt):
                return text
            # an empty block that the prompt has and the answer has not
            closed = CLOSED_BLOCK.search(prompt)
            has_reasoning = without_reasoning(self.messages[i])[0]
            if closed and not has_reasoning and text.startswith(prompt[: closed.start()]):
                return prompt + text[closed.start() :]
        at = next(i for i, letter in enumerate(prompt) if letter != rendering[i : i + 1])
        raise RowError(
            "not-prefix-stable",
            f"message {i + 1}: the chat template writes the turn ({rendering[at : at + 30]!r}) in "
            f"another way than its generation prompt ({prompt[at : at + 30]!r}), so that inference "
            f"would see another text; change it or --data.template-kwargs",
        )

    def _context_and_answer(self, i: int, rendering: str) -> str | None:
        """Put the messages before i, rendered alone, before the answer that `rendering` ends with.

        A probe in place of the answer shows where in the rendering the answer begins.
        """
        template = self.template
        probe = {"role": "assistant", "content": ANSWER}
        context = self._render(i, probe).text.partition(ANSWER)[0]
        before = self._render(i).text
        rewritten = context.removesuffix(template.before_content)
        if context.endswith(template.before_content) and rendering.startswith(rewritten):
            return before + rendering.removeprefix(rewritten)
        return None

    def _turn_end(self, text: str, prompt_end: int, i: int) -> int:
        """Return where the turn with which a text ends is over, behind its end-of-turn token."""
        enders = self.template.enders
        for end in (len(text.removesuffix(self.template.tail)), len(text.rstrip())):
            if text.endswith(enders, prompt_end, end):
                return end
        raise RowError(
            "no-end-of-turn",
            f"message {i + 1}: the chat template writes no special token that ends the turn; add "
            f"one, such as the token with which the next turn begins (the model's own templates "
            f"may rely on that: name it in eos_token_id of generation_config.json then)",
        )

    def _generation_span(self, answer: _Answer, trained_end: int) -> tuple[int, int]:
        """Return the characters of a turn from its first generation block through its last one.

        The blocks are characters of the rendering. The text that was made of it has more before
        the answer where the context was restored, and more within it where reasoning was closed.
        """
        longer = len(answer.text) - len(answer.rendering.text)
        blocks = answer.rendering.blocks
        is_closed = answer.note == "closed-reasoning"
        if answer.note == "context-restored":
            blocks = [(start + longer, end + longer) for start, end in blocks]
            longer = 0
        turn_start = answer.header_end if is_closed else answer.prompt_end
        within = [(start, end) for start, end in blocks if end > max(start, turn_start)]
        first_start, last_end = (within[0][0], within[-1][1]) if within else (0, 0)
        start = answer.prompt_end if is_closed else max(answer.prompt_end, first_start)
        return start, min(trained_end, last_end + longer)

    def _reasoning_end(self, i: int, answer: _Answer, turn_end: int) -> int:
        """Return where content or tool calls of message i begin in its text, behind its reasoning
        and what closes that.
        """
        message = self.messages[i]
        content = message["content"] or ""
        in_content = REASONING.fullmatch(content)
        answer_start = in_content.start(2) if in_content else 0
        probe = content[:answer_start] + ANSWER + content[answer_start:]
        try:
            rendered = self._render(i, message | {"content": probe}).text
        except RowError:  # some refuse content beside reasoning and tool calls
            rendered = ""
        turn = answer.text[answer.prompt_end :]
        if ANSWER in rendered and rendered.replace(ANSWER, "").endswith(turn):
            return rendered.index(ANSWER) + len(answer.text) - len(rendered) + len(ANSWER)
        # no content, or it is trimmed: behind the reasoning, its closing tag and line ends
        reasoning = without_reasoning(message)[0]
        text = answer.text
        found = text.find(reasoning, answer.prompt_end, turn_end)
        at = max(answer.prompt_end, found + len(reasoning))
        at = max(at, text.find("</think>", at, turn_end) + len("</think>"))
        return turn_end - len(text[at:turn_end].lstrip("\n"))

    # ------------------------------------------------------------ what the message says is there

    def _check_answer(self, i: int, text: str) -> None:
        """Raise RowError unless a text holds all that assistant message i says."""
        if not (lacking := self._lacking(i, text)):
            return
        what, source = lacking
        reason = "text-lost"
        remedy = "write it as the template does, or use another one"
        if what == "reasoning":
            reason = "reasoning-lost"
            remedy = "see --data.template-kwargs, set --data.reasoning mask, or take it out"
            if self.mask == "all":  # the others can split by turn
                remedy = "set --data.mask assistant"
        raise RowError(
            reason,
            f"message {i + 1}: the chat template leaves out or changes its {what} "
            f"({source.strip()[:40]!r}); {remedy}",
        )

    def _check_part(self, i: int, part: str, reason: str, fault: str) -> None:
        """Raise RowError unless a part of a text holds all that assistant message i says.

        Args:
            fault: what the template does else, with `{}` for what the part lacks.
        """
        if lacking := self._lacking(i, part):
            raise RowError(reason, f"message {i + 1}: the chat template {fault.format(lacking[0])}")

    def _lacking(self, i: int, text: str) -> tuple[str, str] | None:
        """Return the first thing that assistant message i says and a text lacks.

        Returns:
            What it is (reasoning, content or tool call) and the source string; None where the text
            lacks nothing.
        """
        reasoning, bare = without_reasoning(self.messages[i])
        if not self.masks_reasoning and not contains(text, reasoning):
            return "reasoning", reasoning
        content = bare["content"] or ""
        if not contains(text, content):
            return "content", content
        for call in bare.get("tool_calls") or ():
            function = call["function"]
            for source in leaves([function["name"], function["arguments"]]):
                if not contains(text, source):
                    return "tool call", source
        return None


def _is_plain(message: Message) -> bool:
    """Return whether a message has nothing but contents that a template need not look into."""
    content = message["content"]
    return content is not None and "think>" not in content and message.keys() <= PLAIN_KEYS


def _has_reasoning(message: Message, text: str, header_end: int) -> bool:
    """Return whether an answer has reasoning, or its text a block for it behind the header."""
    reasoning = without_reasoning(message)[0]
    return bool(reasoning or OPENING_TAG.match(text, header_end))


def _with_closed_reasoning(
    prompt: str, opened: re.Match[str], reasoning: str, rendering: Rendering
) -> _Answer:
    """Return an answer behind a prompt that opens a reasoning block, which the template never
    writes: the text continues the prompt with the reasoning (or none) and the end of its block.

    Args:
        opened: the opening tag in the prompt.
        rendering: of the answer without reasoning.
    """
    header_end = opened.start()
    closing = "\n</think>\n\n" if "\n" in opened[1] else "</think>"
    block = prompt + reasoning + closing
    rest = EMPTY_BLOCK.sub("", rendering.text[header_end:], count=1)
    return _Answer(
        text=block + rest,
        prompt_end=len(prompt),
        header_end=header_end,
        rendering=rendering,
        note="closed-reasoning",
        reasoning_end=len(block),
    )


def _texts_with(turns: Sequence[Turn], whole: TrainedText) -> list[TrainedText]:
    """Return texts that hold the turns, each turn in one of them.

    The text of the whole conversation is taken if it holds the last turn. Else, and for the turns
    that it does not hold, the text is that of the last of these turns.
    """
    texts = []
    remaining = list(turns)
    text, rendering, stop = whole.text, whole.rendering, whole.stop
    while remaining:
        last = remaining[-1]
        if not _holds(text, last):
            text, rendering, stop = last.text, last.rendering, last.index + 1
        held = [turn for turn in remaining if _holds(text, turn)]
        remaining = [turn for turn in remaining if not _holds(text, turn)]
        texts.append(TrainedText(text, held, rendering, stop))
    return texts


def _holds(text: str, turn: Turn) -> bool:
    """Return whether a text begins as the text of a turn, through the end of that turn."""
    return text.startswith(turn.text[: turn.trained_end])
