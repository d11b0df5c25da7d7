"""torchao's float8 products in a model: in the matrices of attention, dense networks and shared
experts.

Embedding, head and routers are left out for accuracy, as DeepSeek-V3 leaves them out
(arXiv:2412.19437, section 3.3), and so are the matrix that joins MTP layers and DeepSeek-V3.2's
indexer, whose small differences choose tokens; routed experts have grouped products
(expert_float8.py).
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchsft.config import InputError
from torchsft.models.decoder import Linear, local
from torchsft.models.language_model import LanguageModel
from torchsft.precision.float8 import CAPABILITY, E4M3, MULTIPLE, float8_product

KEPT = "lm_head", "eh_proj", "indexer"  # parts of names of what is not in fp8


def apply_float8(model: LanguageModel, device: torch.device, recipe: str) -> None:
    """Let a model, whose heads and matrices are split over ranks already, multiply in float8.

    Args:
        model: changed in place.
        device: that it runs on; a CPU emulates.
        recipe: of torchao.

    Raises:
        InputError: the device has no fp8, or this rank's part of a matrix is not for its products.
    """
    if device.type == "cuda":
        check_device(torch.cuda.get_device_capability(device))
    product = float8_product(recipe, emulate=device.type != "cuda")
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not set(KEPT) & set(name.split(".")):
            check_shape(name, module)
            module.product = product


def gather_in_float8(stage: LanguageModel) -> None:
    """Let FSDP gather weights of tensorwise products in float8, a byte an element, in place of
    rounding what it has gathered: the same numbers.

    At a shard FSDP looks for two functions, here torchao's, that say what is gathered; shards stay
    plain tensors. All scales are found in one collective, for the first gather since a forward
    pass began. Left out are weights whose rows do not divide over the ranks (FSDP pads a copy of
    such a shard), and those of which a rank computes some rows alone, whose scale is their own.

    Args:
        stage: sharded, with memory. A part of a model is left as it is: schedules of pipelines
            gather when they will, and mostly once for a step.
    """
    if not (stage.first and stage.last):
        return
    shards: list[Tensor] = []
    scales: dict[Tensor, Tensor] = {}

    def gather(
        shard: Tensor, mesh: DeviceMesh, size: Any, stride: Any, linear: Any, policy: Any
    ) -> Any:
        dtype = policy.param_dtype or shard.dtype
        if not scales:
            from torchao.float8.float8_utils import amax_to_scale

            largest = torch.stack([each.abs().max() for each in shards])
            dist.all_reduce(largest, dist.ReduceOp.MAX, mesh.get_group())
            scales.update(zip(shards, amax_to_scale(largest.to(dtype), E4M3), strict=True))
        low = linear.product.cast(shard.to(dtype), precomputed_scale=scales[shard])
        return low.fsdp_pre_all_gather(mesh)

    for module in stage.modules():
        cast = getattr(getattr(module, "product", None), "cast", None)
        if cast is None or module.rows is not None or not isinstance(module.weight, DTensor):
            continue
        shard = module.weight._local_tensor
        if len(module.weight) % module.weight.device_mesh.size() == 0:
            shard.fsdp_pre_all_gather = partial(gather, shard)
            shard.fsdp_post_all_gather = cast(shard).fsdp_post_all_gather
            shards.append(shard)
    stage.register_forward_pre_hook(lambda *_: scales.clear(), prepend=True)


def check_device(capability: tuple[int, int]) -> None:
    """Refuse a GPU without fp8."""
    has, needs = (".".join(map(str, version)) for version in (capability, CAPABILITY))
    if capability < CAPABILITY:
        raise InputError(
            f"--precision.compute float8 needs a GPU of compute capability {needs}, but this one "
            f"has {has}; use --precision.compute bf16"
        )


def check_shape(name: str, linear: Linear) -> None:
    """Refuse a matrix that fp8 kernels cannot multiply: on a CPU too, so that a run moves."""
    outputs, inputs = local(linear.weight).shape
    if linear.rows is not None:
        outputs = len(range(*linear.rows.indices(outputs)))
    if outputs % MULTIPLE or inputs % MULTIPLE:
        raise InputError(
            f"{name} is [{outputs}, {inputs}] on a rank, but --precision.compute float8 needs "
            f"multiples of {MULTIPLE}; use --precision.compute bf16, or lower --parallel.tp and "
            "--parallel.cp"
        )
