"""What a rank needs of its machine before it talks to others: an interface, and open files; and
what it leaves there when that fails.
"""

import os
import resource
import socket
import sys
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

import torch

from torchsft.config import InputError

# of a rank besides sockets of gloo: NCCL's (some 30 a communicator), weights, the data loader
OTHER_FILES = 512


def check_interface() -> None:
    """Refuse a start where gloo would listen on no interface or, on several machines, on an address
    that only this one reaches.

    Where GLOO_SOCKET_IFNAME does not say another interface, gloo takes the first address of the
    host's name that this machine has, which on many is that of the loopback interface (/etc/hosts).

    Raises:
        InputError: it would.
    """
    ranks, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    several = ranks != here and not _is_loopback(os.environ.get("MASTER_ADDR", ""))
    usable = [name for _, name in socket.if_nameindex() if not (several and name == "lo")]
    listed = ", ".join(usable)
    if asked := os.environ.get("GLOO_SOCKET_IFNAME"):
        if not {*asked.split(",")} <= {*usable}:
            raise InputError(
                f"GLOO_SOCKET_IFNAME is {asked}, but the interfaces of this host, "
                f"{socket.gethostname()}, that ranks can reach are {listed}; set it to one of them"
            )
        return
    if not several:
        return
    host = socket.gethostname()
    address = _own_address(host)
    if address is None or _is_loopback(address):
        found = f"resolves to {address}, a loopback address" if address else "does not resolve"
        raise InputError(
            f"the name of this host, {host}, {found}, where gloo would wait for ranks of other "
            f"nodes; set GLOO_SOCKET_IFNAME to the interface that they reach (here are {listed}), "
            "or mend /etc/hosts"
        )


def _own_address(host: str) -> str | None:
    """Return the first address of a name that is this machine's."""
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return None
    for family, kind, protocol, _, address in infos:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return address[0]
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def files_needed(sizes: Mapping[str, Mapping[str, int]], ranks: int, on_gpus: bool) -> int:
    """Return how many files and sockets a rank has open at most.

    gloo opens a socket to each other rank of a group: of that of all ranks, that of the writers of
    checkpoints and, without GPUs, those of the axes of meshes.

    Args:
        sizes: name of a mesh -> axis -> size.
        ranks: of the run.
        on_gpus: whether the meshes' groups are NCCL's.
    """
    peers = 2 * (ranks - 1)
    if not on_gpus:
        peers += sum(size - 1 for axes in sizes.values() for size in axes.values())
    return OTHER_FILES + peers


def raise_file_limit(needed: int) -> None:
    """Let this process open as many files as it needs.

    Raises:
        InputError: the system does not permit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"a rank needs up to {needed} open files and sockets in this layout, but {hard} are "
            f"permitted here; start the job where ulimit -Hn is {needed} or more "
            "(/etc/security/limits.conf, or LimitNOFILE of the service)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def write_record(rank: int) -> None:
    """Write what torch's flight recorder has of gloo's collectives, where it is on
    (`launch.record_collectives`); NCCL's watchdog does so with its own when one waits too long.
    """
    place = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
    if place and "TORCH_FR_BUFFER_SIZE" in os.environ:
        # torch has no public name for it; a pickled dict, which torchfrtrace reads
        record = torch._C._distributed_c10d._dump_fr_trace()
        try:
            Path(f"{place}{rank}").write_bytes(record)
        except OSError as error:  # what has ended the run shall be told, and not this
            print(f"warning: {error}: the flight recorder's record", file=sys.stderr, flush=True)
