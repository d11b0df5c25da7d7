"""From an example to tokens and loss weights, by the model's own chat template and tokenizer.

`turns.py` says which characters of which text are trained, and why. Here the text is tokenised
once. A token is trained if it begins in a trained span. None may reach into it from before: where
the tokenizer joins the end of the prompt with the beginning of the answer, the text is tokenised in
pieces, as inference does.
"""

import itertools
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from torchsft.config import InputError
from torchsft.data.formats import Conversation, Example, Text, Tokens
from torchsft.data.patterns import TrainedText, Turn
from torchsft.data.rendering import AddedTokens, ChatTemplate, Extras, without_reasoning
from torchsft.data.rows import RowError, Strings
from torchsft.data.turns import Mask, TurnFinder

KNOWN_VARIABLES = 64  # sets of variables of rows whose renderings are remembered


@dataclass(slots=True)
class _Rendered:
    """What to tokenise for an example; notes and kept as in `Encoded`.

    Attributes:
        weight: of what stands outside of the turns, with the mask `all`.
        weights: of each turn, by its index.
        is_plain: whether the text is of no chat template, and gets the tokenizer's BOS.
    """

    texts: list[TrainedText]
    weight: float
    weights: Mapping[int, float]
    is_plain: bool = False
    notes: Strings = ()
    kept: Strings = ()


