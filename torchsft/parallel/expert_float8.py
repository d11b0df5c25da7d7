"""Products of routed experts in float8 or MXFP8, in a model."""

import importlib.metadata
from typing import NamedTuple

import torch

from torchsft import ops
from torchsft.config import InputError
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import Experts
from torchsft.precision.expert_float8 import BLOCK, ExpertFloat8

TORCHAO = "0.18"  # whose kernels precision/expert_float8_kernels.py calls


class Format(NamedTuple):
    """What a number format needs."""

    block: int | None  # see `ExpertFloat8`
    capability: int  # major compute capability of the GPUs that have its kernels
    multiple: int  # of which the experts' widths must be, for kernels


FORMATS = {"float8": Format(None, 9, 16), "mxfp8": Format(BLOCK, 10, 128)}


def apply_expert_float8(
    model: LanguageModel, device: torch.device, name: str, compute: torch.dtype
) -> None:
    """Let the routed experts of a model multiply in fp8.

    Args:
        model: changed in place; its experts are split over ranks already.
        device: that it runs on; a CPU emulates, and so does a GPU with --model.ops plain.
        name: of the number format.
        compute: dtype of the passes.

    Raises:
        InputError: the model has no such experts, or the device or their widths are not for it.
    """
    kind = FORMATS[name]
    product, multiple = ExpertFloat8(kind.block), kind.block or kind.multiple
    if device.type == "cuda" and not ops.plain():
        installed = importlib.metadata.version("torchao")
        check_device(name, torch.cuda.get_device_capability(device), compute, installed)
        from torchsft.precision.expert_float8_kernels import expert_kernels

        product, multiple = expert_kernels(name), kind.multiple
    if not model.layer_experts():
        raise InputError(
            f"--precision.experts is {name}, but this model has no experts; leave it out"
        )
    for layer, moe in model.moe_layers().items():
        if type(moe.experts) is not Experts:
            raise InputError(
                f"--precision.experts {name} is not for the experts of a {type(model).__name__}, "
                "which have biases; leave it out"
            )
        check_widths(name, layer, tuple(moe.experts.down_proj.shape[1:]), multiple)
        moe.experts.products = product, product


def check_device(
    name: str, capability: tuple[int, int], compute: torch.dtype, torchao: str
) -> None:
    """Refuse a GPU, a dtype or an installation for which there are no kernels."""
    needs, has = FORMATS[name].capability, ".".join(map(str, capability))
    faults = {
        f"a GPU of compute capability {needs}.x, but this one has {has}": capability[0] == needs,
        f"--precision.compute bf16 or float8, but it is {compute}": compute == torch.bfloat16,
        f"torchao {TORCHAO}, but {torchao} is installed": torchao.startswith(f"{TORCHAO}."),
    }
    for fault, is_right in faults.items():
        if not is_right:
            raise InputError(
                f"the kernels of --precision.experts {name} need {fault}; leave it out, or "
                "emulate with --model.ops plain"
            )


def check_widths(name: str, layer: str, widths: tuple[int, int], multiple: int) -> None:
    """Refuse experts that the products cannot multiply."""
    if any(width % multiple for width in widths):
        raise InputError(
            f"layer {layer}'s experts are {' x '.join(map(str, widths))}, but --precision.experts "
            f"{name} needs multiples of {multiple}; leave it out"
        )
