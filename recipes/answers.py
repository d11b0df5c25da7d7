"""Answers to held-out conversations, generated greedily before and after training (--eval.answers),
and how many are right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from torchsft.data.template import Sample
from torchsft.metrics.logger import Waiting
from torchsft.metrics.summary import Answers
from torchsft.parallel.pipeline import OneStage, Pipeline
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

SHOWN = 4  # answers on the console


def answer(trainer: Trainer, when: str) -> Answers:
    """Generate greedy answers to the run's evaluation samples; they are written to
    OUTPUT/answers-WHEN.jsonl, and a few are shown.
    """
    config, tokenizer = trainer.config, trainer.run_data.tokenizer
    stops = frozenset(trainer.stop_tokens())
    samples = trainer.run_data.eval_samples
    prompts = [(sample.id, *turn) for sample in samples for turn in answer_prompts(sample)]
    answers = greedy_answers(
        trainer.pipeline,
        prompts,
        trainer.world,
        stops=stops,
        max_new_tokens=config.eval.max_new_tokens,
        max_tokens=config.data.seq_len * config.train.micro_batch_size,
        label=f"answers {when} training" if config.metrics.progress else "",
    )
    correct = sum(answer.correct for answer in answers)
    ended = sum(answer.ended(stops) for answer in answers)
    if trainer.output.log:
        path = trainer.output.directory / f"answers-{when}.jsonl"
        with trainer.output.may_fail():
            _write(answers, path, tokenizer, stops)
        share = f"{100 * correct / len(answers):.1f} %"
        right = f"{correct} of {len(answers)} held-out answers are exactly right ({share})"
        lines = [f"{when} training: {right}, for example"]
        lines += [answer.shown(tokenizer) for answer in answers[:SHOWN]]
        trainer.output.log.message("\n".join(lines))
    return Answers(correct, ended, len(answers))


def _write(
    answers: Sequence[Answer],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    stops: Collection[int],
) -> None:
    """Write one JSON object a line for each answer: token ids, their texts, and how it came out."""
    with open(path, "w", encoding="utf-8") as file:
        for answer in answers:
            line = dataclasses.asdict(answer)
            line |= {"correct": answer.correct, "ended": answer.ended(stops)}
            for part in ("prompt", "reference", "generated"):
                line[f"{part}_text"] = tokenizer.decode(getattr(answer, part))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def answer_prompts(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """For each contiguous run of supervised tokens: the tokens before it, and the run with its
    end-of-turn token.
    """
    trained = np.concatenate([[False], sample.weights > 0, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    tokens = sample.tokens.tolist()
    return [
        (tokens[:start], tokens[start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


@dataclass
class Answer:
    """One assistant turn: what precedes it, the reference, and what the model says. Token ids,
    end-of-turn included.
    """

    id: str
    prompt: list[int]
    reference: list[int]
    generated: list[int]

    @property
    def correct(self) -> bool:
        """True where the generated turn equals the reference, token for token."""
        return self.generated == self.reference

    def ended(self, stops: Collection[int]) -> bool:
        """Whether the last token is one of those at which a server stops."""
        return bool(self.generated) and self.generated[-1] in stops

    def shown(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a line of text: the end of its prompt, what was generated, and the reference where
        it differs.
        """
        question = tokenizer.decode(self.prompt)[-60:].replace("\n", " ")
        line = f"  ...{question!r} -> {tokenizer.decode(self.generated)!r}"
        if self.correct:
            return line
        return f"{line} (reference {tokenizer.decode(self.reference)!r})"


