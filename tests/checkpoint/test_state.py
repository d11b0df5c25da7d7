"""Training checkpoints: exact restoration, asynchronous saving, atomicity, retention, refusals."""

from __future__ import annotations

import itertools
import json
import math
import resource
import shutil
import signal
import threading
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from tests.checkpoint import savers
from torchsft.checkpoint import state, writer
from torchsft.checkpoint.manifest import damaged
from torchsft.checkpoint.reader import RangeReader
from torchsft.checkpoint.storage import Folder
from torchsft.config import InputError


class Toy(nn.Module):
    """Matrices, a bias and both kinds of buffers."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.down = nn.Linear(width, 1)
        self.register_buffer("kept", torch.full((3,), 5.01))
        self.register_buffer("transient", torch.zeros(2), persistent=False)


def build(seed, width=6):
    torch.manual_seed(seed)
    model = Toy(width)
    matrices, rest = (
        [p for p in model.parameters() if p.ndim > 1],
        [p for p in model.parameters() if p.ndim == 1],
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.05)


def train(model, optimizer, steps):
    """Steps on random data from torch's global generator: any difference in any state shows."""
    for _ in range(steps):
        model.down(torch.tanh(model.up(torch.randn(8, 4)))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def begin(directory, **options):
    return state.Checkpointer(directory, **({"mode": "sync"} | options))


def save(directory, step, model, optimizer, score=None, options=(), **extra):
    """Written at once; the checkpoint's path."""
    checkpointer = begin(directory, **dict(options))
    assert checkpointer.save(
        step, model, optimizer, extra=extra, config={"train": {"seed": 3}}, score=score
    )
    (report,) = checkpointer.reports()
    assert (report.step, report.error) == (step, None)
    return report.path


def steps_in(directory):
    return sorted(int(name.rsplit("-", 1)[1]) for name in Folder(directory).names())


@pytest.fixture(params=["without a process group", "with one rank"])
def world(request):
    if request.param == "with one rank":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_restored_run_continues_bit_for_bit(world, tmp_path, recwarn):
    model, optimizer = build(0)
    train(model, optimizer, 3)
    model.kept += 1
    path = save(tmp_path, 3, model, optimizer, position=[1, 20], loss=math.nan)
    expected = train(model, optimizer, 3)

    other, other_optimizer = build(1)  # another seed; its optimizer has not stepped yet
    extra = state.load(path, other, other_optimizer)
    assert extra["position"] == [1, 20] and math.isnan(extra["loss"])
    for name, tensor in train(other, other_optimizer, 3).items():
        assert torch.equal(tensor, expected[name]), name
    assert state.saved_config(path) == {"train": {"seed": 3}}
    assert not [w for w in recwarn if "torch.distributed is disabled" in str(w.message)]


def test_loading_touches_neither_options_nor_other_state(tmp_path):
    """State is created by a step with zero learning rate: weight decay must not act, and the
    options must come back.
    """
    model, optimizer = build(0)
    train(model, optimizer, 2)
    path = save(tmp_path, 2, model, optimizer)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    other, other_optimizer = build(1)
    for group in other_optimizer.param_groups:
        group["lr"] = 0.7
    other.transient += 4
    # a left-over gradient must not stop the state's creation
    other.up.weight.grad = torch.ones_like(other.up.weight)
    state.load(path, other, other_optimizer)
    assert all(torch.equal(v, saved[k]) for k, v in other.state_dict().items())
    assert [g["lr"] for g in other_optimizer.param_groups] == [0.7, 0.7]
    assert [g["weight_decay"] for g in other_optimizer.param_groups] == [0.1, 0.0]
    assert torch.equal(other.transient, torch.full((2,), 4.0))
    assert all(p.grad is None for p in other.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][name]), name


def test_a_checkpoint_before_the_first_step_restores_a_fresh_optimizer(tmp_path):
    model, optimizer = build(0)
    path = save(tmp_path, 0, model, optimizer)
    assert not optimizer.state
    expected = train(model, optimizer, 3)
    other, other_optimizer = build(1)
    train(other, other_optimizer, 2)
    state.load(path, other, other_optimizer)
    for name, tensor in train(other, other_optimizer, 3).items():
        assert torch.equal(tensor, expected[name]), name


