"""Records what each block of a model does and keeps, operation by operation, while it runs on
tensors without memory (torchsft/planning/simulation.py).

Where a GPU has a kernel of torchsft's, this kernel is recorded and not its plain twin: normalising,
rotating, the experts' SwiGLU, and products in fp8.

Private names of torch, all of which are in this file: `FSDPParamGroup._module_fqn`, by which what
FSDP2 does is told to belong to a block, and the names of attention's operators.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from sys import _getframe
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import torchsft.ops
from tools.benchmark_triton import held
from tools.planning.operations import (
    ATTENTION,
    BACKWARD,
    EMBEDDING,
    FORWARD,
    GROUPED,
    HEAD,
    MEMORY,
    MTP,
    ONCE,
    PRODUCT,
    RECOMPUTED,
    ROOT,
    WAIT,
    Block,
    Operation,
    Operations,
)
from tools.sent_bytes import SentBytes
from torchsft.config import Config
from torchsft.models import rope
from torchsft.models.decoder import local
from torchsft.ops import swiglu
from torchsft.ops.grouped import Products
from torchsft.parallel.expert import Transfer
from torchsft.parallel.memory import gathered_elements
from torchsft.planning import simulation
from torchsft.planning.build import ModelPlan
from torchsft.planning.memory import (
    DOCUMENT,
    answers,
    full_batch,
    put_copies_on_device,
)
from torchsft.planning.simulation import (
    EXCHANGE,
    GATHERED,
    GRADIENTS,
    LiveMemory,
    SimulatedWorld,
)
from torchsft.precision.blockwise_compute import BlockwiseProducts
from torchsft.precision.expert_float8 import ExpertFloat8


class _Mark(torch.autograd.Function):
    """Passes hidden states on, and says when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return grad, None


@dataclass
class _Found:
    """What is found of a block."""

    operations: list[dict[str, Operations]]  # of each microbatch
    kept: int = 0
    before: int = 0  # bytes, when its pass began
    exchange_before: int = 0  # those of them that the exchange held
    working: int = 0
    exchange: int = 0


# Operations without a kernel.
FREE = set(
    "empty empty_like new_empty empty_strided new_empty_strided detach alias _unsafe_view "
    "lift_fresh record_stream set_ resize_ is_pinned _pin_memory".split()
)
# Those that read no tensor that they are given.
CREATING = set("zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full".split())
# Those that read of their first tensor as much as they return.
GATHERING = {"index", "index_select", "gather", "embedding"}
# Those that write of their first tensor as much as they are given.
SCATTERING = {"index_put_", "index_put", "scatter_add_", "scatter_", "index_add_", "copy_", "fill_"}
DTYPES = {torch.float32: "fp32", torch.float64: "fp32"}


