"""metrics.jsonl, TensorBoard and the console, read back with independent readers."""

import json
import math
import os
import re
import resource
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchsft.config import InputError
from torchsft.metrics.logger import MetricsLogger, Waiting


def record(step, **more):
    return {
        "loss": 2.0 / step,
        "grad_norm": 0.5 * step,
        "lr": 1e-3,
        "tokens": 100 * step,
        "supervised_tokens": 10 * step,
        "tokens_per_second": 1234.5,
        "step_seconds": 0.25,
        "epoch": 0,
        **more,
    }


def logger(output, start_step=0, total_steps=6, tensorboard=False, progress=False):
    return MetricsLogger(
        output,
        total_steps=total_steps,
        start_step=start_step,
        tensorboard=tensorboard,
        progress=progress,
        config_text='{\n  "seed": 0\n}',
    )


def write(output, steps, **options):
    log = logger(output, start_step=steps[0] - 1, **options)
    for step in steps:
        evaluation = {"eval_loss": 1.5, "eval_perplexity": 4.5} if step % 3 == 0 else {}
        log.step(step, record(step, **evaluation), {"memory/peak_gib": 0.1 * step})
    log.close()


def events(output):
    reader = EventAccumulator(
        str(output / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    reader.Reload()
    return reader


def test_one_json_object_a_step_with_the_promised_keys(tmp_path):
    write(tmp_path, range(1, 7))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    keys = "step loss grad_norm lr tokens supervised_tokens tokens_per_second step_seconds epoch"
    assert list(lines[0]) == keys.split()
    assert [("eval_loss" in line) for line in lines] == [False, False, True, False, False, True]
    assert lines[3] == {"step": 4, **record(4)}


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    log = logger(tmp_path)
    for step in (1, 2):
        log.step(step, record(step), {})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    log.close()


@pytest.mark.parametrize("killed_after", [2, 3, 4, 6])
def test_resume_at_step_2_leaves_the_files_of_an_uninterrupted_run(tmp_path, killed_after):
    write(tmp_path / "whole", range(1, 7), tensorboard=True)
    write(tmp_path / "parts", range(1, killed_after + 1), tensorboard=True)
    write(tmp_path / "parts", range(3, 7), tensorboard=True)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()
    whole, parts = events(tmp_path / "whole"), events(tmp_path / "parts")
    assert whole.Tags()["scalars"] == parts.Tags()["scalars"]
    for tag in whole.Tags()["scalars"]:
        assert [(e.step, e.value) for e in parts.Scalars(tag)] == [
            (e.step, e.value) for e in whole.Scalars(tag)
        ]


def test_a_run_that_died_before_its_first_checkpoint_starts_with_an_empty_file(tmp_path):
    write(tmp_path, range(1, 4))
    logger(tmp_path, start_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_an_unfinished_last_line_is_cut(tmp_path):
    write(tmp_path, range(1, 3))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    write(tmp_path, range(3, 5))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("foreign", ["loss,step\n", "[1, 2]\n", '{"epoch": 1}\n'])
def test_a_foreign_metrics_file_is_refused_and_left_alone(tmp_path, foreign):
    write(tmp_path, range(1, 2))
    path = tmp_path / "metrics.jsonl"
    content = path.read_text() + foreign
    path.write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is not a line of metrics"):
        logger(tmp_path, start_step=1)
    assert path.read_text() == content


def test_numbers_that_are_not_finite_stay_valid_json_and_are_told(tmp_path, capsys):
    log = logger(tmp_path, tensorboard=True)
    log.step(1, record(1, loss=math.nan, grad_norm=math.inf), {})
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["grad_norm"] is None and line["tokens"] == 100
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}
    assert "step 1: loss is nan, grad_norm is inf" in capsys.readouterr().out
    assert math.isinf(events(tmp_path).Scalars("optim/grad_norm")[0].value)


def test_tensorboard_has_grouped_scalars_and_the_configuration(tmp_path):
    write(tmp_path, range(1, 7), tensorboard=True)
    reader = events(tmp_path)
    expected = {
        "train/loss": [2.0 / step for step in range(1, 7)],
        "optim/grad_norm": [0.5 * step for step in range(1, 7)],
        "optim/lr": [1e-3] * 6,
        "speed/tokens_per_second": [1234.5] * 6,
        "speed/step_seconds": [0.25] * 6,
        "memory/peak_gib": [0.1 * step for step in range(1, 7)],
        "eval/loss": [1.5] * 2,
        "eval/perplexity": [4.5] * 2,
    }
    for tag, values in expected.items():
        assert [e.value for e in reader.Scalars(tag)] == pytest.approx(values, rel=1e-6), tag
    assert [e.step for e in reader.Scalars("eval/loss")] == [3, 6]
    (text,) = reader.Tensors("config/text_summary")
    assert b'"seed": 0' in text.tensor_proto.string_val[0]


def test_without_tensorboard_there_is_no_event_file(tmp_path):
    write(tmp_path, range(1, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_without_a_terminal_about_twenty_plain_lines_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    log = logger(tmp_path, total_steps=200, progress=True)
    for step in range(1, 201):
        log.step(step, record(step, **({"eval_loss": 0.75} if step == 5 else {})), {})
    log.message("a message")
    log.close()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and "\r" not in out
    assert len(lines) == 20 + 3  # each tenth; the first, the evaluation, the message
    assert re.match(
        r"\d\d:\d\d:\d\d step 1/200, loss 2.0000, norm 0.50, lr 1.00e-03, 1,234 tok/s", lines[0]
    )
    assert "eval loss 0.7500" in lines[1] and lines[-1] == "a message"


def test_on_a_terminal_there_is_one_bar_and_messages_go_to_stdout(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = logger(tmp_path, total_steps=2, progress=True)
    for step in (1, 2):
        log.step(step, record(step), {})
    log.message("a message")
    log.close()
    out, err = capsys.readouterr()
    assert out == "a message\n"
    assert "2/2" in err and "loss 1.0000, norm 1.00, lr 1.00e-03, 1,234 tok/s" in err


def test_a_terminal_of_no_columns_gets_lines_as_a_file_does(tmp_path, capsys, monkeypatch):
    """As some containers' terminals say; tqdm would print empty bars."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
    log = logger(tmp_path, total_steps=2, progress=True)
    log.step(1, record(1), {})
    log.close()
    out, err = capsys.readouterr()
    assert "step 1/2, loss 2.0000" in out and err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_each_of_several_evaluation_sets_is_on_the_console(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    log = logger(tmp_path, total_steps=9, progress=True)
    log.step(
        1, record(1, **{"eval_loss": 0.5, "eval_loss/chats": 0.25, "eval_loss/maths": 0.75}), {}
    )
    log.close()
    assert "eval loss 0.5000 (chats 0.2500, maths 0.7500)" in capsys.readouterr().out


def test_what_is_waited_for_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(
    capsys, monkeypatch
):
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        now = iter([0.0, 1.0, 12.0, 13.0])
        monkeypatch.setattr(
            "torchsft.metrics.logger.time.monotonic", lambda now=now: next(now, 99.0)
        )
        with Waiting("answers", 32, "answers", shown=True) as waiting:
            for done in (0, 5, 6):
                waiting.done(done, "9 under way")
                time.sleep(0.11)  # tqdm draws ten times a second
        out, err = capsys.readouterr()
        if terminal:
            assert "5/32" in err and "9 under way" in err and out == ""
        else:
            assert (
                re.fullmatch(
                    r"\d\d:\d\d:\d\d answers: 5 of 32 answers, 9 under way, 00:12 so "
                    r"far\n",
                    out,
                )
                and err == ""
            )


def test_without_progress_only_messages_are_printed(tmp_path, capsys):
    log = logger(tmp_path)
    log.step(1, record(1), {})
    log.message("a message")
    log.close()
    assert capsys.readouterr() == ("a message\n", "")


@contextmanager
def files_end_at(size):
    """Writing beyond this many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_a_full_disk_cut_short_is_written_whole_as_soon_as_there_is_room(tmp_path):
    log = logger(tmp_path)
    log.step(1, record(1), {})
    with files_end_at((tmp_path / "metrics.jsonl").stat().st_size + 20):
        for step in (2, 3):
            with pytest.raises(
                OSError,
                match=r"metrics\.jsonl cannot be written or has vanished "
                r"\(File too large\)",
            ):
                log.step(step, record(step), {})
    log.step(4, record(4), {})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, **record(step)} for step in range(1, 5)]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_vanished_file_is_told_at_the_next_step(tmp_path, replaced):
    """Writing to a file without a name would succeed and tell nobody."""
    log = logger(tmp_path / "run")
    log.step(1, record(1), {})
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    if replaced:
        write(tmp_path / "run", [1])
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written or has vanished"):
        log.step(2, record(2), {})


def test_a_run_goes_on_without_tensorboard_where_its_file_cannot_be_written(tmp_path, monkeypatch):
    # its thread says what went wrong, too
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    log = logger(tmp_path, tensorboard=True)
    log.step(1, record(1), {})
    with (
        files_end_at(1000),
        pytest.raises(
            OSError,
            match=r"TensorBoard's file in .* cannot be "
            r"written",
        ),
    ):
        for _ in range(10_000):  # its thread writes when its buffer is full
            log.scalars(2, {"a/b": 1.0})
    log.step(2, record(2), {"a/b": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
