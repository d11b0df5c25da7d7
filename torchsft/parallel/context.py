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

Grouped-query attention: each rank projects its own tokens, then queries, keys and values of its
heads travel to it (`exchange_heads` in parallel/sequence.py), and the outputs back. Of a rank's H
query and G key/value heads of d entries these are (2 H + 2 G) * d * (cp - 1) / cp^2 values a token
of the row.
"""

from torchsft.models.attention import LatentAttention
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.sequence import SequenceLayout, check_sizes
from torchsft.parallel.world import World


def apply_context_parallel(model: LanguageModel, world: World) -> None:
    """Let each rank of `cp` compute its share of the heads, of those that tensor parallelism left
    it; in place.

    Parameters stay as they are: each rank uses some rows of them (latent attention) or some tokens
    (grouped-query attention), and FSDP, which shards over `cp` too, sums the gradients.

    Raises:
        InputError: heads do not divide over tp * cp.
    """
    check_sizes(model.config, world)
    cp, rank = world.dense["cp"].size(), world.dense["cp"].get_local_rank()
    heads = model.config.num_attention_heads // (cp * world.dense["tp"].size())
    for layer in model.model.layers.values():
        # Grouped-query attention exchanges heads through the layout.
        if isinstance(layer.self_attn, LatentAttention):
            layer.self_attn.use_heads(rank * heads, heads)
    model.layout = SequenceLayout(world, model.config.vocab_size)
