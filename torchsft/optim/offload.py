"""AdamW in host memory (--optim.offload), behind the backward pass and beside the next forward one.

Where things are:

    host     parameters (the fp32 masters, which are the model's parameters: so checkpoints, exports
             and other layouts find them as without offload), gradients and two moments; pinned
             what travels
    device   a copy of this rank's shards in the dtype that FSDP gathers (bf16; of routers fp32),
             and what FSDP gathers of a layer at a time

A step:

    backward    FSDP's `CPUOffloadPolicy` copies each layer's summed gradient to the host, on its
                reduce-scatter stream, and adds microbatches up there
    norm, clip  on the host, where all gradients are: the same operations in the same order as
                those of a resident step on a CPU
    `step`      hands the layers to a thread, in the order of the forward pass. It lets torch's
                fused CPU AdamW update a layer, frees its gradients, rounds it to the gathered dtype
                in pinned memory, and copies that to the device on a stream of its own
    forward     before FSDP gathers a layer, a hook waits for the thread to be done with it

So every number is that of `torch.optim.AdamW(fused=True)` on CPU tensors, and the forward pass sees
the masters rounded once, as FSDP rounds them without offload. On a CPU, the "device" is the host:
the same code runs, without streams and pinning.

With several microbatches FSDP waits, from the second on, for a layer's gradient before it launches
more, to add it up on the host; with a pipeline it adds up on the device, and copies once.

Beyond FSDP's interface this file uses `FSDPParam.sharded_param`, `.param_dtype` and
`._sharded_param_data` (see `gathered_from`).
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from torchsft.models.language_model import LanguageModel
from torchsft.optim.fused import FusedAdamW


@dataclass(eq=False)
class _Unit:
    """What is updated at once: a layer with its experts and router, or the rest of a stage.

    Attributes:
        parts: parameters as FSDP keeps them.
        groups: the optimizer's groups of this unit's parameters.
        adamw: updates these; None: all are frozen.
        done: when the last step's update of this unit has reached the device.
    """

    module: FSDPModule
    parts: list[FSDPParam]
    groups: list[dict] = field(default_factory=list)
    adamw: FusedAdamW | None = None
    done: Future | None = None


def gathered_from(module: FSDPModule) -> list[FSDPParam]:
    """Return FSDP's records of the parameters that it gathers for a module, without those of FSDP
    modules inside.

    Of a record: `sharded_param` is the model's parameter; `_sharded_param_data` is what is
    gathered, flat and padded, on any device and in any dtype; `param_dtype` is the dtype to gather
    in, None: the parameter's.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    return [] if group is None else group.fsdp_params


def _units(stage: FSDPModule) -> list[_Unit]:
    """Return a stage's units: its own parameters, then each layer in order."""
    units = [_Unit(stage, gathered_from(stage))]
    inside: set[nn.Module] = set()  # the modules of the last layer
    for module in stage.modules():
        if module is stage or not isinstance(module, FSDPModule):
            continue
        if module in inside:
            units[-1].parts += gathered_from(module)
        else:
            units.append(_Unit(module, [*gathered_from(module)]))
            inside = set(module.modules())
    return units


