"""float8 in a model: which of its linear maps multiply so."""

import torch

from torchsft.config import InputError
from torchsft.models.decoder import Linear, local
from torchsft.models.language_model import LanguageModel
from torchsft.precision.float8 import Recipe, float8_product

CAPABILITY = 8, 9  # of a GPU with tensor cores for fp8
MULTIPLE = 16  # of both dims of a matrix that kernels take


def apply_float8(model: LanguageModel, device: torch.device, recipe: Recipe) -> None:
    """Let the linear maps of a model's layers, whose matrices are split over ranks already,
    multiply in float8: of attention, dense networks and shared experts.

    Not those that an fp8 release of the family has in bf16 (`LanguageModel.quantised`), as they
    cost accuracy; routers, whose choice a rounding would change; embedding and head, whose
    gradients are rare and large; and the experts' grouped products.

    Args:
        model: changed in place.
        device: that it runs on; a CPU emulates.
        recipe: see precision/float8.py.

    Raises:
        InputError: the GPU has no float8, or a matrix's part has dims that kernels do not take.
    """
    if device.type == "cuda":
        check_device(torch.cuda.get_device_capability(device))
    product = float8_product(recipe, emulate=device.type != "cuda")
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or not name.startswith("model.layers."):
            continue
        if model.quantised is None or model.is_quantised(model.hf_key(f"{name}.weight")):
            check_part(name, module)
            module.product = product


def check_device(capability: tuple[int, int]) -> None:
    """Refuse a GPU without tensor cores for fp8."""
    has, needs = (".".join(map(str, version)) for version in (capability, CAPABILITY))
    if capability < CAPABILITY:
        raise InputError(
            f"--precision.compute float8 needs a GPU of compute capability {needs}, but this one "
            f"has {has}; use --precision.compute bf16"
        )


def check_part(name: str, linear: Linear) -> None:
    """Refuse a rank's part of a matrix that kernels do not take."""
    rows, columns = local(linear.weight).shape
    if linear.rows is not None:
        rows = linear.rows.stop - linear.rows.start
    if rows % MULTIPLE or columns % MULTIPLE:
        raise InputError(
            f"--precision.compute float8 needs matrices whose dims are multiples of {MULTIPLE}, "
            f"but a rank's part of {name} is {rows} x {columns}; lower --parallel.tp and "
            "--parallel.cp, or use --precision.compute bf16"
        )
