"""What a run writes beside its metrics: checkpoints, exports, and what follows when that fails."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from torchsft.checkpoint import huggingface, state
from torchsft.checkpoint.endings import about, read_generation_config, stop_ids
from torchsft.checkpoint.storage import Folder, root_of
from torchsft.config import Config, to_dict
from torchsft.metrics.logger import MetricsLogger
from torchsft.parallel.apply import quantised_dtype
from torchsft.parallel.collectives import gather_objects
from torchsft.parallel.world import World


class RunOutput:
    """A run's output directory as one rank knows it: messages, checkpoints and their faults."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.directory = Path(config.output)
        self.root = root_of(config.output, config.checkpoint.remote)
        self.log: MetricsLogger | None = None  # on the main rank, once everything is built
        options = config.checkpoint
        self.checkpointer = state.Checkpointer(
            f"{self.root}/checkpoints",
            mode=options.mode,
            if_busy=options.if_busy,
            keep=options.keep,
            keep_every=options.keep_every,
            keep_best=options.keep_best,
            group=world.writers,
        )
        # How the end of a save reaches the run: this rank fetches reports (`collect_reports`); a
        # step's all-reduce tells all ranks whether any knows of a failure (`save_failed`, set by
        # the trainer); behind the step all of them print what they know (`report_saves`), and end
        # together where a save failed.
        self.unreported: list[state.Report] = []  # fetched, and not printed yet
        self.save_failed = False
        self.last_failure = ""  # what befell the newest checkpoint, if it failed
        self.faults = 0  # of the output, where the run goes on nevertheless

    def message(self, text: str) -> None:
        """Print a line on the main rank, without breaking the progress bar."""
        if self.log:
            self.log.message(text)
        elif self.world.is_main:
            print(text, flush=True)

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        """Let an OSError inside end the run or be a warning, as --checkpoint.on-error says."""
        try:
            yield
        except OSError as error:
            if self.config.checkpoint.on_error == "stop":
                raise
            self.faults += 1
            if self.world.is_main:
                warning = f"warning: {error}; training goes on (fault {self.faults} of the output)"
                print(warning, file=sys.stderr, flush=True)

    def collect_reports(self) -> None:
        """Fetch the reports of saves that have ended since the last call."""
        self.unreported += self.checkpointer.reports()

    @property
    def knows_of_failed_save(self) -> bool:
        """Whether this rank has fetched the report of a save that failed."""
        return any(report.error for report in self.unreported)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        extra: dict[str, Any],
        score: float | None,
        last: bool,
    ) -> None:
        """Write a checkpoint; beside training, unless it is the last one of the run.

        Args:
            step: its number.
            model: as `state.Checkpointer.save`, like the following two.
            optimizer: see there.
            extra: counters and data position.
            score: its eval loss, if known.
            last: nothing is trained behind it, so that it must be complete.
        """
        if last:
            self.checkpointer.wait()  # before the new save, whose stall it does not belong to
        written = self.checkpointer.save(
            step,
            model,
            optimizer,
            extra=extra,
            config=to_dict(self.config),
            score=score,
            now=last,
        )
        if not written:
            self.message(f"no checkpoint of step {step}: the one before is still being written")
        if last or self.config.checkpoint.mode == "sync":  # all ranks know how it went
            self.collect_reports()
            self.save_failed = self.knows_of_failed_save
            self.report_saves()

    def report_saves(self) -> None:
        """Print how saves ended.

        Raises:
            OSError: on all ranks at one step: a save failed on any, and --checkpoint.on-error is
                stop.
        """
        if self.save_failed and not self.knows_of_failed_save:
            self.checkpointer.wait()  # another rank heard of it first
            self.collect_reports()
        reports, self.unreported, self.save_failed = self.unreported, [], False
        for report in reports:
            self._report(report)

    def _report(self, report: state.Report) -> None:
        self.last_failure = report.error or ""
        with self.may_fail():
            if self.last_failure:
                if self.config.checkpoint.on_error == "stop":
                    # A save that has begun meanwhile ends too, and removes what it leaves.
                    self.checkpointer.wait()
                raise OSError(self.last_failure)
            if self.log:
                scalars = {
                    "checkpoint/stall_seconds": report.stall_seconds,
                    "checkpoint/write_seconds": report.write_seconds,
                }
                self.log.scalars(report.step, scalars)
        if not self.last_failure:
            written = f"{report.bytes / 1e6:,.1f} MB written in {report.write_seconds:.2f} s"
            waited = f"training waited {report.stall_seconds:.2f} s"
            self.message(f"checkpoint {report.path}: {written}, {waited}")


def base_configs(source: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read config.json and generation_config.json of the model directory that a run begins with.

    Raises:
        InputError: their eos ids cannot be used.
    """
    base = huggingface.read_config(source), read_generation_config(source)
    stop_ids(*base, ())
    return base


class Exporter:
    """Writes the weights and all that belongs to them as Hugging Face directories."""

    def __init__(
        self,
        output: RunOutput,
        source: Path,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
    ) -> None:
        self.output, self.source = output, source
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.options = output.config.checkpoint
        self.base = base_configs(source)

    def exists(self, name: str) -> bool:
        """Whether the export `name` is complete, as the main rank sees it; collective."""
        place = Folder(f"{self.output.root}/{name}")
        return gather_objects(place.has("config.json"))[0]

    def stop_tokens(self, end_tokens: Sequence[int]) -> list[int]:
        """Return the ids at which answers end when an export of this moment is served; collective.

        Args:
            end_tokens: that ended trained turns; those of the main rank count.
        """
        return gather_objects(stop_ids(*self.base, end_tokens))[0]

    def export(self, model: nn.Module, name: str, end_tokens: Sequence[int]) -> None:
        """Write the export `name`; collective.

        Raises:
            OSError: on every rank: it could not be written.
        """
        place = f"{self.output.root}/{name}"
        stops = about(*self.base, end_tokens, self.tokenizer)
        self.output.message(f"exporting {self.options.export} weights to {place}{stops}")
        torch.cuda.empty_cache()  # tensors of an export have other sizes than those of a step
        try:
            huggingface.export(
                model,
                place,
                self.options.export,
                self.source,
                ends=end_tokens,
                chat_template=self.chat_template,
                through=quantised_dtype(self.output.config.precision, self.output.world.device),
            )
        except OSError as error:
            raise OSError(f"the export to {place} could not be written ({error})") from error


def end_tokens(trained: Iterable[Counter[int]], earlier: Sequence[int]) -> list[int]:
    """Return the ids of the tokens that ended trained turns.

    Args:
        trained: token id -> turns that it ended, of each source.
        earlier: those that the checkpoint knew from which the run continues.

    Returns:
        The earlier ones, then the others, the most frequent first.
    """
    counts: Counter[int] = Counter()
    for ends in trained:
        counts.update({int(token): turns for token, turns in ends.items()})
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    return list(dict.fromkeys([*earlier, *frequent]))
