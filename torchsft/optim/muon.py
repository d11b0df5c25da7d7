"""Muon: momentum, orthogonalised matrix by matrix (arXiv:2502.16982, as Moonlight and Kimi K2 were
pre-trained); what is no matrix of a layer stays with AdamW.

    part of W, G and B          each rank's, as FSDP2, tensor and expert parallelism have cut them
    B <- 0.95 B + 0.05 G        on that part, kept as `momentum_buffer`
    N = 0.95 B + 0.05 G         Nesterov's look ahead, on that part
    O = orthogonalise(N)        of whole matrices, for which the ranks exchange parts of N and of O
    W <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(rows, columns)) O

So every layout makes the update of one process. Matrices are orthogonalised in bf16 on CUDA and in
fp32 on a CPU, where bf16 products are very slow; all else is fp32.

Shape suffixes: n matrices, A rows and B columns of each.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchsft.models.decoder import local

MOMENTUM = 0.95
# The quintic Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon, and how often it
# runs.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7
# With it, an update has the root mean square of a typical one of AdamW (arXiv:2502.16982, eq. 4).
ADAMW_RMS = 0.2
# The most elements of whole matrices that a rank holds at a time, but at least one matrix.
BATCH_ELEMENTS = 2**24


def orthogonalise(x_nAB: Tensor) -> Tensor:
    """Replace the singular values of each matrix by ones near 1 (0.7 to 1.2), as far as they are
    not much smaller than the largest; 0 stays 0. Computed in the dtype of `x_nAB`.
    """
    if x_nAB.shape[1] > x_nAB.shape[2]:
        return orthogonalise(x_nAB.mT).mT
    # The Frobenius norm is at least the largest singular value: all are at most 1 then.
    norm_n11 = torch.linalg.vector_norm(x_nAB, dim=(1, 2), keepdim=True)
    x_nAB = x_nAB / norm_n11.clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram_nAA = x_nAB @ x_nAB.mT
        factor_nAA = torch.baddbmm(gram_nAA, gram_nAA, gram_nAA, beta=b, alpha=c)
        x_nAB = torch.baddbmm(x_nAB, factor_nAA, x_nAB, beta=a)
    return x_nAB


class Split(NamedTuple):
    """How the ranks of a group share matrices."""

    group: dist.ProcessGroup
    dim: int  # of [n, A, B]: 1 or 2
    size: int  # of that dim before it is split


def splits_of(parameter: Tensor) -> list[Split]:
    """Return how the matrices of a parameter, [A, B] or stacked [E, A, B], are split, the last
    split first.

    Where the stack is split, each rank has matrices of its own. FSDP2's axis comes before those of
    tensor and expert parallelism in a mesh, but it has split what these had left; and only what is
    split last may have parts of different sizes.
    """
    splits: list[Split] = []
    if not isinstance(parameter, DTensor):
        return splits
    mesh, stacked = parameter.device_mesh, parameter.ndim - 2
    shape = list(parameter.shape[stacked:])
    for axis, placement in reversed(list(enumerate(parameter.placements))):
        # Not every placement that splits is a Shard: where two axes split one dim.
        dim = getattr(placement, "dim", -1) - stacked
        ranks = mesh.size(axis)
        if dim >= 0 and ranks > 1:
            split = Split(mesh.get_group(axis), 1 + dim, shape[dim])
            splits.insert(0, split)
            shape[dim] //= ranks
    return splits


def shares(size: int, ranks: int) -> list[int]:
    """Return how many of `size` each rank has, as `torch.chunk` and FSDP2 share."""
    most = -(-size // ranks)
    return [max(0, min(most, size - most * rank)) for rank in range(ranks)]


def exchange(
    x: Tensor,
    group: dist.ProcessGroup,
    dim: int,  # by which a tensor is split over the ranks of the group
    sizes: list[int],  # of each rank's part in that dim
    new_dim: int,  # by which it is to be
    new_sizes: list[int],
) -> Tensor:
    """Return this rank's part of a tensor that is split otherwise; an all-to-all of the group."""
    # For each rank its part of what this rank has; `dim` comes first, by which they are joined.
    parts = [part.movedim(dim, 0) for part in x.split(new_sizes, new_dim)]
    _, *other_dims = parts[group.rank()].shape
    received = x.new_empty(sum(sizes), *other_dims)
    lengths = [part.numel() for part in parts]
    sent = torch.cat([part.flatten() for part in parts])
    dist.all_to_all_single(received, sent, sizes, lengths, group)
    return received.movedim(0, dim)


