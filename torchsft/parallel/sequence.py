"""Where the tokens of a microbatch lie under tensor and context parallelism, and how they move.

Ranks that share a microbatch form a grid of cp x tp, cp-major; rank (i, j) has the tokens [(i * tp
+ j) * S, + S) between blocks. A tensor group (one i) splits matrices, so inside of a block it works
on its C = tp * S tokens together; the attention works on all T = cp * C tokens, for some of the
heads.

Shapes: T tokens of the microbatch, C of a tensor group, S of a rank, H heads of a tensor group, h =
H / cp of a rank, d head dim, V vocabulary, n tokens whose logits are wanted.
"""

import itertools
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
from torchsft.models.language_model import ModelConfig
from torchsft.parallel.world import World


def check_sizes(config: ModelConfig, world: World) -> None:
    """Refuse sizes that do not divide over tp and cp.

    Raises:
        InputError: it names sizes that do, for as many ranks.
    """
    shard, cp, tp = (world.dense[axis].size() for axis in ("dp_shard", "cp", "tp"))
    found = _what_does_not_divide(config, tp, cp)
    if found is None:
        return
    ranks = cp * tp
    # Sizes that do, each with how near it is to those given: rather one option changed than both,
    # then as many ranks as possible.
    possible = []
    for good_tp, good_cp in itertools.product(range(1, ranks + 1), repeat=2):
        good_ranks = good_tp * good_cp
        if good_ranks > ranks or shard * ranks % good_ranks:
            continue
        if _what_does_not_divide(config, good_tp, good_cp) is None:
            kept = (good_tp == tp) + (good_cp == cp)
            possible.append((kept, good_ranks, good_tp, good_cp))
    *_, good_tp, good_cp = max(possible)
    raise InputError(
        f"config.json has {found}; set --parallel.tp {good_tp} --parallel.cp {good_cp} "
        "--parallel.dp-shard -1"
    )


def _what_does_not_divide(config: ModelConfig, tp: int, cp: int) -> str | None:
    """Say which size of the model these sizes do not divide.

    Returns:
        The beginning of a sentence; None: they divide all.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    ranks = tp * cp
    if heads % ranks:
        return (
            f"num_attention_heads = {heads}, which --parallel.tp {tp} x --parallel.cp {cp} = "
            f"{ranks} ranks do not divide"
        )
    # The tensor group's ranks split key/value heads, or several have the same one; then the context
    # group's ranks do so with what a rank of the tensor group has.
    of_tensor_rank = max(kv_heads // tp, 1)
    if not _divide(kv_heads, tp) or not _divide(of_tensor_rank, cp):
        return (
            f"num_key_value_heads = {kv_heads}, which --parallel.tp {tp} and then --parallel.cp "
            f"{cp} must divide or be multiples of"
        )
    sizes = {"vocab_size": config.vocab_size} | config.split_widths
    for name, size in sizes.items():
        if size % tp:
            return f"{name} = {size}, which --parallel.tp {tp} does not divide"
    return None


def _divide(kv_heads: int, ranks: int) -> bool:
    """Whether ranks can split key/value heads evenly, or evenly have the same ones."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def gather_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[t, ...] of every rank of a 1-D mesh to all of their tokens on each, in the order of the
    ranks.

    Ranks use the result differently (for their heads, their columns), so what they send back is
    summed.
    """
    parts = DTensor.from_local(x, mesh, [Shard(0)])
    whole = parts.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def mean_over_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Elementwise mean over a 1-D mesh, on each of its ranks, which use it differently."""
    return gather_tokens(x.unsqueeze(0), mesh).mean(0)


def scatter_sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum over a 1-D mesh of its ranks' [t, ...], of which each rank keeps its slice of tokens: [t
    / ranks, ...].
    """
    summands = DTensor.from_local(x, mesh, [Partial()])
    slices = summands.redistribute(placements=[Shard(0)])
    return slices.to_local(grad_placements=[Shard(0)])


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: x[i] of rank j becomes y[j] of rank i; differentiable (its own inverse)."""
    # Waited for at once: an AsyncCollectiveTensor with a gradient is unsafe downstream.
    return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, group))


