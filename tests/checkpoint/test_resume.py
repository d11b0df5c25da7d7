"""How a run starts in a directory that an earlier one has used: anew, in its place, longer, or from
another checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.kill import stored
from tests.test_trainer import run_recipe
from tests.tiny import write_conversations, write_tiny_model
from torchsft.checkpoint.overwrite import make_way
from torchsft.config import Checkpoint, Config, Data, InputError, Parallel
from torchsft.trainer import Trainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    write_tiny_model(directory / "model", num_hidden_layers=2)
    write_conversations(directory / "train.jsonl", 40)
    return directory


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, capsys):
    """Trains in tmp_path/run with these options more; what was printed, as (out, err)."""

    def train(*options):
        usual = {
            "--model.path": inputs / "model",
            "--data.train": inputs / "train.jsonl",
            "--data.seq-len": 192,
            "--train.global-batch-size": 2,
            "--checkpoint.every": 2,
            "--checkpoint.mode": "sync",
            "--checkpoint.export": "none",
            "--optim.lr": 1e-3,
            "--optim.schedule": "constant",
            "--output": tmp_path / "run",
        }
        fixed = [
            word for name, value in usual.items() if name not in options for word in (name, value)
        ]
        run_recipe(monkeypatch, *fixed, *options)
        return capsys.readouterr()

    return train


def steps(output: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ]


def interrupt(monkeypatch, step):
    """The run breaks in this step, when the results of the one before have been read."""
    update_weights = Trainer.update_weights

    def broken(self, *arguments):
        if self.counters.step + 1 == step:
            raise ArithmeticError("broken")
        return update_weights(self, *arguments)

    monkeypatch.setattr(Trainer, "update_weights", broken)


def test_where_no_checkpoint_was_left_the_same_output_starts_anew_with_other_options(
    run, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    with monkeypatch.context() as context, pytest.raises(ArithmeticError):
        interrupt(context, 2)
        run("--train.steps", 2, "--train.seed", 1)
    (output / "mine.txt").write_text("kept")
    (output / "answers-before.jsonl").write_text("of the run that broke")
    old_events = set((output / "tensorboard").iterdir())
    assert steps(output) == [1] and len(old_events) == 1
    out, _ = run("--train.steps", 2, "--train.seed", 2)
    assert "left no checkpoint, so it starts anew (train.seed: 1 -> 2)" in out
    assert (
        steps(output) == [1, 2]
        and json.loads((output / "config.json").read_text())["train"]["seed"] == 2
    )
    assert (output / "mine.txt").exists() and not (output / "answers-before.jsonl").exists()
    assert not old_events & set((output / "tensorboard").iterdir())
    with pytest.raises(
        InputError,
        match=r"another run, which differs in train.seed: 2 -> 3; .* "
        r"--overwrite to replace",
    ):
        run("--train.steps", 2, "--train.seed", 3)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", ["hf", "hf-step-00000002"])
def test_an_export_without_a_checkpoint_is_a_run_that_got_somewhere(
    run, tmp_path, monkeypatch, name, remote
):
    output = tmp_path / "run"
    beside = tmp_path / "remote" if remote else output
    more = ["--train.steps", 2] + (["--checkpoint.remote", f"file://{beside}"] if remote else [])
    with monkeypatch.context() as context, pytest.raises(ArithmeticError):
        interrupt(context, 1)
        run(*more, "--train.seed", 1)
    (beside / name).mkdir(parents=True)
    (beside / name / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"another run, which differs in train.seed: 1 -> 2"):
        run(*more, "--train.seed", 2)


@pytest.mark.parametrize("remote", [False, True])
def test_a_place_that_cannot_take_the_export_is_told_before_training(run, tmp_path, remote):
    output = tmp_path / "run"
    beside = tmp_path / "remote" if remote else output
    more = ["--checkpoint.remote", f"file://{beside}"] if remote else []
    (beside / "hf").mkdir(parents=True)
    (beside / "hf" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="holds no exported model; choose another"):
        run("--train.steps", 1, "--checkpoint.export", "bf16", *more)
    assert not (output / "config.json").exists() and (beside / "hf" / "mine.txt").exists()
    run("--train.steps", 1, *more)  # it exports nothing


def test_a_model_that_its_own_export_would_replace_is_told_before_training(run, inputs, tmp_path):
    model = tmp_path / "run" / "hf"
    shutil.copytree(inputs / "model", model)
    with pytest.raises(InputError, match="is also its source; choose another"):
        run("--train.steps", 1, "--checkpoint.export", "bf16", "--model.path", model)
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_config_json_of_a_model_is_not_taken_for_a_run_without_checkpoints(
    run, inputs, tmp_path
):
    before = (inputs / "model" / "config.json").read_bytes()
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="is not the configuration of a run of torchsft"):
            run("--output", inputs / "model", *more)
    assert (inputs / "model" / "config.json").read_bytes() == before


def test_overwrite_replaces_a_run_once_and_then_continues_its_own(run, tmp_path, monkeypatch):
    output = tmp_path / "run"
    run("--train.steps", 6, "--checkpoint.export", "fp32")
    (output / "mine.txt").write_text("kept")
    (output / "checkpoints" / "notes.txt").write_text("kept")
    again = ["--train.steps", 4, "--train.seed", 1, "--overwrite", "--checkpoint.export", "none"]
    with monkeypatch.context() as context, pytest.raises(ArithmeticError):
        interrupt(context, 4)
        run(*again)
    assert not (output / "hf").exists() and steps(output) == [1, 2, 3]
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"notes.txt", "step-00000002"} and (output / "mine.txt").exists()
    out, err = run(*again)  # as torchrun --max-restarts does
    assert "continuing from" in out and "step-00000002 at step 2 of 4" in out
    assert "it is continued, not replaced" in err and steps(output) == [1, 2, 3, 4]
    # the run found is another one again
    out, _ = run("--train.steps", 3, "--train.seed", 1, "--overwrite")
    assert "--overwrite: the earlier run" in out and steps(output) == [1, 2, 3]


def test_overwrite_does_not_delete_what_the_run_reads(run, inputs, tmp_path):
    run("--train.steps", 2, "--checkpoint.export", "fp32")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(
        InputError,
        match=r"would delete .*checkpoints, but this run reads "
        r".*step-00000002 there",
    ):
        run("--train.steps", 4, "--overwrite", "--checkpoint.resume", checkpoint)
    with pytest.raises(InputError, match=r"would delete .*hf, but this run reads .*hf there"):
        run(
            "--train.steps",
            4,
            "--overwrite",
            "--model.path",
            tmp_path / "run" / "checkpoints" / ".." / "hf",
        )
    assert checkpoint.exists() and (tmp_path / "run" / "hf" / "config.json").exists()


@pytest.mark.parametrize("source", ["run", "r*/generated/*.jsonl:2.0", "held=run/gen*"])
def test_files_that_a_directory_or_glob_names_are_inputs_too(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "run" / "generated" / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}\n")
    data = Data(eval=(source,)) if "=" in source else Data(train=(source,))
    make_way(Config(output="run", overwrite=True, data=data))
    assert rows.exists()
    make_way(Config(output="run", overwrite=True))
    assert not rows.exists()


def test_links_are_removed_and_what_they_lead_to_stays(tmp_path):
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for name in ("checkpoints", "tensorboard", "flight-recorder", "hf", "generated"):
        (elsewhere / name / "step-00000001").mkdir(parents=True)
        (elsewhere / name / "events.out.tfevents.1").write_text("kept")
    (elsewhere / "metrics.jsonl").write_text("kept")
    output.mkdir()
    before = sorted(elsewhere.rglob("*"))
    for path in elsewhere.iterdir():
        (output / path.name).symlink_to(path)
    config = Config(output=str(output), overwrite=True)
    assert len(make_way(config)) == 6
    assert [path.name for path in output.iterdir()] == ["checkpoints"] and not (
        output / "checkpoints"
    ).is_symlink()
    (output / "checkpoints" / "step-00000001").symlink_to(elsewhere)
    make_way(config)
    assert not list((output / "checkpoints").iterdir()) and sorted(elsewhere.rglob("*")) == before


def test_overwrite_removes_flight_records_whose_directory_torch_does_not_make(tmp_path):
    records = tmp_path / "flight-recorder"
    config = Config(output=str(tmp_path), overwrite=True, parallel=Parallel(flight_recorder=100))
    for names, others in ((["rank_0", "rank_13"], []), (["rank_1", "mine"], ["mine"])):
        records.mkdir(exist_ok=True)
        for name in names:
            (records / name).write_bytes(b"")
        assert make_way(config) == [str(records)]
        assert [path.name for path in records.iterdir()] == others
    (records / "mine").unlink()
    make_way(Config(output=str(tmp_path), overwrite=True))
    assert not records.exists()


def test_overwrite_removes_remote_checkpoints(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("step-00000001/checkpoint.json", "step-00000001/trainer.json", "mine/file"):
        system.pipe(f"/overwritten/checkpoints/{name}", b"{}")
    config = Config(
        output=str(tmp_path), overwrite=True, checkpoint=Checkpoint(remote="memory://overwritten")
    )
    removed = make_way(config)
    assert removed == ["memory://overwritten/checkpoints/step-00000001"]
    assert [path.rsplit("/", 1)[-1] for path in system.find("/overwritten")] == ["file"]


def test_a_finished_run_that_is_extended_is_the_longer_run(run, tmp_path):
    """With a constant learning rate the course is the same: weights and moments bit for bit, here
    and from another output.
    """
    longer = ["--train.steps", 7]
    run(*longer, "--output", tmp_path / "whole")
    run("--train.steps", 4)
    out, _ = run(
        *longer,
        "--output",
        tmp_path / "other",
        "--checkpoint.resume",
        tmp_path / "run/checkpoints/step-00000004",
    )
    assert "step-00000004 at step 4 of 7" in out and steps(tmp_path / "other") == [5, 6, 7]
    out, _ = run(*longer)
    assert "train.steps: 4 -> 7: its constant schedule now ends at step 7" in out
    assert "goes on at 0.001 and ends at 0.001" in out
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7]
    whole = stored(tmp_path / "whole" / "checkpoints" / "step-00000007")
    for name in ("run", "other"):
        found = stored(tmp_path / name / "checkpoints" / "step-00000007")
        assert found.keys() == whole.keys()
        assert not [key for key in whole if not torch.equal(found[key], whole[key])], name


def test_the_new_course_of_the_schedule_is_said_and_followed(run, tmp_path):
    run("--train.steps", 4, "--optim.schedule", "linear")
    out, _ = run("--train.steps", 8, "--optim.schedule", "linear")
    assert "goes on at 0.0005 and ends at 0.000125" in out  # 1 - 4/8 and 1 - 7/8 of 1e-3
    lines = [
        json.loads(line)["lr"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4])


def test_a_run_from_anothers_checkpoint_continues_its_own_when_it_is_started_again(
    run, tmp_path, monkeypatch
):
    run("--train.steps", 2)
    other = [
        "--output",
        tmp_path / "other",
        "--checkpoint.resume",
        tmp_path / "run" / "checkpoints" / "step-00000002",
    ]
    with monkeypatch.context() as context, pytest.raises(ArithmeticError):
        interrupt(context, 6)
        run("--train.steps", 6, *other)
    out, _ = run("--train.steps", 6, *other)
    assert "other/checkpoints/step-00000004 at step 4 of 6" in out and steps(
        tmp_path / "other"
    ) == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "length", [["--train.steps", 3], ["--train.steps", "None", "--train.epochs", 1]]
)
def test_a_run_is_not_shortened_below_what_it_has_reached(run, tmp_path, monkeypatch, length):
    run("--train.steps", 24, "--checkpoint.every", 24)
    monkeypatch.setattr(
        "torchsft.checkpoint.huggingface.load_weights",
        lambda *_: pytest.fail("weights were loaded"),
    )
    with pytest.raises(
        InputError,
        match=r"but it has reached step 24 \(.*step-00000024\); give at "
        r"least that many",
    ):
        run(*length)


def test_the_debug_run_is_extended_into_another_output(tmp_path, monkeypatch, capsys):
    """Its generated inputs lie in the output directory, and are the same in every one."""
    options = [
        "debug",
        "--eval.answers",
        0,
        "--checkpoint.export",
        "none",
        "--optim.warmup-steps",
        0,
        "--checkpoint.every",
        0,
    ]
    run_recipe(monkeypatch, *options, "--train.steps", 1, "--output", tmp_path / "a")
    more = [
        "--checkpoint.resume",
        tmp_path / "a" / "checkpoints" / "step-00000001",
        "--output",
        tmp_path / "b",
    ]
    run_recipe(monkeypatch, *options, "--train.steps", 2, *more)
    assert steps(tmp_path / "b") == [2]
    assert "train.steps: 1 -> 2" in capsys.readouterr().out