def orthogonalise_parts(x_nAB: Tensor, splits: list[Split], rows: int) -> Tensor:
    """Return this rank's parts of orthogonalised matrices; collective over the groups of `splits`.

    The ranks exchange parts until each has some of the matrices whole, and exchange the results
    back: so they share the work.

    Args:
        x_nAB: this rank's parts of the matrices.
        splits: of `splits_of`.
        rows: so many rows of a whole one, again and again, are a matrix of their own.
    """
    if not len(x_nAB):
        return x_nAB
    if not splits:
        by_matrix = x_nAB.unflatten(1, (-1, rows))  # [n, matrices of each, rows, B]
        result = orthogonalise(by_matrix.flatten(0, 1))
        return result.view_as(by_matrix).flatten(1, 2)
    (group, dim, size), *others = splits
    counts = shares(len(x_nAB), group.size())  # of matrices
    sizes = shares(size, group.size())  # of each matrix
    whole = exchange(x_nAB, group, dim, sizes, 0, counts)
    whole = orthogonalise_parts(whole, others, rows)
    return exchange(whole, group, 0, counts, dim, sizes)


class Muon(torch.optim.Optimizer):
    """Muon for some parameters and, in the same object, another optimizer for the others.

    Args:
        groups: of parameters; so many `rows` of each, and all columns, are a matrix
            (`LanguageModel.matrices`).
        adamw: for the other parameters; shares its groups and state with this optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], adamw: torch.optim.Optimizer) -> None:
        super().__init__(groups, {"lr": adamw.defaults["lr"]})
        self.matrix_groups, self.adamw = self.param_groups, adamw
        self.param_groups = [*self.matrix_groups, *adamw.param_groups]
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have gradients; collective."""
        found_inf = self.adamw.found_inf = getattr(self, "found_inf", None)  # see `FusedAdamW`
        skip = None if found_inf is None else found_inf > 0
        self.adamw.step()
        for group in self.matrix_groups:
            # Those of one shape are orthogonalised together, over all layers.
            alike: dict[Any, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                key = parameter.shape, None, ()
                if isinstance(parameter, DTensor):
                    key = parameter.shape, parameter.device_mesh, parameter.placements
                alike.setdefault(key, []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group, skip)

    def _update(
        self, parameters: list[nn.Parameter], group: dict[str, Any], skip: Tensor | None
    ) -> None:
        """Update parameters of one shape that are placed alike, where not `skip` (a bool scalar on
        their device, or None).
        """
        like, rows, lr = parameters[0], group["rows"], group["lr"]
        splits = splits_of(like)
        height, width = like.shape[-2:]
        dtype = torch.bfloat16 if like.device.type == "cuda" else torch.float32
        at_once = max(1, BATCH_ELEMENTS // (height * width))
        # the ranks share them, so that each has as many whole ones
        at_once *= math.prod(split.group.size() for split in splits)
        scale = ADAMW_RMS * math.sqrt(max(rows, width))
        parts = list(self._parts(parameters))
        for first in range(0, len(parts), at_once):
            batch = parts[first : first + at_once]
            weights, gradients, momenta = zip(*batch, strict=True)
            gradient_nAB, momentum_nAB = torch.stack(gradients), torch.stack(momenta)
            kept_share = 1 - lr * group["weight_decay"]
            if skip is not None:  # the momentum moves to itself
                gradient_nAB = torch.where(skip, momentum_nAB, gradient_nAB)
                kept_share = torch.where(skip, 1.0, kept_share)
            momentum_nAB.lerp_(gradient_nAB, 1 - MOMENTUM)
            torch._foreach_copy_(momenta, momentum_nAB.unbind())
            ahead_nAB = gradient_nAB.lerp_(momentum_nAB, MOMENTUM)
            x_nAB = orthogonalise_parts(ahead_nAB.to(dtype), splits, rows)
            if skip is not None:
                x_nAB = torch.where(skip, 0, x_nAB)
            torch._foreach_mul_(weights, kept_share)
            torch._foreach_add_(weights, x_nAB.unbind(), alpha=-lr * scale)

    def _parts(self, parameters: list[nn.Parameter]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's part [A, B] of each entry of each stack: of weight, gradient and
        momentum.
        """
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            tensors = parameter, parameter.grad, state["momentum_buffer"]
            parts = tuple(map(local, tensors))
            if parameter.ndim == 3:
                yield from zip(*parts, strict=True)
            else:
                yield parts