def exchange_heads(
    q_CHd: Tensor, k_CGd: Tensor, v_CGd: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange all heads of this rank's tokens for this rank's heads of all tokens, in one
    all-to-all; differentiable.

    Neighbouring query heads share a key/value head; the head dim of values may be another.

    Args:
        q_CHd: all query heads of this rank's tokens.
        k_CGd: all key heads, of which there may be fewer.
        v_CGd: as many value heads.
        group: its ranks are in the order of their tokens.

    Returns:
        q [T, H / ranks, d], k and v [T, G / ranks, d]; where there are more ranks than key/value
        heads, k and v [T, 1, d]: the head that this rank's queries need, which is on several ranks.

    Raises:
        InputError: the ranks do not divide H, or G is neither a multiple nor a divisor of them.
    """
    ranks, heads, kv_heads = group.size(), q_CHd.shape[1], k_CGd.shape[1]
    if heads % ranks or not _divide(kv_heads, ranks):
        divisors = (n for n in range(1, heads + 1) if heads % n == 0)
        good = [str(n) for n in divisors if _divide(kv_heads, n)]
        raise InputError(
            f"{heads} query heads and {kv_heads} key/value heads do not divide over --parallel.cp "
            f"{ranks} ranks; set --parallel.cp to one of {', '.join(good)}"
        )
    if ranks > kv_heads:
        copies = ranks // kv_heads
        k_CGd = k_CGd.repeat_interleave(copies, dim=1)
        v_CGd = v_CGd.repeat_interleave(copies, dim=1)
    # [C, ranks, heads of a rank, d]
    by_rank = [x.unflatten(1, (ranks, -1)) for x in (q_CHd, k_CGd, v_CGd)]
    heads_of_a_rank = [part.shape[2:] for part in by_rank]
    # [C, ranks, all entries for a rank]
    together = torch.cat([part.flatten(2) for part in by_rank], dim=-1)
    arrived = exchange(together.transpose(0, 1), group)  # [ranks, C, entries]
    entries = [n * d for n, d in heads_of_a_rank]
    parts = arrived.flatten(0, 1).split(entries, dim=-1)
    shaped = zip(parts, heads_of_a_rank, strict=True)
    q_Thd, k_Tgd, v_Tgd = (part.unflatten(-1, shape) for part, shape in shaped)
    return q_Thd, k_Tgd, v_Tgd


def heads_to_tokens(x_Thd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange this rank's heads of all tokens for all heads of its tokens, as `exchange_heads` the
    other way round; differentiable.

    Args:
        x_Thd: attention's output for this rank's heads.
        group: its ranks are in the order of their tokens.

    Returns:
        [C, H, d].
    """
    of_ranks = x_Thd.unflatten(0, (group.size(), -1))  # their tokens: [ranks, C, h, d]
    heads_of_ranks = exchange(of_ranks, group)  # of this rank's tokens, likewise
    return heads_of_ranks.transpose(0, 1).flatten(1, 2)


def _reduce(x: Tensor, op: str, mesh: DeviceMesh) -> Tensor:
    """Return the sum or maximum over the ranks of a mesh, on each of them; without a gradient."""
    return wait_tensor(all_reduce(x, op, mesh.get_group()))


def _own_part(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's part of what the ranks of a 1-D mesh share along dim 0."""
    parts = x.unflatten(0, (mesh.size(), -1))
    return parts[mesh.get_local_rank()]


class SequenceLayout(Layout):
    """The layout of a microbatch over the cp * tp ranks of `world.sequence`, and of the vocabulary
    over tp; see `Layout`.
    """

    def __init__(self, world: World, vocab_size: int) -> None:
        self.cp, self.tp = world.dense["cp"], world.dense["tp"]
        self.sequence = world.sequence["sequence"]
        if self.tp.size() > 1:
            tokens_a_rank = vocab_size // self.tp.size()
            self.vocabulary = VocabularyPart(
                first=self.tp.get_local_rank() * tokens_a_rank,
                size=vocab_size,
                max=partial(_reduce, op="max", mesh=self.tp),
                sum=partial(_reduce, op="sum", mesh=self.tp),
            )

    def context(self, x: Tensor) -> Tensor:
        return _own_part(x, self.cp)

    def tokens(self, x: Tensor) -> Tensor:
        return _own_part(x, self.sequence)

    def gather_tensor(self, x_SD: Tensor) -> Tensor:
        return x_SD if self.tp.size() == 1 else gather_tokens(x_SD, self.tp)

    def gather(self, *parts: Tensor) -> tuple[Tensor, ...]:
        # All parts in one all-gather.
        together = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        whole = gather_tokens(together, self.sequence)
        widths = [part.shape[-1] for part in parts]
        return whole.split(widths, dim=-1)

    def tokens_to_heads(
        self, q_CHd: Tensor, k_CGd: Tensor, v_CGd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.cp.size() == 1:
            return q_CHd, k_CGd, v_CGd
        return exchange_heads(q_CHd, k_CGd, v_CGd, self.cp.get_group())

    def heads(self, x_H: Tensor) -> Tensor:
        return self.context(x_H)  # heads are cut over cp as tokens are

    def heads_to_tokens(self, x_THd: Tensor) -> Tensor:
        return x_THd if self.cp.size() == 1 else heads_to_tokens(x_THd, self.cp.get_group())

    def sum(self, x: Tensor) -> Tensor:
        return _reduce(x, "sum", self.sequence)

    def logits(self, x_nV: Tensor) -> Tensor:
        x_nV = x_nV.detach()  # no gradient: on every rank it would be that of all tokens
        if self.tp.size() == 1:
            return x_nV
        return DTensor.from_local(x_nV, self.tp, [Shard(1)]).full_tensor()
