"""Block-wise fp8 products in a model: in every matrix that an fp8 release of its family has in fp8
(`LanguageModel.quantised`), so not in embedding, head, routers and norms.
"""

import importlib.util

import torch

from torchsft import ops
from torchsft.config import InputError
from torchsft.models.decoder import Linear, local
from torchsft.models.language_model import LanguageModel
from torchsft.ops.tiles import SIZE
from torchsft.precision.blockwise_compute import BlockwiseProducts

CAPABILITY = 9, 0


def apply_blockwise(
    model: LanguageModel, device: torch.device, *, power_of_two: bool, keep: bool
) -> None:
    """Let a model, whose heads and matrices are split over ranks already, multiply in fp8 blocks.

    Args:
        model: changed in place.
        device: that it runs on: GPUs use kernels, unless plain twins are asked for.
        power_of_two: round scales up to powers of two.
        keep: quantise weights once for each step of the optimizer, not for each product; where
            gathered parameters are kept too.

    Raises:
        InputError: the device, or a matrix or its part on this rank, is not for these blocks.
    """
    if model.quantised is None:
        raise InputError(
            f"--precision.compute blockwise multiplies what fp8 releases have in fp8, but a "
            f"{type(model).__name__} has none; use --precision.compute bf16"
        )
    with_kernels = device.type == "cuda" and not ops.plain()
    if with_kernels:
        check_device(torch.cuda.get_device_capability(device))

    def products(parts: int = 1) -> BlockwiseProducts:
        if not with_kernels:
            return BlockwiseProducts(power_of_two, parts)
        from torchsft.precision.blockwise_kernels import BlockwiseKernels

        return BlockwiseKernels(power_of_two, parts, keep=keep)

    for name, module in model.named_modules():
        key = model.hf_key(f"{name}.weight")
        if isinstance(module, Linear) and model.is_quantised(key):
            check_part(name, module)
            module.product = products().linear
    for layer, moe in model.moe_layers().items():
        width = moe.experts.down_proj.shape[2]
        if with_kernels and width % SIZE:
            raise InputError(
                f"layer {layer}'s experts are {width} wide, but the kernels of --precision.compute "
                f"blockwise need a multiple of {SIZE}; use --model.ops plain"
            )
        moe.experts.products = products(parts=2), products()


def check_device(capability: tuple[int, int]) -> None:
    """Refuse a GPU without the tensor cores for fp8, or an installation without triton."""
    has, needs = (".".join(map(str, version)) for version in (capability, CAPABILITY))
    if capability < CAPABILITY:
        raise InputError(
            f"--precision.compute blockwise needs a GPU of compute capability {needs} (H100), but "
            f"this one has {has}; use --precision.compute bf16"
        )
    if importlib.util.find_spec("triton") is None:
        raise InputError(
            "--precision.compute blockwise needs triton on a GPU, which is not installed; run pip "
            "install triton, or use --model.ops plain"
        )


def check_part(name: str, linear: Linear) -> None:
    """Refuse parts of a matrix that do not end with a block: their blocks would not be those of the
    whole, and how the model is split would change what it computes.
    """
    weight = linear.weight
    pairs = zip(local(weight).shape, weight.shape, strict=True)
    parts = [part for part, whole in pairs if part != whole]
    parts += [] if linear.rows is None else [linear.rows.stop - linear.rows.start]
    if split := [part for part in parts if part % SIZE]:
        raise InputError(
            f"{name} [{', '.join(map(str, weight.shape))}] is split at multiples of {split[0]}, "
            f"which are not multiples of the {SIZE} rows and columns of an fp8 block; lower "
            "--parallel.tp and --parallel.cp, or use --precision.compute bf16"
        )
