"""All the data of a run: tokenizer, training loader, evaluation sets, and how many steps they
make.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from torchsft.config import Config, InputError
from torchsft.data.prepare import open_streams, prepare, prepare_eval
from torchsft.data.stream import EvalSet, StreamLoader, TrainLoader
from torchsft.data.template import Sample
from torchsft.data.tokenizer import load_tokenizer, read_chat_template

# Any id will do: padding is known by its place.
PAD_TOKEN_ID = 0


@dataclass(frozen=True)
class DataRank:
    """Which of the ranks that read different rows this is."""

    rank: int
    size: int


@dataclass
class RunData:
    """What one rank trains and evaluates on."""

    tokenizer: PreTrainedTokenizerBase
    # The text of --data.chat-template, read once, so that an export has what was trained with
    # whatever becomes of the file.
    chat_template: str | None
    loader: TrainLoader | StreamLoader
    total_steps: int
    eval_sets: dict[str, EvalSet] = field(default_factory=dict)  # by name
    eval_samples: list[Sample] = field(default_factory=list)  # for which answers are generated


def check_options(config: Config, can_answer: bool) -> None:
    """Refuse options of --data and --eval that need what is not there.

    Args:
        config: of the run.
        can_answer: whether the recipe can generate answers.

    Raises:
        InputError: which option, and what it lacks.
    """
    data, evaluation = config.data, config.eval
    if evaluation.answers and not (data.eval and can_answer):
        without_data = "there is no --data.eval to take questions from"
        lacks = "this recipe cannot generate any" if data.eval else without_data
        raise InputError(f"--eval.answers is {evaluation.answers}, but {lacks}")
    if config.checkpoint.keep_best and not data.eval:
        raise InputError(
            f"--checkpoint.keep-best is {config.checkpoint.keep_best}, but without --data.eval no "
            f"checkpoint has an eval loss; give held-out data"
        )
    if data.streaming and config.train.steps is None:
        raise InputError(
            f"--data.streaming reads an unknown number of samples, but --train.epochs is "
            f"{config.train.epochs}; give --train.steps"
        )


def load_run_data(
    config: Config,
    source: Path,
    data_rank: DataRank,
    *,
    vocab_size: int,
    max_position_embeddings: int,
    attention_cost: Callable[[Sequence[int]], float],
    progress: bool,
    message: Callable[[str], None],
) -> RunData:
    """Read, tokenise and pack everything that a run needs.

    Args:
        config: resolved.
        source: directory with the tokenizer.
        data_rank: which rows this rank reads.
        vocab_size: of the model; ids beyond it are refused.
        max_position_embeddings: of the model; longer samples are reported.
        attention_cost: FLOPs of documents of these lengths, for --data.balance attention.
        progress: whether bars may be drawn.
        message: prints a line on the main rank.

    Raises:
        InputError: a source, row or template cannot be used.
    """
    data, train = config.data, config.train
    chat_template = read_chat_template(data.chat_template) if data.chat_template else None
    tokenizer = load_tokenizer(source, chat_template=data.chat_template, date=data.template_date)
    batches = {
        "seq_len": data.seq_len,
        "micro_batch_size": train.micro_batch_size,
        "data_rank": data_rank.rank,
        "data_size": data_rank.size,
        "pad_token_id": PAD_TOKEN_ID,
    }
    order = {
        "packing": data.packing,
        "buffer": data.packing_buffer,
        "seed": train.seed,
        "cost": attention_cost if data.balance == "attention" else None,
        "global_batch_size": train.global_batch_size,
    }
    loader: TrainLoader | StreamLoader
    if data.streaming:
        streams = open_streams(data.train, tokenizer, data, vocab_size=vocab_size)
        loader = StreamLoader(streams, **batches, **order)
    else:
        sources = prepare(data.train, tokenizer, data, vocab_size, progress)
        for report in (source.report for source in sources):
            message(with_faults(str(report), report.faults))
            for text in report.kept:
                message(f"  kept: {text}")
        longest = max(source.report.longest for source in sources)
        if longest > max_position_embeddings:
            most = f"the model's max_position_embeddings is {max_position_embeddings}"
            message(f"warning: the longest sample has {longest} tokens, but {most}")
        loader = TrainLoader(sources, **batches, **order)

    total_steps = train.steps or loader.steps_in(train.epochs)
    run_data = RunData(tokenizer, chat_template, loader, total_steps)
    evaluation = prepare_eval(data.eval, tokenizer, data, vocab_size, progress)
    for name, sources in evaluation.items():
        for source_samples in sources:
            report = source_samples.report
            message(with_faults(f"eval {name}: {report}", report.faults))
            wanted = config.eval.answers - len(run_data.eval_samples)
            run_data.eval_samples += source_samples.samples[:wanted]
        run_data.eval_sets[name] = EvalSet(sources, **batches)
    return run_data


def with_faults(text: str, faults: Sequence[str]) -> str:
    """Return `text` and, on lines of their own, the rows that were skipped."""
    return "\n  skipped: ".join([text, *faults])
