"""--checkpoint.export-every: what is exported, what a conversion makes of the checkpoint beside it,
and what faults do.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from recipes import deepseek_v3_sft
from tests.checkpoint.sources import change_config, read_tensors, same_bits
from tests.distributed.kill import attend, options, write_inputs
from tools.conversion.convert import to_hf
from torchsft.checkpoint import state
from torchsft.checkpoint.weight_files import SafetensorsWriter

STEPS = 6
OTHERS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def argv_for(inputs: Path, output: Path, *more: str) -> list[str]:
    """Exports after steps 2 and 4, and of the last one as hf/."""
    return [
        *options(inputs, output, STEPS),
        "--checkpoint.export-every",
        "2",
        "--checkpoint.keep",
        "0",
        *more,
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ranks):
    """Model, data, and a run of two ranks that nothing disturbed. The base's end of text is not
    what ends turns.
    """
    directory = write_inputs(tmp_path_factory.mktemp("exports"))
    change_config(directory / "model", eos_token_id=200)
    (directory / "model" / "generation_config.json").unlink()
    log = str(directory / "log.txt")
    run = {"size": 2, "argv": argv_for(directory, directory / "undisturbed"), "log": log}
    ((codes, _),) = ranks(1, attend, **run)
    assert codes == [0, 0], Path(log).read_text()[-3000:]
    return directory


def assert_same_export(one: Path, other: Path) -> None:
    before, after = read_tensors(one), read_tensors(other)
    assert before.keys() == after.keys() and all(
        same_bits(before[key], after[key]) for key in before
    )
    for name in OTHERS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def exports_of(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if "hf" in path.name)


def test_each_export_is_what_a_conversion_of_the_checkpoint_gives(inputs, tmp_path):
    output = inputs / "undisturbed"
    assert exports_of(output) == ["hf", "hf-step-00000002", "hf-step-00000004"]
    for step, name in ((2, "hf-step-00000002"), (4, "hf-step-00000004"), (6, "hf")):
        checkpoint = output / "checkpoints" / f"step-{step:08d}"
        to_hf(checkpoint, tmp_path / name, dtype="fp32", workers=1, progress=False)
        assert_same_export(output / name, tmp_path / name)
    assert (
        '"eos_token_id": [\n    200,\n    257\n  ]'
        in (output / "hf" / "generation_config.json").read_text()
    )
    two, four = (
        read_tensors(output / f"hf-step-0000000{step}")["model.norm.weight"] for step in (2, 4)
    )
    assert not torch.equal(two, four)


def test_a_run_that_ended_before_an_export_makes_up_for_it(inputs, ranks, tmp_path):
    """Continued after step 4, whose export was under way; that of step 2 is there and stays as it
    is.
    """
    output, log = tmp_path / "run", tmp_path / "log.txt"
    shutil.copytree(inputs / "undisturbed", output)
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(output / "hf")
    (output / "hf-step-00000004").rename(output / ".hf-step-00000004.incomplete")
    before = (output / "hf-step-00000002").stat().st_ino
    ((codes, _),) = ranks(1, attend, size=2, argv=argv_for(inputs, output), log=str(log))
    assert codes == [0, 0], log.read_text()[-3000:]
    assert log.read_text().count("exporting fp32 weights") == 2
    assert exports_of(output) == exports_of(inputs / "undisturbed")
    for name in exports_of(output):
        assert_same_export(output / name, inputs / "undisturbed" / name)
    assert (output / "hf-step-00000002").stat().st_ino == before


def run_with_full_disk(argv: list[str], failures: int) -> str:
    """On each rank: the recipe, where the first `failures` exports find rank 1's disk full after
    some tensors. What it raised.
    """
    write, left = SafetensorsWriter.write, [failures]

    def write_or_fail(self, key, values):
        if os.environ["RANK"] == "1" and left[0] and key.endswith("o_proj.weight"):
            left[0] -= 1
            raise OSError(28, "No space left on device")
        write(self, key, values)

    SafetensorsWriter.write = write_or_fail
    sys.argv = ["deepseek_v3_sft.py", *argv]
    try:
        deepseek_v3_sft.main()
    except OSError as error:
        return str(error)
    finally:
        SafetensorsWriter.write = write
    return ""


def test_a_full_disk_ends_the_run_on_all_ranks_or_is_told(inputs, ranks, tmp_path):
    output, undisturbed = tmp_path / "run", inputs / "undisturbed"
    told = ranks(2, run_with_full_disk, argv=argv_for(inputs, output), failures=1)
    said = (
        f"the export to {output}/hf-step-00000002 could not be written (rank 1: OSError: [Errno "
        f"28] No space left on device)"
    )
    assert told == [said, said]
    assert exports_of(output) == []  # nothing half done either
    assert state.find_latest(output / "checkpoints") == (f"{output}/checkpoints/step-00000002", [])

    bucket = tmp_path / "bucket"
    remote = argv_for(
        inputs,
        tmp_path / "away",
        "--checkpoint.on-error",
        "continue",
        "--checkpoint.remote",
        f"file://{bucket}",
    )
    assert ranks(2, run_with_full_disk, argv=remote, failures=1) == ["", ""]
    assert exports_of(bucket) == ["hf", "hf-step-00000004"]
    for name in exports_of(bucket):
        assert_same_export(bucket / name, undisturbed / name)

    # it makes up for step 2
    assert ranks(2, run_with_full_disk, argv=argv_for(inputs, output), failures=0) == ["", ""]
    assert exports_of(output) == exports_of(undisturbed)
    for name in exports_of(output):
        assert_same_export(output / name, undisturbed / name)
