"""Options of --data."""

import datetime
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

from torchsft.config.errors import InputError, at_least

# What rendering itself gives to a chat template.
RESERVED = set("messages conversations tools documents chat_template add_generation_prompt".split())

# What --data.map can make of a column: a turn, the key of a format, or nothing.
MAP_TARGETS = tuple(
    "system user assistant messages conversations prompt completion text instruction input output "
    "history tools weight input_ids labels ignore".split()
)


@dataclass(kw_only=True)
class Data:
    """What is trained on."""

    train: tuple[str, ...] = ()
    """JSONL (.gz, .zst), JSON, Parquet, datasets directories or hub names (NAME:SPLIT); PATH:2.0
    takes each sample twice.
    """
    eval: tuple[str, ...] = ()
    """Held-out sources as NAME=PATH (without a name: the file's), each evaluated over every row."""
    map: str = ""
    """Columns of other names: question=user,answer=assistant makes messages (also system, a
    format's key, or ignore).
    """
    system: str = ""
    """System turn for rows that have none: a text, or a file that holds it."""
    seq_len: int = 4096
    """Tokens in a packed row."""
    mask: Literal["assistant", "last-turn", "all"] = "assistant"
    """Which tokens are trained: every assistant turn, the last one, or everything."""
    reasoning: Literal["train", "mask"] = "train"
    """Whether reasoning (reasoning_content, <think>) is trained, or only read by the answer behind
    it.
    """
    template_kwargs: str = ""
    """JSON object of further variables of the chat template, such as {"thinking": true}."""
    chat_template: str | None = None
    """File with a chat template in place of the model directory's; the export carries it."""
    template_date: str | None = None
    """Day (YYYY-MM-DD) for templates that ask for the date; absent: that of the run's first
    start.
    """
    on_lost_context: Literal["refuse", "keep"] = "refuse"
    """When the template leaves out context (system, tools, results): the row cannot be used, or is
    kept, counted, listed.
    """
    truncation: Literal["drop", "left", "right", "split", "raise"] = "drop"
    """A sample longer than seq_len is left out, cut at its beginning or end, cut into pieces (all
    counted), or an error.
    """
    packing: Literal["best-fit", "first-fit", "none"] = "best-fit"
    """How samples share rows: best-fit decreasing, first-fit in the given order, or one sample a
    row.
    """
    packing_buffer: int = 8192
    """Samples that are packed together."""
    balance: Literal["none", "attention"] = "none"
    """attention deals the rows of a step so that ranks do equal work, counting what long documents
    cost in the attention.
    """
    on_error: Literal["raise", "skip"] = "raise"
    """A row that cannot be used ends the run, or is left out, counted and listed."""
    streaming: bool = False
    """Tokenise while training instead of once before it (no cache, order of the file); needs
    --train.steps.
    """
    cache: str | None = None
    """Directory of tokenised samples; absent: $TORCHSFT_CACHE, else ~/.cache/torchsft."""
    workers: int = 1
    """Threads of each rank that prepare the next steps beside training; 0: none, training waits."""

    def __post_init__(self) -> None:
        at_least(self, seq_len=2, packing_buffer=1, workers=0)
        self.template_variables()
        self.columns()
        try:
            datetime.date.fromisoformat(self.template_date or "2000-01-01")
        except ValueError:
            raise InputError(
                f"--data.template-date is {self.template_date!r}, but it must be a day such as "
                "2026-01-31"
            ) from None

    def columns(self) -> tuple[tuple[str, str], ...]:
        """`map` as pairs (column, what it becomes): a role, a key of a format, or `ignore`."""
        pairs = []
        for pair in filter(None, self.map.split(",")):
            column, _, target = (each.strip() for each in pair.partition("="))
            if not column or target not in MAP_TARGETS:
                raise InputError(
                    f"--data.map is {self.map!r}, but it must be COLUMN=TARGET pairs such as "
                    f"question=user,answer=assistant; targets are {', '.join(MAP_TARGETS)}"
                )
            pairs.append((column, target))
        columns = [column for column, _ in pairs]
        for column in columns:
            if columns.count(column) > 1:
                raise InputError(
                    f"--data.map names the column {column!r} twice; give it one target"
                )
        return tuple(pairs)

    def system_text(self) -> str:
        """`system`, or what the file of that name holds, without the white space around it."""
        if not os.path.isfile(self.system):
            return self.system
        try:
            with open(self.system, encoding="utf-8") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--data.system {self.system} cannot be read ({error}); give a text file in UTF-8"
            ) from None

    def template_variables(self) -> dict[str, Any]:
        """`template_kwargs` as a dictionary."""
        try:
            found = json.loads(self.template_kwargs or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.keys() & RESERVED:
            needed = "a JSON object of the template's own variables, such as '{\"thinking\": true}'"
            raise InputError(
                f"--data.template-kwargs is {self.template_kwargs!r}, but it must be {needed}"
            )
        return found
