"""tools/convert_checkpoint.py as a command: help, the whole way with two processes, exit codes and
sentences.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint.sources import change_tensors, copy, read_tensors, same_bits, write_source
from tools import convert_checkpoint

TOOL = str(Path(convert_checkpoint.__file__))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("source") / "hf", torch.bfloat16, sharded=True, mtp=True
    )


def command(*arguments):
    """A process of its own: exit code, stdout, stderr."""
    ended = subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """The same within this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        try:
            code = convert_checkpoint.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_the_whole_way_with_two_processes(source, tmp_path):
    code, out, err = command("to-dcp", source, tmp_path / "dcp", "--workers", "2")
    assert code == 0 and f"{tmp_path / 'dcp'}: 1 files of weights" in out and "Traceback" not in err
    code, out, err = command(
        "to-hf", tmp_path / "dcp", tmp_path / "hf", "--max-shard-size", "60KB", "--workers", "2"
    )
    assert code == 0 and f"{tmp_path / 'hf'}: 4 files of weights" in out, err
    assert "%" not in err and "\r" not in err  # no bar off a terminal
    before, after = read_tensors(source), read_tensors(tmp_path / "hf")
    assert before.keys() == after.keys() and all(
        same_bits(before[key], after[key]) for key in before
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "hf"]


def test_help_of_every_command(call):
    for arguments in ((), ("to-dcp",), ("to-hf",), ("verify",), ("info",)):
        code, out, _ = call(*arguments, "--help")
        assert code == 0 and "usage:" in out
    assert "--base" in call("to-hf", "--help")[1] and "--tolerance" in call("verify", "--help")[1]
    assert "verify A [B]" in call("--help")[1]


def test_help_needs_no_torch():
    """It comes at once."""
    code = (
        f"import sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(Path(TOOL).parent)!r})\n"
    )
    code += (
        "import convert_checkpoint\ntry: convert_checkpoint.main()\nexcept SystemExit: "
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.endswith("False\n"), ended.stderr


def test_exit_codes_and_sentences(source, tmp_path, call):
    one = "--workers", "1"
    assert call("to-dcp", source, tmp_path / "dcp", *one)[0] == 0
    code, out, _ = call("verify", source, tmp_path / "dcp", *one)
    assert code == 0 and out.endswith("no differences\n") and "tensors compared" in out
    assert call("verify", tmp_path / "dcp", *one)[0] == 0
    assert "converted directory" in call("info", tmp_path / "dcp")[1]

    other = copy(source, tmp_path / "other")
    change_tensors(other, {"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)})
    change_tensors(other, {"model.norm.weight": None})
    code, out, _ = call("verify", tmp_path / "dcp", other, *one)
    assert (
        code == 1
        and "has 1 tensor (model.norm.weight)" in out
        and out.endswith("not the same, or damaged\n")
    )

    for arguments, sentence in (
        (("to-dcp", other, tmp_path / "no"), "1 missing: model.norm.weight"),
        (("to-dcp", tmp_path / "nowhere", tmp_path / "no"), "does not exist"),
        (("to-dcp", source, tmp_path / "dcp"), "exists already"),
        (("to-hf", source, tmp_path / "no"), "has no .metadata"),
        (("to-hf", tmp_path / "dcp", source / "config.json" / "no"), "Not a directory"),
        (("info", tmp_path), "has no config.json"),
        (("verify", tmp_path / "nowhere"), "does not exist"),
    ):
        code, out, err = call(*arguments, *(one if arguments[0] != "info" else ()))
        assert (code, out, err.count("\n")) == (1, "", 1), (arguments, err)
        assert err.startswith("error: ") and sentence in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "other"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("to-dcp", "s3://bucket/model", "out"), "is a URL; this tool works on local directories"),
        (("to-hf", "dcp", "hf", "--dtype", "int8"), "invalid choice"),
        (("to-hf", "dcp", "hf", "--max-shard-size", "5 apples"), "is no size"),
        (("to-hf", "dcp", "hf", "--max-shard-size", "0GB"), "is no size"),
        (("to-dcp", "a", "b", "--workers", "0"), "at least 1"),
        (("verify", "a", "b", "--tolerance", "-1"), "at least 0"),
        (("verify", "a", "b", "--tolerance", "nan"), "at least 0"),
        ((), "required: command"),
    ],
)
def test_command_lines_that_are_refused(call, arguments, sentence):
    code, _, err = call(*arguments)
    assert code == 2 and sentence in err


def test_sizes():
    assert [convert_checkpoint.size(text) for text in ("5GB", "500mb", "4GiB", "1.5K", "7")] == [
        5e9,
        5e8,
        4 * 2**30,
        1500,
        7,
    ]
    with pytest.raises(argparse.ArgumentTypeError):
        convert_checkpoint.size("GB")
