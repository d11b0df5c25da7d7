"""One rank of a run of any size, in one process, without memory: tensors are on the meta device,
the process group is torch's fake one, whose collectives do nothing.

The meta device stands for a GPU: code that asks whether a tensor is on the CPU takes the other way
there. What a meta tensor cannot answer is answered here (`LiveMemory`).

Private names of torch, all of which are in this file: `FakeStore`; of FSDP2 `_get_device_from_mesh`
and two checks of `FSDPParamGroup` that parameters have memory; `torch.meta`, which FSDP2 and
pipeline schedules look for by the name of the device; and `_batch_p2p` of these schedules.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType, SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import schedules
from torch.utils._python_dispatch import TorchDispatchMode

from torchsft import ops
from torchsft.config import Parallel
from torchsft.models import attention, rope
from torchsft.ops import swiglu
from torchsft.parallel import expert_float8
from torchsft.parallel.memory import pinned_bytes
from torchsft.parallel.world import mesh_sizes, nodes_of_experts

META = torch.device("meta")
BLOCK = 512  # bytes; torch's CUDA allocator gives whole ones
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class SimulatedWorld:
    """What planning asks of a `World`."""

    rank: int
    size: int
    data_size: int
    dense: DeviceMesh
    parameter: DeviceMesh
    expert: DeviceMesh
    sequence: DeviceMesh
    expert_nodes: int
    device: torch.device = META
    timeout: None = None


@contextmanager
def simulated_rank(
    parallel: Parallel, rank: int, size: int, ranks_per_node: int = RANKS_PER_NODE
) -> Iterator[SimulatedWorld]:
    """Be one rank of `size`, as far as torch.distributed goes; no process group may exist.

    Raises:
        InputError: the layout does not have that many ranks.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sizes, new_group = mesh_sizes(parallel, size), dist.new_group
    nodes = nodes_of_experts(parallel, min(size, ranks_per_node))
    streams = {name: getattr(torch.cpu, name) for name in ("Event", "stream")}
    streams |= {"Stream": _Stream, "current_stream": lambda *_: _Stream()}
    streams |= {"get_rng_state": lambda _: None, "set_rng_state": lambda *_: None}
    group = _fsdp_param_group.FSDPParamGroup
    with ExitStack() as stack:
        stack.enter_context(
            patch.object(sys, "excepthook", sys.excepthook)
        )  # which torch replaces each time
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        meshes = {
            name: init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
            for name, axes in sizes.items()
        }
        stack.enter_context(patch.object(torch, "meta", SimpleNamespace(**streams), create=True))
        stack.enter_context(patch.object(_fully_shard, "_get_device_from_mesh", lambda _: META))
        for check in ("_validate_no_meta_params", "_validate_cpu_offload_params"):
            stack.enter_context(patch.object(group, check, lambda _: None))
        for module, name, replacement in (
            (F, "scaled_dot_product_attention", _fused_attention),
            (attention, "flex_attention", _flex_attention),
            (attention, "create_block_mask", lambda *_, **options: None),
            (F, "rms_norm", lambda x, shape, weight, eps: _RmsNorm.apply(x, weight)),
            (swiglu, "kernels", _has_kernels),
            (rope, "kernels", _has_kernels),
            # fake groups do not know the device
            (schedules, "_batch_p2p", lambda operations, desc=None: [_Travel(operations)]),
            (expert_float8, "gather_objects", lambda value: [value]),
            (dist, "new_group", lambda ranks, **_: new_group(ranks, backend="fake")),
        ):
            stack.enter_context(patch.object(module, name, replacement))
        for name, kernels in KERNELS.items():
            stack.enter_context(patch.object(ops, name, kernels, create=True))
        data_size = parallel.dp_replicate * sizes["dense"]["dp_shard"]
        yield SimulatedWorld(rank, size, data_size, **meshes, expert_nodes=nodes)


class _Stream(torch.cpu.Stream):
    """Does nothing, but has events, which FSDP2 asks for where gradients of replicas are summed."""

    def record_event(self) -> torch.cpu.Event:
        return torch.cpu.Event()


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that does not keep scores; for meta tensors torch chooses one that does."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Travel:
    """Keeps what is sent and received until it is waited for, as NCCL's and gloo's work does."""

    def __init__(self, operations: list[dist.P2POp]) -> None:
        self.tensors = [each.tensor for each in operations]

    def wait(self) -> None:
        self.tensors = []


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **_: Any) -> Tensor:
    """The same of torch's flex attention, which is compiled."""
    return _fused_attention(q, k, v, scale=scale)


def _has_kernels(x: Tensor) -> bool:
    """What `ops.kernels` says on a GPU with triton."""
    return x.dtype in (torch.bfloat16, torch.float16) and not ops.plain()


