"""Saved activations on the host: what checkpointed layers keep goes there while the forward pass
goes on, and comes back one layer ahead of the backward pass.

On CUDA copies run on a stream of their own, from and to pinned memory. On a CPU the same code
copies within its memory.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAST = 2**20  # bytes; what is smaller stays where it is


class Layer:
    """What one layer keeps of one microbatch; the tensors belong to the graph, not to this list."""

    def __init__(self, before: "Layer | None") -> None:
        self.before = (lambda: None) if before is None else ref(before)
        self.tensors: WeakSet[OnHost] = WeakSet()


class OnHost:
    """A tensor on the host, and its copy on the device, once that is under way."""

    def __init__(self, host: Tensor, layer: Layer) -> None:
        self.host, self.layer = host, layer
        self.copy: tuple[Tensor, torch.cuda.Event | None] | None = None
        layer.tensors.add(self)


class Offload:
    """Moves tensors of layers to the host and back; `pack` and `unpack` are hooks of saved
    tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.layer: Layer | None = None  # the one whose first pass runs, or ran last

    def run(self, recompute: Callable[..., Tensor], *args: Any) -> Tensor:
        """Run the first pass through a layer."""
        self.layer = Layer(self.layer)
        with saved_tensors_hooks(self.pack, self.unpack):
            return recompute(*args)

    def pack(self, x: Any) -> Any:
        """Return what stands for x until the backward pass."""
        if not isinstance(x, Tensor) or x.nbytes < LEAST:
            return x
        host = torch.empty_like(x, device="cpu", pin_memory=self.stream is not None)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            x.record_stream(self.stream)  # its memory is not used again before it is copied
        with self.on_stream():
            host.copy_(x, non_blocking=True)
        return OnHost(host, self.layer)

    def unpack(self, packed: Any) -> Any:
        """Return x, and let what the layer before keeps come too."""
        if not isinstance(packed, OnHost):
            return packed
        self.fetch([*packed.layer.tensors, packed])
        (x, ready), packed.copy = packed.copy, None
        packed.layer.tensors.discard(packed)
        before = packed.layer.before()
        if before is not None:
            self.fetch(before.tensors)
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)
            x.record_stream(torch.cuda.current_stream())
        return x

    def fetch(self, tensors: Iterable[OnHost]) -> None:
        """Begin to copy tensors to the device, where that has not begun."""
        for tensor in tensors:
            if tensor.copy is None:
                with self.on_stream():
                    x = tensor.host.to(self.device, non_blocking=True)
                tensor.copy = x, None if self.stream is None else self.stream.record_event()

    def on_stream(self) -> AbstractContextManager:
        """Return a context in which copies do not wait for what is computed."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
