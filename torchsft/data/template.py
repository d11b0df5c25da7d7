"""From an example to tokens and loss weights, by the model's own chat template and tokenizer.

`turns.py` says which characters of which text are trained, and why. Here the text is tokenised
once. A token is trained if it begins in a trained span. None may reach into it from before: where
the tokenizer joins the end of the prompt with the beginning of the answer, the text is tokenised in
pieces, as inference does.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from torchsft.config import RESERVED, InputError
from torchsft.data.formats import Conversation, Example, Text, Tokens
from torchsft.data.rendering import AddedTokens, ChatTemplate, Given, without_reasoning
from torchsft.data.rows import RowError
from torchsft.data.turns import Mask, Part, TurnFinder

KNOWN_VARIABLES = 64  # sets of variables of rows whose renderings are remembered


class Span(NamedTuple):
    """Characters of a turn: behind the prompt, behind what is not trained of it, behind its end;
    and its weight.
    """

    begin: int
    start: int
    end: int
    weight: float


class _Marked(NamedTuple):
    """A text to tokenise, with what is trained of it. `plain`: a text of no chat template, which
    gets the tokenizer's BOS. `weight`: of what stands outside of the spans, with the mask `all`.
    """

    text: str
    spans: list[Span]
    plain: bool = False
    weight: float = 1.0


class _Texts(NamedTuple):
    """What to tokenise for an example, and what is to be told of it."""

    marked: list[_Marked]
    notes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Sample:
    """One tokenised conversation. Accepts any sequences and keeps arrays, which take a fifth of the
    memory of lists.

    Attributes:
        id: `<file name>:<line number>`.
        tokens: int32 [n], n at least 1.
        weights: float32 [n], loss weight of token i as a *target*, that is of predicting it from
            the tokens before it. The first one is 0, as nothing comes before it.
    """

    id: str
    tokens: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, dtype=np.int32)
        self.weights = np.asarray(self.weights, dtype=np.float32)


class Encoded(NamedTuple):
    """Samples of one example (tokens int32 [n], weights float32 [n] as in `Sample`), of any length,
    and what happened.

    Attributes:
        samples: several where the conversation is split by turn, in the order of their last turns.
        notes: codes that are counted. split-by-turn: several samples. closed-reasoning,
            context-restored: a text was put together, see `turns.py`. context-lost: the template
            leaves out some context, and the row is kept. unread-variable: the row names a variable
            that the template does not read. unread-name: nor does it write the name of a message.
        ends: the token that ends each trained turn, in any order.
        kept: in words, why a row with a fault is kept nevertheless.
    """

    samples: list[tuple[np.ndarray, np.ndarray]]
    notes: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()


class ChatTokenizer:
    """Turns examples into tokens and weights. Safe to keep: it works on a copy of the tokenizer's
    backend.

    Templates are chosen for each row as `apply_chat_template` does: of several ones, "tool_use" for
    a row with tools, else "default".

    Args:
        mask: assistant: every assistant message; last-turn: those after the last user message that
            has an answer; all: every token but the first.
        reasoning: mask: reasoning, through its closing tag, is context only.
        template_kwargs: further variables of the chat template; those of a row win over them.
        on_lost_context: keep: a row of whose context the template leaves something out is kept,
            with a note; else refused.
        eos_ids: ids of the tokens at which servers stop, see `tokenizer.eos_ids`.

    Raises:
        InputError: a slow tokenizer, which knows not where in the text a token comes from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask: Mask = "assistant",
        reasoning: str = "train",
        template_kwargs: Mapping[str, Any] | None = None,
        on_lost_context: str = "refuse",
        eos_ids: Sequence[int] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} is a slow tokenizer; give a directory "
                f"with a tokenizer.json"
            )
        self.mask, self.masks_reasoning = mask, reasoning == "mask"
        self.keeps_lost_context = on_lost_context == "keep"
        self.templates = templates_of(tokenizer)
        self.variables = {**tokenizer.special_tokens_map, **(template_kwargs or {})}
        self.added = _added_tokens(tokenizer, eos_ids)
        self.eos_ids = tuple(eos_ids)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token
        self.adds_bos = self.bos is not None and tokenizer("").input_ids[:1] == [self.bos]
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # it would take the spaces out of the offsets (ByteLevel's trim_offsets)
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.finders: dict[tuple[str, str], TurnFinder] = {}

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """The samples of each example, or why it cannot be used; an error names the example by its
        id.
        """
        found = [self._texts(example) for example in examples]
        texts = [marked.text for one in found if isinstance(one, _Texts) for marked in one.marked]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        for place, one in enumerate(found):
            if not isinstance(one, _Texts):
                continue
            own = [(marked, next(encodings)) for marked in one.marked]
            try:
                made = [self._sample(*each) for each in own]
            except RowError as error:
                found[place] = RowError(examples[place].id, error.reason, error.text)
                continue
            samples = [(ids, weights) for ids, weights, _ in made]
            ends = tuple(end for *_, ended in made for end in ended)
            found[place] = Encoded(samples, one.notes, ends, one.kept)
        return found

    def _sample(
        self, marked: _Marked, encoding: Encoding
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens and weights, and what ends trained turns.

        A text without chat template has the BOS that the tokenizer adds, exactly once. A rendered
        conversation has the one that its template writes, as in `apply_chat_template`.
        """
        text, spans, plain, outside = marked
        pieces = [(0, 0, encoding)]  # character and token with which it begins
        tokens = {at: _token_at(pieces, at) for at in {at for span in spans for at in span[:3]}}
        if self.mask != "all" and any(tokens[span.begin][1] for span in spans):
            pieces = self._in_pieces(
                text, [0, *(span.begin for span in spans), len(text)], encoding
            )
            tokens = {at: _token_at(pieces, at) for at in tokens}
        ids = np.array(
            encoding.ids if len(pieces) == 1 else [i for _, _, e in pieces for i in e.ids],
            dtype=np.int32,
        )
        weights = np.full(len(ids), outside if self.mask == "all" else 0.0, dtype=np.float32)
        for begin, start, end, weight in spans:
            weights[tokens[begin][0] : tokens[start][0]] = 0.0
            weights[tokens[start][0] : tokens[end][0]] = weight
        ends = [
            int(ids[tokens[end][0] - 1])
            for _, start, end, weight in spans
            if weight and start < end
        ]
        if self.mask == "all" and not plain:  # turns are not located one by one
            closing = {finder.template.closing for finder in self.finders.values()} - {""}
            ends += [
                i
                for i in map(self.backend.token_to_id, sorted(closing))
                if i is not None and i in ids
            ]
        if self.bos is not None:
            if len(ids) > 1 and ids[0] == ids[1] == self.bos:
                problem = (
                    f"the text begins with two BOS tokens (id {self.bos}); take one out of the "
                    f"chat template"
                )
                raise RowError("", "double-bos", problem)
            if plain and self.adds_bos and (not len(ids) or ids[0] != self.bos):
                ids, weights = np.insert(ids, 0, self.bos), np.insert(weights, 0, 0.0)
        weights[:1] = 0.0  # nothing comes before it
        return ids, weights, ends

    def _in_pieces(
        self, text: str, edges: list[int], whole: Encoding
    ) -> list[tuple[int, int, Encoding]]:
        """The text with no token across an edge; must decode to what the whole does."""
        encodings = self.backend.encode_batch(
            [text[a:b] for a, b in itertools.pairwise(edges)], add_special_tokens=False
        )
        ids = [i for encoding in encodings for i in encoding.ids]
        if self.backend.decode(ids, skip_special_tokens=False) != self.backend.decode(
            whole.ids, skip_special_tokens=False
        ):
            problem = (
                "a token reaches from the prompt into an assistant turn, and this tokenizer "
                "changes the text when it is"
            )
            raise RowError(
                "",
                "straddling-token",
                problem + " split there; change the whitespace there or the chat template",
            )
        return list(
            zip(
                edges, itertools.accumulate(map(len, encodings), initial=0), encodings, strict=False
            )
        )

    def _texts(self, example: Example) -> _Texts | Encoded | RowError:
        """What to tokenise for an example."""
        if isinstance(example, Tokens):
            tokens = np.array(example.tokens, dtype=np.int32)
            weights = np.array(example.weights, dtype=np.float32)
            weights[list(example.starts)] = 0.0  # nothing comes before them
            edges = itertools.pairwise([*example.starts, len(tokens)])
            samples = [(tokens[start:end], weights[start:end]) for start, end in edges]
            return Encoded(
                samples, ends=tuple(end for sample in samples for end in self._ends_of(*sample))
            )
        try:
            return self._plain(example) if isinstance(example, Text) else self._rendered(example)
        except RowError as error:
            return RowError(example.id, error.reason, error.text)

    def _ends_of(self, tokens: np.ndarray, weights: np.ndarray) -> list[int]:
        """The tokens with which stretches of trained tokens end, in a row that is tokens already,
        if they end turns: the row may be cut anywhere.
        """
        trained = np.append(weights > 0, False)
        last = tokens[np.flatnonzero(trained[:-1] & ~trained[1:])]
        return last[np.isin(last, self._turn_ends)].tolist()

    @cached_property
    def _turn_ends(self) -> list[int]:
        """Ids of the tokens that end turns as far as is known without a conversation: eos tokens,
        and the template's.
        """
        template = ChatTemplate(self.templates["default"], self.variables, self.added)
        named = {self.eos, template.closing, *template.openers.values()} - {None, ""}
        ids = [self.backend.token_to_id(token) for token in named]
        return sorted({*self.eos_ids, *(i for i in ids if i is not None)})

    def _plain(self, example: Text) -> _Texts:
        if not self.eos:
            raise RowError(
                "",
                "no-end-of-turn",
                "the tokenizer has no eos_token to end the text with; name one",
            )
        begin, text = len(example.prompt), example.prompt + example.completion
        text += "" if text.endswith(self.eos) else self.eos
        span = Span(begin, begin, len(text), example.weight)
        return _Texts([_Marked(text, [span], plain=True, weight=example.weight)])

    def _rendered(self, example: Conversation) -> _Texts:
        finder = self._finder(example)
        weights = self._weights(example)
        given = Given(example.tools, example.documents)
        parts = finder.parts(example.messages, given, weights)
        notes = ("split-by-turn",) if len(parts) > 1 else ()
        notes += tuple(sorted({turn.note for part in parts for turn in part.turns} - {""}))
        if example.template_kwargs.keys() - finder.template.reads:
            notes += ("unread-variable",)
        names = {message["name"] for message in example.messages if message.get("name")}
        if any(name not in part.text for part in parts[-1:] for name in names):
            notes += ("unread-name",)
        kept = self._lost(parts)
        if kept and not self.keeps_lost_context:
            remedy = (
                "use a template that writes it, take it out of the row, or set "
                "--data.on-lost-context keep"
            )
            raise RowError(
                "",
                "context-lost",
                f"{kept[0]}, so that the answer would be trained without it; {remedy}",
            )
        notes += ("context-lost",) if kept else ()
        marked = [
            _Marked(
                part.text,
                [Span(*t[1:4], weights[t.index]) for t in part.turns],
                weight=example.row_weight,
            )
            for part in parts
        ]
        return _Texts(marked, notes, kept)

    def _lost(self, parts: list[Part]) -> tuple[str, ...]:
        """In words, what the texts lack of their context, each once."""
        found = dict.fromkeys(lost for part in parts for lost in part.lost)
        places = [
            (f"message {lost.index + 1}: " if lost.index is not None else "", lost.what)
            for lost in found
        ]
        return tuple(f"{place}the chat template leaves out {what}" for place, what in places)

    def _finder(self, example: Conversation) -> TurnFinder:
        """For the template and the variables of a row."""
        name = "tool_use" if example.tools and "tool_use" in self.templates else "default"
        variables = example.template_kwargs
        key = (name, json.dumps(variables, sort_keys=True, default=repr) if variables else "")
        if key not in self.finders:
            if reserved := sorted(variables.keys() & RESERVED):
                problem = (
                    f"the row's variables of the chat template have {reserved[0]!r}, which "
                    f"rendering itself gives"
                )
                raise RowError("", "template-kwargs", f"{problem}; remove it")
            if len(self.finders) >= KNOWN_VARIABLES:
                self.finders.clear()
            template = ChatTemplate(
                self.templates[name], {**self.variables, **variables}, self.added
            )
            self.finders[key] = TurnFinder(template, self.mask, self.masks_reasoning)
        return self.finders[key]

    def _weights(self, example: Conversation) -> dict[int, float]:
        """The messages to locate, with their weights: those that are trained; with the mask `all`,
        those that differ.
        """
        given = {i: weight for i, weight in enumerate(example.weights) if weight is not None}
        roles = [message["role"] for message in example.messages]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        if self.mask == "all":
            hidden = {
                i: example.row_weight
                for i in answers
                if self.masks_reasoning and without_reasoning(example.messages[i])[0]
            }
            return dict(
                sorted(
                    (
                        hidden
                        | {i: weight for i, weight in given.items() if weight != example.row_weight}
                    ).items()
                )
            )
        if self.mask == "last-turn":
            asked = max(
                (i for i, role in enumerate(roles[: max(answers, default=0)]) if role == "user"),
                default=-1,
            )
            answers = [i for i in answers if i > asked]
        return {i: given.get(i, 1.0) for i in answers if given.get(i) != 0.0}


def templates_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates of a tokenizer by their names; a single one is the default. Raises
    InputError: no default.
    """
    templates = tokenizer.chat_template
    templates = (
        templates if isinstance(templates, dict) else {"default": tokenizer.get_chat_template()}
    )
    if "default" not in templates:
        names = ", ".join(sorted(templates))
        raise InputError(
            f"the tokenizer has chat templates named {names}, but none named default; "
            f"name one of them so"
        )
    return templates


def _added_tokens(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> AddedTokens:
    added = tokenizer.added_tokens_decoder
    special = [token.content for token in added.values() if token.special]
    others = [token.content for token in added.values() if not token.special]
    if tokenizer.eos_token and tokenizer.eos_token not in special:
        special.append(tokenizer.eos_token)
    stops = [added[i].content for i in eos_ids if i in added]
    return AddedTokens(tuple(special), tuple(others), tuple(stops))


def _token_at(pieces: list[tuple[int, int, Encoding]], at: int) -> tuple[int, bool]:
    """The first token that begins at character `at` or later, and whether the one before it reaches
    behind `at`.
    """
    first, tokens, encoding = (
        pieces[0] if len(pieces) == 1 else next(p for p in reversed(pieces) if p[0] <= at)
    )
    token = encoding.char_to_token(at - first)
    if token is None:  # the end of the text, or a character that no token has
        ended = encoding.char_to_token(at - first - 1) == len(encoding) - 1
        return tokens + (
            len(encoding) if ended else sum(start < at - first for start, _ in encoding.offsets)
        ), False
    before = encoding.token_to_chars(token)[0] < at - first
    return tokens + token + before, before