# What Triton kernels return, by their module in ops/; they allocate nothing else.
KERNELS = {
    "swiglu_kernels": SimpleNamespace(
        weighted_swiglu=lambda both, _: both.new_empty(len(both), both.shape[1] // 2),
        weighted_swiglu_backward=lambda both, weights, *_: torch.empty_like(weights),
    ),
    "rotation_kernels": SimpleNamespace(
        rotate=lambda x, *_, **options: x.new_empty(x.shape),
        keys=lambda kv, rope, cos, sin, others, _: kv.new_empty(
            *kv.shape[:2], others + rope.shape[1]
        ),
        keys_backward=lambda keys, values, cos, *_: (
            keys.new_empty(*keys.shape[:2], keys.shape[2] - 2 * cos.shape[1] + values.shape[2]),
            keys.new_empty(len(keys), 2 * cos.shape[1]),
        ),
    ),
}


class _RmsNorm(torch.autograd.Function):
    """RMSNorm as one kernel each way, which keeps its input and a number of each row; for meta
    tensors torch composes it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


# What memory is for.
PARAMETERS, GATHERED, GRADIENTS = "parameters", "gathered copies", "gradients"
MOMENTS = "optimizer"
RECEIVED, IN_FLIGHT = "receive buffers", "activations in flight"
LAYER = "one layer's working set"
EXCHANGE, LOSS, SHAPES = "exchange buffers", "loss", "shapes alone"
# Who asked for memory says what it is for: the innermost function on the stack that is named here,
# by the end of its file's name and its own name ("": any other).
PURPOSES = {
    "torchsft/parallel/torch_pipelining.py": {"_place": RECEIVED, "_without_buffers": RECEIVED},
    "torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py": {
        "foreach_reduce": GRADIENTS,
        "foreach_all_gather": GATHERED,
        "foreach_all_gather_copy_out": GATHERED,
    },
    "torch/distributed/fsdp/_fully_shard/_fsdp_param.py": {
        "accumulate_unsharded_grad_if_needed": GRADIENTS,
        "to_accumulated_grad_if_needed": GRADIENTS,
    },
    "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py": {
        "post_backward": GRADIENTS,
        "unshard": GATHERED,
        "wait_for_unshard": GATHERED,
    },
    "torch/distributed/tensor/_sharding_prop.py": {"": SHAPES},
    "torchsft/models/loss.py": {"": LOSS},
    "torchsft/models/moe.py": {"": LAYER},
    "torchsft/parallel/compute_copies.py": {"_copy": GATHERED, "backward": GRADIENTS},
    "torchsft/parallel/expert.py": {"": EXCHANGE},
    "torchsft/planning/memory.py": {"put_copies_on_device": PARAMETERS},
}


@cache
def _purpose_of(code: CodeType) -> str | None:
    for file, functions in PURPOSES.items():
        if code.co_filename.replace("\\", "/").endswith(file):
            return functions.get(code.co_name, functions.get(""))
    return None


def _purpose() -> str:
    """Return what memory is for that is asked for now."""
    frame = sys._getframe(2)
    while frame is not None:
        if purpose := _purpose_of(frame.f_code):
            return purpose
        frame = frame.f_back
    return LAYER


@cache
def _makes_new_tensors(function: Any) -> bool:
    """Whether an operation returns none of its arguments, nor views of them."""
    schema = function._schema
    return not any(each.alias_info for each in (*schema.arguments, *schema.returns))


@cache
def _written(function: Any) -> int | str | None:
    """Return which argument an operation writes and returns, by its place or name; None: it does
    something else.
    """
    schema = function._schema
    written = [each for each in schema.arguments if each.alias_info and each.alias_info.is_write]
    if len(written) != 1 or len(schema.returns) != 1 or torch.Tag.inplace_view in function.tags:
        return None
    return written[0].name if written[0].kwarg_only else schema.arguments.index(written[0])


def _signature(value: Any) -> Any:
    """Return what the shapes of results depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_signature, value))
    return type(value), value


@dataclass(eq=False, slots=True)
class _Held:
    """Memory of a storage."""

    size: int  # bytes
    purpose: str | None  # None: it is on the host
    storage: weakref.ref


