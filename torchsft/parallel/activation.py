"""Activation checkpointing: keep a layer's input alone, and compute the layer again when its
backward pass needs the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from torchsft.models.language_model import LanguageModel


@contextmanager
def _not_counted(moe: nn.Module) -> Iterator[None]:
    """What is computed again is not routed again: it is left out of the counters."""
    moe.counting = False
    try:
        yield
    finally:
        moe.counting = True


def apply_activation_checkpointing(model: LanguageModel) -> None:
    """Recompute every layer in its backward pass, in place.

    Memory falls to [S, D] a layer and microbatch in flight, plus one layer; time grows by a forward
    pass. The layer is computed from the same input by the same operations, so it routes tokens as
    before. Applied before FSDP2, which then gathers a layer's parameters once for both.
    """
    # The state of random generators is not kept: nothing here is random.
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in model.model.layers.values():
        layer.recompute = recompute
    # contexts around the forward pass, and around its repetition
    for name, moe in model.moe_layers().items():
        model.model.layers[name].recompute = partial(
            recompute, context_fn=lambda moe=moe: (nullcontext(), _not_counted(moe))
        )
