"""What the ranks do in test_state.py. Without `transformers`, whose import costs each rank
seconds.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchsft.checkpoint import state, writer
from torchsft.checkpoint.reader import RangeReader
from torchsft.config import InputError

PLACES = {  # mesh shape, placements of the two matrices
    "replicas": ((2, 2), [Replicate(), Shard(0)], [Replicate(), Shard(1)]),
    "rows": ((4,), [Shard(0)], [Shard(0)]),
    "rows of two": ((2,), [Shard(0)], [Shard(0)]),
    "columns of two": ((2,), [Shard(1)], [Shard(1)]),
}


class Sharded(nn.Module):
    """Two matrices as DTensors, and what every rank has: a bias, a buffer."""

    def __init__(self, layout: str, rows: int = 37) -> None:
        super().__init__()
        shape, *places = PLACES[layout]
        mesh = init_device_mesh("cpu", shape)
        values = torch.Generator().manual_seed(5)
        for name, placements in zip("ab", places, strict=True):
            full = torch.randn(rows, 24, generator=values)
            self.register_parameter(
                name, nn.Parameter(distribute_tensor(full, mesh, placements, src_data_rank=None))
            )
        self.bias = nn.Parameter(torch.randn(rows * 10, generator=values))
        self.register_buffer("buffer", torch.randn(9, generator=values))


def optimizer_of(model, steps=1):
    """AdamW that has made steps whose gradients follow from the weights alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() / 2
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def everything(model, optimizer):
    """Whole copies of parameters, buffers and moments; collective."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}:{key}": value for key, value in optimizer.state[parameter].items()}
    return {
        k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for k, t in tensors.items()
    }


def spoil(model, optimizer):
    """Fill the memory of all that is saved with nan."""
    with torch.no_grad():
        for tensor in [
            *model.state_dict().values(),
            *(v for entry in optimizer.state.values() for v in entry.values()),
        ]:
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(torch.nan)


def differing(found, expected):
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


class Gate:
    """Writers on this rank wait until it is opened, or fail with its error."""

    def __init__(self) -> None:
        self.open, self.error = threading.Event(), None
        self.open.set()
        write = writer.write_archive

        def watched(*arguments):
            assert self.open.wait(60)
            if self.error:
                raise self.error
            write(*arguments)

        writer.write_archive = watched


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saves(directory):
    """Several saves of 4 ranks; what each of them saw, by what was tried."""
    dist.init_process_group("gloo")
    rank, gate, seen = dist.get_rank(), Gate(), {}
    group = dist.new_group(backend="gloo")

    def begin(name, **options):
        return state.Checkpointer(
            f"{directory}/{name}",
            **({"mode": "async", "if_busy": "wait", "group": group} | options),
        )

    def save(checkpointer, step, **options):
        return checkpointer.save(step, model, optimizer, extra={"step": step}, config={}, **options)

    def end(checkpointer):
        checkpointer.wait()
        return checkpointer.reports()

    def restored(name, step, layout="rows"):
        """The names of what a checkpoint does not restore in another layout."""
        other = Sharded(layout)
        other_optimizer = optimizer_of(other)
        spoil(other, other_optimizer)
        extra = state.load(f"{directory}/{name}/step-{step:08d}", other, other_optimizer)
        return differing(everything(other, other_optimizer), expected), extra

    model = Sharded("replicas")
    optimizer = optimizer_of(model)
    expected = everything(model, optimizer)
    again = {name: tensor.clone() for name, tensor in expected.items()}

    # While it is written, everything changes; nothing has been written before.
    busy = begin("changed")
    gate.open.clear()
    assert save(busy, 1)
    spoil(model, optimizer)
    seen["unfinished"] = busy.reports(), state.find_latest(f"{directory}/changed")
    dist.barrier()
    gate.open.set()
    seen["changed"] = end(busy), restored("changed", 1)
    seen["own bytes"] = os.path.getsize(f"{directory}/changed/step-00000001/__{rank}_0.distcp")
    model = Sharded("replicas")
    optimizer = optimizer_of(model)
    assert not differing(everything(model, optimizer), again)

    # A second save while rank 3 alone has not ended the first one.
    skipping = begin("skip", if_busy="skip")
    late, report = threading.Event(), skipping._report
    if rank == 3:
        skipping._report = lambda *arguments: (report(*arguments), late.wait(60))[0]
    seen["skip"] = [save(skipping, 1)]
    if rank != 3:
        skipping.wait()
    seen["skip"].append(save(skipping, 2))
    threading.Timer(0.5, late.set).start()
    seen["skip"].append(save(skipping, 3, now=True))
    seen["skip reports"] = end(skipping)
    waiting = begin("wait")
    if rank == 3:
        gate.open.clear()
    threading.Timer(0.5, gate.open.set).start()
    seen["wait"] = (
        [save(waiting, 1), save(waiting, 2)],
        [report.step for report in waiting.reports()],
    )
    seen["wait reports"] = end(waiting)

    # One rank fails: in the copy, in the writing, in what rank 0 does at the end; then the next
    # save is good.
    for mode in ("async", "sync"):
        failing = begin(mode, mode=mode)
        save(failing, 1)
        failing.wait()
        if rank == 2:
            gate.error = full_disk()
        save(failing, 2)
        failing.wait()
        gate.error = None
        metadata = writer.write_metadata
        if rank == 0:
            writer.write_metadata = lambda *_: (_ for _ in ()).throw(
                PermissionError(errno.EACCES, "no")
            )
        save(failing, 3)
        failing.wait()
        writer.write_metadata = metadata
        if mode == "async":
            copy = failing._stager.copy
            if rank == 1:
                failing._stager.copy = no_host_memory
            save(failing, 4)
            failing._stager.copy = copy
        save(failing, 5)
        seen[mode] = end(failing), sorted(os.listdir(f"{directory}/{mode}"))
        seen[f"{mode} restored"] = restored(mode, 1), restored(mode, 5)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(f"{directory}/{mode}")
        dist.barrier()
        save(failing, 6)
        seen[f"{mode} vanished"] = end(failing), os.path.exists(f"{directory}/{mode}")

    # A part of the saved bytes cannot be read on one rank, or nothing on another: all say so.
    seen["refused"] = []
    for faulty, name, fault in ((1, "RangeReader", Unreadable), (2, "read_lock", gone)):
        good = getattr(state, name)
        if rank == faulty:
            setattr(state, name, fault)
        try:
            restored("changed", 1)
        except InputError as error:
            seen["refused"].append(str(error))
        setattr(state, name, good)
    dist.barrier()
    dist.destroy_process_group()
    return seen


def no_host_memory(tensors):
    raise MemoryError("no host memory")


def gone(folder):
    raise InputError("removed for rank 2")


class Unreadable(RangeReader):
    """Fails at the last tensor."""

    def _chunk(self, item):
        if item.storage_index.fqn == "rng.1.cpu":
            raise InputError("rank 1 cannot read it")
        return super()._chunk(item)


def write(directory, layout, rows):
    """One checkpoint of a model of `rows` rows."""
    dist.init_process_group("gloo")
    model = Sharded(layout, rows)
    optimizer = optimizer_of(model)
    checkpointer = state.Checkpointer(directory, mode="sync", group=dist.new_group(backend="gloo"))
    checkpointer.save(7, model, optimizer, extra={}, config={})
    (report,) = checkpointer.reports()
    whole = everything(model, optimizer)
    dist.destroy_process_group()
    return report, whole


def read(path, layouts, rows):
    """By layout: what it made of the model, and the bytes that this rank read."""
    readers = []

    class Counting(RangeReader):
        def __init__(self, folder):
            super().__init__(folder)
            readers.append(self)

    state.RangeReader = Counting
    dist.init_process_group("gloo")
    seen = {}
    for layout in layouts:
        model = Sharded(layout, rows)
        optimizer = optimizer_of(model)
        spoil(model, optimizer)
        state.load(path, model, optimizer)
        seen[layout] = everything(model, optimizer), readers[-1].bytes_read
    dist.destroy_process_group()
    return seen


def killed(directory):
    """A rank is killed while all write; the others' reports. (In forks: the pool's own processes
    live on.)
    """
    result = Path(f"{directory}/{os.environ['RANK']}.txt")
    child = os.fork()
    if child == 0:
        try:
            dist.init_process_group("gloo")
            model = Sharded("rows of two")
            optimizer = optimizer_of(model)
            checkpointer = state.Checkpointer(
                f"{directory}/checkpoints", mode="async", group=dist.new_group(backend="gloo")
            )
            checkpointer.save(1, model, optimizer, extra={}, config={}, now=True)
            gate = Gate()
            gate.open.clear()
            checkpointer.save(2, model, optimizer, extra={}, config={})
            dist.barrier()
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.2)
            gate.open.set()
            checkpointer.wait()
            result.write_text(str(checkpointer.reports()[-1].error))
        except BaseException:
            result.write_text(traceback.format_exc())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), result.read_text() if result.exists() else None