def test_moments_of_another_dtype_keep_it(tmp_path):
    """`Optimizer.load_state_dict` would turn bf16 moments into fp32."""
    model, optimizer = build(0)
    train(model, optimizer, 1)
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()
    path = save(tmp_path, 1, model, optimizer)
    saved = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
    state.load(path, model, optimizer)
    for value, entry in zip(saved, optimizer.state.values(), strict=True):
        assert entry["exp_avg"].dtype == torch.bfloat16 and torch.equal(entry["exp_avg"], value)


@pytest.fixture(params=["path", "file", "memory"])
def place(request, tmp_path):
    """Of a run's checkpoints."""
    if request.param == "memory":
        yield f"memory://{tmp_path.name}/checkpoints"
        fsspec.filesystem("memory").store.clear()
    else:
        yield f"{'file://' if request.param == 'file' else ''}{tmp_path}/checkpoints"


def test_only_tensors_are_in_the_checkpoint(tmp_path):
    """Anything else would be pickled."""
    model, optimizer = build(0)
    train(model, optimizer, 1)
    path = save(tmp_path, 1, model, optimizer)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert {type(entry).__name__ for entry in stored.values()} == {"TensorStorageMetadata"}
    assert {name.split(".")[0] for name in stored} == {"model", "optimizer", "rng"}
    assert {"model.kept", "optimizer.state.up.weight.exp_avg", "rng.0.cpu"} <= stored.keys()
    assert "model.transient" not in stored


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_itself_loads_a_checkpoint(tmp_path):
    model, optimizer = build(0)
    train(model, optimizer, 2)
    path = save(tmp_path, 2, model, optimizer)
    targets = {
        f"model.{name}": torch.zeros_like(tensor) for name, tensor in model.state_dict().items()
    }
    moments = {
        f"optimizer.state.{n}.exp_avg_sq": optimizer.state[p]["exp_avg_sq"]
        for n, p in model.named_parameters()
    }
    targets |= {name: torch.zeros_like(tensor) for name, tensor in moments.items()}
    dcp.load(targets, checkpoint_id=path)
    for name, tensor in {
        **{f"model.{n}": t for n, t in model.state_dict().items()},
        **moments,
    }.items():
        assert torch.equal(targets[name], tensor), name


def test_a_checkpoint_of_an_older_version_opens():
    """Written by commit 1e9825c, which made DCP's files by its own hand and took CRC-32 of them:
    `Toy` after 2 steps of `train` of `build(0)`.
    """
    path = Path(__file__).parent / "written_by_1e9825c"
    expected, expected_optimizer = build(0)
    train(expected, expected_optimizer, 2)
    model, optimizer = build(1)
    assert state.load(path, model, optimizer) == {"position": [1, 20]}
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, expected.state_dict()[name], rtol=1e-5, atol=1e-6), name
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert float(optimizer.state[one]["step"]) == 2
        moments = optimizer.state[one]["exp_avg"], expected_optimizer.state[other]["exp_avg"]
        assert torch.allclose(*moments, rtol=1e-5, atol=1e-6)
    assert damaged(Folder(path)) == []
    manifest = json.loads((path / "checkpoint.json").read_text())
    assert all("crc32" in entry for entry in manifest["files"].values())


# --------------------------------------------------------------------------------------------------
# asynchronous


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    """The thread writes only after everything has changed. The host buffers are those of the save
    before.
    """
    model, optimizer = build(0)
    train(model, optimizer, 2)
    checkpointer = begin(tmp_path, mode="async")
    write, may_write = writer.write_archive, threading.Event()
    monkeypatch.setattr(
        writer, "write_archive", lambda *arguments: may_write.wait(60) and write(*arguments)
    )
    states, random_states, buffers, path = {}, {}, {}, None
    for step in (2, 3):
        states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        may_write.clear()
        assert checkpointer.save(step, model, optimizer, extra={"step": step}, config={})
        assert checkpointer.reports() == [] and state.find_latest(tmp_path)[0] == path
        random_states[step] = torch.get_rng_state()
        train(model, optimizer, 1)
        may_write.set()
        checkpointer.wait()
        buffers[step] = [tensor.data_ptr() for tensor in checkpointer._stager.host.values()]
        (report,) = checkpointer.reports()
        path = report.path
        assert (
            report.error is None
            and path == str(tmp_path / f"step-{step:08d}") == state.find_latest(tmp_path)[0]
        )
        assert report.bytes == sum(
            file.stat().st_size for file in Path(path).iterdir() if file.name != "checkpoint.json"
        )
        assert report.stall_seconds > 0 and report.write_seconds > 0
    assert buffers[2] == buffers[3] and checkpointer.reports() == []
    for step in (2, 3):
        other, other_optimizer = build(1)
        assert state.load(tmp_path / f"step-{step:08d}", other, other_optimizer) == {"step": step}
        assert all(
            torch.equal(tensor, states[step][name]) for name, tensor in other.state_dict().items()
        )
        assert {float(entry["step"]) for entry in other_optimizer.state.values()} == {step}
        assert torch.equal(torch.get_rng_state(), random_states[step])


