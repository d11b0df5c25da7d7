"""A rank's part of a model, spread over the ranks on the meta device: what a run allocates next,
and what memory is predicted from.
"""

from dataclasses import dataclass

import torch

from torchsft import ops
from torchsft.config import Config, InputError
from torchsft.data.stream import microbatches_per_step, tokens_per_microbatch
from torchsft.models.attention import choose_implementation
from torchsft.models.language_model import LanguageModel, ModelConfig, trained_mtp_layers
from torchsft.models.moe import frozen_by_router
from torchsft.optim.selection import Selection, select
from torchsft.parallel.apply import compute_dtype, parallelize
from torchsft.parallel.compile import check_compile
from torchsft.parallel.pipeline import (
    OneStage,
    Pipeline,
    build_pipeline,
    first_trained,
    reshard_after_forward,
    split,
)
from torchsft.parallel.stages import StagePlan, plan_stages
from torchsft.parallel.world import World


@dataclass(frozen=True)
class ModelPlan:
    """What `plan_model` has decided and built."""

    whole: LanguageModel  # all of the model, spread over nothing
    selection: Selection
    layers: StagePlan
    model: LanguageModel  # this rank's part, all stages together
    stages: list[LanguageModel]  # share the modules of `model`, which so has sharded parameters too
    compute: torch.dtype  # of hidden states and gathered parameters
    reshard: bool  # whether gathered parameters are freed between the passes
    microbatches: int  # of a step on each data rank
    tokens: int  # of a microbatch, padding included

    def pipeline(self, config: Config, world: World) -> Pipeline | OneStage:
        """Return what runs a step's microbatches through the stages."""
        return build_pipeline(
            self.stages,
            self.layers,
            config.parallel,
            world,
            microbatches=self.microbatches,
            tokens=self.tokens,
            dtype=self.compute,
            first_trained=first_trained(self.whole, self.layers),
        )


def plan_model(
    config: Config,
    family: type[LanguageModel],
    model_config: ModelConfig,
    world: World,
    layers: StagePlan | None = None,
    reshard: bool | None = None,
) -> ModelPlan:
    """Spread a model over the ranks on the meta device, which takes no memory.

    Args:
        config: resolved.
        family: of the model.
        model_config: of the whole model.
        world: the ranks.
        layers: which ones, and where; None: all, as the options say.
        reshard: whether gathered parameters are freed between the passes; None: as the options say.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    parallel, options, train = config.parallel, config.model, config.train
    compute = compute_dtype(config.precision.compute, world.device)
    choose_implementation(options.attention, world.device, compute)
    check_compile(config, world.device)
    microbatches = microbatches_per_step(
        train.global_batch_size, train.micro_batch_size, world.data_size
    )
    tokens = tokens_per_microbatch(
        train.micro_batch_size, config.data.seq_len, parallel.cp, parallel.tp
    )
    if options.ops == "plain" and parallel.tp > 1:
        fault = "--model.ops plain has no loss over a split vocabulary"
        raise InputError(f"{fault}; set --parallel.tp to 1, not {parallel.tp}")
    ops.use_plain(options.ops == "plain")

    mtp_layers = trained_mtp_layers(options.mtp, model_config)
    layers = layers or plan_stages(parallel, model_config, microbatches, mtp_layers)
    pp_rank = world.dense.get_local_rank("pp")
    implementations = {
        "mtp": options.mtp,
        "attention": options.attention,
        "experts": options.experts,
        "loss_chunk": options.loss_chunk,
    }
    with torch.device("meta"):
        whole = family(model_config, **implementations)
        shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
        freeze = [*train.freeze, *whole.untrained]
        freeze += frozen_by_router(config.router, whole.moe_layers().values())
        selection = select(shapes, freeze, config.optim.parameter_groups(), whole.parts)
        selection.apply(whole)
        model = family(model_config, **implementations, **layers.model_part(pp_rank))
        selection.apply(model)
        stages = split(model, layers, pp_rank)
    if reshard is None:
        reshard = reshard_after_forward(parallel)
    parallelize(
        stages,
        world,
        compute,
        masters=compute_dtype(config.optim.masters, world.device),
        activations=train,
        reshard_after_forward=reshard,
        precision=config.precision,
        offload=config.optim.offload,
        compiled=options.compile,
    )
    return ModelPlan(
        whole, selection, layers, model, stages, compute, reshard, microbatches, tokens
    )
