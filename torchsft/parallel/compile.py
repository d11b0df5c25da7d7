"""`torch.compile` of the regions between collectives: what a module's class names as its `regions`,
methods whose tensors have the same shapes in every microbatch.

    LatentAttention      latents (projections and norms), expand (projections, rotation, heads)
    GroupedQueryAttention  project (projections, norms, rotation)
    DecoderLayer         add_and_norm
    GroupedRouter        score, choose, weigh
    MoE                  sort
    SwigluMLP            forward, of dense networks and shared experts

Not compiled are what waits for ranks or for the host, attention, rows of routed experts (which are
as many as come), what FSDP2 shards by itself (it calls its hooks around these modules, and so
outside of every region), and passes without gradients, whose number of tokens may differ. Within a
region `ops.plain()` holds: the functions with gradients of their own, which exist to keep little,
are left to the compiler, which decides itself what it keeps.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor, wait_tensor

from torchsft.config import Config, InputError
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.stages import ZERO_BUBBLE

BACKEND = "inductor"


def apply_compile(model: LanguageModel) -> None:
    """Compile the regions of a model when they are first called, in place."""
    for module in model.modules():
        for name in getattr(module, "regions", ()):
            setattr(module, name, _compiled(getattr(module, name)))


def check_compile(config: Config, device: torch.device) -> None:
    """Refuse what --model.compile is not for.

    Raises:
        InputError: the regions would not be between collectives, or of one shape; the numbers of
            their products are not for a compiler; the backward pass goes through a graph twice; or
            a compiler is missing.
    """
    if not config.model.compile:
        return
    parallel, compute, schedule = (
        config.parallel,
        config.precision.compute,
        config.parallel.pp_schedule,
    )
    checkpointing = config.train.activation_checkpointing
    is_split = parallel.pp > 1 and schedule in ZERO_BUBBLE and checkpointing == "none"
    compiler = "triton" if device.type == "cuda" else "a C++ compiler"
    refused = {
        "--model.ops plain": config.model.ops == "plain",
        f"--parallel.tp {parallel.tp}": parallel.tp > 1,
        f"--precision.compute {compute}": compute in ("blockwise", "float8"),
        "--train.activation-checkpointing stream": checkpointing == "stream",
        f"--parallel.pp-schedule {schedule} without activation checkpointing": is_split,
        f"an installation without {compiler}": not _has_compiler(device),
    }
    for what, given in refused.items():
        if given:
            raise InputError(f"--model.compile is not for {what}; leave one of the two out")


def _has_compiler(device: torch.device) -> bool:
    """Whether torch finds what it compiles with."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def compiled_message() -> str:
    """Say how long this process has compiled so far."""
    from torch._dynamo.utils import calculate_time_spent  # torch-private; slow to import

    return f"compiled in {calculate_time_spent()['total_wall_time']:.0f} s"


def _compiled(region: Callable[..., Any]) -> Callable[..., Any]:
    """Return a region that is compiled for passes with gradients."""
    fast = torch.compile(region, fullgraph=True, dynamic=False, backend=BACKEND)

    @functools.wraps(region)
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return region(*args)
        return fast(*map(_arrived, args))

    return run


def _arrived(value: Any) -> Any:
    """Wait for a tensor that is on its way from other ranks: a compiled region would lose its
    gradient.
    """
    return wait_tensor(value) if isinstance(value, AsyncCollectiveTensor) else value