@pytest.mark.gpu
def test_a_gpu_is_copied_to_pinned_memory(tmp_path):
    model, optimizer = build(0)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpointer, buffers = begin(tmp_path, mode="async"), []
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        checkpointer.save(step, model, optimizer, extra={}, config={})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        checkpointer.wait()
        assert [report.error for report in checkpointer.reports()] == [None]
        buffers.append(
            {
                name: tensor.data_ptr()
                for name, tensor in checkpointer._stager.host.items()
                if tensor.is_pinned()
            }
        )
        state.load(tmp_path / f"step-{step:08d}", model, optimizer)
        assert all(
            torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()
        )
    assert (
        buffers[0] == buffers[1]
        and "model.up.weight" in buffers[0]
        and "rng.0.cuda" not in buffers[0]
    )


def test_a_synchronous_save_copies_nothing(tmp_path):
    model, optimizer = build(0)
    for checkpointer, now in (
        (begin(tmp_path / "a"), False),
        (begin(tmp_path / "b", mode="async"), True),
    ):
        checkpointer.save(1, model, optimizer, extra={}, config={}, now=now)
        (report,) = checkpointer.reports()
        assert (
            not checkpointer._stager.host
            and report.error is None
            and report.stall_seconds == report.write_seconds
        )


RANKS = 4


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """What 4 ranks saw."""
    return ranks(RANKS, savers.saves, directory=str(tmp_path_factory.mktemp("saves")))


def same(values):
    """The value that all ranks have."""
    assert all(value == values[0] for value in values), values
    return values[0]


def test_ranks_save_the_state_at_the_call(saved):
    assert same([seen["unfinished"] for seen in saved]) == ([], (None, []))
    (report,), restored = same([seen["changed"] for seen in saved])
    assert report.error is None and restored == ([], {"step": 1})


def test_replicas_share_the_writing(saved):
    """The bias of 370 numbers with its moments is the most that cannot be cut; every rank has a
    random state of 5 KB.
    """
    sizes = [seen["own bytes"] for seen in saved]
    assert max(sizes) - min(sizes) < 2 * (37 * 24 * 4) + 10 * 1500


def test_a_save_beside_another_is_skipped_or_waits_on_all_ranks(saved):
    assert same([seen["skip"] for seen in saved]) == [True, False, True]
    assert [(r.step, r.error) for r in same([seen["skip reports"] for seen in saved])] == [
        (1, None),
        (3, None),
    ]
    assert same([seen["wait"] for seen in saved]) == ([True, True], [1])
    assert [(r.step, r.error) for r in same([seen["wait reports"] for seen in saved])] == [
        (2, None)
    ]


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_all_ranks_learn_the_failure_of_one(saved, mode):
    reports, names = same([seen[mode] for seen in saved])
    assert names == ["step-00000001", "step-00000005"]
    errors = {report.step: report.error for report in reports}
    assert errors.pop(1) is None and errors.pop(5) is None
    assert (
        "step-00000002 could not be written (rank 2: OSError: [Errno 28] No space left on device); "
        "older" in errors.pop(2)
    )
    assert (
        "step-00000003 could not be written (rank 0: PermissionError: [Errno 13] no)"
        in errors.pop(3)
    )
    if mode == "async":
        assert (
            "step-00000004 could not be written (rank 1: MemoryError: no host memory)"
            in errors.pop(4)
        )
    assert not errors
    assert same([seen[f"{mode} restored"] for seen in saved]) == (
        ([], {"step": 1}),
        ([], {"step": 5}),
    )


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_vanished_directory_is_said_and_not_made_again(saved, mode):
    (report,), exists = same([seen[f"{mode} vanished"] for seen in saved])
    assert (
        "step-00000006 could not be written (rank 0: FileNotFoundError" in report.error
        and not exists
    )