def traffic(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the bytes that an operation's kernel reads and writes."""

    def of(*values: Any) -> int:
        return sum(held(x) for x in tree_leaves(values) if isinstance(x, Tensor))

    if name == "all_gather_copy_in":
        return 2 * of(args[0])
    if name in CREATING:
        return of(result)
    if name in GATHERING:
        return of(args[1:]) + 2 * of(result)
    if name in SCATTERING:
        return 2 * of(args[1:]) or of(result)
    return of(args) + of(kwargs.get("out", result))


@cache
def _is_fp8_code(file: str) -> bool:
    """Whether a file emulates products in fp8, in fp32."""
    return "torchao/float8" in file or "torchsft/precision/" in file


class Recorder(LiveMemory):
    """Records what a model does; see the top of this file."""

    def __init__(
        self,
        plan: ModelPlan,
        world: SimulatedWorld,
        imbalance: float,
        documents: Sequence[float],
        names: Sequence[str],
    ) -> None:
        super().__init__(answers(plan, world, imbalance))
        self.plan, self.world, self.names = plan, world, names
        self.documents = documents or [min(DOCUMENT, plan.tokens)]
        self.sent = SentBytes()
        self.found: dict[str, _Found] = {}
        self.shapes_of_weights = self._shapes_of_weights()
        self.microbatch, self.muted = 0, False
        self.block, self.phase = EMBEDDING, FORWARD
        self.window: int | None = None
        self.flights = self.flying = 0

    def _shapes_of_weights(self) -> set[tuple[int, ...]]:
        """Return the shapes of gathered matrices, in which their gradients come."""
        shapes = set()
        for parameter in self.plan.model.parameters():
            if parameter.ndim > 1:
                shapes.add(tuple(local(parameter).shape))
                shapes.add(tuple(parameter.shape))
        return shapes

    def pairs(self, tokens: int) -> float:
        """Return how many tokens the queries of a microbatch of so many see together, as
        `ModelConfig.flops` counts them.
        """
        total = 0.0
        for length in self.documents:
            seen = length if self.window is None else min(self.window, length)
            total += seen * (length - seen / 2)
        return total * tokens / sum(self.documents)

    def run(self, config: Config) -> None:
        """Run three microbatches, or the one that a step has."""
        plan, pipeline = self.plan, config.parallel.pp > 1
        model = plan.stages[0].train()
        layers = plan.model.model.layers
        for name, layer in layers.items():
            kind = self.names[int(name)] if int(name) < len(self.names) else MTP
            window = plan.model.config.attention_window(int(name)) if kind != MTP else None
            enter, leave = partial(self.enter, kind, window), partial(self.leave, kind)
            left = partial(self.enter, EMBEDDING, None)  # the backward pass
            layer.register_forward_pre_hook(partial(_before, enter, left))
            layer.register_forward_hook(partial(_behind, leave, enter))
            layer.compute = self._again(layer.compute, kind, window)
        if config.optim.offload:
            model.register_forward_pre_hook(put_copies_on_device)
        count = 1 if plan.microbatches == 1 else 3
        with self:
            for number in range(count):
                self.microbatch, last = number, number == count - 1
                if pipeline:
                    model.set_is_last_backward(last)
                    model.set_reshard_after_backward(last)
                    model.set_requires_gradient_sync(last)
                else:
                    model.set_requires_all_reduce(last)
                self.phase = FORWARD
                self.enter(EMBEDDING, None)
                loss = model(**full_batch(plan.tokens).model_inputs())
                self.leave(HEAD)
                self.phase = BACKWARD
                self.enter(HEAD, None)
                loss.backward()

    def enter(self, block: str, window: int | None) -> None:
        """A pass through a block begins."""
        self.block, self.window = block, window
        found = self.of_block()
        found.before, found.exchange_before = self.level(), self.held[EXCHANGE]
        if self.phase == FORWARD:
            self.begin_layer(())

    def leave(self, block: str) -> None:
        """The forward pass through a block ends; that through the head begins, or goes on."""
        found = self.found[block]
        found.kept = self.level() - found.before
        if block != HEAD:
            self.enter(HEAD, None)

    def of_block(self) -> _Found:
        """Return what is found of the block at work."""
        if self.block not in self.found:
            self.found[self.block] = _Found([{} for _ in range(3)])
        return self.found[self.block]

    def level(self) -> int:
        """Return the bytes that are held but for parameters and their gradients."""
        return self.now - self.held[GATHERED] - self.held[GRADIENTS]

    def add(self, size: int, purpose: str | None) -> None:
        super().add(size, purpose)
        if self.block in self.found and size > 0:
            found = self.found[self.block]
            more = self.level() - found.before
            if more > found.working:
                found.working = more
                found.exchange = self.held[EXCHANGE] - found.exchange_before

    def _again(self, compute: Callable[..., Tensor], block: str, window: int | None) -> Any:
        """Return a layer's `compute` that knows when the backward pass calls it."""

        def compute_again(*args: Any) -> Tensor:
            if self.phase == FORWARD:
                return compute(*args)
            self.phase, self.block, self.window = RECOMPUTED, block, window
            try:
                return compute(*args)
            finally:  # a repetition ends by an exception
                self.phase = BACKWARD

        return compute_again

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        other = any(kind not in (Tensor, nn.Parameter) for kind in types)
        if not self.muted and not other and result is not NotImplemented:
            self.note(function, args, kwargs or {}, result)
        return result

    def note(self, function: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Record an operation of torch's."""
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            if name not in SentBytes.IGNORED:
                self.note_collective(function, name, args, result)
            return
        if name == "_local_scalar_dense":
            self.record(Operation(WAIT))
            return
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors) or function.is_view or name in FREE:
            return
        if kwargs.get("device") == torch.device("cpu"):
            self.record(Operation(WAIT))
            return
        kind, fields = MEMORY, {}
        if name in ("mm", "addmm", "addmm_", "bmm", "_grouped_mm"):
            x, y = args[1:3] if name.startswith("add") else args[:2]
            kind, fields = PRODUCT, self.product(x, y, result)
            if name == "_grouped_mm":
                kind = GROUPED
        elif "attn" in name or "attention" in name:
            backward = "backward" in name
            q, _, v = args[1:4] if backward else args[:3]
            kind, fields = ATTENTION, self.attention(q, v, backward)
        self.record(Operation(kind, traffic(name, args, kwargs, result), **fields))

    def product(self, x: Tensor, y: Tensor, result: Tensor) -> dict[str, Any]:
        """Describe a matrix product: `Operation`'s fields."""
        if x.ndim == 2 and y.ndim == 3:  # rows of experts
            shape = len(x) // len(y), y.shape[2], x.shape[1], len(y)
        elif result.ndim == 3 and x.ndim == 2:  # gradient of the experts' weights
            shape = len(x), y.shape[1], x.shape[1] // len(result), len(result)
        elif x.ndim == 3:  # a batch of products
            shape = x.shape[1], y.shape[2], x.shape[2]
        else:
            shape = len(x), y.shape[1], x.shape[1]
        flops = 2.0 * x.numel() * y.shape[-1]
        dtype = DTYPES.get(x.dtype, "bf16")
        if dtype == "fp32" and self._emulates():
            dtype = "fp8"
        weights = self.phase == BACKWARD and tuple(result.shape) in self.shapes_of_weights
        return {"flops": flops, "shape": shape, "dtype": dtype, "weights": weights}

    def attention(self, q: Tensor, v: Tensor, backward: bool) -> dict[str, Any]:
        """Describe attention: two products forward; backward scores again, and the gradients of
        queries and keys, and of values and weights.
        """
        if q.ndim == 4:  # one document's [1, H, L, d]
            (_, heads, tokens, width) = q.shape
        else:
            tokens, heads, width = q.shape
        of_queries, of_values = (3, 2) if backward else (1, 1)
        widths = of_queries * width + of_values * v.shape[-1]
        pairs = self.pairs(tokens)
        shape = heads, width, v.shape[-1], round(2 * pairs / tokens)
        return {"flops": 2.0 * pairs * heads * widths, "shape": shape, "dtype": "bf16"}

    def note_collective(self, function: Any, name: str, args: Any, result: Any) -> None:
        """Record a collective."""
        given = {x.name: value for x, value in zip(function._schema.arguments, args, strict=False)}
        kind, sent = self.sent.measured(name, given, result)
        if kind == "all-to-all":
            # another rank's rows may be more than one's own
            received = given.get("output", result)
            own = given["input"].nbytes - sent
            sent = max(sent, received.nbytes - own)
        group = given.get("process_group", given.get("group_name"))
        if isinstance(group, torch.ScriptObject):
            group = dist.ProcessGroup.unbox(group)
        elif isinstance(group, str):
            group = dist.distributed_c10d._resolve_process_group(group)
        if sent:
            ranks = tuple(dist.get_process_group_ranks(group))
            self.record(Operation(kind, int(sent), ranks=ranks))

    def record(self, operation: Operation) -> None:
        """Count an operation for the block and the pass that it belongs to."""
        block, phase, fsdp = self.block, self.phase, False
        name = self._fsdp_module()
        if name is not None:
            block, fsdp = self._block_of(name), True
            phase = FORWARD if phase == FORWARD else BACKWARD
        operation = dataclasses.replace(operation, flight=self.flying, fsdp=fsdp)
        before, self.block = self.block, block
        found = self.of_block()
        self.block = before
        found.operations[self.microbatch].setdefault(phase, Counter())[operation] += 1

    def _fsdp_module(self) -> str | None:
        """Return the name of the module for which FSDP2 works now; None: it does not."""
        frame = _getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.endswith("_fsdp_param_group.py"):
                group = frame.f_locals.get("self", frame.f_locals.get("param_group"))
                return getattr(group, "_module_fqn", None) or ""
            frame = frame.f_back
        return None

    def _emulates(self) -> bool:
        frame = _getframe(3)
        while frame is not None:
            if _is_fp8_code(frame.f_code.co_filename):
                return True
            frame = frame.f_back
        return False

    def _block_of(self, module: str) -> str:
        """Return the block that a module of the model belongs to."""
        parts = module.split(".")
        if "layers" not in parts:
            return ROOT
        layer = int(parts[parts.index("layers") + 1])
        return self.names[layer] if layer < len(self.names) else MTP

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Let kernels of GPUs stand in for their plain twins."""

        def count(*tensors: Tensor, more: int = 0) -> None:
            self.record(Operation(MEMORY, sum(map(held, tensors)) + more))

        def rotate(x: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Tensor:
            turned = torch.empty_like(x, memory_format=torch.contiguous_format)
            count(x, turned, cos, sin)
            return turned

        def keys(
            kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, nope: int, _: bool
        ) -> Tensor:
            tokens, heads, _ = kv.shape
            made = kv.new_empty(tokens, heads, nope + k_rope.shape[-1])
            count(kv[..., :nope], k_rope, cos, sin, made)
            return made

        def keys_backward(
            grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, _: bool
        ) -> tuple[Tensor, Tensor]:
            tokens, heads, width = grad_k.shape
            rotated = 2 * cos.shape[-1]
            kv = grad_k.new_empty(tokens, heads, width - rotated + grad_v.shape[-1])
            grad_rope = grad_k.new_empty(tokens, rotated)
            count(grad_k, grad_v, cos, sin, kv, grad_rope)
            return kv, grad_rope

        def weighted_swiglu(both: Tensor, weights: Tensor) -> Tensor:
            hidden = both.new_empty(len(both), both.shape[1] // 2)
            count(both, weights, hidden)
            return hidden

        def weighted_swiglu_backward(
            both: Tensor, weights: Tensor, grad: Tensor, keep_hidden: bool
        ) -> Tensor:
            count(both, both, grad, weights, weights, more=held(grad) * keep_hidden)
            return torch.empty_like(weights)

        normed = simulation._RmsNorm

        class Norm(normed):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
                count(x, x)
                return normed.forward(ctx, x, weight)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
                count(grad, grad, grad)
                return normed.backward(ctx, grad)

        norm = SimpleNamespace(apply=Norm.apply)
        of_rotation = SimpleNamespace(rotate=rotate, keys=keys, keys_backward=keys_backward)
        of_swiglu = SimpleNamespace(
            weighted_swiglu=weighted_swiglu, weighted_swiglu_backward=weighted_swiglu_backward
        )
        with ExitStack() as stack:
            for module, name, replacement in (
                (simulation, "_RmsNorm", norm),
                (rope, "kernels", _has_kernels),
                (swiglu, "kernels", _has_kernels),
                (torchsft.ops, "rotation_kernels", of_rotation),
                (torchsft.ops, "swiglu_kernels", of_swiglu),
                (Transfer, "start", self._starting(Transfer.start)),
                (Transfer, "arrive", self._arriving(Transfer.arrive)),
                *(
                    (products, name, self._in_fp8(getattr(products, name)))
                    for products in (BlockwiseProducts, ExpertFloat8)
                    for name in ("forward", "grad_rows", "grad_weight")
                ),
            ):
                stack.enter_context(patch.object(module, name, replacement, create=True))
            yield

    def _starting(self, start: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return what lets rows leave, and knows what then runs beside them."""

        def start_and_note(transfer: Transfer, *args: Any) -> Tensor:
            if not self.flying:
                self.flights += 1
                self.flying = self.flights
            return start(transfer, *args)

        return start_and_note

    def _arriving(self, arrive: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def arrive_and_note(transfer: Transfer) -> Tensor:
            self.flying = 0
            return arrive(transfer)

        return arrive_and_note

    def _in_fp8(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a product that is recorded as fp8 kernels do it: both factors are quantised, each
        by a kernel, and multiplied.
        """

        def multiply(products: Products, x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
            before, self.muted = self.muted, True
            result = method(products, x, y, offs)
            self.muted = before
            experts = max(x.ndim, y.ndim, result.ndim) == 3 and len(offs) > 1
            for factor in (x, y):
                self.record(Operation(MEMORY, held(factor) + factor.numel()))
            count = len(offs) if experts else 1
            # where one of them is not sorted by expert it may be tokens, of which each has rows
            rows = max(len(each) for each in (x, y, result) if each.ndim == 2)
            shape = rows // count, result.shape[-1], x.shape[-1]
            if result.ndim == 3:  # the gradient of the weight
                shape = x.shape[-1], result.shape[-1], rows // count
            flops = 2.0 * rows * x.shape[-1] * result.shape[-1]
            shape += (count,) if experts else ()
            size = x.numel() + y.numel() + held(result)
            weights = result.ndim == 3
            kind = GROUPED if experts else PRODUCT
            self.record(Operation(kind, size, flops, shape, "fp8", weights=weights))
            return result

        return multiply

    def blocks(self) -> dict[str, Block]:
        """Return what was recorded."""
        found = {
            name: _by_pass(each.operations, self.microbatch) for name, each in self.found.items()
        }
        self._divide_root(found)
        modules = self._modules()
        blocks = {}
        for name, operations in found.items():
            own, parameters = self.found.get(name, _Found([])), modules.get(name, [])
            blocks[name] = Block(
                name,
                operations,
                sum(local(p).numel() for p in parameters),
                sum(local(p).numel() for p in parameters if p.requires_grad),
                sum(
                    gathered_elements(p) if isinstance(p, DTensor) else p.numel()
                    for p in parameters
                ),
                own.kept,
                max(own.working, 0),
                own.exchange,
            )
        return blocks

    def _modules(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each block."""
        of_block: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.plan.model.named_parameters():
            block = self._block_of(name)
            if block == ROOT:
                block = EMBEDDING if "embed_tokens" in name else HEAD
            of_block.setdefault(block, []).append(parameter)
        return of_block

    def _divide_root(self, found: dict[str, dict[str, Operations]]) -> None:
        """Let embedding and head have their shares of what FSDP2 does for both together."""
        modules = self._modules()
        sizes = {name: sum(p.numel() for p in modules.get(name, ())) for name in (EMBEDDING, HEAD)}
        root = found.pop(ROOT, {})
        for name, size in sizes.items():
            share = size / sum(sizes.values())
            own = found.setdefault(name, {})
            for phase, operations in root.items():
                for operation, count in operations.items():
                    part = dataclasses.replace(operation, bytes=round(operation.bytes * share))
                    own.setdefault(phase, Counter())[part] += count


def _by_pass(operations: list[dict[str, Operations]], last: int) -> dict[str, Operations]:
    """Return what every microbatch does, and what the first and the last one do besides.

    Args:
        operations: of each microbatch, by pass.
        last: number of the last one; 0: a step has no others.
    """
    if last == 0:
        return operations[0]
    first, middle, end = operations
    once: Operations = Counter()
    for microbatch, sign in ((first, 1), (end, 1), (middle, -2)):
        for of_phase in microbatch.values():
            for operation, count in of_phase.items():
                once[dataclasses.replace(operation, flight=0)] += sign * count
    return {**middle, ONCE: Counter({each: count for each, count in once.items() if count})}


def _has_kernels(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and not torchsft.ops.plain()


def _before(enter: Callable[[], None], left: Callable[[], None], _: nn.Module, args: Any) -> Any:
    enter()
    return _Mark.apply(args[0], left), *args[1:]


def _behind(
    leave: Callable[[], None], enter: Callable[[], None], _: nn.Module, args: Any, output: Tensor
) -> Tensor:
    leave()
    return _Mark.apply(output, enter)