@torch.no_grad()
def greedy_answers(
    pipeline: Pipeline | OneStage,
    prompts: Sequence[tuple[str, list[int], list[int]]],
    world: World,
    *,
    stops: Collection[int],
    max_new_tokens: int,
    max_tokens: int,
    label: str = "",
) -> list[Answer]:
    """Generate the answer to each (id, prompt, reference) greedily, until a token at which a server
    would stop too.

    The prompts are spread over the data ranks; all ranks must call this with the same arguments,
    and all get all answers. There is no key/value cache: each new token is a forward pass over
    packed prompts, meant for a held-out sample.

    Args:
        stops: ids of tokens that end an answer.
        max_new_tokens: longest answer.
        max_tokens: tokens of one forward pass; also where an answer ends that has not ended by
            then. References must fit.
        label: what rank 0 shows progress under; empty: it shows none.
    """
    limits = Limits(frozenset(stops), max_new_tokens, max_tokens)
    of_this_rank = prompts[world.data_rank :: world.data_size]
    mine = [Answer(*prompt, generated=[]) for prompt in of_this_rank]
    groups = _groups(mine, limits)
    most_groups = torch.tensor(len(groups), device=world.device)
    dist.all_reduce(most_groups, op=dist.ReduceOp.MAX)
    while len(groups) < int(most_groups):
        groups.append([])
    with Waiting(label, len(prompts), "answers", shown=bool(label) and world.is_main) as waiting:
        done_before = 0  # on this rank, in earlier groups
        for group in groups:
            for done, still_open in _generate(pipeline, group, world, limits, done_before):
                waiting.done(done, f"{still_open} under way")
            done_before += len(group)
    gathered: list[tuple[int, list[Answer]]] = [(0, []) for _ in range(world.size)]
    dist.all_gather_object(gathered, (world.data_rank, mine))
    of_rank = dict(gathered)  # ranks that read the same rows have the same answers
    return [of_rank[i % world.data_size][i // world.data_size] for i in range(len(prompts))]


@dataclass(frozen=True)
class Limits:
    """Where answers end; see `greedy_answers`."""

    stops: frozenset[int]
    max_new_tokens: int
    max_tokens: int

    def goes_on(self, answer: Answer) -> bool:
        """Whether an answer gets a further token, as far as the first and last limit say."""
        length = len(answer.prompt) + len(answer.generated)
        return not answer.ended(self.stops) and length < self.max_tokens


def _groups(answers: Sequence[Answer], limits: Limits) -> list[list[Answer]]:
    """Divide answers into groups that fit into a forward pass."""
    groups: list[list[Answer]] = [[]]
    filled = 0
    for answer in answers:
        length = min(len(answer.prompt) + limits.max_new_tokens, limits.max_tokens)
        if groups[-1] and filled + length > limits.max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(answer)
        filled += length
    return groups


def _generate(
    pipeline: Pipeline | OneStage,
    answers: list[Answer],
    world: World,
    limits: Limits,
    done_before: int,
) -> Iterator[tuple[int, int]]:
    """Extend `answers` in place; the ranks go on together until none has an open answer, since
    their layers communicate.

    Before each token: how many answers are done (`done_before` on this rank in earlier groups) and
    under way, over all ranks.
    """
    for _ in range(limits.max_new_tokens):
        unfinished = [answer for answer in answers if limits.goes_on(answer)]
        finished = len(answers) - len(unfinished)
        counts = world.sum([len(unfinished), done_before + finished]).tolist()
        copies = world.size // world.data_size  # ranks that read the same rows
        still_open, done = (int(count) // copies for count in counts)
        yield done, still_open
        if not still_open:
            return
        next_tokens = _next_tokens(pipeline, unfinished, world)
        for answer, token in zip(unfinished, next_tokens, strict=True):
            answer.generated.append(token)


def _next_tokens(
    pipeline: Pipeline | OneStage, answers: Sequence[Answer], world: World
) -> list[int]:
    """Return the likeliest next token of each answer, by one forward pass over all of them."""
    sequences = [answer.prompt + answer.generated for answer in answers]
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    ends = lengths.cumsum(0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
    tokens = [token for sequence in sequences for token in sequence]
    positions = [position for sequence in sequences for position in range(len(sequence))]
    # Padding, so that the tokens divide over cp x tp ranks, and a rank without open answers can
    # take part.
    ranks = world.sequence["sequence"].size()
    missing = -len(tokens) % ranks if tokens else ranks
    padding = [0] * missing
    logits = pipeline.logits(
        torch.tensor(tokens + padding, device=world.device),
        positions=torch.tensor(positions + padding, device=world.device),
        cu_seqlens=cu_seqlens.to(world.device),
        max_seqlen=int(lengths.max()) if sequences else 0,
        logits_at=(ends - 1).to(world.device),
    )
    return logits.argmax(-1).tolist()
