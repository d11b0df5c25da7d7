"""Answers to held-out conversations, generated greedily before and after training (--eval.answers),
and how many are right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

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
    correct = sum(a.correct for a in answers)
    ended = sum(a.ended(stops) for a in answers)
    if trainer.output.log:
        path = trainer.output.directory / f"answers-{when}.jsonl"
        with trainer.output.may_fail(), open(path, "w", encoding="utf-8") as file:
            for a in answers:
                texts = {
                    f"{part}_text": tokenizer.decode(getattr(a, part))
                    for part in ("prompt", "reference", "generated")
                }
                line = (
                    dataclasses.asdict(a) | {"correct": a.correct, "ended": a.ended(stops)} | texts
                )
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        share = 100 * correct / len(answers)
        lines = [
            f"{when} training: {correct} of {len(answers)} held-out answers are exactly right "
            f"({share:.1f} %), for example"
        ]
        lines += [a.shown(tokenizer) for a in answers[:4]]
        trainer.output.log.message("\n".join(lines))
    return Answers(correct, ended, len(answers))


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
        """A line of text: the end of its prompt, what was generated, and the reference where it
        differs.
        """
        question = tokenizer.decode(self.prompt)[-60:].replace("\n", " ")
        line = f"  ...{question!r} -> {tokenizer.decode(self.generated)!r}"
        return line if self.correct else line + f" (reference {tokenizer.decode(self.reference)!r})"


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
    with Waiting(label, len(prompts), "answers", shown=bool(label) and world.is_main) as waiting:
        for index, group in enumerate(groups):
            before = sum(map(len, groups[:index]))
            for done, still_open in _generate(
                pipeline, group, world, stops, max_new_tokens, max_tokens, before
            ):
                waiting.done(done, f"{still_open} under way")
    gathered: list[tuple[int, list[Answer]]] = [(0, []) for _ in range(world.size)]
    dist.all_gather_object(gathered, (world.data_rank, mine))
    of_rank = dict(gathered)  # ranks that read the same rows have the same answers
    return [of_rank[i % world.data_size][i // world.data_size] for i in range(len(prompts))]


def _generate(
    pipeline: Pipeline | OneStage,
    answers: list[Answer],
    world: World,
    stops: Collection[int],
    max_new_tokens: int,
    max_tokens: int,
    before: int,
) -> Iterator[tuple[int, int]]:
    """Extend `answers` in place; the ranks go on together until none has an open answer, since
    their layers communicate.

    Before each token: how many answers are done (`before` on this rank in earlier groups) and under
    way, over all ranks.
    """
    device, together = world.device, world.sequence["sequence"].size()
    for _ in range(max_new_tokens):
        unfinished = [
            a
            for a in answers
            if not a.ended(stops) and len(a.prompt) + len(a.generated) < max_tokens
        ]
        mine = [len(unfinished), before + len(answers) - len(unfinished)]
        copies = world.size // world.data_size  # ranks that read the same rows
        still_open, done = (int(count) // copies for count in world.sum(mine).tolist())
        yield done, still_open
        if not still_open:
            return
        sequences = [a.prompt + a.generated for a in unfinished]
        lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
        ends = lengths.cumsum(0)
        tokens = [t for s in sequences for t in s]
        positions = [p for s in sequences for p in range(len(s))]
        # Padding, so that the tokens divide over cp x tp ranks, and a rank without open answers can
        # take part.
        padding = [0] * (-len(tokens) % together or (0 if tokens else together))
        tokens, positions = tokens + padding, positions + padding
        logits = pipeline.logits(
            torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends])
            .to(torch.int32)
            .to(device),
            max_seqlen=int(lengths.max()) if sequences else 0,
            logits_at=(ends - 1).to(device),
        )
        for answer, token in zip(unfinished, logits.argmax(-1).tolist(), strict=True):
            answer.generated.append(token)
