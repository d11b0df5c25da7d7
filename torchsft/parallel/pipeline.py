"""Pipeline parallelism: how the microbatches of a step pass through the stages.

The schedules are torch's (parallel/torch_pipelining.py). What a microbatch needs besides hidden
states (positions, documents, labels, weights) every rank of a pipeline reads itself and gives to
its own stages: only hidden states and their gradients travel, and no logits.

Shape suffixes: T tokens of a microbatch, V vocabulary, n tokens whose logits are wanted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from torchsft.config import InputError, Parallel
from torchsft.data.batch import Batch
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.gradients import ExactSummands, sum_summands, sum_with
from torchsft.parallel.stages import StagePlan, schedule_class
from torchsft.parallel.torch_pipelining import Stage, forward_only_schedule, run_schedule
from torchsft.parallel.world import World


def split(model: LanguageModel, plan: StagePlan, pp_rank: int) -> list[LanguageModel]:
    """Split a pipeline rank's `model` into its stages; it keeps their layers, under their names in
    the whole model.
    """
    stages = plan.local(pp_rank)
    if len(stages) == 1:
        return [model]
    return [model.part(**plan.part([stage])) for stage in stages]


def reshard_after_forward(parallel: Parallel) -> bool:
    """Whether FSDP may free gathered parameters between forward and backward.

    Not with a pipeline: zero-bubble schedules would compute wrong gradients without a word (the
    weight pass finds other parameters than the input pass), and the others would gather again for
    every microbatch.
    """
    return parallel.pp == 1


def first_trained(model: LanguageModel, plan: StagePlan) -> int:
    """Return the first stage of the whole `model` that has a parameter to train."""
    for stage in range(len(plan.layers)):
        parameters = model.part(**plan.part([stage])).parameters()
        if any(parameter.requires_grad for parameter in parameters):
            return stage
    raise AssertionError("a model of which nothing is trained")


def build_pipeline(
    stages: Sequence[LanguageModel],
    plan: StagePlan,
    parallel: Parallel,
    world: World,
    *,
    microbatches: int,
    tokens: int,
    dtype: torch.dtype,
    first_trained: int = 0,
) -> "Pipeline | OneStage":
    """Make what runs a step's microbatches through the model.

    Args:
        stages: of this rank (`split`), parallelized; memory and weights may come later.
        plan: which stages are where.
        parallel: names the schedule.
        world: the ranks.
        microbatches: of a step.
        tokens: T.
        dtype: of hidden states (compute).
        first_trained: the first stage that has anything to train; those before it do no backward
            pass.
    """
    if parallel.pp == 1:
        return OneStage(stages, world, tokens)
    return Pipeline(
        stages,
        world,
        tokens,
        plan,
        parallel.pp_schedule,
        microbatches=microbatches,
        dtype=dtype,
        first_trained=first_trained,
    )


class Runner(ABC):
    """What runs microbatches through this rank's modules; the part of it that needs no
    gradients.
    """

    microbatches_at_once = 1  # of an evaluation's forward pass

    def __init__(self, modules: Sequence[LanguageModel], world: World, tokens: int) -> None:
        self.modules, self.world, self.tokens = modules, world, tokens
        # Whether every forward pass has T tokens; else any number of them will do.
        shares_tokens = world.sequence["sequence"].size() > 1
        self.needs_all_tokens = world.dense["pp"].size() > 1 or shares_tokens
        self.zero = torch.zeros((), dtype=torch.float64, device=world.device)
        self.tp = world.parameter["tp"]  # each such look-up makes a mesh

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters, of those on several pipeline ranks the first one's."""
        for module in self.modules:
            yield from module.parameters()

    @cached_property
    def exact(self) -> ExactSummands:
        """What `.grad` would round before it is summed over `tp`; asked for before a step's passes,
        when parameters have memory.
        """
        return ExactSummands(self.modules if self.tp.size() > 1 else [])

    @abstractmethod
    def _forward(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        """Return what the model returns for each microbatch; nothing on ranks without the last
        stage.
        """

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Return the loss sum of any number of batches, float64 scalar, in evaluation mode; 0 on
        ranks without the last stage.

        All ranks of a pipeline, or that share parameters, give as many batches.
        """
        total = self.zero.clone()
        for start in range(0, len(batches), self.microbatches_at_once):
            together = batches[start : start + self.microbatches_at_once]
            inputs = [batch.to(self.world.device).model_inputs() for batch in together]
            for loss in self._evaluation_forward(inputs):
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
        """Return the logits [n, V] of the n tokens at `logits_at`, on every rank, in evaluation
        mode.

        With a pipeline, or where ranks share tokens, of at most T tokens. The arguments are those
        of `LanguageModel.forward`.
        """
        if self.needs_all_tokens:
            missing = self.tokens - len(tokens)
            if missing < 0:
                raise InputError(
                    f"an answer needs a forward pass over {len(tokens)} tokens, but in this layout "
                    f"one has {self.tokens}; raise --data.seq-len or lower --eval.max-new-tokens"
                )
            tokens = F.pad(tokens, (0, missing))
            positions = F.pad(positions, (0, missing))
        inputs = {
            "tokens": tokens,
            "positions": positions,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "logits_at": logits_at,
        }
        return self._to_all_ranks(self._evaluation_forward([inputs]), len(logits_at))

    def _to_all_ranks(self, results: list[Tensor], n: int) -> Tensor:
        """Return the one result [n, V] of the last stage, on every rank of the pipeline."""
        return results[0]

    def _evaluation_forward(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        """Run `_forward` in evaluation mode."""
        for module in self.modules:
            module.eval()
        results = self._forward(inputs)
        for module in self.modules:
            module.train()
        return results


class OneStage(Runner):
    """The whole model on this rank (and those that share it): one microbatch after the other."""

    def step(self, batches: Sequence[Batch], divisor: float) -> Tensor:
        """Run forward and backward passes of a step's microbatches.

        Args:
            batches: of this rank.
            divisor: gradients are those of loss sum / divisor.

        Returns:
            The loss sum of this rank's microbatches, float64 scalar.
        """
        model, total, exact = self.modules[0], self.zero.clone(), self.exact
        for number, batch in enumerate(batches, start=1):
            if isinstance(model, FSDPModule):
                # Shards are summed for every microbatch, so that no rank holds whole gradients;
                # replicas (HSDP) sum once, what each has summed over its microbatches.
                model.set_requires_all_reduce(number == len(batches))
            loss = model(**batch.to(self.world.device).model_inputs())
            (loss / divisor).backward()
            total += loss.detach()
            del loss  # before the next forward pass: its graph keeps more than saved tensors
        sum_summands(model.parameters(), self.tp, self.world.device, exact.take())
        return total

    def _forward(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        model = self.modules[0]
        results = [model(**of_one) for of_one in inputs]
        if isinstance(model, FSDPModule):
            # The root stays gathered for a backward pass, and would be stale after an update.
            model.reshard()
        return results


class Pipeline(Runner):
    """The stages of this rank among those of its pipeline, run by one of torch's schedules."""

    def __init__(
        self,
        modules: Sequence[LanguageModel],
        world: World,
        tokens: int,
        plan: StagePlan,
        schedule: str,
        *,
        microbatches: int,
        dtype: torch.dtype,
        first_trained: int,
    ) -> None:
        """Make the schedule; see `build_pipeline` for the arguments."""
        super().__init__(modules, world, tokens)
        self.plan, self.microbatches, self.dtype = plan, microbatches, dtype
        self.first_trained = first_trained
        self.rank_of_stage = dict(enumerate(plan.ranks))
        # Receive buffers are as many; more would hardly fill more bubble.
        self.microbatches_at_once = min(microbatches, len(plan.ranks))
        self.group = world.dense.get_group("pp")
        self.divisor, self.total = 1.0, self.zero
        self.ends = plan.ranks[0], plan.ranks[-1]
        self.stages = self._stages(training=True)
        kind = schedule_class(schedule)
        takes_several = issubclass(kind, PipelineScheduleMulti)
        self.schedule = kind(
            self.stages if takes_several else self.stages[0],
            n_microbatches=microbatches,
            loss_fn=self._loss,
            scale_grads=False,
        )
        places = self.stages[0].stage_index_to_group_rank
        assert places == self.rank_of_stage, "torch places stages elsewhere"
        # Forward-only schedules and their stages, by number of microbatches.
        self.forward_only: dict[int, tuple[PipelineScheduleMulti, list[Stage]]] = {}

    def step(self, batches: Sequence[Batch], divisor: float) -> Tensor:
        """Do as `OneStage.step`; the loss sum is 0 where the last stage is not.

        FSDP sums gradients over ranks once, behind the last microbatch.
        """
        expected = f"{len(batches)} microbatches, the schedule has {self.microbatches}"
        assert len(batches) == self.microbatches, expected
        self.divisor, self.total, exact = divisor, self.zero.clone(), self.exact
        inputs = [batch.to(self.world.device).model_inputs() for batch in batches]
        run_schedule(self.schedule, self.stages, inputs)
        sum_summands(super().parameters(), self.tp, self.world.device, exact.take())
        if self.shared is not None:
            (peer,) = {*self.ends} - {dist.get_rank(self.group)}
            sum_with(self.shared, peer, self.group)
        return self.total

    @property
    def shared(self) -> nn.Parameter | None:
        """The embedding, where it is on another pipeline rank too, for MTP layers."""
        if self.modules[0].depth == self.modules[0].config.num_hidden_layers:
            return None
        for module in self.modules:
            if module.first or module.needs_embedding:
                return module.model.embed_tokens.weight
        return None

    def parameters(self) -> Iterator[nn.Parameter]:
        counted_elsewhere = None if self.modules[0].first else self.shared
        for parameter in super().parameters():
            if parameter is not counted_elsewhere:
                yield parameter

    def _stages(self, training: bool) -> list[Stage]:
        """Make this rank's stages."""
        return [
            Stage(
                module,
                index,
                len(self.plan.layers),
                self.world,
                tokens=self.tokens,
                dtype=self.dtype,
                first_trained=self.first_trained,
                training=training,
            )
            for module, index in zip(
                self.modules, self.plan.local(dist.get_rank(self.group)), strict=True
            )
        ]

    def _loss(self, output: Tensor, _: None) -> Tensor:
        """Add a microbatch's loss sum, and return what its backward pass begins with."""
        self.total += output.detach()
        return output / self.divisor

    def _forward(self, inputs: list[dict[str, Any]]) -> list[Tensor]:
        count = len(inputs)
        if count not in self.forward_only:
            stages = self._stages(training=False)
            schedule = forward_only_schedule(self.schedule, stages, self.rank_of_stage, count)
            self.forward_only[count] = schedule, stages
        schedule, stages = self.forward_only[count]
        return run_schedule(schedule, stages, inputs)

    def _to_all_ranks(self, results: list[Tensor], n: int) -> Tensor:
        if results:
            logits_nV = results[0].to(self.dtype).contiguous()
        else:
            vocabulary = self.modules[0].config.vocab_size
            logits_nV = torch.empty(n, vocabulary, dtype=self.dtype, device=self.world.device)
        dist.broadcast(logits_nV, group=self.group, group_src=self.plan.ranks[-1])
        return logits_nV
