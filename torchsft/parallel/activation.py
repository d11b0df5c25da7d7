"""Activation checkpointing: keep a layer's input alone, and compute the layer again when its backward pass needs the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.utils.checkpoint import checkpoint

from torchsft.models.deepseek_v3 import DeepseekV3


@contextmanager
def _not_counted(moe: nn.Module) -> Iterator[None]:
    """What is computed again is not routed again: it is left out of the counters."""
    moe.counting = False
    try:
        yield
    finally:
        moe.counting = True


def apply_activation_checkpointing(model: DeepseekV3) -> None:
    """Recompute every layer in its backward pass, in place.

    Memory falls to [S, D] a layer and microbatch in flight, plus one layer; time grows by a forward pass. The layer is computed
    from the same input by the same operations, so it routes tokens as before. Applied before FSDP2, which then gathers a
    layer's parameters once for both.
    """
    moes = model.moe_layers()
    for name, layer in model.model.layers.items():
        contexts = functools.partial(_contexts, moes.get(name))
        layer.recompute = functools.partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random
            context_fn=contexts,
        )


def _contexts(moe: nn.Module | None) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around the forward pass, and around its repetition."""
    return nullcontext(), nullcontext() if moe is None else _not_counted(moe)
