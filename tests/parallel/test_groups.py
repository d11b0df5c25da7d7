"""Process groups: how many a rank of a large run makes, and of which backend; that all of them are
connected; what a start needs of the machine.
"""

import os
import pickle
import resource
import socket
import time
from contextlib import suppress
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from recipes import deepseek_v3_sft
from torchsft.config import InputError, Parallel
from torchsft.launch import record_collectives, use_expandable_segments
from torchsft.parallel import cluster, groups
from torchsft.parallel.world import World, mesh_sizes

EXPANDABLE = "expandable_segments:True"


def groups_made(parallel, size, device_type):
    """Of rank 77 of a fake world: backend and ranks of each group that it makes, by axis; the mesh
    axes that share a group; what goes over each group when these are connected.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=77, world_size=size, store=FakeStore())
    made, connected, new_group = [], {}, dist.new_group

    def record_group(ranks, timeout, backend, group_desc):
        if 77 in ranks:
            made.append((group_desc, backend, len(ranks), timeout.total_seconds()))
        return new_group(ranks, timeout, "fake", group_desc=group_desc)

    def record(name):
        return lambda *_, group: connected.setdefault(group, []).append(name)

    def record_sent(operations):
        for each in operations:
            name = f"{each.op.__name__} {each.group_peer - each.group.rank()}"
            connected[each.group].append(name)
        return []

    names = "all_reduce", "all_gather", "reduce_scatter", "all_to_all_single"
    recorded = {name: record(name) for name in names}
    recorded |= {"new_group": record_group, "batch_isend_irecv": record_sent}
    with mock.patch.multiple(dist, **recorded):
        meshes = groups.make_meshes(
            mesh_sizes(parallel, size), device_type, timedelta(seconds=parallel.timeout_seconds)
        )
        groups.connect(groups.groups_of(meshes.values()), torch.device("cpu"))
    axes = {}
    for name, mesh in meshes.items():
        for axis in mesh.mesh_dim_names:
            axes.setdefault(mesh.get_group(axis), []).append(f"{name} {axis}")
    travelled = {" ".join(axes[group]): names for group, names in connected.items()}
    return made, list(axes.values()), travelled


def test_on_gpus_no_mesh_has_a_group_of_gloo_and_layers_none_with_fsdp(ranks):
    parallel = deepseek_v3_sft.PRESETS["v3_256"]().parallel
    size = 256
    sizes = mesh_sizes(parallel, size)
    arguments = {"parallel": parallel, "size": size, "device_type": "cuda"}
    ((made, shared, connected),) = ranks(1, groups_made, **arguments)
    neighbours = ["isend 1", "irecv -1", "isend -1", "irecv 1"]
    assert {backend for _, backend, _, _ in made} == {"nccl"}
    assert {timeout for *_, timeout in made} == {parallel.timeout_seconds}
    # pp, dp_shard (no collective), fsdp and ep; a group of each kind for all axes of one rank
    assert sorted(n for _, _, n, _ in made) == [1, 16, 16, 16, 16]
    # gloo's connections: two groups of all ranks (with one for each axis besides they were 624)
    assert cluster.files_needed(sizes, size, on_gpus=True) - cluster.OTHER_FILES == 510
    for axes in shared:
        several = {axis.split()[1] for axis in axes if sizes[axis.split()[0]][axis.split()[1]] > 1}
        assert len(several) <= 1, axes
    # All that something travels over, by what will travel (rank 77 is the fifth of a pipeline).
    assert connected == {
        "dense pp parameter pp expert pp": ["all_reduce", *neighbours],
        "parameter fsdp": ["all_reduce", "all_gather", "reduce_scatter"],
        "expert ep": ["all_reduce", "all_to_all_single"],
    }


def test_on_cpus_axes_over_the_same_ranks_share_a_group(ranks):
    """dp_shard and fsdp; tp and sequence; edp; ep; all axes of one rank."""
    parallel = Parallel(dp_shard=32, tp=4, ep=32)
    arguments = {"parallel": parallel, "size": 128, "device_type": "cpu"}
    ((made, shared, _),) = ranks(1, groups_made, **arguments)
    assert {backend for _, backend, _, _ in made} == {"gloo"}
    assert sorted(n for _, _, n, _ in made) == [1, 4, 4, 32, 32]
    assert ["dense tp", "parameter tp", "sequence sequence"] in shared
    assert ["dense dp_shard", "parameter fsdp", "sequence data"] in shared


def open_sockets():
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


def a_world():
    """How many sockets a rank opens, and may by the formula; one comes late to a barrier."""
    parallel = Parallel(dp_shard=2, tp=2, ep=2, timeout_seconds=60)
    before = open_sockets()
    with World(parallel, 0) as world:
        dist.all_reduce(torch.zeros(1), group=world.writers)
        opened = open_sockets() - before
        _set_pg_timeout(timedelta(seconds=1))
        time.sleep(2 * (world.rank == 3))
        world.barrier()
        _set_pg_timeout(timedelta(seconds=60))
    return opened, cluster.files_needed(mesh_sizes(parallel, 4), 4, on_gpus=False)


def test_a_rank_opens_no_more_sockets_than_its_limit_is_raised_for_and_may_be_late(ranks):
    """Besides one to each peer of a group gloo listens on one for each group, and the store has
    some.
    """
    for opened, needed in ranks(4, a_world):
        assert 3 + 3 <= opened <= needed - cluster.OTHER_FILES + 20


@pytest.mark.parametrize(
    ("limits", "needed", "now"),
    [
        ((1024, 4096), 1500, (4096, 4096)),
        ((1024, 4096), 1000, None),
        ((1024, resource.RLIM_INFINITY), 1500, (resource.RLIM_INFINITY,) * 2),
        ((resource.RLIM_INFINITY,) * 2, 1500, None),
        ((1024, 1400), 1500, "up to 1500 open files .* but 1400 are permitted .* ulimit -Hn"),
    ],
)
def test_the_file_limit_is_raised_or_refused_with_both_numbers(monkeypatch, limits, needed, now):
    changes = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: changes.append(new))
    if isinstance(now, str):
        with pytest.raises(InputError, match=now):
            cluster.raise_file_limit(needed)
    else:
        cluster.raise_file_limit(needed)
        assert changes == ([] if now is None else [now])


def test_an_interface_that_other_nodes_cannot_reach_is_refused(monkeypatch):
    def check(address, **environment):
        with monkeypatch.context() as patch:
            patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
            nodes = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node0"}
            for name, value in (nodes | environment).items():
                patch.setenv(name, value)
            patch.setattr(socket, "gethostname", lambda: "node7")
            patch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])

            def look_up(host, port, **_):
                if address is None:
                    raise socket.gaierror
                others = "192.0.2.1"  # of no machine
                tcp = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
                return [(*tcp, (found, 0)) for found in (others, address)]

            patch.setattr(socket, "getaddrinfo", look_up)
            cluster.check_interface()

    fault = "this host, node7, resolves to 127.0.0.1, a loopback address"
    with pytest.raises(InputError, match=fault + r".* GLOO_SOCKET_IFNAME .*\(here are eth0, ib0\)"):
        check("127.0.0.1")
    with pytest.raises(InputError, match="node7, does not resolve"):
        check(None)
    check("0.0.0.0")  # an address of this machine that is no loopback address
    for asked in ("eth0", "eth0,ib0"):
        check("127.0.0.1", GLOO_SOCKET_IFNAME=asked)
    with pytest.raises(InputError, match="does not resolve"):
        check(None, GLOO_SOCKET_IFNAME="")  # gloo takes it for none
    for asked in ("eth7", "eth0,eth7", "lo"):
        with pytest.raises(InputError, match=f"IFNAME is {asked}, but .* node7, .* are eth0, ib0;"):
            check("0.0.0.0", GLOO_SOCKET_IFNAME=asked)
    check("127.0.0.1", GLOO_SOCKET_IFNAME="lo", LOCAL_WORLD_SIZE="16")
    check("127.0.0.1", LOCAL_WORLD_SIZE="16")
    check("127.0.0.1", MASTER_ADDR="localhost")


def test_the_allocator_grows_blocks_where_nobody_says_how_it_works(monkeypatch):
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    for given in (None, *names):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if given:
            monkeypatch.setenv(given, "max_split_size_mb:64")
        use_expandable_segments()
        found = {name: os.environ.get(name) for name in names}
        expected = {given or names[0]: "max_split_size_mb:64" if given else EXPANDABLE}
        assert {name: value for name, value in found.items() if value} == expected


def test_the_flight_recorder_is_torchs_and_other_settings_of_it_are_refused(monkeypatch, tmp_path):
    place = tmp_path / "flight-recorder"
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {})
        record_collectives(0, str(tmp_path))
        assert not os.environ and not place.exists()
        record_collectives(2000, str(tmp_path))
        assert place.is_dir()
        assert os.environ == {
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_FR_DUMP_TEMP_FILE": f"{place}/rank_",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        }
        record_collectives(2000, str(tmp_path))  # said twice
        os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] = "5"
        with pytest.raises(InputError, match=r"2000 needs TORCH_NCCL_TRACE_BUFFER_SIZE .* it is 5"):
            record_collectives(2000, str(tmp_path))


def failing_world(places):
    """Leave a world with an error, once for each place of its record."""
    for place in places:
        settings = {"TORCH_FR_BUFFER_SIZE": "10", "TORCH_FR_DUMP_TEMP_FILE": f"{place}/rank_"}
        os.environ.update(settings)
        try:
            with World(Parallel(), 0):
                raise RuntimeError("a fault")
        except RuntimeError:
            dist.destroy_process_group()
    for name in settings:
        del os.environ[name]


def test_a_rank_that_fails_leaves_what_was_recorded(ranks, tmp_path):
    """Its fault is told also where the record cannot be written."""
    ranks(1, failing_world, places=[str(tmp_path / "gone"), str(tmp_path)])
    record = pickle.loads((tmp_path / "rank_0").read_bytes())
    assert {"version", "pg_config", "entries"} <= record.keys()
