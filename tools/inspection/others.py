"""What another tool makes of the data: TRL's own code run on the same rows, or a dump of input_ids
and labels.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow

from tools.inspection.report import Inspected
from tools.inspection.serving import Server, read_examples
from torchsft.config import Data, InputError
from torchsft.data.formats import Conversation, Example, Text
from torchsft.data.rows import RowError, located, read_row
from torchsft.data.sources import Source
from torchsft.data.specs import parse_spec

IDS = ("input_ids", "tokens")
MASKS = (
    *("assistant_masks", "assistant_tokens_mask", "completion_mask"),
    *("loss_mask", "loss_weights", "weights"),
)
INSTALL = "pip install 'trl>=1,<2'"


@dataclass
class Document:
    """One text of the other tool.

    Attributes:
        name: where it comes from, for people.
        tokens: int64 [n].
        trained: bool [n].
        row: (source, number) of the row that it was made of, where that is known.
    """

    name: str
    tokens: np.ndarray
    trained: np.ndarray
    row: tuple[str, int] | None = None


@dataclass
class Other:
    """What another tool makes of the data.

    Attributes:
        name: of the tool or file, for people.
        refused: (source, number) of rows of which it makes nothing, and what it says.
    """

    name: str
    documents: list[Document]
    refused: dict[tuple[str, int], str] = field(default_factory=dict)


def open_other(option: Sequence[str]) -> Callable[[Sequence[Inspected], str, Data], Other] | None:
    """Return what `--compare` asks for.

    Returns:
        A function of sources, model directory and data options; None where nothing is asked for.

    Raises:
        InputError: it is not `trl`, FILE or `axolotl-file FILE`; TRL is not installed; the file is
            no dump.
    """
    if not option:
        return None
    if tuple(option) == ("trl",):
        _trl_version()
        return run_trl
    *kind, path = option
    if path == "axolotl-file" or kind not in ([], ["axolotl-file"]):
        raise InputError(
            f"--compare is {' '.join(option)}, but it takes trl, FILE or axolotl-file "
            f"FILE; name one"
        )
    found = Other(path, read_dump(path))
    return lambda sources, model, data: found


# ---------------------------------------------------------------- dumps


def read_dump(path: str) -> list[Document]:
    """Return the documents of a JSONL, JSON, Parquet or Arrow file or a `save_to_disk` directory,
    in order.

    Padding is taken out, packed rows are split where position_ids, seq_lengths, cu_seqlens,
    document_ids or a numbered attention_mask (axolotl's) say so. What is trained is said by labels,
    else by masks; without any, everything is.

    Raises:
        InputError: it cannot be read, or its columns do not fit together.
    """
    documents: list[Document] = []
    for where, row in _rows(path):
        documents += _documents(where, row)
    if not documents:
        raise InputError(
            f"{path} holds no rows; give --compare the dump of a tool, with input_ids and labels"
        )
    return documents


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a file."""
    if path.endswith(".arrow"):
        yield from _arrow(path)
        return
    source = Source(parse_spec(path))
    for number, payload in source.rows():
        where = source.where(number)
        with located(where):
            if isinstance(payload, RowError):
                raise payload
            row, _ = read_row(payload)
        yield where, row


def _arrow(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of an Arrow file as `datasets` writes them (a stream), or in the format
    for random access.
    """
    try:
        with pyarrow.memory_map(path) as file:
            try:
                table = pyarrow.ipc.open_stream(file).read_all()
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(file).read_all()
            rows = table.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} cannot be read as an Arrow file ({reason}); give --compare a file that exists"
        ) from None
    for i, row in enumerate(rows, start=1):
        yield f"{path}, row {i}", row


def _documents(where: str, row: dict[str, Any]) -> Iterator[Document]:
    """Yield the documents of a row, without padding."""
    key = next((key for key in IDS if row.get(key) is not None), None)
    if key is None:
        has = ", ".join(row) or "none"
        raise InputError(
            f"{where}: no input_ids (keys: {has}); --compare needs the tokens of a "
            f"tool, with labels or a mask"
        )
    tokens = _array(row[key], key, where)
    trained = _trained(row, tokens, where)
    attention = _beside(row, "attention_mask", tokens, where)
    bounds = _bounds(row, attention, tokens, where)
    is_real = np.ones(len(tokens), bool) if attention is None else attention > 0
    pieces = [piece[is_real[piece]] for piece in np.split(np.arange(len(tokens)), bounds)]
    pieces = [piece for piece in pieces if len(piece)]
    for i, piece in enumerate(pieces, start=1):
        name = f"{where}, document {i}" if len(pieces) > 1 else where
        yield Document(name, tokens[piece], trained[piece])


def _trained(row: dict[str, Any], tokens: np.ndarray, where: str) -> np.ndarray:
    """Return which tokens of a row are trained, bool [n], by labels, else by masks.

    Labels stand at the place of their token, or of the token before it.
    """
    labels = _beside(row, "labels", tokens, where)
    if labels is None:
        trained = np.ones(len(tokens), bool)
        for key in MASKS:
            mask = _beside(row, key, tokens, where)
            if mask is not None:
                trained &= mask > 0
        return trained
    trained = labels != -100
    if (labels[trained] == tokens[trained]).all():
        return trained
    shifted = np.append(False, trained[:-1])  # the label of a token is the token behind it
    if (labels[:-1][trained[:-1]] == tokens[shifted]).all():
        return shifted
    i = int(np.flatnonzero(trained & (labels != tokens))[0])
    raise InputError(
        f"{where}: label {labels[i]} of token {i + 1} is neither -100 nor its id {tokens[i]} nor "
        f"that of the next token; dump labels as the loss takes them"
    )


def _bounds(
    row: dict[str, Any], attention: np.ndarray | None, tokens: np.ndarray, where: str
) -> np.ndarray:
    """Return where documents begin, but for the first one.

    Args:
        attention: the attention mask, which may number documents.
    """
    if row.get("cu_seqlens") is not None:
        return _array(row["cu_seqlens"], "cu_seqlens", where)[1:-1]
    if row.get("seq_lengths") is not None:
        return np.cumsum(_array(row["seq_lengths"], "seq_lengths", where))[:-1]
    positions = _beside(row, "position_ids", tokens, where)
    if positions is not None:
        return np.flatnonzero(positions[1:] != positions[:-1] + 1) + 1
    numbers = _beside(row, "document_ids", tokens, where)
    numbers = attention if numbers is None else numbers
    if numbers is None:
        return np.zeros(0, int)
    return np.flatnonzero(numbers[1:] != numbers[:-1]) + 1


def _beside(row: dict[str, Any], key: str, tokens: np.ndarray, where: str) -> np.ndarray | None:
    """Return a column with a number for each token, if the row has it."""
    if row.get(key) is None:
        return None
    found = _array(row[key], key, where)
    if len(found) != len(tokens):
        raise InputError(
            f"{where}: {len(tokens)} input_ids, but {len(found)} {key}; give one for each token"
        )
    return found


def _array(value: Any, key: str, where: str) -> np.ndarray:
    """Return a list of numbers, or a batch of one list, as int64 or float64 [n]."""
    with contextlib.suppress(ValueError, OverflowError):  # lists of different lengths
        found = np.asarray(value)
        if found.ndim == 2 and len(found) == 1:  # a batch of one
            found = found[0]
        if found.ndim == 1 and found.size and found.dtype.kind in "iufb":
            return found.astype(np.float64 if found.dtype.kind == "f" else np.int64)
    raise InputError(
        f"{where}: {key} is no list of numbers; dump the token ids of one row or batch a line"
    )


# ---------------------------------------------------------------- TRL


def run_trl(sources: Sequence[Inspected], model: str, data: Data) -> Other:
    """Return what TRL's SFTTrainer trains of the rows of these sources.

    It is the trainer itself, with its own choice of template and masks, beside a model of a few
    parameters. Its loss is on assistant messages only, unless --data.mask is all; on completions
    for rows of prompt and completion.

    Raises:
        InputError: TRL is not installed, or cannot mask this chat template.
    """
    found = Other(f"TRL {_trl_version()}", [])
    for source in sources:
        # Arrow gives every row the keys of all others: rows with other variables are prepared
        # apart.
        alike: dict[str, list[dict[str, Any]]] = {}
        for number, example in read_examples(source, most=None):
            made = _trl_row(example, data)
            if made is None:
                raise InputError(
                    f"{source.name} has tokens, which TRL takes as they are; leave it "
                    f"out of --compare trl"
                )
            key = json.dumps([sorted(made), made.get("chat_template_kwargs")], sort_keys=True)
            alike.setdefault(key, []).append({**made, "torchsft_row": number})
        for rows in alike.values():
            with _quiet(), tempfile.TemporaryDirectory() as where:
                found.documents += _trl_documents(
                    source.name, rows, Server(model, data), where, found.refused
                )
    return found


def _trl_version() -> str:
    """Return the version of TRL.

    Raises:
        InputError: it is not installed.
    """
    try:
        with _quiet():
            import trl
    except ImportError:
        raise InputError(f"--compare trl needs TRL, which is not installed; {INSTALL}") from None
    return trl.__version__


def _trl_row(example: Example, data: Data) -> dict[str, Any] | None:
    """Return an example as TRL reads it; None for tokens."""
    if isinstance(example, Text):
        if example.prompt:
            return {"prompt": example.prompt, "completion": example.completion}
        return {"text": example.completion}
    if not isinstance(example, Conversation):
        return None
    row: dict[str, Any] = {"messages": example.messages}
    if example.tools:
        row["tools"] = json.dumps(example.tools)  # as Arrow would put keys of one tool into all
    variables = {**data.template_variables(), **example.template_kwargs}
    if variables:
        row["chat_template_kwargs"] = variables
    return row


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from writing to the terminal."""
    import datasets
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets.enable_progress_bars()
        logging.set_verbosity(level)


def _trl_documents(
    name: str,
    rows: list[dict[str, Any]],
    server: Server,
    where: str,
    refused: dict[tuple[str, int], str],
) -> Iterator[Document]:
    """Yield TRL's documents of some rows.

    Where it fails on some, it is asked for each half, until those are found that it fails on.

    Args:
        name: of the source.
        where: a directory for its output.
        refused: rows of which it makes nothing are added to it, with what it says.
    """
    try:
        made = _prepare(rows, server, where)
    except Exception as error:  # of its checks, of Arrow, of the chat template
        reason = " ".join(str(error).split())
        if "chat template is not" in reason:
            raise InputError(
                f"TRL cannot mask this chat template ({reason}); compare with "
                f"--data.mask all, or a dump"
            ) from None
        if len(rows) == 1:
            refused[name, rows[0]["torchsft_row"]] = reason
            return
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]):
            yield from _trl_documents(name, part, server, where, refused)
        return
    for row in made:
        number = row["torchsft_row"]
        place = f"TRL's row {number}"
        tokens = np.array(row["input_ids"], np.int64)
        trained = _trained(row, tokens, place)
        yield Document(place, tokens, trained, row=(name, number))
    given = {row["torchsft_row"] for row in rows}
    kept = {row["torchsft_row"] for row in made}
    for number in given - kept:
        refused[name, number] = "no token of it has a label"


def _prepare(rows: list[dict[str, Any]], server: Server, where: str) -> Any:
    """Return the data set that TRL's trainer makes of rows."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(server.tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    arguments = SFTConfig(
        output_dir=where,
        max_length=server.data.seq_len,
        assistant_only_loss="messages" in rows[0] and server.data.mask != "all",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    dataset = Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=server.tokenizer
    )
    return trainer.train_dataset
