"""to-hf of a checkpoint of a run that goes on, saves beside and removes old checkpoints
meanwhile.
"""

from __future__ import annotations

import json
import threading

import pytest
import torch

import torchsft
from tests.checkpoint.sources import read_tensors
from tests.tiny import write_tiny_model
from tools.conversion import convert
from torchsft.checkpoint.state import Checkpointer, find_latest
from torchsft.config import InputError


class Run:
    """What a run does with its checkpoints: the values of step n are all n."""

    def __init__(self, directory):
        self.base = write_tiny_model(directory / "base")
        self.model = torchsft.load_model(self.base)
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.checkpoints = directory / "run" / "checkpoints"
        self.checkpointer = Checkpointer(self.checkpoints, keep=1)
        self.step = 0

    def save(self, ends=(257,)):
        self.step += 1
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                tensor.fill_(self.step)
        config, extra = (
            {"model": {"path": str(self.base)}},
            {"end_tokens": list(ends)} if ends else {},
        )
        self.checkpointer.save(self.step, self.model, self.optimizer, extra=extra, config=config)

    def saved(self):
        self.checkpointer.wait()
        assert not [report.error for report in self.checkpointer.reports() if report.error]
        return sorted(path.name for path in self.checkpoints.iterdir())


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def values(directory):
    return {
        value for tensor in read_tensors(directory).values() for value in tensor.unique().tolist()
    }


@pytest.mark.parametrize("moment", ["check_weights", "_check_room"])
def test_what_is_converted_stays_until_it_is(run, tmp_path, monkeypatch, moment):
    """`check_weights` comes while the conversion is planned, `_check_room` before the first file is
    written.
    """
    run.save()
    assert run.saved() == ["step-00000001"]
    original, during = getattr(convert, moment), []

    def go_on(*arguments):
        if not during:
            run.save()
            during.append(run.saved())
        return original(*arguments)

    monkeypatch.setattr(convert, moment, go_on)
    convert.to_hf(
        run.checkpoints / "step-00000001", tmp_path / "hf", dtype="fp32", workers=1, progress=False
    )
    assert during == [["step-00000001", "step-00000002"]] and values(tmp_path / "hf") == {1.0}
    run.save()
    assert run.saved() == ["step-00000003"]  # nobody reads it any more


def test_beside_a_thread_that_saves_without_a_break(run, tmp_path):
    """Each conversion gives one checkpoint, whole, or says that it has just been removed."""
    run.save()
    run.saved()
    stop = threading.Event()

    def go_on():
        while not stop.is_set():
            run.save()

    thread = threading.Thread(target=go_on)
    thread.start()
    converted = 0
    try:
        for attempt in range(8):
            latest, out = find_latest(run.checkpoints)[0], tmp_path / f"hf-{attempt}"
            try:
                convert.to_hf(latest, out, dtype="fp32", workers=1, progress=False)
            except InputError as error:
                assert "removed" in str(error) or "has no .metadata" in str(error), error
                assert not out.exists()
                continue
            assert values(out) == {float(latest.rpartition("-")[2])}
            converted += 1
    finally:
        stop.set()
        thread.join()
    assert converted >= 4
    assert run.saved()[-1] == f"step-{run.step:08d}"


def test_the_ends_of_trained_turns_are_those_of_the_checkpoint(run, tmp_path):
    """As in the run's own export; a checkpoint of an older version knows none, and the base's files
    stay.
    """
    (run.base / "generation_config.json").write_text('{"eos_token_id": 5}')
    for ends, wanted in (((257, 3), [5, 257, 3]), ((), 5)):
        run.save(ends)
        run.saved()
        out = tmp_path / f"hf-{len(ends)}"
        convert.to_hf(run.checkpoints / f"step-{run.step:08d}", out, workers=1, progress=False)
        assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": wanted}
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == (
            wanted if ends else None
        )