class OffloadedAdamW(torch.optim.AdamW):
    """Steps the fp32 parameters of a model whose FSDP modules have a `CPUOffloadPolicy`.

    After the first one `step` returns at once: who gathers parameters, or asks `model` for its
    `state_dict`, waits. Each group is split into one for each unit.

    Args:
        adamw: a fused one, of the same parameters: its groups and options count.
        model: this rank's part.
        stages: that it was split into; FSDP's roots.
    """

    def __init__(
        self, adamw: torch.optim.AdamW, model: LanguageModel, stages: Sequence[nn.Module]
    ) -> None:
        self.units = [unit for stage in stages for unit in _units(stage)]
        for unit in self.units:
            held = {part.sharded_param for part in unit.parts}
            for group in adamw.param_groups:
                parameters = [each for each in group["params"] if each in held]
                if parameters:
                    unit.groups.append({**group, "params": parameters})
        groups = [group for unit in self.units for group in unit.groups]
        super().__init__(groups or adamw.param_groups, fused=True)
        for unit in self.units:
            if unit.groups:
                copies = [dict(group) for group in unit.groups]
                unit.adamw = FusedAdamW(copies, fused=True)
        self.device = next(stages[0].buffers()).device
        is_cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if is_cuda else None
        self.thread = ThreadPoolExecutor(1, "offloaded-adamw")
        # FSDP's record -> the masters and their copy on the device, both flat and padded.
        self.copies: dict[FSDPParam, tuple[Tensor, Tensor]] = {}
        # Schedules of pipelines gather all of a stage before its forward pass begins.
        self.overlaps = len(stages) == 1 and model.first and model.last
        self._wait_before_gathering()
        model.register_state_dict_pre_hook(lambda *_: self.gather_masters())

    def _wait_before_gathering(self) -> None:
        """Let each unit's forward pass begin when FSDP can gather it, and the next unit, which it
        gathers meanwhile.
        """
        for unit, following in zip(self.units, [*self.units[1:], None], strict=True):
            is_root = unit is self.units[0]
            needed = [unit] if is_root or following is None else [unit, following]
            unit.module.register_forward_pre_hook(
                lambda *_, needed=needed: self.wait(needed), prepend=True
            )

    def wait(self, units: Iterable[_Unit] | None = None) -> None:
        """Return when the last step is done, of some units or of all."""
        for unit in self.units if units is None else units:
            if unit.done is not None:
                unit.done.result()
                unit.done = None

    def step(self, closure: None = None) -> None:
        """Begin to update all units; the gradients belong to the thread, which frees them."""
        assert closure is None, "the gradients are there"
        self.wait()
        # Of the first step others see the state as soon as it returns; FSDP may not have gathered
        # anything yet (torch's `get_optimizer_state_dict` steps to make a state).
        is_first = not self.state
        for unit in self.units:
            if unit.adamw is not None:
                unit.adamw.state = self.state
                unit.adamw.found_inf = getattr(self, "found_inf", None)
                for own, group in zip(unit.adamw.param_groups, unit.groups, strict=True):
                    own.update(group)  # this step's learning rate
            unit.done = self.thread.submit(self._update, unit, not is_first)
        if is_first or not self.overlaps:
            self.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients, where the thread does not."""
        for unit in self.units:
            if unit.done is None:
                for part in unit.parts:
                    part.sharded_param.grad = None

    @torch.no_grad()
    def _update(self, unit: _Unit, copies: bool) -> None:
        """Update a unit on the host and, if `copies`, on the device; runs in the thread."""
        if unit.adamw is not None:
            unit.adamw.step()
            unit.adamw.zero_grad()
        if not copies:
            return
        with torch.cuda.stream(self.stream):
            for part in unit.parts:
                self._copy(part)
        if self.stream is not None:
            self.stream.synchronize()

    def _copy(self, part: FSDPParam) -> None:
        """Copy masters to the device, rounded, and let FSDP gather the copy."""
        if part not in self.copies:
            masters = part._sharded_param_data
            dtype = part.param_dtype or masters.dtype
            self.copies[part] = (
                masters,
                masters.new_empty(masters.shape, dtype=dtype, device=self.device),
            )
        masters, copy = self.copies[part]
        is_copied = part._sharded_param_data is copy
        if is_copied and not part.sharded_param.requires_grad:
            return
        rounded = torch.empty(masters.shape, dtype=copy.dtype, pin_memory=self.stream is not None)
        copy.copy_(rounded.copy_(masters), non_blocking=True)
        part._sharded_param_data = copy

    def gather_masters(self) -> None:
        """Let FSDP gather from the host until the next step: who has asked for the masters may
        change them.
        """
        self.wait()
        for part, (masters, _) in self.copies.items():
            part._sharded_param_data = masters
