"""Activation checkpointing: keep little of a layer, and compute the layer again when its backward
pass needs the rest.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from torchsft.config import InputError, Train
from torchsft.models.language_model import LanguageModel
from torchsft.ops.repetition import ATTENTION, PRODUCTS, ROUTING, Pass
from torchsft.parallel.activation_offload import Offload
from torchsft.parallel.stream import call, stream_layer


def apply_activation_checkpointing(
    model: LanguageModel, options: Train, device: torch.device
) -> None:
    """Recompute layers in their backward pass, in place, as --train.activation-checkpointing says.

    Of a layer and microbatch in flight are kept its input [S, D], where its tokens are routed (so
    that the repetition exchanges no counts, waits for no host and cannot route otherwise), and with
    `selective` what attention returns; parallel/stream.py says what `stream` does. Applied before
    FSDP2, which then gathers a layer's parameters once for both passes.

    Raises:
        InputError: no layer of the whole model would be checkpointed.
    """
    mode, every = options.activation_checkpointing, options.activation_checkpointing_every
    if mode == "none":
        return
    if every > model.depth:
        raise InputError(
            f"--train.activation-checkpointing-every is {every}, but the model has {model.depth} "
            f"layers, of which none would be checkpointed; set at most {model.depth}"
        )
    layers = [layer for name, layer in model.model.layers.items() if (int(name) + 1) % every == 0]
    offload = Offload(device) if options.activation_offload else None
    moves = [offload.pack, offload.unpack] if offload else []
    if mode == "stream":
        for layer in layers:
            stream_layer(layer, options.stream_pieces, *moves)
            layer.recompute = offload.run if offload else call
        return
    names = ROUTING
    if mode == "selective":
        names |= {ATTENTION, PRODUCTS} if options.selective_products else {ATTENTION}

    def passes() -> tuple[Pass, Pass]:
        kept: dict[str, Any] = {}
        return Pass(names, kept, False, *moves[:1]), Pass(names, kept, True, *moves[1:])

    # The state of random generators is not kept: nothing here is random.
    recompute = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=passes
    )
    if offload:
        recompute = partial(offload.run, recompute)
    for layer in layers:
        layer.recompute = recompute
