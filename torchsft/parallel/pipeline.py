"""Pipeline parallelism: how the microbatches of a step pass through the stages.

The schedules are torch's (`torch.distributed.pipelining`); this is the only file that touches
private names of that package, and of FSDP2's gradients. What a microbatch needs besides hidden
states (positions, documents, labels, weights) every rank of a pipeline reads itself and gives to
its own stages: only hidden states and their gradients travel, and no logits.

Shape suffixes: T tokens of a microbatch, S of them on this rank between blocks, D width, V
vocabulary.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from torchsft.config import InputError, Parallel
from torchsft.data.batch import Batch
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.stages import StagePlan, plan_stages, schedule_class
from torchsft.parallel.world import World

# It logs the whole schedule, a line for each of its steps, on every rank behind every error.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

__all__ = [
    "OneStage",
    "Pipeline",
    "build_pipeline",
    "plan_stages",
    "reshard_after_forward",
    "split",
]


def split(model: LanguageModel, plan: StagePlan, pp_rank: int) -> list[LanguageModel]:
    """The stages of a pipeline rank whose layers are all in `model`, which keeps them, under their
    names in the whole model.
    """
    stages = plan.local(pp_rank)
    return [model] if len(stages) == 1 else [model.part(**plan.part([stage])) for stage in stages]


def reshard_after_forward(parallel: Parallel) -> bool:
    """Whether FSDP may free gathered parameters between forward and backward.

    Not with a pipeline: zero-bubble schedules would compute wrong gradients without a word (the
    weight pass finds other parameters than the input pass), and the others would gather again for
    every microbatch.
    """
    return parallel.pp == 1


def build_pipeline(
    # of this rank (`split`), parallelized; memory and weights may come later
    stages: Sequence[LanguageModel],
    plan: StagePlan,
    parallel: Parallel,
    world: World,
    *,
    microbatches: int,  # of a step
    tokens: int,  # T
    dtype: torch.dtype,  # of hidden states (compute)
    # the first stage that has anything to train; those before it do no backward pass
    first_trained: int = 0,
) -> "Pipeline | OneStage":
    """What runs a step's microbatches through the model."""
    if parallel.pp == 1:
        return OneStage(stages, world, tokens)
    return Pipeline(
        stages, world, tokens, plan, parallel.pp_schedule, microbatches, dtype, first_trained
    )


def first_trained(model: LanguageModel, plan: StagePlan) -> int:
    """The first stage of the whole `model` that has a parameter to train."""
    for stage in range(len(plan.layers)):
        parameters = model.part(**plan.part([stage])).parameters()
        if any(parameter.requires_grad for parameter in parameters):
            return stage
    raise AssertionError("a model of which nothing is trained")