class LiveMemory(TorchDispatchMode):
    """Runs what is computed on meta tensors and counts the memory of storages that are alive.

    What the host asks of the device has no answer on the meta device: `ask` gives copies of
    integers; a single number is 1. Other tensors that go to the host are there, and not counted.

    Attributes:
        held: bytes by purpose, now.
        timeline: the same, when all together were most: before the first layer began, and of each
            time that a layer begins (again) until the next one does.
        host_peak: bytes of what was on the host at most, all of which is pinned.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ask = ask
        self.held: Counter[str] = Counter()
        self.timeline: list[Counter[str]] = [Counter()]
        self.now = self.most = self.host = self.host_peak = 0  # bytes; most: of the layer at work
        self.storages: dict[int, _Held] = {}  # by address
        self.recent: list[_Held] = []  # of the layer or the loss at work
        self.known: dict[Any, list[Any]] = {}  # operation and arguments -> shapes of results
        self.patch = patch.object(torch.UntypedStorage, "resize_", self._resizing())

    def __enter__(self) -> Self:
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.stop()

    def add(self, size: int, purpose: str | None) -> None:
        """Count bytes more (or fewer) for a purpose; None: on the host."""
        if purpose is None:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            return
        self.held[purpose] += size
        self.now += size
        if self.now > self.most:
            self.most, self.timeline[-1] = self.now, self.held.copy()

    @property
    def at_peak(self) -> Counter[str]:
        """What was held when all together were most."""
        return max(self.timeline, key=Counter.total)

    def hold(self, storage: torch.UntypedStorage, purpose: str | None) -> None:
        """Count a storage, if it is not counted yet, or has another size than it had."""
        address, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        held = self.storages.get(address)
        if (purpose if held is None else held.purpose) is None:
            size = pinned_bytes(storage.nbytes(), True)
        if held is None:

            def freed(_: weakref.ref) -> None:
                held = self.storages.pop(address)
                self.add(-held.size, held.purpose)

            held = self.storages[address] = _Held(0, purpose, weakref.ref(storage, freed))
            if purpose in (LAYER, LOSS):
                self.recent.append(held)
        if size != held.size:
            self.add(size - held.size, held.purpose)
        held.size = size

    def begin_layer(self, gradients: Iterable[Tensor]) -> None:
        """Let what earlier layers hold be activations in flight, but for `gradients`."""
        addresses = {gradient.untyped_storage()._cdata for gradient in gradients}
        for held in self.recent:
            storage = held.storage()
            if storage is not None:
                purpose = GRADIENTS if storage._cdata in addresses else IN_FLIGHT
                self.held[held.purpose] -= held.size
                self.held[purpose] += held.size
                held.purpose = purpose
        self.recent = []
        self.timeline.append(self.held.copy())
        self.most = self.now

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count what it returns and what its kernel needs besides."""
        kwargs, other = (
            kwargs or {},
            any(kind not in (Tensor, torch.nn.Parameter) for kind in types),
        )
        # the stack is slow to walk; a view's storage is known
        purpose = _purpose() if other or _makes_new_tensors(function) else ""
        if purpose == SHAPES:
            return function(*args, **kwargs)
        if other:
            return NotImplemented  # it comes again, as operations on this rank's parts
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if function is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it does on devices; that of the meta device makes a copy
        to_host = kwargs.get("device") == torch.device("cpu")
        on_host = to_host and isinstance(args[0], Tensor) and args[0].is_meta
        if on_host and args[0].dtype in (torch.int32, torch.int64):
            return self.ask(args[0])
        if on_host:
            kwargs, purpose = {**kwargs, "device": META, "pin_memory": False}, None
        result = self.shapes(function, args, kwargs)
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.is_meta:
                storage = each.untyped_storage()
                if purpose == "" and storage._cdata not in self.storages:
                    purpose = _purpose()
                if purpose not in ("", SHAPES):
                    self.hold(storage, purpose)
        if workspace := WORKSPACES.get(function.name()):
            size = workspace(*args)
            self.add(size, purpose)
            self.add(-size, purpose)
        return result

    def shapes(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation returns, or for the same shapes returned before: torch's Python
        functions for meta tensors take most of the time.
        """
        is_new, written = _makes_new_tensors(function), _written(function)
        if not is_new and written is None:
            return function(*args, **kwargs)
        key = function, _signature(args), _signature(tuple(kwargs.items()))
        known = self.known.get(key)
        if known is not None and not is_new:
            return kwargs[written] if isinstance(written, str) else args[written]
        if known is not None:
            made = [
                torch.empty_strided(*sizes, dtype=dtype, device=META) for *sizes, dtype in known
            ]
            return made[0] if len(made) == 1 else tuple(made)
        if function is torch.ops.aten._grouped_mm.default:
            # torch's function for meta tensors knows bf16 alone
            result = function(*(x.to(torch.bfloat16) for x in args[:2]), *args[2:], **kwargs)
            result = result.to(args[0].dtype)
        else:
            result = function(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        if all(isinstance(x, Tensor) and x.is_meta for x in results):
            self.known[key] = [(x.shape, x.stride(), x.dtype) for x in results]
        return result

    def _resizing(self) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if storage._cdata in self.storages:
                self.hold(storage, None)
            return storage

        return resize_and_count


def _flash_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *more: Any
) -> int:
    """Return bytes that FlashAttention 2's backward pass over documents of any lengths allocates
    besides its results (torch, mha_varlen_bwd in flash_api.cpp): an fp32 sum of the gradient of
    queries, with 128 rows more for each document, and of shared heads keys and values of their own.
    """
    tokens, heads, width = query.shape
    documents = more[0].numel() - 1
    rows, wide = tokens + 128 * documents, 4
    size = wide * rows * heads * (-(-width // 32) * 32 + 1)
    if key.shape[1] != heads:
        size += 2 * tokens * heads * width * query.element_size()
    return size


WORKSPACES: dict[str, Callable[..., int]] = {
    "torch_attn::_varlen_attn_backward": _flash_attention_backward,
}
