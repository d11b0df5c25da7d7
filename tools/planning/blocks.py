"""What each kind of block of a model does and keeps in a run's layout: a layer of each kind, the
embedding, and the head with the loss.

A model of one layer of each kind runs three microbatches as one rank of a pipeline rank's group
(world size / pp), on tensors without memory (torchsft/planning/simulation.py). The first one
gathers what a pipeline gathers once, the last one sums gradients over ranks; what the second one
does is what every microbatch does (recorder.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from tools.planning.operations import Blocks
from tools.planning.recorder import Recorder
from torchsft.config import Config
from torchsft.models import attention
from torchsft.models.families import family_of, read_model_config
from torchsft.models.language_model import ModelConfig
from torchsft.parallel.stages import StagePlan
from torchsft.planning.build import plan_model
from torchsft.planning.memory import (
    IMBALANCE,
    on_gpus,
)
from torchsft.planning.simulation import (
    RANKS_PER_NODE,
    simulated_rank,
)


def measure(
    config: Config,
    model_config: Mapping[str, Any],
    size: int,
    *,
    imbalance: float = IMBALANCE,
    documents: Sequence[float] | None = None,
    ranks_per_node: int = RANKS_PER_NODE,
    fa3: bool = False,
    balanced: bool = False,
) -> Blocks:
    """Record a model of one layer of each kind in a run's layout.

    Args:
        config: of the run.
        model_config: config.json of the model.
        size: ranks.
        imbalance: rows that this rank's experts receive, over the mean.
        documents: tokens of each document of a microbatch, or of several microbatches; None: as
            long ones as `DOCUMENT` says.
        ranks_per_node: GPUs of a node.
        fa3: whether attention is FlashAttention 3, whose values may be narrower than queries.
        balanced: whether tokens go to all experts in turn, whatever groups of these compete.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    config, pp = on_gpus(config), config.parallel.pp
    alone = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, pp=1))
    sizes, family = read_model_config(model_config), family_of(model_config)
    names = layer_names(config, sizes)
    layers = tuple(names.index(name) for name in dict.fromkeys(names))
    shared = config.parallel.cp * config.parallel.tp
    with ExitStack() as stack:
        world = stack.enter_context(simulated_rank(alone.parallel, 0, size // pp, ranks_per_node))
        if fa3:
            stack.enter_context(patch.object(attention, "flash_kernel", lambda _: "FA3"))
        plan = plan_model(alone, family, sizes, world, StagePlan((layers,), (0,)), pp == 1)
        if balanced:
            for moe in plan.model.moe_layers().values():
                if hasattr(moe.gate, "groups"):
                    moe.gate.groups = moe.gate.top_groups = 1
        recorder = Recorder(plan, world, imbalance, documents or (), names)
        stack.enter_context(recorder.kernels())
        recorder.run(config)
    return Blocks(
        recorder.blocks(),
        tuple(names),
        plan.model.depth - sizes.num_hidden_layers,
        plan.tokens,
        plan.tokens // shared * sizes.hidden_size * plan.compute.itemsize,
    )


def layer_names(config: Config, sizes: ModelConfig) -> list[str]:
    """Return the kind of each layer of a model: what it computes, and whether it is computed
    again.
    """
    train, costs = config.train, sizes.layer_costs()
    kinds: dict[tuple[Any, ...], str] = {}
    names = []
    for layer, cost in enumerate(costs):
        experts, window = sizes.routed_experts(layer), sizes.attention_window(layer)
        every = train.activation_checkpointing_every
        again = train.activation_checkpointing != "none" and (layer + 1) % every == 0
        key = experts, window, cost, again
        name = f"{experts} experts" if experts else "dense"
        name += f", window {window}" if window else ""
        name += "" if again or every == 1 else ", kept"
        if key not in kinds and name in kinds.values():
            name += f", {cost / 1e6:.1f} M"
        names.append(kinds.setdefault(key, name))
    return names
