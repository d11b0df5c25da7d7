"""torch's fused AdamW over this rank's parts of parameters, in few and large calls."""

import torch
from torch.optim.adamw import adamw

from torchsft.models.decoder import local


class FusedAdamW(torch.optim.AdamW):
    """AdamW that makes one fused call for each group, whatever the meshes of its parameters.

    torch's own gives DTensors to the call: DTensor then looks at every one of them on the host (of
    80 small ones longer than the arithmetic), and refuses those of two meshes in a call.

    Attributes:
        found_inf: set by who calls `step`, as torch's GradScaler does: fp32 scalar on the device of
            the parameters; where it is 1 a step changes neither parameters nor state. Absent: each
            step counts.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have gradients."""
        for group in self.param_groups:
            # parameters, gradients, first and second moments, none (of AMSGrad), numbers of steps
            columns: list[list[torch.Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *columns)  # torch's: makes missing state, and fills the lists
            beta1, beta2 = group["betas"]
            adamw(
                *([local(tensor) for tensor in column] for column in columns),
                fused=True,
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
