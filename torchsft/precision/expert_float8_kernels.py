"""`ExpertFloat8` by the kernels of torchao 0.18, for GPUs that have them; the one place that uses
what is private to torchao.prototype.moe_training. Factors are bf16, and so are the results.

Shape suffixes: see precision/expert_float8.py; M rows with zeros behind those of each expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType
from torchao.prototype.moe_training import kernels, mxfp8_grouped_mm
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.quantization.quantize_.common import KernelPreference

from torchsft.config import InputError
from torchsft.ops.grouped import zero_gradients_without_rows
from torchsft.ops.tiles import padding_of
from torchsft.precision.expert_float8 import BLOCK, ExpertFloat8

E4M3 = torch.float8_e4m3fn
# of the rows of an expert
FLOAT8_ROWS = 16
MXFP8_ROWS = 128  # the scales lie in tiles of so many rows


def expert_kernels(name: str) -> ExpertFloat8:
    """Return the products of a --precision.experts.

    Raises:
        InputError: torchao lacks what its kernels of MXFP8 consist of.
    """
    if name == "float8":
        return Float8Kernels()
    if not mxfp8_grouped_mm._SM100_KERNELS_AVAILABLE:
        raise InputError(
            "the kernels of --precision.experts mxfp8 need torchao for CUDA 12.8 or later, with "
            "nvidia-cutlass-dsl and apache-tvm-ffi, which are not installed; emulate with "
            "--model.ops plain"
        )
    return Mxfp8Kernels()


@dataclass(frozen=True)
class Float8Kernels(ExpertFloat8):
    """Products of float8, for SM90: what torchao's `_Float8GroupedMM` does, a product at a time."""

    block: None = None

    def forward(self, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return y_RO."""
        weight = kernels.triton_fp8_colwise_3d_scale_and_cast(weight_EOI.mT, E4M3, True)
        return self._by_rows(x_RI, *weight, offs_E)

    def grad_rows(self, grad_RO: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of x_RI."""
        weight = kernels.triton_fp8_rowwise_3d_transpose_rhs(weight_EOI.mT, E4M3, True)
        return self._by_rows(grad_RO, *weight, offs_E)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of weight_EOI."""
        padding = padding_of(offs_E, len(x_RI), FLOAT8_ROWS)
        grad_MO, grad_scales, x_MI, x_scales = kernels.triton_fp8_per_group_colwise_scales_dual(
            padding.pad(grad_RO), padding.pad(x_RI), padding.offs_E, E4M3, True
        )
        gradient = _product(grad_MO.t(), grad_scales, x_MI, x_scales, padding.offs_E)
        zero_gradients_without_rows(offs_E, gradient)
        return gradient

    def _by_rows(self, x_RI: Tensor, weight: Tensor, scales: Tensor, offs_E: Tensor) -> Tensor:
        padding = padding_of(offs_E, len(x_RI), FLOAT8_ROWS)
        x_MI, x_scales = kernels.triton_fp8_rowwise_2d_scale_and_cast(padding.pad(x_RI), E4M3, True)
        y_MO = _product(x_MI, x_scales, weight, scales.flatten(1), padding.offs_E)
        return padding.unpad(y_MO)


def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offs_E: Tensor) -> Tensor:
    """Return `F.grouped_mm` of a / a_scales and b / b_scales, bf16."""
    return F.scaled_grouped_mm(
        a,
        b,
        a_scales.squeeze(-1).reciprocal(),
        ScalingType.RowWise,
        b_scales.reciprocal(),
        ScalingType.RowWise,
        offs=offs_E,
        use_fast_accum=True,
    )


@dataclass(frozen=True)
class Mxfp8Kernels(ExpertFloat8):
    """Products of MXFP8, for SM100."""

    block: int = BLOCK
    preference: KernelPreference = KernelPreference.AUTO  # or EMULATED, torchao's own emulation

    def forward(self, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return y_RO."""
        return self._by_rows(mxfp8_grouped_mm._compute_fwd, x_RI, weight_EOI, offs_E)

    def grad_rows(self, grad_RO: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of x_RI."""
        return self._by_rows(mxfp8_grouped_mm._compute_dgrad, grad_RO, weight_EOI, offs_E)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of weight_EOI."""
        padding = padding_of(offs_E, len(x_RI), MXFP8_ROWS)
        gradient = mxfp8_grouped_mm._compute_wgrad(
            padding.pad(grad_RO),
            padding.pad(x_RI),
            *self._options(padding.offs_E),
            wgrad_with_hp=False,
            kernel_preference=self.preference,
        ).mT
        zero_gradients_without_rows(offs_E, gradient)
        return gradient

    def _by_rows(
        self, product: Callable[..., Tensor], x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor
    ) -> Tensor:
        padding = padding_of(offs_E, len(x_RI), MXFP8_ROWS)
        options = self._options(padding.offs_E)
        y_MO = product(
            padding.pad(x_RI), weight_EOI.mT, *options, kernel_preference=self.preference
        )
        return padding.unpad(y_MO)

    def _options(self, offs_E: Tensor) -> tuple[Tensor, int, torch.dtype, ScaleCalculationMode]:
        return offs_E, BLOCK, torch.bfloat16, ScaleCalculationMode.RCEIL
