"""torchao's float8 products in a model: in the matrices of attention, dense networks and shared
experts.

Embedding, head and routers are left out for accuracy, as DeepSeek-V3 leaves them out
(arXiv:2412.19437, section 3.3), and so are the matrix that joins MTP layers and DeepSeek-V3.2's
indexer, whose small differences choose tokens; routed experts have grouped products
(expert_float8.py).
"""

import torch

from torchsft.config import InputError
from torchsft.models.decoder import Linear, local
from torchsft.models.language_model import LanguageModel
from torchsft.precision.float8 import CAPABILITY, MULTIPLE, float8_product

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
