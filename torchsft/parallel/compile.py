"""`torch.compile` of the regions between collectives: what a module's class names as its `regions`,
methods whose tensors have the same shapes in every microbatch.

    LatentAttention          latents (projections and norms), expand (projections, rotation)
    GroupedQueryAttention    project (projections, norms, rotation)
    DecoderLayer             add_and_norm
    GroupedRouter            score, choose, weigh
    SwigluMLP                hidden, of dense networks and shared experts
    MoE                      add (routed and shared experts, the stream of hidden states)

Not compiled are attention, what waits for ranks or for the host, rows of routed experts (as many
as come) and their sums (an `embedding_bag` that keeps nothing, so that a repetition of a layer ends
before it), a layer's first norm (a kernel of its own either way), and passes without gradients,
whose number of tokens may differ. FSDP2 calls its hooks around modules, so outside of regions.

Within a region `ops.plain()` holds: the functions with gradients of their own, which exist to keep
little, make way for their twins, which the compiler fuses, and of which it keeps as little
(tools/benchmarks.md).
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

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
        InputError: the regions would have collectives in them, or tensors of several shapes, or
            operations that are not for a compiler; a backward pass would go through a graph twice;
            or a compiler is missing.
    """
    if not config.model.compile:
        return
    parallel, precision = config.parallel, config.precision
    schedule, checkpointing = parallel.pp_schedule, config.train.activation_checkpointing
    is_split = parallel.pp > 1 and schedule in ZERO_BUBBLE and checkpointing == "none"
    refused = {
        "--model.ops plain": config.model.ops == "plain",
        f"--parallel.tp {parallel.tp}": parallel.tp > 1,
        "--precision.compute blockwise": precision.compute == "blockwise",
        "--precision.float8-recipe tensorwise": precision.float8_recipe == "tensorwise",
        "--train.activation-checkpointing stream": checkpointing == "stream",
        f"--parallel.pp-schedule {schedule} without activation checkpointing": is_split,
    }
    for what, given in refused.items():
        if given:
            raise InputError(f"--model.compile is not for {what}; leave one of the two out")
    if not _has_compiler(device):
        compiler = "triton" if device.type == "cuda" else "a C++ compiler"
        raise InputError(f"--model.compile needs {compiler}; install it, or leave the option out")


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
        # The gradient of one that is still on its way from other ranks would be lost.
        assert not any(isinstance(value, AsyncCollectiveTensor) for value in args)
        return fast(*args)

    return run
