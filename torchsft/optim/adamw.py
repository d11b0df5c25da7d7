"""AdamW on master weights, fp32 by default."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchsft.config import Optim, ParameterGroup
from torchsft.optim.low_precision import LowPrecisionAdamW


def build_optimizer(
    model: nn.Module,
    optim: Optim,
    groups: Mapping[str, ParameterGroup] | None = None,
) -> torch.optim.Optimizer:
    """Make AdamW over every trainable parameter of `model`: decoupled weight decay on matrices
    only.

    Parameters of two or more dims shrink by `lr * weight_decay` of themselves a step, the rest
    (norms, biases) does not; frozen parameters are left out. They are on one device. Fp32 masters
    with fp32 moments are torch's fused AdamW's; bf16 masters, or moments of fewer bits, are rounded
    stochastically (`low_precision.py`). Moments have the parameter's placements.
    Parameters may be plain tensors and DTensors of several meshes: each mesh has groups of its own,
    as one fused (or foreach) call that mixes them raises. Each group has its peak learning rate as
    `peak`; `set_lr` sets the current one before each step. Of a pipeline rank's part all may be
    frozen. Fused is the fastest on CPU too: 4 ms a step of 80 small DTensors; foreach takes 6 ms, a
    loop 18 ms.

    Args:
        model: this rank's part.
        optim: of the run.
        groups: name -> options of its own (`Selection.groups`).

    Raises:
        InputError: see `LowPrecisionAdamW`.
    """
    parameters_of: dict[_Alike, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            alike = _Alike(mesh, parameter.ndim >= 2, (groups or {}).get(name))
            parameters_of.setdefault(alike, []).append(parameter)
    if not parameters_of:  # AdamW refuses an empty list of groups
        parameters_of[_Alike(None, True, None)] = []
    param_groups = []
    for alike, parameters in parameters_of.items():
        options = {"peak": alike.peak_lr(optim), "weight_decay": alike.weight_decay(optim)}
        param_groups.append({"params": parameters, **options})
    if (optim.masters, optim.moments) != ("fp32", "fp32"):
        names = {parameter: name for name, parameter in model.named_parameters()}
        return LowPrecisionAdamW(param_groups, names, optim)
    return torch.optim.AdamW(
        param_groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )


@dataclass(frozen=True)
class _Alike:
    """What parameters that share a group of the optimizer have in common."""

    mesh: DeviceMesh | None  # None: plain tensors
    matrices: bool  # of two or more dims; else norms and biases
    group: ParameterGroup | None  # what --optim.groups says of them

    def peak_lr(self, optim: Optim) -> float:
        """Return the learning rate that the schedule scales."""
        if self.group is None or self.group.lr is None:
            return optim.lr
        return self.group.lr

    def weight_decay(self, optim: Optim) -> float:
        """Return the decoupled weight decay."""
        if not self.matrices:
            return 0.0
        if self.group is None or self.group.weight_decay is None:
            return optim.weight_decay
        return self.group.weight_decay


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` (see `lr_factor`) times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