def test_all_ranks_refuse_what_one_cannot_read(saved):
    assert same([seen["refused"] for seen in saved]) == [
        "rank 1 cannot read it",
        "removed for rank 2",
    ]


def test_the_death_of_a_rank_ends_a_save_and_leaves_the_older_one(ranks, tmp_path):
    (first, error), (second, _) = ranks(2, savers.killed, directory=str(tmp_path))
    assert (first, second) == (0, -9) and "step-00000002 could not be written" in error
    latest, passed = state.find_latest(tmp_path / "checkpoints")
    assert latest == str(tmp_path / "checkpoints/step-00000001") and passed == []


def test_each_rank_reads_the_bytes_of_its_shards(ranks, tmp_path):
    """4 ranks write rows; 2 ranks read halves of the rows, or of the columns. Headers are
    counted.
    """
    rows = 20_000
    (report, expected), *_ = ranks(
        RANKS, savers.write, directory=str(tmp_path), layout="rows", rows=rows
    )
    layouts = ["rows of two", "columns of two"]
    seen = ranks(2, savers.read, path=report.path, layouts=layouts, rows=rows)
    sharded = 2 * 3 * rows * 24 * 4  # two matrices and their moments
    replicated = 3 * rows * 10 * 4 + 9 * 4  # a bias, its moments, and a buffer
    assert report.bytes > sharded + replicated
    for layout, rank in itertools.product(layouts, seen):
        tensors, count = rank[layout]
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
        # Half a row of 24 numbers is too short to be jumped over: of columns everything is read.
        part = sharded if layout == "columns of two" else sharded / 2
        assert part + replicated < count < 1.02 * (part + replicated)


# --------------------------------------------------------------------------------------------------
# retention


def retained(directory, saves, **options):
    """The steps that are left after saves of (step, score)."""
    model, optimizer = build(0)
    checkpointer = begin(directory, **options)
    for step, score in saves:
        checkpointer.save(step, model, optimizer, extra={}, config={}, score=score)
    assert [report.error for report in checkpointer.reports()] == [None] * len(saves)
    return steps_in(directory)


SCORES = [(10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 1.5), (60, math.nan), (70, 4.0)]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 0, "keep_every": 30, "keep_best": 1}, [10, 20, 30, 40, 50, 60, 70]),
        ({"keep": 1}, [70]),
        ({"keep": 3}, [50, 60, 70]),
        ({"keep": 1, "keep_every": 30}, [30, 60, 70]),
        ({"keep": 1, "keep_best": 2}, [20, 50, 70]),
        ({"keep": 2, "keep_every": 40, "keep_best": 1}, [20, 40, 60, 70]),
        ({"keep": 1, "keep_best": 99}, [10, 20, 40, 50, 70]),
    ],
)
def test_newest_every_and_best_stay(tmp_path, options, left):
    assert retained(tmp_path, SCORES, **options) == left


def test_of_equal_scores_the_newer_stays(tmp_path):
    assert retained(tmp_path, [(1, 2.0), (2, 2.0), (3, None)], keep=1, keep_best=1) == [2, 3]


def test_what_was_just_written_stays(tmp_path):
    """A run that was resumed from an older checkpoint, beside the newer ones of before."""
    assert retained(tmp_path, [(100, None), (200, None), (50, None)], keep=1) == [50, 200]
    assert retained(tmp_path, [(60, None)], keep=1) == [60, 200]


