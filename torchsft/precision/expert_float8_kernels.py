"""`ExpertFloat8` by the kernels of torchao 0.18, for GPUs that have them; the one place that uses
what is private to torchao.prototype.moe_training. Factors are bf16, and so are the results. Rows of
float8 are padded and quantised in one pass, by a kernel of ops/blockwise_mm.py.

Shape suffixes: R rows, sorted by expert, I inputs, O outputs, E experts held here, M rows with
zeros behind those of each expert.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType
from torchao.prototype.moe_training import kernels, mxfp8_grouped_mm
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.quantization.quantize_.common import KernelPreference

from torchsft.config import InputError
from torchsft.ops.tiles import Padding
from torchsft.precision.expert_float8 import BLOCK, ExpertFloat8

FORMAT = torch.float8_e4m3fn, True  # scales are powers of two


def float8_kernels() -> ExpertFloat8:
    """Return the products of float8, for SM90."""
    return ExpertFloat8(16, _float8_y, _float8_dx, _float8_dw, _float8_rows)


def mxfp8_kernels(preference: KernelPreference = KernelPreference.AUTO) -> ExpertFloat8:
    """Return the products of MXFP8, for SM100; or torchao's emulation of them.

    Raises:
        InputError: torchao lacks what these kernels consist of.
    """
    is_auto = preference == KernelPreference.AUTO
    if is_auto and not mxfp8_grouped_mm._SM100_KERNELS_AVAILABLE:
        raise InputError(
            "the kernels of --precision.experts mxfp8 need torchao for CUDA 12.8 or later, with "
            "nvidia-cutlass-dsl and apache-tvm-ffi, which are not installed; emulate with "
            "--model.ops plain"
        )
    options = {
        "block_size": BLOCK,
        "out_dtype": torch.bfloat16,
        "scale_calculation_mode": ScaleCalculationMode.RCEIL,
        "kernel_preference": preference,
    }
    y, dx, dw = (
        partial(getattr(mxfp8_grouped_mm, f"_compute_{name}"), **options)
        for name in ("fwd", "dgrad", "wgrad")
    )
    # Scales lie in tiles of 128 rows.
    return ExpertFloat8(128, y, dx, partial(dw, wgrad_with_hp=False))


# What torchao's `_Float8GroupedMM` does, a product at a time; its scales are reciprocals of ours.


def _float8_rows(padding: Padding, x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return padded rows in e4m3, and the scale of each, fp32 [M]."""
    from torchsft.ops.blockwise_mm import quantise_whole_rows  # imports triton

    return quantise_whole_rows(x_RI.contiguous(), FORMAT[1], padding.index_M())


def _float8_y(x_MI: tuple[Tensor, Tensor], weight_EIO: Tensor, offs_E: Tensor) -> Tensor:
    weight, scales = kernels.triton_fp8_colwise_3d_scale_and_cast(weight_EIO, *FORMAT)
    return _product(*x_MI, weight, scales.flatten(1).reciprocal(), offs_E)


def _float8_dx(grad_MO: tuple[Tensor, Tensor], weight_EIO: Tensor, offs_E: Tensor) -> Tensor:
    weight, scales = kernels.triton_fp8_rowwise_3d_transpose_rhs(weight_EIO, *FORMAT)
    return _product(*grad_MO, weight, scales.flatten(1).reciprocal(), offs_E)


def _float8_dw(grad_MO: Tensor, x_MI: Tensor, offs_E: Tensor) -> Tensor:
    grad_MO, grad_scales, x_MI, x_scales = kernels.triton_fp8_per_group_colwise_scales_dual(
        grad_MO, x_MI, offs_E, *FORMAT
    )
    scales = grad_scales.reciprocal(), x_scales.reciprocal()
    return _product(grad_MO.t(), scales[0], x_MI, scales[1], offs_E).mT


def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offs_E: Tensor) -> Tensor:
    """Return `F.grouped_mm` of a * a_scales and b * b_scales, bf16."""
    scales = a_scales, ScalingType.RowWise, b_scales, ScalingType.RowWise
    return F.scaled_grouped_mm(a, b, *scales, offs=offs_E, use_fast_accum=True)
