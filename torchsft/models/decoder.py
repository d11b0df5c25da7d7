"""Parts that decoder families share: norm, feed-forward network, checkpoint pieces, initial values.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchsft.ops.rms_norm import rms_norm
from torchsft.ops.swiglu import swiglu


@dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor and the box of the parameter that it fills.

    The box begins at `start` and has the shape (1,) * (parameter dims - len(hf_shape)) + hf_shape.
    """

    key: str
    hf_shape: tuple[int, ...]
    start: tuple[int, ...]


class Float32Buffers(nn.Module):
    """A module whose floating buffers keep fp32 through `.to(bf16)` and the like (devices change as usual)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in fp32; `weight` [width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner_width, bias=False)
        self.up_proj = nn.Linear(width, inner_width, bias=False)
        self.down_proj = nn.Linear(inner_width, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


def seeded_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal numbers, fp32 on CPU, that depend on name, shape and seed alone, so on no layout of ranks."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(std=std, generator=generator)
