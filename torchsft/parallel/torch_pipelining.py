"""torch's pipeline schedules, and everything that works around what they do not do.

This is the only file that touches private names of `torch.distributed.pipelining`, and of FSDP2's
gradients. Its work-arounds, and the versions of torch in which each was seen to be needed:

    name here                      versions     what torch does
    -----------------------------  -----------  --------------------------------------------------
    weight_pass_possible           2.11         a backward pass cannot start at an autograd Function
                                                of Python's (pytorch issue 166577)
    Stage: inputs_of               2.11         numbers among keyword arguments are refused
                                   2.11 - 2.13  ragged documents would be split evenly
    Stage: no_weight_pass          2.11 - 2.13  the weight pass of a checkpointed layer computes it
                                                again for each of its parameters; that of a stage
                                                that embeds tokens besides its input raises
    Stage: gradient_ends           2.11 - 2.13  a stage without anything to train still has to send
                                                a gradient
    Stage: scalar for logits       2.11         outputs of other shapes than the first are refused
    Stage: receive buffers         2.11 - 2.13  there is one for each microbatch of a step, always
    Stage: sends                   2.11 - 2.13  schedules of several stages a rank keep what is sent
                                                to the end of a step: NCCL's and gloo's works hold
                                                the tensor, and are waited for there
    Stage: clone of views          2.11 - 2.13  outputs are detached in place, which views refuse
    backward_weight_one_chunk      2.11 - 2.13  sums over microbatches stay in the compute dtype
    _get_init_p2p_neighbors_ops    2.11         a rank greets itself where both neighbours are its
                                                own (V-shaped schedules), which gloo refuses
    _post_metadata_inference_...   2.11 - 2.13  gradients of a trial run are freed; there was none
    forward_only_schedule          2.11 - 2.13  `schedule.eval()` crashes on V-shaped schedules, and
                                                stages that have evaluated train wrongly
    run_schedule: __cause__        2.11 - 2.13  what a stage's forward pass raises is wrapped
    logging                        2.11 - 2.13  every error is followed by the whole schedule

Shape suffixes: T tokens of a microbatch, S of them on this rank between blocks, D width.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from torchsft.models.language_model import LanguageModel
from torchsft.parallel.compute_copies import free_copies
from torchsft.parallel.world import World

# It logs the whole schedule, a line for each of its steps, on every rank behind every error.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)

Schedule = PipelineScheduleSingle | PipelineScheduleMulti
# Of each stage and direction. The order of sends and receives is one in which each send could be
# waited for at once, so that waiting for earlier ones cannot hang.
SENDS_ON_THEIR_WAY = 2


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


@torch.enable_grad()
def weight_pass_possible() -> bool:
    """Whether a backward pass can start inside a graph at an autograd Function of ours.

    Not with torch 2.11: there zero-bubble schedules do whole backward passes, with the bubble that
    these schedules fill.
    """
    node = _Probe.apply(torch.zeros((), requires_grad=True)).grad_fn
    try:
        return node._input_metadata is not None
    except RuntimeError:
        return False


class _NoGradientFor(torch.autograd.Function):
    """Passes y on, and sends x, on which it does not depend, a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.like = x.detach().new_empty(()).expand_as(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros_like(ctx.like, memory_format=torch.contiguous_format)
        return zeros, grad


def _no_weight_pass() -> Callable[[], None]:
    """Return a weight pass that does nothing: where a stage has a `dw_builder`, torch's
    `backward_one_chunk` does a whole backward pass in the input pass's place.
    """
    return lambda: None


class Stage(PipelineStage):
    """A stage of torch's schedules whose module also gets what belongs to the microbatch.

    That does not pass through the schedules, but lies in `inputs_of`. So that nothing is computed
    twice to learn shapes, torch is given them: hidden states [S, D], and a scalar from the last
    stage.
    """

    def __init__(
        self,
        module: LanguageModel,
        index: int,
        count: int,
        world: World,
        *,
        tokens: int,
        dtype: torch.dtype,
        first_trained: int,
        training: bool,
    ) -> None:
        """Make a stage.

        Args:
            module: its layers.
            index: its number.
            count: how many stages there are.
            world: the ranks.
            tokens: T.
            dtype: of hidden states.
            first_trained: the first stage that has anything to train.
            training: whether it does backward passes.
        """
        tokens_per_rank = tokens // world.sequence["sequence"].size()
        meta = {"device": "meta", "requires_grad": training}
        hidden_SD = torch.empty(tokens_per_rank, module.config.hidden_size, dtype=dtype, **meta)
        scalar = torch.empty((), dtype=torch.float32, **meta)
        tokens_T = torch.empty(tokens, dtype=torch.int64, device="meta")
        # The weight pass goes through the graph once for each parameter, and would compute a layer
        # again each time (14 times, measured). A whole backward pass does it once, and is right.
        recomputes = any(layer.recompute is not None for layer in module.model.layers.values())
        # It would also go through MTP layers twice, since the embedding lies behind them.
        whole_backward = recomputes or module.needs_embedding or not weight_pass_possible()
        super().__init__(
            module,
            index,
            count,
            world.device,
            input_args=tokens_T if index == 0 else hidden_SD,
            output_args=scalar if index == count - 1 else hidden_SD,
            group=world.dense.get_group("pp"),
            dw_builder=_no_weight_pass if whole_backward else None,
        )
        self.has_backward = self.training = training
        # Nothing is trained before this stage.
        self.gradient_ends = training and index <= first_trained
        # Keyword arguments for the module, of each microbatch.
        self.inputs_of: Sequence[Mapping[str, Any]] = []
        # If it only evaluates: what the last stage's module returned for each microbatch.
        self.results: list[Tensor] = []
        self.microbatch = 0  # the one whose forward pass runs
        # Whether the schedule waits for what it sends at the end of a step only.
        self.waits = False
        self.outputs_sent: list[list[dist.Work]] = []
        self.gradients_sent: list[list[dist.Work]] = []

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Note which microbatch it is."""
        self.microbatch = fwd_chunk_id
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        # The input is kept for the backward pass elsewhere, until that is done.
        self._place(self.args_recv_info[fwd_chunk_id], fresh=False)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Free what the gradient was received into and, on the last stage, the loss's graph, which
        ends at the stage's input: the schedule keeps losses to the end of the step.
        """
        super().backward_one_chunk(bwd_chunk_id, loss, *args, **kwargs)
        self._place(self.grad_recv_info.get(bwd_chunk_id, ()), fresh=False)
        if loss is not None:
            loss.detach_()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Allocate what an input is received into."""
        self._place(self.args_recv_info[fwd_chunk_id], fresh=True)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Allocate what a gradient is received into."""
        self._place(self.grad_recv_info.get(bwd_chunk_id, ()), fresh=True)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send an output, or let the schedule do it."""
        return self._send(super().get_fwd_send_ops(fwd_chunk_id), self.outputs_sent)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a gradient, or let the schedule do it."""
        return self._send(super().get_bwd_send_ops(bwd_chunk_id), self.gradients_sent)

    def _send(self, operations: list[dist.P2POp], sent: list[list[dist.Work]]) -> list[dist.P2POp]:
        """Send, and let go of what was sent earlier."""
        if not self.waits:
            return operations
        sent.append(schedules._batch_p2p(operations))
        self.wait_for(sent, SENDS_ON_THEIR_WAY)
        return []

    def wait_for(self, sent: list[list[dist.Work]], left: int = 0) -> None:
        """Wait for sends, but for the last ones."""
        while len(sent) > left:
            schedules._wait_batch_p2p(sent.pop(0))

    def _place(self, infos: Sequence[Any], *, fresh: bool) -> None:
        """Let receive buffers be fresh ones, or hold nothing and have the shape alone."""
        for info in infos:
            buffer = getattr(info, "buffer", None)  # a first stage receives nothing
            if buffer is None:
                continue
            if fresh:
                new = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.device)
            else:
                new = torch.empty((), dtype=buffer.dtype, device="meta").expand(buffer.shape)
            info.buffer = new.requires_grad_(buffer.requires_grad)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_buffers(super()._prepare_forward_infra, *args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_buffers(super()._prepare_backward_infra, *args, **kwargs)

    def _without_buffers(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let torch make its receive buffers on the meta device."""
        device, self.device = self.device, torch.device("meta")
        result = prepare(*args, **kwargs)
        self.device = device
        for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
            self._place(infos, fresh=False)
        return result

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
            output = output.new_zeros((), dtype=torch.float32)
        return output.clone() if output._is_view() else output

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Let FSDP's fp32 sum take a microbatch's gradients, as behind a whole backward pass."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for part in self.submod.modules():
            if not isinstance(part, FSDPModule):
                continue
            group = part._get_fsdp_state()._fsdp_param_group
            if group is None:
                continue
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        operations = super()._get_init_p2p_neighbors_ops()
        return [each for each in operations if each.group_peer != self.group_rank]

    def _post_metadata_inference_cleanup(self) -> None:
        pass


def run_schedule(
    schedule: Schedule, stages: Sequence[Stage], inputs: Sequence[Mapping[str, Any]]
) -> list[Tensor]:
    """Run microbatches through the stages of this rank.

    Args:
        schedule: over these stages.
        stages: of this rank.
        inputs: keyword arguments of `LanguageModel.forward`, of each microbatch.

    Returns:
        What the last stage's module returned for each microbatch, where it only evaluates and is on
        this rank.
    """
    beside_tokens = [
        {"token_ids" if name == "tokens" else name: value for name, value in of_one.items()}
        for of_one in inputs
    ]
    for stage in stages:
        stage.clear_runtime_states()
        stage.inputs_of = beside_tokens
        stage.waits = isinstance(schedule, schedules._PipelineScheduleRuntime)
    tokens = [(of_one["tokens"],) for of_one in inputs]
    # The targets are among the inputs; torch asks for one of each.
    targets = [None] * len(inputs)
    try:
        schedule._step_microbatches(tokens, target_mbs=targets, return_outputs=False)
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
    for stage in stages:
        stage.wait_for(stage.outputs_sent)
        stage.wait_for(stage.gradients_sent)
    free_copies(stage.submod for stage in stages)
    results = [result for stage in stages for result in stage.results]
    for stage in stages:
        stage.clear_runtime_states()
        stage.inputs_of, stage.results = [], []
    return results


def forward_only_schedule(
    training: Schedule,
    stages: Sequence[Stage],
    rank_of_stage: Mapping[int, int],
    microbatches: int,
) -> PipelineScheduleMulti:
    """Make a schedule of the forward passes of a training schedule.

    In the place of what torch's multi-stage schedules prepare when they are made: their order of
    actions, with sends and receives put in.

    Args:
        training: whose order of forward passes is kept.
        stages: of this rank, that do not train.
        rank_of_stage: pipeline rank of each stage.
        microbatches: at most as many as the training schedule has.
    """
    schedule = schedules._PipelineScheduleRuntime(
        list(stages), n_microbatches=microbatches, scale_grads=False
    )
    for each in (schedule, *stages):
        each.stage_index_to_group_rank = dict(rank_of_stage)
    orders = {
        rank: schedules._add_unshard_reshard(actions)
        for rank, actions in _forward_orders(training, rank_of_stage, microbatches).items()
    }
    schedule.pipeline_order_with_comms = schedules._add_send_recv(
        orders, lambda stage: rank_of_stage[stage], len(rank_of_stage)
    )
    return schedule


def _forward_orders(
    training: Schedule, rank_of_stage: Mapping[int, int], microbatches: int
) -> dict[int, list[schedules._Action]]:
    """Return the forward passes of each pipeline rank, in the training schedule's order."""
    forward = schedules._ComputationType.FORWARD
    if isinstance(training, PipelineScheduleSingle):
        # 1F1B's `pipeline_order` is not what it does (torch 2.13); stage s is on rank s.
        return {
            rank: [schedules._Action(rank, forward, number) for number in range(microbatches)]
            for rank in rank_of_stage.values()
        }
    orders = {}
    for rank, actions in training.pipeline_order.items():
        orders[rank] = [
            action
            for action in _single_actions(actions)
            if action.computation_type == forward and action.microbatch_index < microbatches
        ]
    return orders


def _single_actions(actions: Sequence[Any]) -> list[schedules._Action]:
    """Return the actions of a rank without pauses, and overlapped ones one by one."""
    single = []
    for action in actions:
        if action is not None:
            single += action.sub_actions or (action,)
    return single
