"""Answers to held-out conversations, generated greedily before and after training (--eval.answers), and how many are right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from torchsft.data.template import Sample
from torchsft.parallel.pipeline import OneStage, Pipeline
from torchsft.parallel.world import World
from torchsft.trainer import Trainer


def answer(trainer: Trainer, when: str) -> tuple[int, int, int]:
    """Greedy answers to `trainer.eval_samples`: written to OUTPUT/answers-WHEN.jsonl, a few shown.

    Returns:
        How many equal the reference, how many there are, and how many ended by themselves.
    """
    config = trainer.config
    prompts = [(s.id, *turn) for s in trainer.eval_samples for turn in answer_prompts(s)]
    answers = greedy_answers(
        trainer.pipeline,
        prompts,
        trainer.world,
        max_new_tokens=config.eval.max_new_tokens,
        max_tokens=config.data.seq_len * config.train.micro_batch_size,
        stop=trainer.stop_tokens(),
    )
    correct = sum(a.correct for a in answers)
    ended = sum(a.ended for a in answers)
    if trainer.log:
        with trainer.output_may_fail(), open(trainer.output / f"answers-{when}.jsonl", "w") as file:
            for a in answers:
                file.write(json.dumps(dataclasses.asdict(a) | {"correct": a.correct}) + "\n")
        share = 100 * correct / len(answers)
        lines = [
            f"{when} training: {correct} of {len(answers)} held-out answers are exactly right ({share:.1f} %),"
            f" {ended} ended by themselves, for example"
        ]
        lines += [a.shown(trainer.tokenizer) for a in answers[:4]]
        trainer.log.message("\n".join(lines))
    return correct, len(answers), ended


def answer_prompts(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """For each contiguous run of supervised tokens: the tokens before it, and the run with its end-of-turn token."""
    trained = np.concatenate([[False], sample.weights > 0, [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    tokens = sample.tokens.tolist()
    return [(tokens[:start], tokens[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@dataclass
class Answer:
    """One assistant turn: what precedes it, the reference, and what the model says. Token ids, end-of-turn included."""

    id: str
    prompt: list[int]
    reference: list[int]
    generated: list[int]
    ended: bool = False
    """Whether what was generated ends with a token at which servers stop."""

    @property
    def correct(self) -> bool:
        """True where the generated turn equals the reference, token for token."""
        return self.generated == self.reference

    def shown(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """A line of text: the end of its prompt, what was generated, and the reference where it differs."""
        question = tokenizer.decode(self.prompt)[-60:].replace("\n", " ")
        line = f"  ...{question!r} -> {tokenizer.decode(self.generated)!r}"
        return line if self.correct else line + f" (reference {tokenizer.decode(self.reference)!r})"


@torch.no_grad()
def greedy_answers(
    pipeline: Pipeline | OneStage,
    prompts: Sequence[tuple[str, list[int], list[int]]],
    world: World,
    *,
    max_new_tokens: int,
    max_tokens: int,
    stop: Collection[int],
) -> list[Answer]:
    """Generate the answer to each (id, prompt, reference) greedily, until a token of `stop`, as a server does.

    The prompts are spread over the data ranks; all ranks must call this with the same arguments, and all get all answers.
    There is no key/value cache: each new token is a forward pass over packed prompts, meant for a held-out sample.

    Args:
        max_new_tokens: longest answer.
        max_tokens: tokens of one forward pass; also where an answer ends that has not ended by then. References must fit.
        stop: ids of the tokens that end an answer.
    """
    mine = [Answer(*prompt, generated=[]) for prompt in prompts[world.data_rank :: world.data_size]]
    groups: list[list[Answer]] = [[]]
    filled = 0
    for answer in mine:
        length = min(len(answer.prompt) + max_new_tokens, max_tokens)
        if groups[-1] and filled + length > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(answer)
        filled += length
    count = torch.tensor(len(groups), device=world.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    groups += [[]] * (int(count) - len(groups))
    for group in groups:
        _generate(pipeline, group, world, max_new_tokens, max_tokens, stop)
    gathered: list[tuple[int, list[Answer]]] = [(0, []) for _ in range(world.size)]
    dist.all_gather_object(gathered, (world.data_rank, mine))
    of_rank = dict(gathered)  # ranks that read the same rows have the same answers
    return [of_rank[i % world.data_size][i // world.data_size] for i in range(len(prompts))]


def _generate(
    pipeline: Pipeline | OneStage,
    answers: list[Answer],
    world: World,
    max_new_tokens: int,
    max_tokens: int,
    stop: Collection[int],
) -> None:
    """Extend `answers` in place; the ranks go on together until none has an open answer, since their layers communicate."""
    device, together = world.device, world.sequence["sequence"].size()
    for _ in range(max_new_tokens):
        unfinished = [a for a in answers if not a.ended and len(a.prompt) + len(a.generated) < max_tokens]
        open_anywhere = torch.tensor(len(unfinished), device=device)
        dist.all_reduce(open_anywhere)
        if not int(open_anywhere):
            return
        sequences = [a.prompt + a.generated for a in unfinished]
        lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
        ends = lengths.cumsum(0)
        tokens = [t for s in sequences for t in s]
        positions = [p for s in sequences for p in range(len(s))]
        # Padding, so that the tokens divide over cp x tp ranks, and a rank without open answers can take part.
        padding = [0] * (-len(tokens) % together or (0 if tokens else together))
        tokens, positions = tokens + padding, positions + padding
        logits = pipeline.logits(
            torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32).to(device),
            max_seqlen=int(lengths.max()) if sequences else 0,
            logits_at=(ends - 1).to(device),
        )
        for answer, token in zip(unfinished, logits.argmax(-1).tolist(), strict=True):
            answer.generated.append(token)
            answer.ended = token in stop
