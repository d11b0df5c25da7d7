"""The matrix products of several experts, and of one linear map; other number formats replace them.

Shape suffixes: R rows sorted by expert, I inputs, O outputs, E experts held here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.ops.permute import Order

BLACKWELL = 10, 0  # compute capability


class Products:
    """What a stacked weight [E, O, I] is multiplied with; expert e has the rows offs_E[e - 1] to
    offs_E[e] (int32), of R, at least 1, in all. Here by `F.grouped_mm`.

    Some take inputs (x, and give their gradients), or give outputs (and take their gradients), in
    another order than sorted by expert: no sorted copy is then made before they quantise.
    """

    # How they are sorted; None: they are.
    input_order: Order | None = None
    output_order: Order | None = None
    sorts = False  # whether there may be such orders

    linear = staticmethod(F.linear)  # of one expert alone, differentiable

    def forward(self, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return y_RO: each row by the matrix of its expert."""
        return F.grouped_mm(x_RI, weight_EOI.mT, offs=offs_E)

    def grad_rows(self, grad_RO: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of x_RI."""
        return F.grouped_mm(grad_RO, weight_EOI, offs=offs_E)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of weight_EOI."""
        grad_EOI = F.grouped_mm(grad_RO.mT, x_RI, offs=offs_E)
        if leaves_gradients_without_rows(offs_E.device):
            zero_gradients_without_rows(offs_E, grad_EOI)
        return grad_EOI


def leaves_gradients_without_rows(device: torch.device) -> bool:
    """Whether `F.grouped_mm` leaves the gradient of an expert without rows as it was in memory
    (pytorch issue 172439).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BLACKWELL


def zero_gradients_without_rows(offs_E: Tensor, *gradients: Tensor | None) -> None:
    """Zero what an expert without rows gets: it has no terms to add up, and some kernels leave its
    gradient as it was in memory.
    """
    rows_E = offs_E.diff(prepend=offs_E.new_zeros(1))
    empty_E11 = (rows_E == 0).view(-1, 1, 1)
    for gradient in gradients:
        if gradient is not None:
            gradient.masked_fill_(empty_E11, 0)
