"""Where the numbers of a run go: metrics.jsonl, TensorBoard and the console. One process (rank 0)
writes them.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from torchsft.config import InputError

# metrics.jsonl key -> TensorBoard tag; `eval_NAME` becomes `eval/NAME`.
_GROUPS = {
    "train": "loss smoothed_loss logit_z_loss aux_loss z_loss mtp_loss tokens supervised_tokens "
    "epoch",
    "optim": "lr grad_norm",
    "speed": "tokens_per_second step_seconds data_wait_share",
}
_TAGS = {key: f"{group}/{key}" for group, keys in _GROUPS.items() for key in keys.split()}

SECONDS_BETWEEN_LINES = 10.0  # of what is waited for without a terminal


def bars_can_be_drawn() -> bool:
    """Whether stderr is a terminal of known width; some (a container's, an editor's) say that they
    have 0 columns.
    """
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # it does not say
        return True


def _clock() -> str:
    return time.strftime("%H:%M:%S")


class Waiting:
    """Shows how far something is that the user waits for: a bar on a terminal, else a line on
    stdout now and then.
    """

    def __init__(self, what: str, total: int, unit: str, shown: bool) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._shown = shown  # whether anything is; on one rank
        self._began = self._last = time.monotonic()
        self._bar: tqdm | None = None
        if shown and bars_can_be_drawn():
            self._bar = tqdm(
                total=total, unit=f" {unit}", desc=what, dynamic_ncols=True, leave=False
            )

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def done(self, count: int, more: str = "") -> None:
        """So many of them are done; `more` is said behind the count."""
        if self._bar is not None:
            self._bar.set_postfix_str(more, refresh=False)
            self._bar.update(count - self._bar.n)
            return
        now = time.monotonic()
        if not self._shown or now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        line = (
            f"{_clock()} {self._what}: {count} of {self._total} {self._unit}, {more}".removesuffix(
                ", "
            )
        )
        print(f"{line}, {tqdm.format_interval(now - self._began)} so far", flush=True)


class MetricsLogger:
    """Writes OUTPUT/metrics.jsonl and OUTPUT/tensorboard/, and shows progress.

    Steps count from 1: step k is the state after k steps. What an earlier run wrote beyond
    `start_step` is cut off (metrics.jsonl) or hidden (TensorBoard's purge), so that a resumed run
    leaves what an uninterrupted one would.

    Raises:
        InputError: the metrics.jsonl found there is not one of ours.
    """

    def __init__(
        self,
        output: Path,  # the run's directory, made if it is not there
        *,
        total_steps: int,  # last step of the run
        start_step: int,  # steps already done (0 for a new run)
        tensorboard: bool,  # whether to write OUTPUT/tensorboard/
        # a bar if stderr is a terminal; else about 20 plain lines with the time (more if steps are
        # long)
        progress: bool,
        config_text: str,  # the resolved configuration, shown on TensorBoard's text page
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._path = path = output / "metrics.jsonl"
        if path.exists():
            _cut(path, start_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self._end = path.stat().st_size  # of what is whole
        self._pending = b""  # lines that could not be written yet
        self._board = None
        if tensorboard:
            self._board = SummaryWriter(
                str(output / "tensorboard"), purge_step=start_step + 1, flush_secs=10
            )
            self._board.add_text(
                "config", "\n".join("    " + line for line in config_text.splitlines()), start_step
            )
        self._total_steps, self._progress = total_steps, progress
        self._bar: tqdm | None = None
        # number of the first step of this process, and when it ended
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0

    def step(
        self, step: int, record: Mapping[str, float | int], scalars: Mapping[str, float]
    ) -> None:
        """Write one step (1 is the first).

        `record` is the step's line in metrics.jsonl, also shown on TensorBoard. A number that is
        not finite becomes null, is spelt out under the key "nonfinite" of the same line, and is
        told on the console. `scalars` are TensorBoard tags and values, for TensorBoard only.

        Raises:
            OSError: a file cannot be written or has vanished: another step can follow, which then
                also writes this line; TensorBoard's file ends at its first fault.
        """
        nonfinite = {key: str(value) for key, value in record.items() if not math.isfinite(value)}
        line = {
            "step": step,
            **{key: None if key in nonfinite else value for key, value in record.items()},
        }
        if nonfinite:
            line["nonfinite"] = nonfinite
            found = ", ".join(f"{key} is {value}" for key, value in nonfinite.items())
            self.message(f"{_clock()} step {step}: {found}")
        if self._progress:
            self._show(step, record)
        self._pending += json.dumps(line, allow_nan=False).encode() + b"\n"
        self._write_pending()
        tags = {
            key: key.replace("_", "/", 1) if key.startswith("eval_") else _TAGS[key]
            for key in record
        }
        self.scalars(step, {tags[key]: value for key, value in record.items()} | dict(scalars))

    def _write_pending(self) -> None:
        try:
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                raise FileNotFoundError("another file has taken its place")
            self._file.truncate(self._end)  # a full disk may have cut a line short
            rest = self._pending
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(
                f"{self._path} cannot be written or has vanished ({error.strerror or error})"
            ) from error
        self._end += len(self._pending)
        self._pending = b""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show TensorBoard tag -> value of a step; nothing without TensorBoard.

        Raises:
            OSError: its file cannot be written.
        """
        try:
            for tag, value in values.items() if self._board else ():
                self._board.add_scalar(tag, value, step)
        except OSError as error:
            self._board = None  # its writing thread has ended
            raise OSError(
                f"TensorBoard's file in {self._path.parent} cannot be written ({error})"
            ) from error

    def _show(self, step: int, record: Mapping[str, float | int]) -> None:
        """Progress on the console; the clock starts at the end of the first step, which is slower
        than the others.
        """
        now = time.monotonic()
        self._first = self._first or (step, now)
        first, began = self._first
        speed = f"{record['tokens_per_second']:,.0f} tok/s"
        evaluation = _evaluation(record)
        lr = f"lr {record['lr']:.2e}"
        if bars_can_be_drawn():
            if self._bar is None:
                self._bar = tqdm(
                    total=self._total_steps, initial=step - 1, unit="step", dynamic_ncols=True
                )
            numbers = f"loss {record['loss']:.4f}, norm {record['grad_norm']:.2f}, {lr}, {speed}"
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update()
            if evaluation:
                self.message(f"{_clock()} step {step}: {evaluation}")
            return
        regular = step % max(1, self._total_steps // 20) == 0 or step == self._total_steps
        if step == first or regular or evaluation or now - self._last_line > 60:
            self._last_line = now
            parts = [
                f"step {step}/{self._total_steps}",
                f"loss {record['loss']:.4f}",
                f"norm {record['grad_norm']:.2f}",
            ]
            parts += [lr, speed, *([evaluation] if evaluation else [])]
            if step > first:
                left = (now - began) / (step - first) * (self._total_steps - step)
                parts.append(f"{tqdm.format_interval(left)} left")
            print(f"{_clock()} {', '.join(parts)}", flush=True)

    def message(self, text: str) -> None:
        """Print `text` to stdout without breaking the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Finish the files and the progress bar. Messages are still printed afterwards."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board:
            self._board.close()
        with self._file:
            if self._pending:
                self._write_pending()


def _evaluation(record: Mapping[str, float | int]) -> str:
    """Return the eval loss of a step, of each of several sets too; nothing where it was not
    evaluated.
    """
    if "eval_loss" not in record:
        return ""
    prefix = "eval_loss/"
    each = [
        f"{key.removeprefix(prefix)} {value:.4f}"
        for key, value in record.items()
        if key.startswith(prefix)
    ]
    return f"eval loss {record['eval_loss']:.4f}" + (f" ({', '.join(each)})" if each else "")


def _cut(path: Path, last_step: int) -> None:
    """Cut `path` off behind the line of `last_step`; also an unfinished last line, which a killed
    run can leave.
    """
    end = 0
    with open(path, "r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path} line {number} is not a line of metrics ({error!r}); choose another "
                    "--output or delete it"
                ) from error
            if step > last_step:
                break
            end += len(line)
        file.truncate(end)
