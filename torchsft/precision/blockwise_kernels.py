"""`BlockwiseProducts` by the kernels of ops/blockwise_mm.py, for GPUs of SM90; imports triton.

Shape suffixes: R rows, sorted by expert, I inputs, O outputs, E experts held here.
"""

from dataclasses import dataclass, field

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchsft.ops import blockwise_mm as mm
from torchsft.ops.permute import Order, tokens_of
from torchsft.ops.tiles import tiles_of
from torchsft.precision.blockwise_compute import BlockwiseProducts

_updates = [0]  # optimizer steps of this process


def _count_update(*_: object) -> None:
    """Note that an optimizer has stepped."""
    _updates[0] += 1


# FSDP2 gathers into the same tensor without a change of its version: what has been quantised is
# known to be old by the optimizer's step alone.
register_optimizer_step_post_hook(_count_update)


@dataclass(frozen=True)
class BlockwiseKernels(BlockwiseProducts):
    """The products of one weight."""

    # Whether the quantised weight is kept until the optimizer's next step (2 bytes a parameter: its
    # transpose too), or made for each product. Kept where FSDP keeps gathered parameters.
    keep: bool = False
    # by whether it is transposed: when it was made, and itself
    kept: dict[bool, tuple[tuple[int, ...], mm.Quantised]] = field(default_factory=dict)

    def forward(self, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return y_RO."""
        weight = self._quantised(weight_EOI, transposed=False)
        return self._by_rows(x_RI, self.input_order, weight, offs_E, self.output_order)

    def grad_rows(self, grad_RO: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of x_RI."""
        values, scales = self._quantised(weight_EOI, transposed=True)
        weight = mm.Quantised(values, scales.mT)  # e4m3 [E, I, O] with scales [E, i, o]
        return self._by_rows(grad_RO, self.output_order, weight, offs_E, self.input_order)

    def grad_weight(self, grad_RO: Tensor, x_RI: Tensor, offs_E: Tensor) -> Tensor:
        """Return the gradient of weight_EOI."""
        of_grad, of_x = _index(self.output_order), _index(self.input_order)
        # where tokens are sorted here, they are no more than rows
        tiles = tiles_of(offs_E, max(len(grad_RO), len(x_RI)))
        grad = mm.quantise_columns(grad_RO.contiguous(), tiles, self.power_of_two, of_grad)
        x = mm.quantise_columns(x_RI.contiguous(), tiles, self.power_of_two, of_x)
        return mm.columns_product(grad, x, tiles, x_RI.dtype)

    def _by_rows(
        self,
        x_RI: Tensor,
        order: Order | None,
        weight: mm.Quantised,
        offs_E: Tensor,
        result_order: Order | None,
    ) -> Tensor:
        """Return the product of each row, or of its gradient, with the matrix of its expert.

        Args:
            x_RI: in the dtype that the result has too.
            order: how it is sorted by expert; None: it is.
            weight: [E, O, I] or, for gradients, [E, I, O].
            offs_E: int32, where each expert's rows end.
            result_order: how the result would be sorted; None: it is.
        """
        x = mm.quantise_rows(x_RI.contiguous(), self.power_of_two, _index(order))
        tiles = tiles_of(offs_E, len(x.values))
        if result_order is not None and result_order.is_one_to_one():
            return mm.rows_product(x, weight, tiles, x_RI.dtype, result_order.order_R)
        return tokens_of(mm.rows_product(x, weight, tiles, x_RI.dtype), result_order)

    def _quantised(self, weight_EOI: Tensor, *, transposed: bool) -> mm.Quantised:
        """Return the weight in fp8: what is kept, where nothing has changed the weight since.

        Args:
            weight_EOI: of any floating dtype.
            transposed: whether the values are those of [E, I, O]; scales are [E, o, i] all the
                same.
        """
        now = _updates[0], weight_EOI.data_ptr(), weight_EOI._version
        made, quantised = self.kept.get(transposed, (None, None))
        if made == now:
            return quantised
        weight = weight_EOI.detach().contiguous()
        quantised = mm.quantise_weight(weight, self.power_of_two, transposed)
        if self.keep:
            self.kept[transposed] = now, quantised
        return quantised


def _index(order: Order | None) -> Tensor | None:
    """Return what each sorted row is of what is given, int64; None: it is sorted."""
    return None if order is None else order.token_R()
