"""Tensor and sequence parallelism: the ranks of the `tp` axis share matrices, and between these the
tokens.

What is split is said by a table of the model's family (`LanguageModel.tensor_parallel`), module
name -> style:

    column        weight [out, in] split by outputs; of a norm over all heads together, by its
                  entries: mean squares are averaged over ranks
    key_value     column, of key or value heads; where there are more ranks than heads, replicated,
                  and each rank computes the head that its query heads share (the mean over ranks
                  is that over heads then too: as many ranks have each)
    row           weight split by inputs; the products are summed and scattered over tokens, then
                  the bias is added
    heads         an attention block, whose sinks are split as its query heads are
    vocabulary    rows of an embedding or of the head: each rank has a range of token ids
    gather        a feed-forward network whose matrices are split: it sees the tokens of all ranks
                  of the tensor group

Every other parameter is replicated and meets this rank's tokens alone, so that its gradient is a
summand; experts belong to the expert mesh and are not split here. The parameters' placements say
which is which: behind the last microbatch `gradients.sum_summands` sums the gradients of what is
`Replicate` over `tp`.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchsft.models.decoder import Embedding, Linear, RMSNorm, SwigluMLP
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import Experts
from torchsft.parallel.sequence import (
    SequenceLayout,
    check_sizes,
    gather_tokens,
    mean_over_ranks,
    scatter_sum,
)
from torchsft.parallel.world import World

_PLACEMENTS = {
    "column": {"weight": Shard(0), "bias": Shard(0)},
    "row": {"weight": Shard(1)},
    "heads": {"sinks": Shard(0)},
    "vocabulary": {"weight": Shard(0)},
    "gather": {},
}


def apply_tensor_parallel(model: LanguageModel, world: World) -> None:
    """Split a model or a part of it, on the meta device, over `tp` in place.

    Its parameters become DTensors on `world.parameter["tp"]`, except those of the experts.

    Raises:
        InputError: heads, vocabulary or the inner width of dense layers do not divide.
    """
    check_sizes(model.config, world)
    mesh = world.parameter["tp"]
    kv_heads = model.config.num_key_value_heads
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            continue
        style = style_of(name, model.tensor_parallel)
        if isinstance(module, RMSNorm) and style is not None:
            module.mean = partial(mean_over_ranks, mesh=mesh)
        if style == "key_value":
            style = "column"
            if mesh.size() > kv_heads:
                style = None
                _use_shared_head(module, kv_heads, mesh)
        placements = {} if style is None else _PLACEMENTS[style]
        for key, parameter in list(module.named_parameters(recurse=False)):
            split = distribute_tensor(parameter, mesh, [placements.get(key, Replicate())])
            module.register_parameter(
                key, nn.Parameter(split, requires_grad=parameter.requires_grad)
            )
        if style == "row":
            module.reduce = partial(scatter_sum, mesh=mesh)
        elif style == "vocabulary" and isinstance(module, Embedding):
            module.first = mesh.get_local_rank() * (module.num_embeddings // mesh.size())
            module.reduce = partial(scatter_sum, mesh=mesh)
        elif style == "gather" and isinstance(module, SwigluMLP):
            module.gather = partial(gather_tokens, mesh=mesh)
    model.layout = SequenceLayout(world, model.config.vocab_size)


def style_of(name: str, table: Mapping[str, str]) -> str | None:
    """Return the style of the first pattern that a module's name matches."""
    for pattern, style in table.items():
        if fnmatchcase(name, pattern):
            return style
    return None


def _use_shared_head(module: Linear | RMSNorm, kv_heads: int, mesh: DeviceMesh) -> None:
    """Let a rank compute, of all key or value heads, the one that its query heads share."""
    head = mesh.get_local_rank() * kv_heads // mesh.size()
    head_dim = len(module.weight) // kv_heads
    module.rows = slice(head * head_dim, (head + 1) * head_dim)
