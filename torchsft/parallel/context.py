"""Context parallelism: the ranks of the `cp` axis share the tokens of a row, and in the attention
its heads.

Each rank computes the attention of some heads over all tokens, so that causal and packed work is
balanced wherever documents begin and end, and a document that crosses ranks is like any other.

Multi-head latent attention: only latents travel to the ranks (queries, keys and values are expanded
from them for a rank's own heads), and the heads' outputs travel back. Values that a rank receives
per token of the row, per layer and forward pass, with n = cp * tp ranks; the backward pass moves as
many again:

    latents      (q_lora_rank + kv_lora_rank + rope) * (n - 1) / n     V3: 2112 * (n - 1) / n
    outputs      heads * v / n * (cp - 1) / cp                         V3: 16384 / n * (cp - 1) / cp

For V3 with cp = 8 these are 3640 values; to gather keys and values it would be 40960 * 7 / 8 =
35840. Without a query latent (Moonlight) the hidden states travel in its place. Tensor
parallelism's own sum over heads comes on top, hidden_size / cp * (tp - 1) / tp; without context
parallelism it replaces the outputs' way back.

Grouped-query attention, for families that have it: `exchange_heads` and, back, `heads_to_tokens`
(parallel/sequence.py).

Shapes: T tokens of the row, C = T / ranks of one rank, H query heads, G key/value heads, d head
dim.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from torchsft.config import InputError
from torchsft.models.deepseek_v3 import DeepseekV3
from torchsft.parallel.sequence import SequenceLayout, check_sizes, exchange
from torchsft.parallel.world import World


def apply_context_parallel(model: DeepseekV3, world: World) -> None:
    """Let each rank of `cp` compute its share of the heads, of those that tensor parallelism left
    it; in place.

    Parameters stay as they are: each rank uses some rows of them, and FSDP, which shards over `cp`
    too, sums the gradients. InputError where heads do not divide over tp * cp.
    """
    check_sizes(model.config, world)
    cp, rank = world.dense["cp"].size(), world.dense["cp"].get_local_rank()
    heads = model.config.num_attention_heads // (cp * world.dense["tp"].size())
    for layer in model.model.layers.values():
        layer.self_attn.use_heads(rank * heads, heads)
    model.layout = SequenceLayout(world, model.config.vocab_size)


def exchange_heads(
    q_CHd: Tensor, k_CGd: Tensor, v_CGd: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of this rank's tokens to this rank's heads of all tokens, in one all-to-all;
    differentiable.

    Neighbouring query heads share a key/value head; the head dim of values may be another. The
    ranks of `group` are in the order of their tokens. Returns q [T, H / ranks, d], k and v [T, G /
    ranks, d]; where there are more ranks than key/value heads, k and v [T, 1, d]: the head that
    this rank's queries need, which is on several ranks. InputError where the ranks do not divide H,
    or G is neither a multiple nor a divisor of them.
    """
    ranks, heads, kv_heads = group.size(), q_CHd.shape[1], k_CGd.shape[1]

    def divides(n: int) -> bool:
        return heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)

    if not divides(ranks):
        good = [str(n) for n in range(1, heads + 1) if divides(n)]
        fault = (
            f"{heads} query heads and {kv_heads} key/value heads do not divide over --parallel.cp "
            f"{ranks} ranks; "
        )
        raise InputError(fault + f"set --parallel.cp to one of {', '.join(good)}")
    if ranks > kv_heads:
        k_CGd, v_CGd = (x.repeat_interleave(ranks // kv_heads, dim=1) for x in (k_CGd, v_CGd))
    # [C, ranks, heads of a rank, d]
    parts = [x.unflatten(1, (ranks, -1)) for x in (q_CHd, k_CGd, v_CGd)]
    together = torch.cat([part.flatten(2) for part in parts], dim=-1)
    arrived = exchange(together.transpose(0, 1), group).flatten(0, 1)
    split = arrived.split([part.shape[2] * part.shape[3] for part in parts], dim=-1)
    return tuple(x.unflatten(-1, part.shape[2:]) for x, part in zip(split, parts, strict=True))
