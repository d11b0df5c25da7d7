"""Tensor and sequence parallelism: the ranks of the `tp` axis share matrices, and between these the
tokens.

What is split is said by a table of the model's family (`TENSOR_PARALLEL`), module name -> style:

    column        weight [out, in] split by outputs
    row           weight split by inputs; the products are summed and scattered over tokens, then
                  the bias is added
    vocabulary    rows of an embedding or of the head: each rank has a range of token ids
    gather        a feed-forward network whose matrices are split: it sees the tokens of all ranks
                  of the tensor group

Every other parameter is replicated and meets this rank's tokens alone, so that its gradient is a
summand (`Partial`); experts belong to the expert mesh and are not split here. All of it is DTensor
placements: `local` (models/decoder.py) names those of the gradients, and FSDP2 sums what is
partial.
"""

from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchsft.models.decoder import Embedding, SwigluMLP
from torchsft.models.deepseek_v3 import TENSOR_PARALLEL, DeepseekV3
from torchsft.models.moe import Experts
from torchsft.parallel.sequence import SequenceLayout, check_sizes, gather_tokens, scatter_sum
from torchsft.parallel.world import World

_PLACEMENTS = {
    "column": {"weight": Shard(0), "bias": Shard(0)},
    "row": {"weight": Shard(1)},
    "vocabulary": {"weight": Shard(0)},
    "gather": {},
}


def apply_tensor_parallel(model: DeepseekV3, world: World) -> None:
    """Split a model or a part of it, on the meta device, over `tp` in place.

    Its parameters become DTensors on `world.parameter["tp"]`, except those of the experts.
    InputError where heads, vocabulary or the inner width of dense layers do not divide.
    """
    check_sizes(model.config, world)
    mesh = world.parameter["tp"]
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            continue
        style = next(
            (style for pattern, style in TENSOR_PARALLEL.items() if fnmatchcase(name, pattern)),
            None,
        )
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
