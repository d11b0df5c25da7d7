"""Activation checkpointing: keep little of a layer, and compute the layer again when its backward
pass needs the rest.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint

from torchsft.config import Train
from torchsft.models.language_model import LanguageModel
from torchsft.ops.repetition import ATTENTION, PRODUCTS, ROUTING, Pass


def apply_activation_checkpointing(model: LanguageModel, options: Train) -> None:
    """Recompute layers in their backward pass, in place, as --train.activation-checkpointing says.

    Of a layer and microbatch in flight are kept its input [S, D], where its tokens are routed (so
    that the repetition exchanges no counts, waits for no host and cannot route otherwise), and with
    `selective` what attention returns. Applied before FSDP2, which then gathers a layer's
    parameters once for both passes.
    """
    mode = options.activation_checkpointing
    names = ROUTING
    if mode == "selective":
        names |= {ATTENTION, PRODUCTS} if options.selective_products else {ATTENTION}

    def passes() -> tuple[Pass, Pass]:
        kept = {}
        return Pass(names, kept, False), Pass(names, kept, True)

    # The state of random generators is not kept: nothing here is random.
    recompute = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=passes
    )
    for name, layer in model.model.layers.items():
        if mode != "none" and (int(name) + 1) % options.activation_checkpointing_every == 0:
            layer.recompute = recompute