@dataclass(slots=True)
class _TextTokens:
    """The tokens of a text.

    Attributes:
        offsets: where each of them begins and ends, in characters of the text.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]

    def first_from(self, character: int) -> int:
        """Return which is the first token that begins at a character or behind it."""
        return bisect_left(self.offsets, (character,))

    def is_straddled(self, character: int) -> bool:
        """Return whether a token begins before a character and reaches behind it."""
        first = self.first_from(character)
        return first > 0 and self.offsets[first - 1][1] > character


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


class WeightedTokens(NamedTuple):
    """Tokens int32 [n] and weights float32 [n] as in `Sample`, of any length."""

    tokens: np.ndarray
    weights: np.ndarray


@dataclass(slots=True)
class Encoded:
    """Samples of one example, and what happened.

    Attributes:
        samples: several where the conversation is split by turn, in the order of their last turns.
        notes: codes that are counted. split-by-turn: several samples. closed-reasoning,
            context-restored: a text was put together, see `turns.py`. context-lost: the template
            leaves out some context, and the row is kept. unread-variable: the row names a variable
            that the template does not read. unread-name: nor does it write the name of a message.
        ends: the token that ends each trained turn, in any order.
        kept: in words, why a row with a fault is kept nevertheless.
    """

    samples: list[WeightedTokens]
    notes: Strings = ()
    ends: tuple[int, ...] = ()
    kept: Strings = ()


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
        self.mask = mask
        self.masks_reasoning = reasoning == "mask"
        self.keeps_lost_context = on_lost_context == "keep"
        self.templates = templates_of(tokenizer)
        self.variables = {**tokenizer.special_tokens_map, **(template_kwargs or {})}
        self.added_tokens = _added_tokens(tokenizer, eos_ids)
        self.eos_ids = tuple(eos_ids)
        self.eos = tokenizer.eos_token
        self.bos_id = tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("").input_ids[:1] == [self.bos_id]
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # it would take the spaces out of the offsets (ByteLevel's trim_offsets)
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()
        # by the template's name and the row's own variables
        self.finders: dict[tuple[str, str], TurnFinder] = {}

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """Tokenise examples.

        Returns:
            The samples of each example, or why it cannot be used; an error names the example by its
            id.
        """
        prepared = [self._prepare(example) for example in examples]
        rendered = [found for found in prepared if isinstance(found, _Rendered)]
        texts = [text.text for found in rendered for text in found.texts]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        results = []
        for example, found in zip(examples, prepared, strict=True):
            if isinstance(found, _Rendered):
                own_encodings = [next(encodings) for _ in found.texts]
                try:
                    found = self._encoded(found, own_encodings)
                except RowError as error:
                    found = error.at(example.id)
            results.append(found)
        return results

    # ------------------------------------------------------------ from examples to texts

    def _prepare(self, example: Example) -> _Rendered | Encoded | RowError:
        """Return what to tokenise for an example; its samples, where it is tokens already."""
        if isinstance(example, Tokens):
            return self._pretokenised(example)
        try:
            if isinstance(example, Text):
                return self._plain(example)
            return self._conversation(example)
        except RowError as error:
            return error.at(example.id)

    def _pretokenised(self, example: Tokens) -> Encoded:
        """Return the documents of a row that is tokens already, each of them as a sample."""
        tokens = np.array(example.tokens, dtype=np.int32)
        weights = np.array(example.weights, dtype=np.float32)
        weights[list(example.starts)] = 0.0  # nothing comes before them
        samples = []
        ends = []
        for start, end in itertools.pairwise([*example.starts, len(tokens)]):
            sample = WeightedTokens(tokens[start:end], weights[start:end])
            samples.append(sample)
            ends += self._turn_ends_in(sample)
        return Encoded(samples, ends=tuple(ends))

    def _turn_ends_in(self, sample: WeightedTokens) -> list[int]:
        """Return the tokens with which trained stretches of a pre-tokenised row end, if they end
        turns: the row may be cut anywhere.
        """
        trained = np.append(sample.weights > 0, False)
        is_last = trained[:-1] & ~trained[1:]
        last_tokens = sample.tokens[is_last]
        return last_tokens[np.isin(last_tokens, self._turn_end_ids)].tolist()

    @cached_property
    def _turn_end_ids(self) -> list[int]:
        """Ids of the tokens that end turns as far as is known without a conversation: eos tokens,
        and the template's.
        """
        template = self._template("default", {})
        texts = {self.eos, template.closing, *template.openers.values()} - {None, ""}
        return sorted({*self.eos_ids, *self._ids_of(texts)})

    def _ids_of(self, texts: Iterable[str]) -> set[int]:
        """Return the ids of the texts that are tokens."""
        return {self.backend.token_to_id(text) for text in texts} - {None}

    def _plain(self, example: Text) -> _Rendered:
        """Return a text without chat template, which ends with the eos token."""
        if not self.eos:
            raise RowError(
                "no-end-of-turn",
                "the tokenizer has no eos_token to end the text with; name one",
            )
        text = example.prompt + example.completion
        if not text.endswith(self.eos):
            text += self.eos
        start = len(example.prompt)
        trained = TrainedText(text, [Turn(0, start, start, len(text))])
        return _Rendered([trained], example.weight, {0: example.weight}, is_plain=True)

    def _conversation(self, example: Conversation) -> _Rendered:
        """Return the texts of a conversation, which is rendered by its chat template.

        Raises:
            RowError: a message cannot be trained, or context is lost.
        """
        finder = self._finder(example)
        weights = self._message_weights(example)
        extras = Extras(example.tools, example.documents)
        texts = finder.trained_texts(example.messages, extras, list(weights))
        notes = ["split-by-turn"] if len(texts) > 1 else []
        notes += sorted({turn.note for text in texts for turn in text.turns} - {""})
        if example.template_kwargs.keys() - finder.template.reads:
            notes.append("unread-variable")
        names = {message["name"] for message in example.messages if message.get("name")}
        if texts and any(name not in texts[-1].text for name in names):
            notes.append("unread-name")
        lost = _missing_context(texts)
        if lost and not self.keeps_lost_context:
            raise RowError(
                "context-lost",
                f"{lost[0]}, so that the answer would be trained without it; use a template that "
                f"writes it, take it out of the row, or set --data.on-lost-context keep",
            )
        if lost:
            notes.append("context-lost")
        return _Rendered(texts, example.row_weight, weights, notes=tuple(notes), kept=lost)

    def _finder(self, example: Conversation) -> TurnFinder:
        """Return the finder for the template and the variables of a row."""
        name = "tool_use" if example.tools and "tool_use" in self.templates else "default"
        variables = example.template_kwargs
        written = json.dumps(variables, sort_keys=True, default=repr) if variables else ""
        key = (name, written)
        if key not in self.finders:
            if len(self.finders) >= KNOWN_VARIABLES:
                self.finders.clear()
            template = self._template(name, variables)
            self.finders[key] = TurnFinder(template, self.mask, self.masks_reasoning)
        return self.finders[key]

    def _template(self, name: str, variables: Mapping[str, Any]) -> ChatTemplate:
        """Return a template with the row's own variables."""
        variables = {**self.variables, **variables}
        return ChatTemplate(self.templates[name], variables, self.added_tokens)

    def _message_weights(self, example: Conversation) -> dict[int, float]:
        """Return the messages to locate, with their weights: those that are trained; with the mask
        `all`, those that differ from the rest.
        """
        given = {i: weight for i, weight in enumerate(example.weights) if weight is not None}
        roles = [message["role"] for message in example.messages]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        if self.mask == "all":
            return self._weights_in_all(example, answers, given)
        if self.mask == "last-turn":
            last_answer = max(answers, default=0)
            questions = [i for i, role in enumerate(roles[:last_answer]) if role == "user"]
            last_question = max(questions, default=-1)
            answers = [i for i in answers if i > last_question]
        return {i: given.get(i, 1.0) for i in answers if given.get(i) != 0.0}

    def _weights_in_all(
        self, example: Conversation, answers: Sequence[int], given: Mapping[int, float]
    ) -> dict[int, float]:
        """Return the messages that have another weight than the rest of the row, or reasoning that
        is masked, with their weights.

        Args:
            answers: indices of assistant messages.
            given: weights that the row gives to messages.
        """
        reasoned = [i for i in answers if without_reasoning(example.messages[i])[0]]
        weights = dict.fromkeys(reasoned if self.masks_reasoning else (), example.row_weight)
        weights |= {i: weight for i, weight in given.items() if weight != example.row_weight}
        return dict(sorted(weights.items()))

    # ------------------------------------------------------------ from texts to tokens

    def _encoded(self, rendered: _Rendered, encodings: Sequence[Encoding]) -> Encoded:
        """Return the samples of an example, from the encodings of its texts."""
        ends = []
        samples = [
            self._weighted_tokens(rendered, text, encoding, ends)
            for text, encoding in zip(rendered.texts, encodings, strict=True)
        ]
        return Encoded(samples, rendered.notes, tuple(ends), rendered.kept)

    def _weighted_tokens(
        self, rendered: _Rendered, text: TrainedText, encoding: Encoding, ends: list[int]
    ) -> WeightedTokens:
        """Return tokens and weights of a text.

        A text without chat template has the BOS that the tokenizer adds, exactly once. A rendered
        conversation has the one that its template writes, as in `apply_chat_template`.

        Args:
            rendered: what the text belongs to.
            text: it, and what is trained of it.
            encoding: of the text as a whole; the text is tokenised again, in pieces, where one of
                its tokens would reach from a prompt into a turn.
            ends: the tokens that end trained turns are added to it.

        Raises:
            RowError: double-bos, straddling-token.
        """
        trains_all = self.mask == "all"
        tokens = _TextTokens(encoding.ids, encoding.offsets)
        prompt_ends = [turn.prompt_end for turn in text.turns]
        if not trains_all and any(map(tokens.is_straddled, prompt_ends)):
            tokens = self._in_pieces(text.text, [0, *prompt_ends, len(text.text)], tokens)
        ids = np.array(tokens.ids, dtype=np.int32)
        weights = np.full(len(ids), rendered.weight if trains_all else 0.0, dtype=np.float32)
        for turn in text.turns:
            start = tokens.first_from(turn.trained_start)
            end = tokens.first_from(turn.trained_end)
            weight = rendered.weights[turn.index]
            weights[tokens.first_from(turn.prompt_end) : start] = 0.0
            weights[start:end] = weight
            if weight and turn.trained_start < turn.trained_end:
                ends.append(tokens.ids[end - 1])
        if trains_all and not rendered.is_plain:  # turns are not located one by one
            closing = {finder.template.closing for finder in self.finders.values()}
            ends += sorted(self._ids_of(closing).intersection(tokens.ids))
        ids, weights = self._with_bos(ids, weights, rendered.is_plain)
        weights[:1] = 0.0  # nothing comes before it
        return WeightedTokens(ids, weights)

    def _with_bos(
        self, ids: np.ndarray, weights: np.ndarray, is_plain: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a text's tokens and weights with the BOS that it needs. Raises RowError: it has
        two.
        """
        if self.bos_id is None:
            return ids, weights
        if len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            raise RowError(
                "double-bos",
                f"the text begins with two BOS tokens (id {self.bos_id}); take one out of the chat "
                f"template",
            )
        has_bos = len(ids) > 0 and ids[0] == self.bos_id
        if is_plain and self.adds_bos and not has_bos:
            return np.insert(ids, 0, self.bos_id), np.insert(weights, 0, 0.0)
        return ids, weights

    def _in_pieces(self, text: str, edges: Sequence[int], whole: _TextTokens) -> _TextTokens:
        """Tokenise a text with no token across an edge.

        Raises:
            RowError: the pieces decode to something else than the whole text does.
        """
        found = _TextTokens([], [])
        for first, end in itertools.pairwise(edges):
            piece = self.backend.encode(text[first:end], add_special_tokens=False)
            found.ids += piece.ids
            found.offsets += [(first + start, first + stop) for start, stop in piece.offsets]
        decoded = self.backend.decode(found.ids, skip_special_tokens=False)
        if decoded != self.backend.decode(whole.ids, skip_special_tokens=False):
            raise RowError(
                "straddling-token",
                "a token reaches from the prompt into an assistant turn, and this tokenizer "
                "changes the text when it is split there; change the whitespace there or the chat "
                "template",
            )
        return found


def templates_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the chat templates of a tokenizer by their names; a single one is the default."""
    templates = tokenizer.chat_template
    return templates if isinstance(templates, dict) else {"default": tokenizer.get_chat_template()}


def _added_tokens(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> AddedTokens:
    """Return the texts of the added tokens of a tokenizer.

    Args:
        eos_ids: ids of the tokens at which servers stop.
    """
    added = tokenizer.added_tokens_decoder
    special = [token.content for token in added.values() if token.special]
    others = [token.content for token in added.values() if not token.special]
    if tokenizer.eos_token and tokenizer.eos_token not in special:
        special.append(tokenizer.eos_token)
    stops = [added[i].content for i in eos_ids if i in added]
    return AddedTokens(tuple(special), tuple(others), tuple(stops))


def _missing_context(texts: Sequence[TrainedText]) -> Strings:
    """Return in words what texts lack of their context, each once."""
    sentences = []
    for missing in dict.fromkeys(item for text in texts for item in text.missing):
        place = "" if missing.index is None else f"message {missing.index + 1}: "
        sentences.append(f"{place}the chat template leaves out {missing.what}")
    return tuple(sentences)
