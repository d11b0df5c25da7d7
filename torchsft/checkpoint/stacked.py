"""Experts that a directory stores stacked, seen one by one.

transformers 5 keeps a layer's experts in two tensors, and
`save_pretrained(save_original_format=False)` writes them so:

    model.layers.3.mlp.experts.gate_up_proj    [experts, 2 x width of an expert, width]: its gate
                                               above its up projection
    model.layers.3.mlp.experts.down_proj       [experts, width, width of an expert]

A layer whose experts have biases (`gate_up_proj_bias`) is stored so by its family, and in another
order: it is left as it is.

Published directories store each expert by itself, as
`model.layers.3.mlp.experts.17.gate_proj.weight` and so on. Each of these is a run of bytes of a
stacked tensor, so that reading one reads nothing else.
"""

import re
from collections.abc import Iterator, Mapping

from torchsft.checkpoint.stored import DTYPES, FP8, StoredTensor, listing
from torchsft.precision.blockwise import SCALE_SUFFIX

_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(.+)")
# What the tensors of a layer's experts are, from the first rows of an expert on.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_REMEDY = "save the model again with transformers, without save_original_format=False"


def stacked_in(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return keys of the tensors that hold all experts of a layer, to be seen one by one."""
    return [
        key
        for key in tensors
        if (match := _EXPERTS.fullmatch(key))
        and match[2] in _PARTS
        and f"{match[1]}.gate_up_proj_bias" not in tensors
    ]


def unstacked(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the same tensors, with a tensor for each expert in place of the stacked ones.

    Raises:
        ValueError: what is wrong, in words: experts both stacked and one by one, a stacked tensor
            without the other one, of another shape, or in fp8.
    """
    stacked = stacked_in(tensors)
    if not stacked:
        return dict(tensors)
    _check(tensors, stacked)
    found = {key: stored for key, stored in tensors.items() if key not in set(stacked)}
    for key in stacked:
        found |= _experts(key, tensors[key])
    return found


def _check(tensors: Mapping[str, StoredTensor], stacked: list[str]) -> None:
    layers = {key.rpartition(".")[0] for key in stacked}
    singles = [
        key for key in tensors if (match := _EXPERTS.fullmatch(key)) and match[2][0].isdigit()
    ]
    if singles:
        raise ValueError(
            f"experts are stored stacked ({listing(stacked, 2)}) and one by one "
            f"({listing(singles, 2)}); use one of the two directories that this was put together "
            "from"
        )
    if absent := sorted(
        f"{layer}.{part}" for layer in layers for part in _PARTS if f"{layer}.{part}" not in tensors
    ):
        raise ValueError(
            f"its experts are stored stacked, but {listing(absent)} is absent; {_REMEDY}"
        )
    if scaled := [
        key for key in stacked if tensors[key].dtype == FP8 or key + SCALE_SUFFIX in tensors
    ]:
        raise ValueError(
            f"{listing(scaled, 2)} holds stacked experts in fp8, which is not supported; {_REMEDY}"
        )
    odd = [key for key in stacked if not _fits(key, tensors[key])]
    if odd:
        shapes = [f"{key} ({tensors[key].dtype}, {tensors[key].shape})" for key in odd]
        raise ValueError(f"{listing(shapes, 3)} cannot be split into experts; {_REMEDY}")


def _fits(key: str, stored: StoredTensor) -> bool:
    parts = _PARTS[key.rpartition(".")[2]]
    return len(stored.shape) == 3 and stored.shape[1] % len(parts) == 0 and stored.dtype in DTYPES


def _experts(key: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """Key and place of each expert's tensors in a stacked one."""
    layer, _, name = key.rpartition(".")
    experts, rows, columns = stored.shape
    parts = _PARTS[name]
    shape = rows // len(parts), columns
    for expert in range(experts):
        for number, part in enumerate(parts):
            start = expert, number * shape[0], 0
            yield (
                f"{layer}.{expert}.{part}.weight",
                StoredTensor(stored.file, shape, stored.dtype, stack=key, start=start),
            )