class Runner(ABC):
    """What runs microbatches through this rank's modules; the part of it that needs no
    gradients.
    """

    at_once = 1  # microbatches that `_forward` takes

    def __init__(self, modules: Sequence[LanguageModel], world: World, tokens: int) -> None:
        self.modules, self.world, self.tokens = modules, world, tokens
        # Whether every forward pass has T tokens; else any number of them will do.
        self.fixed = world.dense["pp"].size() > 1 or world.sequence["sequence"].size() > 1
        self.zero = torch.zeros((), dtype=torch.float64, device=world.device)

    @abstractmethod
    def _forward(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        """What the model returns for each microbatch; nothing on ranks without the last stage."""

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The loss sum of any number of batches, float64 scalar, in evaluation mode; 0 on ranks
        without the last stage.

        All ranks of a pipeline, or that share parameters, give as many batches.
        """
        total = self.zero.clone()
        for start in range(0, len(batches), self.at_once):
            inputs = [
                batch.to(self.world.device).model_inputs()
                for batch in batches[start : start + self.at_once]
            ]
            for loss in self._undisturbed(inputs):
                total += loss
        return total

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        logits_at: Tensor,
    ) -> Tensor:
        """Logits [n, V] of the n tokens at `logits_at`, on every rank, in evaluation mode.

        With a pipeline, or where ranks share tokens, of at most T tokens. The arguments are those
        of `LanguageModel.forward`.
        """
        if self.fixed:
            if len(tokens) > self.tokens:
                fault = (
                    f"an answer needs a forward pass over {len(tokens)} tokens, but in this layout "
                    f"one has {self.tokens}; "
                )
                raise InputError(fault + "raise --data.seq-len or lower --eval.max-new-tokens")
            tokens, positions = (F.pad(x, (0, self.tokens - len(x))) for x in (tokens, positions))
        inputs = {
            "tokens": tokens,
            "positions": positions,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
        }
        return self._everywhere(
            self._undisturbed([inputs | {"logits_at": logits_at}]), len(logits_at)
        )

    def _everywhere(self, results: list[Tensor], n: int) -> Tensor:
        return results[0]

    def _undisturbed(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        """`_forward` in evaluation mode."""
        for module in self.modules:
            module.eval()
        results = self._forward(inputs)
        for module in self.modules:
            module.train()
        return results


class OneStage(Runner):
    """The whole model on this rank (and those that share it): one microbatch after the other."""

    def step(self, batches: Sequence[Batch], weight: float) -> Tensor:
        """Forward and backward pass of a step's microbatches; gradients are those of loss sum /
        weight.

        Returns the loss sum of this rank's microbatches, float64 scalar.
        """
        model, total = self.modules[0], self.zero.clone()
        for i, batch in enumerate(batches):
            # replicas (HSDP) sum once, what each has summed over its microbatches
            if isinstance(model, FSDPModule):
                model.set_requires_all_reduce(i == len(batches) - 1)
            loss = model(**batch.to(self.world.device).model_inputs())
            (loss / weight).backward()
            total += loss.detach()
        return total

    def _forward(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        model = self.modules[0]
        results = [model(**one) for one in inputs]
        if isinstance(model, FSDPModule):
            # the root stays gathered for a backward pass, and would be stale after an update
            model.reshard()
        return results


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


@torch.enable_grad()
def weight_pass_possible() -> bool:
    """Whether a backward pass can start inside a graph at an autograd Function of ours. Not with
    torch 2.11: there zero-bubble schedules do whole backward passes, with the bubble that these
    schedules fill.
    """
    node = _Probe.apply(torch.zeros((), requires_grad=True)).grad_fn
    try:
        return node._input_metadata is not None
    except RuntimeError:
        return False


class _NoGradientFor(torch.autograd.Function):
    """Passes y on, and sends x, on which it does not depend, a gradient of zeros: schedules want
    one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.like = x.detach().new_empty(()).expand_as(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(ctx.like, memory_format=torch.contiguous_format), grad


class Stage(PipelineStage):
    """A stage of torch's schedules whose module also gets what belongs to the microbatch.

    That does not pass through the schedules: they would split ragged documents, and torch 2.11
    refuses numbers there. So that nothing is computed twice to learn shapes, these are told: hidden
    states [S, D], and a scalar from the last stage.
    """

    def __init__(
        self,
        module: LanguageModel,
        index: int,
        count: int,
        world: World,
        tokens: int,
        dtype: torch.dtype,
        first_trained: int,
        training: bool,
    ) -> None:
        shape_SD = (tokens // world.sequence["sequence"].size(), module.config.hidden_size)
        hidden_SD = torch.empty(shape_SD, dtype=dtype, device="meta", requires_grad=training)
        tokens_T = torch.empty(tokens, dtype=torch.int64, device="meta")
        scalar = torch.empty((), dtype=torch.float32, device="meta", requires_grad=training)
        # The weight pass of zero-bubble schedules goes through the graph once for each parameter,
        # and would compute a layer again each time (14 times, measured). A whole backward pass in
        # the input pass's place does it once, and is right.
        recomputes = any(layer.recompute is not None for layer in module.model.layers.values())
        no_weight_pass = (
            (lambda: lambda: None) if recomputes or not weight_pass_possible() else None
        )
        ends = dict(
            input_args=tokens_T if index == 0 else hidden_SD,
            output_args=scalar if index == count - 1 else hidden_SD,
        )
        group = world.dense.get_group("pp")
        super().__init__(
            module, index, count, world.device, **ends, group=group, dw_builder=no_weight_pass
        )
        self.has_backward = self.training = training
        self.gradient_ends = training and index <= first_trained  # before it nothing is trained
        # keyword arguments for the module, of each microbatch
        self.inputs_of: list[dict[str, Any]] = []
        # if it only evaluates: what the last stage's module returned for each microbatch
        self.results: list[Tensor] = []
        self.microbatch = 0

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Note which microbatch it is."""
        self.microbatch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, x: Tensor) -> Tensor:
        """Call the module with all that belongs to the microbatch."""
        inputs = self.inputs_of[self.microbatch]
        if self.gradient_ends and not self.is_first:
            output = _NoGradientFor.apply(x, self.submod(x.detach(), **inputs))
        else:
            output = self.submod(x, **inputs)
        if self.gradient_ends and not output.requires_grad:
            output.requires_grad_()  # all of the first stage is frozen: what comes back ends here
        if self.is_last and not self.training:
            self.results.append(output)
            # torch 2.11 compares shapes, and logits vary
            output = output.new_zeros((), dtype=torch.float32)
        # torch detaches it in place, which views refuse
        return output.clone() if output._is_view() else output

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """torch leaves the sum over microbatches in the compute dtype; FSDP's fp32 sum takes it, as
        behind a whole backward.
        """
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for part in self.submod.modules():
            group = (
                part._get_fsdp_state()._fsdp_param_group if isinstance(part, FSDPModule) else None
            )
            for parameter in group.fsdp_params if group else ():
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 would let a rank greet itself where neighbours in a V are both its own, which
        gloo refuses.
        """
        return [
            op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank
        ]

    def _post_metadata_inference_cleanup(self) -> None:
        """torch frees gradients here after a trial run; there was none."""


class Pipeline(Runner):
    """The stages of this rank among those of its pipeline, run by one of torch's schedules."""

    def __init__(
        self,
        modules: Sequence[LanguageModel],
        world: World,
        tokens: int,
        plan: StagePlan,
        schedule: str,
        microbatches: int,
        dtype: torch.dtype,
        first_trained: int = 0,
    ) -> None:
        super().__init__(modules, world, tokens)
        self.plan, self.microbatches, self.dtype, self.first_trained = (
            plan,
            microbatches,
            dtype,
            first_trained,
        )
        self.places = dict(enumerate(plan.ranks))
        # receive buffers are as many; more would hardly fill more bubble
        self.at_once = min(microbatches, len(plan.ranks))
        self.group = world.dense.get_group("pp")
        self.weight, self.total = 1.0, self.zero
        self.stages = self._stages(training=True)
        # NCCL sets up a group's communicator in its first call, which all of its ranks must join;
        # two neighbours do not.
        dist.all_reduce(torch.zeros(1, device=world.device), group=self.group)
        kind = schedule_class(schedule)
        stages = self.stages if issubclass(kind, PipelineScheduleMulti) else self.stages[0]
        self.schedule = kind(
            stages, n_microbatches=microbatches, loss_fn=self._loss, scale_grads=False
        )
        assert self.stages[0].stage_index_to_group_rank == self.places, (
            "torch places stages elsewhere"
        )
        # by number of microbatches
        self.forwards: dict[int, tuple[PipelineScheduleMulti, list[Stage]]] = {}

    def step(self, batches: Sequence[Batch], weight: float) -> Tensor:
        """As `OneStage.step`; the loss sum is 0 where the last stage is not.

        FSDP sums gradients over ranks once, behind the last microbatch."""
        assert len(batches) == self.microbatches, (
            f"{len(batches)} microbatches, the schedule has {self.microbatches}"
        )
        self.forwards.clear()  # with their receive buffers
        self.weight, self.total = weight, self.zero.clone()
        self._run(
            self.schedule,
            self.stages,
            [batch.to(self.world.device).model_inputs() for batch in batches],
        )
        return self.total

    def _stages(self, training: bool) -> list[Stage]:
        indices = self.plan.local(dist.get_rank(self.group))
        shared = (
            len(self.plan.layers),
            self.world,
            self.tokens,
            self.dtype,
            self.first_trained,
            training,
        )
        return [
            Stage(module, index, *shared)
            for module, index in zip(self.modules, indices, strict=True)
        ]

    def _loss(self, output: Tensor, _: None) -> Tensor:
        self.total += output.detach()
        return output / self.weight

    def _run(
        self,
        schedule: schedules._PipelineSchedule,
        stages: list[Stage],
        inputs: list[dict[str, Any]],
    ) -> list[Tensor]:
        for stage in stages:
            stage.clear_runtime_states()
            stage.inputs_of = [
                {name: x for name, x in one.items() if name != "tokens"} for one in inputs
            ]
        tokens = [(one["tokens"],) for one in inputs]
        try:  # the targets are among the inputs; torch asks for one of each
            schedule._step_microbatches(
                tokens, target_mbs=[None] * len(inputs), return_outputs=False
            )
        except RuntimeError as error:  # torch wraps what a stage's forward pass raises
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None
        results = [result for stage in stages for result in stage.results]
        for stage in stages:
            stage.clear_runtime_states()
            stage.inputs_of, stage.results = [], []
        return results

    def _forward(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        if len(inputs) not in self.forwards:
            self.forwards[len(inputs)] = self._forward_schedule(len(inputs))
        return self._run(*self.forwards[len(inputs)], inputs)

    def _everywhere(self, results: list[Tensor], n: int) -> Tensor:
        empty = torch.empty(
            n, self.modules[0].config.vocab_size, dtype=self.dtype, device=self.world.device
        )
        logits_nV = results[0].to(self.dtype).contiguous() if results else empty
        dist.broadcast(logits_nV, group=self.group, group_src=self.plan.ranks[-1])
        return logits_nV

    def _forward_schedule(self, microbatches: int) -> tuple[PipelineScheduleMulti, list[Stage]]:
        """The training schedule's forward passes of some microbatches, over stages of their own on
        the same modules.

        torch's own `schedule.eval()` crashes on V-shaped schedules, and stages that evaluated train
        wrongly in the next step.
        """
        forward = schedules._ComputationType.FORWARD
        # 1F1B's `pipeline_order` is not what it does (torch 2.13)
        if isinstance(self.schedule, PipelineScheduleSingle):
            orders = {
                rank: [schedules._Action(rank, forward, i) for i in range(microbatches)]
                for rank in self.plan.ranks
            }
        else:
            orders = {}
            for rank, actions in self.schedule.pipeline_order.items():
                single = [
                    one
                    for action in actions
                    if action is not None
                    for one in action.sub_actions or (action,)
                ]
                orders[rank] = [
                    x
                    for x in single
                    if x.computation_type == forward and x.microbatch_index < microbatches
                ]
        stages = self._stages(training=False)
        schedule = schedules._PipelineScheduleRuntime(
            stages, n_microbatches=microbatches, scale_grads=False
        )
        for one in (schedule, *stages):
            one.stage_index_to_group_rank = self.places
        orders = {rank: schedules._add_unshard_reshard(actions) for rank, actions in orders.items()}
        schedule.pipeline_order_with_comms = schedules._add_send_recv(
            orders, self.places.__getitem__, len(self.places)
        )
        return schedule, stages
