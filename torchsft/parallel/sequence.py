"""Where the tokens of a microbatch lie under tensor and context parallelism, and how they move.

Ranks that share a microbatch form a grid of cp x tp, cp-major; rank (i, j) has the tokens [(i * tp
+ j) * S, + S) between blocks. A tensor group (one i) splits matrices, so inside of a block it works
on its C = tp * S tokens together; the attention works on all T = cp * C tokens, for some of the
heads.

Shapes: T tokens of the microbatch, C of a tensor group, S of a rank, H heads of a tensor group, h =
H / cp of a rank, d head dim, V vocabulary, n tokens whose logits are wanted.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import (
    all_reduce,
    all_to_all_single_autograd,
    wait_tensor,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from torchsft.config import InputError
from torchsft.models.decoder import Layout, VocabularyPart
from torchsft.models.deepseek_v3 import DeepseekV3Config
from torchsft.parallel.world import World


def check_sizes(config: DeepseekV3Config, world: World) -> None:
    """Refuse sizes that do not divide over tp and cp: InputError that names sizes that do, for as
    many ranks.
    """

    def problem(tp: int, cp: int) -> str | None:
        heads, ranks = config.num_attention_heads, tp * cp
        if heads % ranks:
            return (
                f"num_attention_heads = {heads}, which --parallel.tp {tp} x --parallel.cp {cp} = "
                f"{ranks} ranks do not divide"
            )
        dense = (
            {"intermediate_size": config.intermediate_size} if config.first_k_dense_replace else {}
        )
        for name, size in {"vocab_size": config.vocab_size, **dense}.items():
            if size % tp:
                return f"{name} = {size}, which --parallel.tp {tp} does not divide"
        return None

    shard, cp, tp = (world.dense[axis].size() for axis in ("dp_shard", "cp", "tp"))
    found = problem(tp, cp)
    if found is None:
        return
    sizes = range(1, tp * cp + 1)
    good = [
        (t, c)
        for t in sizes
        for c in sizes
        if shard * cp * tp % (t * c) == 0 and t * c <= tp * cp and not problem(t, c)
    ]
    # the nearest: one option changed rather than both, then as many ranks as possible
    t, c = max(
        good, key=lambda pair: ((pair[0] == tp) + (pair[1] == cp), pair[0] * pair[1], pair[0])
    )
    raise InputError(
        f"config.json has {found}; set --parallel.tp {t} --parallel.cp {c} --parallel.dp-shard -1"
    )


def gather_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[t, ...] of every rank of a 1-D mesh to all of their tokens on each, in the order of the
    ranks.

    Ranks use the result differently (for their heads, their columns), so what they send back is
    summed.
    """
    whole = DTensor.from_local(x, mesh, [Shard(0)]).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def scatter_sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum over a 1-D mesh of its ranks' [t, ...], of which each rank keeps its slice of tokens: [t
    / ranks, ...].
    """
    slices = DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Shard(0)])
    return slices.to_local(grad_placements=[Shard(0)])


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: x[i] of rank j becomes y[j] of rank i; differentiable (its own inverse)."""
    # Waited for at once: an AsyncCollectiveTensor with a gradient is unsafe downstream.
    return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, group))


def heads_to_tokens(x_Thd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, h, d], this rank's heads of all tokens, to [C, H, d], all heads of its tokens;
    differentiable.
    """
    x_nChd = exchange(x_Thd.unflatten(0, (group.size(), -1)), group)
    return x_nChd.transpose(0, 1).flatten(1, 2)


def _reduced(x: Tensor, op: str, mesh: DeviceMesh) -> Tensor:
    return wait_tensor(all_reduce(x, op, mesh.get_group()))


class SequenceLayout(Layout):
    """The layout of a microbatch over the cp * tp ranks of `world.sequence`, and of the vocabulary
    over tp; see `Layout`.
    """

    def __init__(self, world: World, vocab_size: int) -> None:
        self.cp, self.tp, self.sequence = (
            world.dense["cp"],
            world.dense["tp"],
            world.sequence["sequence"],
        )
        if self.tp.size() > 1:
            over_ranks = (partial(_reduced, op=op, mesh=self.tp) for op in ("max", "sum"))
            self.vocabulary = VocabularyPart(
                self.tp.get_local_rank() * (vocab_size // self.tp.size()), *over_ranks
            )

    def context(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.cp.size(), -1))[self.cp.get_local_rank()]

    def tokens(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.sequence.size(), -1))[self.sequence.get_local_rank()]

    def gather_tensor(self, x_SD: Tensor) -> Tensor:
        return x_SD if self.tp.size() == 1 else gather_tokens(x_SD, self.tp)

    def gather(self, *parts: Tensor) -> tuple[Tensor, ...]:
        # All parts in one all-gather.
        whole = gather_tokens(
            torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], self.sequence
        )
        return whole.split([part.shape[-1] for part in parts], dim=-1)

    def heads_to_tokens(self, x_THd: Tensor) -> Tensor:
        return x_THd if self.cp.size() == 1 else heads_to_tokens(x_THd, self.cp.get_group())

    def sum(self, x: Tensor) -> Tensor:
        return _reduced(x, "sum", self.sequence)

    def logits(self, x_nV: Tensor) -> Tensor:
        x_nV = x_nV.detach()  # no gradient: on every rank it would be that of all tokens
        return (
            x_nV
            if self.tp.size() == 1
            else DTensor.from_local(x_nV, self.tp, [Shard(1)]).full_tensor()
        )
