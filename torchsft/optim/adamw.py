"""The optimizer of a run: AdamW on fp32 master weights, alone or beside Muon."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torchsft.config.optim_options import Optim, ParameterGroup
from torchsft.optim.fused import FusedAdamW
from torchsft.optim.low_precision import LowPrecisionAdamW
from torchsft.optim.muon import Muon
from torchsft.optim.offload import OffloadedAdamW


def build_optimizer(
    model: nn.Module,
    optim: Optim,
    groups: Mapping[str, ParameterGroup] | None = None,
    stages: Sequence[nn.Module] = (),
) -> torch.optim.Optimizer:
    """Make AdamW over every trainable parameter of `model`, or with --optim.kind muon over those
    that are no `LanguageModel.matrices`: decoupled weight decay on matrices only.

    Parameters of two or more dims shrink by `lr * weight_decay` of themselves a step, the rest
    (norms, biases) does not; frozen parameters are left out. Moments have the parameter's
    placements, and like the parameters fp32, so that a small learning rate moves them, unless
    --optim.moments or --optim.masters says otherwise (low_precision.py). Parameters may be plain
    tensors and DTensors of several meshes. Each group has its peak learning rate as `peak`;
    `set_lr` sets the current one before each step. Of a pipeline rank's part all may be frozen.

    Every optimizer has the attribute `found_inf` (see `FusedAdamW`), so that no host has to know
    whether a step counts.

    Args:
        model: this rank's part.
        optim: of the run.
        groups: name -> options of its own (`Selection.groups`).
        stages: that the model was split into, for --optim.offload (offload.py).
    """
    rows = model.matrices() if optim.kind == "muon" else {}
    parameters_of: dict[_Alike, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            alike = _Alike(parameter.ndim >= 2, (groups or {}).get(name), rows.get(name))
            parameters_of.setdefault(alike, []).append(parameter)
    param_groups, of_muon = [], []
    for alike, parameters in parameters_of.items():
        options = {"peak": alike.peak_lr(optim), "weight_decay": alike.weight_decay(optim)}
        if alike.rows:
            of_muon.append({"params": parameters, "rows": alike.rows, **options})
        else:
            param_groups.append({"params": parameters, **options})
    if not param_groups:  # optimizers refuse an empty list of groups
        param_groups = [{"params": [], "peak": optim.lr}]
    options = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if (optim.moments, optim.masters) != ("fp32", "fp32"):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        names = {parameter: name for name, parameter in trained}
        return LowPrecisionAdamW(param_groups, names, optim.moments, **options)
    adamw = FusedAdamW(param_groups, fused=True, **options)
    if optim.offload:
        return OffloadedAdamW(adamw, model, stages)
    return Muon(of_muon, adamw) if of_muon else adamw


@dataclass(frozen=True)
class _Alike:
    """What parameters that share a group of the optimizer have in common."""

    matrices: bool  # of two or more dims; else norms and biases
    group: ParameterGroup | None  # what --optim.groups says of them
    rows: int | None  # of each matrix that Muon updates; None: AdamW updates them

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