def test_incomplete_ones_do_not_count_and_are_left_alone(tmp_path):
    """Else keep=2 would keep a damaged one and a good one less."""
    retained(tmp_path, [(1, None), (2, None), (3, None)])
    (tmp_path / "step-00000003/trainer.json").unlink()
    (tmp_path / "notes").mkdir()
    model, optimizer = build(0)
    save(tmp_path, 4, model, optimizer, options={"keep": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes",
        *(f"step-{step:08d}" for step in (2, 3, 4)),
    ]


def test_a_checkpoint_that_is_read_stays_until_it_has_been_read(tmp_path, monkeypatch):
    model, optimizer = build(0)
    path = save(tmp_path, 1, model, optimizer)
    read, during = RangeReader.read_data, []

    def reading(*arguments):
        if not during:
            during.append(retained(tmp_path, [(2, None), (3, None)], keep=1))
        return read(*arguments)

    monkeypatch.setattr(RangeReader, "read_data", reading)
    state.load(path, *build(1))
    assert during == [[1, 3]]
    assert retained(tmp_path, [(4, None)], keep=1) == [4]


def test_what_killed_runs_left_is_removed(tmp_path):
    for name in (".step-00000005.incomplete", ".step-00000003.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"x" * 1000)
    (tmp_path / ".mine").mkdir()
    assert state.find_latest(tmp_path) == (None, [])
    save(tmp_path, 6, *build(0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", "step-00000006"]


def test_a_checkpoint_of_the_same_step_is_replaced(place):
    model, optimizer = build(0)
    save(place, 1, model, optimizer, run="first")
    path = save(place, 1, model, optimizer, run="second")
    assert state.load(path, model, optimizer) == {"run": "second"}
    assert Folder(place).names() == ["step-00000001"]


# --------------------------------------------------------------------------------------------------
# finding one


def test_the_newest_complete_checkpoint_is_found(place):
    model, optimizer = build(0)
    assert state.find_latest(place) == (None, [])
    for step in (9, 10, 200):
        assert save(place, step, model, optimizer) == f"{place}/step-{step:08d}"
    assert state.find_latest(place) == (f"{place}/step-00000200", [])
    assert state.saved_step(f"{place}/step-00000010") == 10
    assert state.saved_config(f"{place}/step-00000010") == {"train": {"seed": 3}}


@pytest.mark.parametrize(
    "fault", [".metadata", "trainer.json", "config.json", "__0_0.distcp", "short", "longer"]
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, fault):
    model, optimizer = build(0)
    older, newer = save(tmp_path, 1, model, optimizer), Path(save(tmp_path, 2, model, optimizer))
    data = newer / "__0_0.distcp"
    if fault in ("short", "longer"):
        content = data.read_bytes()
        data.write_bytes(content[:-1] if fault == "short" else content + b"x")
        problem = f"__0_0.distcp has {data.stat().st_size} bytes instead of {len(content)}"
    else:
        (newer / fault).unlink()
        problem = f"it has no {fault}"
    latest, (sentence,) = state.find_latest(tmp_path)
    assert latest == older and sentence == f"checkpoint {newer} is damaged: {problem}"
    shutil.rmtree(older)
    with pytest.raises(
        InputError,
        match=r"is damaged: .*; there is no complete one before it: "
        r"delete it to start anew",
    ):
        state.find_latest(tmp_path)


def test_several_damaged_ones_are_passed_over(tmp_path):
    paths = [save(tmp_path, step, *build(0)) for step in (1, 2, 3)]
    for path in paths[1:]:
        (Path(path) / "checkpoint.json").unlink()
    latest, sentences = state.find_latest(tmp_path)
    assert latest == paths[0] and [s.split()[1] for s in sentences] == paths[:0:-1]


def test_a_remote_checkpoint_without_its_manifest_was_never_completed():
    """It is written in place, so this is what a killed run leaves: another start must not stumble
    over it.
    """
    place = "memory://never/checkpoints"
    try:
        path = save(place, 1, *build(0))
        fsspec.filesystem("memory").rm(f"{path}/checkpoint.json")
        sentence = f"checkpoint {path} was never completed: it has no checkpoint.json"
        assert state.find_latest(place) == (None, [sentence])
        older = save(place, 0, *build(0), options={"keep": 1})
        assert state.find_latest(place) == (older, [sentence])
        fsspec.filesystem("memory").rm(f"{older}/__0_0.distcp")
        with pytest.raises(InputError, match="was never completed"):
            state.find_latest(place)
    finally:
        fsspec.filesystem("memory").store.clear()


# --------------------------------------------------------------------------------------------------
# failures


def test_a_failed_save_leaves_nothing_that_looks_complete(place, monkeypatch):
    model, optimizer = build(0)
    first = save(place, 1, model, optimizer)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_archive", full_disk)
    checkpointer = begin(place, keep=1)
    assert checkpointer.save(2, model, optimizer, extra={}, config={})
    (report,) = checkpointer.reports()
    assert report.error == (
        f"checkpoint {place}/step-00000002 could not be written (rank 0: OSError: [Errno 28] No "
        f"space left on device); older "
        "ones are untouched"
    )
    assert state.find_latest(place) == (first, []) and Folder(place).names() == ["step-00000001"]
    monkeypatch.undo()
    assert save(place, 2, model, optimizer, options={"keep": 1}) == state.find_latest(place)[0]
    assert Folder(place).names() == ["step-00000002"]


def test_a_file_that_cannot_grow_is_a_failed_save(tmp_path):
    """The system's own error, in the middle of a file."""
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    limits, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        checkpointer = begin(tmp_path, mode="async")
        checkpointer.save(1, model, optimizer, extra={}, config={})
        checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    (report,) = checkpointer.reports()
    assert "OSError: [Errno 27] File too large" in report.error and not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch):
    model, optimizer = build(0)
    save(tmp_path, 1, model, optimizer)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(state, "remove_unread", refuse)
    with pytest.warns(
        UserWarning,
        match=r"an old checkpoint in .* could not be removed \(\[Errno "
        r"13\] Permission denied\)",
    ):
        save(tmp_path, 2, model, optimizer, options={"keep": 1})
    assert steps_in(tmp_path) == [1, 2]


def test_an_old_checkpoint_with_a_wrong_score_is_no_failure(tmp_path):
    trainer = Path(save(tmp_path, 1, *build(0), score=1.5)) / "trainer.json"
    trainer.write_text(trainer.read_text().replace("1.5", '"5"'))  # of the same size
    with pytest.warns(
        UserWarning,
        match=r"an old checkpoint in .* could not be removed \('<' not "
        r"supported",
    ):
        save(tmp_path, 2, *build(0), score=2.0, options={"keep": 1, "keep_best": 1})
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("place", ["memory"], indirect=True)
def test_the_manifest_of_a_failed_remote_save_goes_first(place, monkeypatch):
    # else what is left, if the removal fails too, looks like a damaged checkpoint, at which `auto`
    # stops
    removed = []
    monkeypatch.setattr(writer, "publish", lambda *_: (_ for _ in ()).throw(OSError("lost")))
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")), "rm", lambda _, path, **__: removed.append(path)
    )
    checkpointer = begin(place)
    checkpointer.save(1, *build(0), extra={}, config={})
    assert "rank 0: OSError: lost" in checkpointer.reports()[0].error
    assert [Path(path).name for path in removed] == ["checkpoint.json", "step-00000001"]


def test_what_cannot_be_json_is_refused_before_anything_is_written(tmp_path):
    model, optimizer = build(0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, model, optimizer, position={1, 2})
    assert not list(tmp_path.iterdir())


def refusal(path, model, optimizer):
    with pytest.raises(InputError) as error:
        state.load(path, model, optimizer)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unusable_checkpoints_are_refused_in_one_sentence(tmp_path):
    model, optimizer = build(0)
    train(model, optimizer, 1)
    assert "does not exist" in refusal(tmp_path / "step-00000001", model, optimizer)

    path = save(tmp_path, 1, model, optimizer)
    wide, wide_optimizer = build(0, width=7)
    text = refusal(path, wide, wide_optimizer)
    assert "another model" in text and "model.up.weight ((6, 4) instead of (7, 4))" in text
    assert "optimizer.state.up.weight.exp_avg" in text

    class Bigger(Toy):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    bigger = Bigger()
    text = refusal(path, bigger, torch.optim.AdamW(bigger.parameters()))
    assert "missing: model.extra.weight, model.extra.bias" in text
    smaller = nn.Sequential()
    smaller.add_module("up", model.up)
    text = refusal(path, smaller, torch.optim.AdamW(smaller.parameters()))
    assert "unexpected" in text and "model.down.weight" in text

    path = Path(path)
    (path / "trainer.json").rename(tmp_path / "elsewhere.json")
    assert "is not a complete checkpoint: it has no trainer.json" in refusal(path, model, optimizer)
    text = (tmp_path / "elsewhere.json").read_text()
    (path / "trainer.json").write_text("{" + text[1:-1] + "{")  # of the same size
    assert "damaged: trainer.json is not JSON" in refusal(path, model, optimizer)
    (path / "trainer.json").write_text(text)
    for data in path.glob("*.distcp"):
        content = data.read_bytes()
        data.write_bytes(bytes(len(content)))
        assert "is damaged: model.down.bias cannot be read from __0_0.distcp" in refusal(
            path, model, optimizer
        )
        data.write_bytes(content[:-3000])
        assert "__0_0.distcp has " in refusal(path, model, optimizer)
        data.write_bytes(content)
    metadata = path / ".metadata"
    metadata.write_bytes(b"x" * metadata.stat().st_size)
    assert "damaged: unreadable .metadata" in refusal(path, model, optimizer)
