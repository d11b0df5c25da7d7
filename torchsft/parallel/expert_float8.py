"""Products of routed experts in float8 or MXFP8, in a model."""

import importlib.metadata
from typing import NamedTuple

import torch

from torchsft import ops
from torchsft.config import InputError
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import Experts
from torchsft.parallel.collectives import gather_objects
from torchsft.precision.expert_float8 import BLOCK, emulated

TORCHAO = "0.18."  # whose kernels precision/expert_float8_kernels.py calls


class Format(NamedTuple):
    """What a number format needs."""

    block: int | None  # see `emulated`
    capability: int  # major compute capability of the GPUs that have its kernels
    multiple: int  # of which the experts' widths must be, for kernels


FORMATS = {"float8": Format(None, 9, 16), "mxfp8": Format(BLOCK, 10, 128)}


def apply_expert_float8(
    model: LanguageModel, device: torch.device, name: str, compute: torch.dtype
) -> None:
    """Let the routed experts of a model multiply in fp8; collective.

    Args:
        model: changed in place; its experts are split over ranks already.
        device: that it runs on; a CPU emulates, and so does a GPU with --model.ops plain.
        name: of the number format.
        compute: dtype of the passes.

    Raises:
        InputError: the model has no such experts, or the device or their widths are not for it.
    """
    kind = FORMATS[name]
    product, multiple = emulated(kind.block), kind.block or kind.multiple
    if device.type == "cuda" and not ops.plain():
        installed = importlib.metadata.version("torchao")
        check_device(name, torch.cuda.get_device_capability(device), compute, installed)
        from torchsft.precision.expert_float8_kernels import float8_kernels, mxfp8_kernels

        product = float8_kernels() if name == "float8" else mxfp8_kernels()
        multiple = kind.multiple
    fault = "" if model.layer_experts() else "this model has no experts"
    for layer, moe in model.moe_layers().items():
        moe.experts.products = product, product
        widths = moe.experts.down_proj.shape[1:]
        if type(moe.experts) is not Experts:
            fault = f"the experts of a {type(model).__name__} have biases"
        elif any(width % multiple for width in widths):
            shape = " x ".join(map(str, widths))
            fault = f"layer {layer}'s experts are {shape}, not multiples of {multiple}"
    # A pipeline stage without experts ends with the others.
    faults = [each for each in gather_objects(fault) if each]
    if faults:
        raise InputError(f"--precision.experts {name} is set, but {faults[0]}; leave it out")


def check_device(
    name: str, capability: tuple[int, int], compute: torch.dtype, torchao: str
) -> None:
    """Refuse a GPU, a dtype or an installation for which there are no kernels."""
    needs, has = FORMATS[name].capability, ".".join(map(str, capability))
    fault = ""
    if capability[0] != needs:
        fault = f"a GPU of compute capability {needs}.x, but this one has {has}"
    elif compute != torch.bfloat16:
        fault = f"--precision.compute bf16 or float8, but it is {compute}"
    elif not torchao.startswith(TORCHAO):
        fault = f"torchao {TORCHAO}x, but {torchao} is installed"
    if fault:
        raise InputError(
            f"the kernels of --precision.experts {name} need {fault}; leave it out, or emulate "
            "with --model.ops plain"
        )
