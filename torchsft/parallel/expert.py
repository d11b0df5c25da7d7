"""Expert parallelism: rows travel to the rank that holds their expert, and back.

Shapes: R rows routed on this rank (S tokens x K), M rows received, D width, E experts, n ranks on
the `ep` axis, e = E / n local experts. Rows arrive sorted by global expert, so the part for rank i
is contiguous.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_to_all_single,
    all_to_all_single_autograd,
    wait_tensor,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchsft.config import InputError
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import Experts
from torchsft.ops.permute import permute
from torchsft.ops.repetition import once


class ExpertExchange:
    """A MoE layer's `exchange` over the `ep` axis: all-to-all, local experts, all-to-all back.

    The split sizes of an uneven all-to-all are host numbers, hence one host synchronisation per
    layer and microbatch; a layer that is computed again exchanges the same rows without.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)

    @torch.no_grad()
    def plan(self, counts_E: Tensor) -> tuple[list[int], list[int], Tensor, Tensor, Tensor]:
        """Exchange counts: rows sent to and received from each rank, the order that sorts received
        rows by local expert, its inverse, and where the rows of each local expert then end.
        """
        received_E = wait_tensor(all_to_all_single(counts_E, None, None, self.group))
        local_ne = received_E.view(self.size, -1)
        totals = torch.stack([counts_E.view(self.size, -1).sum(1), local_ne.sum(1)])
        sent, received = totals.tolist()
        # From (sender, local expert) order to (local expert, sender) order.
        expert_M = torch.arange(local_ne.shape[1], device=counts_E.device).repeat(self.size)
        expert_M = expert_M.repeat_interleave(received_E, output_size=sum(received))
        order_M = expert_M.argsort(stable=True)
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(order_M.numel(), device=counts_E.device)
        return sent, received, order_M, inverse_M, local_ne.sum(0).cumsum(0).to(torch.int32)

    def __call__(
        self,
        x_RD: Tensor,
        weights_R1: Tensor,
        counts_E: Tensor,
        experts: Experts,
        meanwhile: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Rows sorted by global expert, their weights, int64 rows per global expert -> the experts'
        outputs, weighted, in the same order, and the result of `meanwhile`, which is computed while
        rows travel to their experts.
        """
        sent, received, order_M, inverse_M, offs_e = once("exchange", lambda: self.plan(counts_E))
        # Always waited: an AsyncCollectiveTensor with a gradient is unsafe downstream (zero
        # gradients under compile).
        arriving = [
            all_to_all_single_autograd(x, received, sent, self.group) for x in (x_RD, weights_R1)
        ]
        result = meanwhile()
        inverse_M1 = inverse_M.unsqueeze(1)
        sorted_M = [permute(wait_tensor(x), order_M, inverse_M1) for x in arriving]
        y_MD = permute(experts(*sorted_M, offs_e), inverse_M, order_M.unsqueeze(1))
        return wait_tensor(all_to_all_single_autograd(y_MD, sent, received, self.group)), result


def apply_expert_parallel(model: LanguageModel, expert_mesh: DeviceMesh) -> None:
    """Give each rank of the `ep` axis its experts: stacked parameters become DTensors sharded on
    dim 0.

    Raises:
        InputError: the number of experts is not a multiple of ep.
    """
    mesh = expert_mesh["ep"]
    if mesh.size() == 1:
        return
    for layer, moe in model.moe_layers().items():
        for key, parameter in list(moe.experts.named_parameters(recurse=False)):
            if parameter.shape[0] % mesh.size():
                raise InputError(
                    f"model.layers.{layer}.mlp has {parameter.shape[0]} experts, which do not "
                    f"divide over --parallel.ep {mesh.size()} ranks; choose an ep that divides "
                    "them, or start another number of ranks"
                )
            sharded = nn.Parameter(
                distribute_tensor(parameter, mesh, [Shard(0)]),
                requires_grad=parameter.requires_grad,
            )
            moe.experts.register_parameter(key, sharded)
        moe.exchange = ExpertExchange(mesh.get_group())
