"""`tools/benchmark.py triton`: what the Triton kernels need of an H100, without one.

Each kernel is compiled for SM90 by the ptxas of triton's own package: registers of a thread, bytes
that it spills and shared memory of a block. Beside it the traffic at DeepSeek-V3's sizes: how many
operations the plain twin runs on meta tensors and how many bytes these read and write, against the
bytes of the kernel's arguments, each once. `tools/benchmark.py gpu` times the same pairs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchsft.models import rope
from torchsft.models.rope import rotate_reference
from torchsft.ops import swiglu
from torchsft.ops.tiles import padding_of
from torchsft.precision.blockwise import encode, scale_of

SHARED = 227 * 1024  # bytes that a block can have on SM90


class Kernel(NamedTuple):
    """How a kernel is called in a training run."""

    module: str  # of torchsft.ops
    constants: Mapping[str, Any]
    fp8: str = ""  # arguments that are pointers to e4m3
    fp32: str = ""
    int32: str = ""
    int64: str = ""
    bf16: str = ""  # other arguments are integers
    launch: str = ""  # options with which it is launched, by their name in the module


_FP8 = "blockwise_mm"
_ROWS = dict(fp8="q", fp32="scales", bf16="x w", int32="first end", int64="index")
_PRODUCT = dict(
    fp8="x w a b",
    fp32="x_scales w_scales a_scales b_scales",
    bf16="y",
    int32="first expert_of end bounds",
    int64="target",
    launch="LAUNCH",
)
_TABLES = dict(fp32="cos sin", launch="LAUNCH")
_V3 = {"N": 128, "P": 32, "neighbours": True, "heads": 16, "n_block": 128, "p_block": 32}
KERNELS = {
    "swiglu_kernels._forward": Kernel(
        "swiglu_kernels", {"width": 1024}, fp32="weights", bf16="both hidden"
    ),
    "swiglu_kernels._backward": Kernel(
        "swiglu_kernels",
        {"width": 1024, "keep_hidden": True},
        fp32="weights grad_weights",
        bf16="both grad",
    ),
    "rotation_kernels._rotate": Kernel(
        "rotation_kernels", _V3 | {"at_end": True, "back": True}, bf16="x y", **_TABLES
    ),
    "rotation_kernels._keys": Kernel("rotation_kernels", _V3, bf16="kv k_rope k", **_TABLES),
    "rotation_kernels._keys_backward": Kernel(
        "rotation_kernels",
        _V3 | {"V": 128, "v_block": 128},
        bf16="grad_k grad_v grad_kv grad_rope",
        **_TABLES,
    ),
    f"{_FP8}._rows": Kernel(_FP8, {"power_of_two": True, "height": 16}, **_ROWS),
    f"{_FP8}._whole_rows": Kernel(_FP8, {"power_of_two": True, "width": 1024}, **_ROWS),
    f"{_FP8}._columns": Kernel(_FP8, {"power_of_two": True, "width": 64}, **_ROWS),
    f"{_FP8}._weight": Kernel(_FP8, {"power_of_two": True, "transposed": True}, **_ROWS),
    f"{_FP8}._rows_product": Kernel(_FP8, {}, **_PRODUCT),
    f"{_FP8}._columns_product": Kernel(_FP8, {}, **_PRODUCT),
}


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    tensor_cores: bool  # whether it multiplies by wgmma


def compiled(name: str) -> Usage:
    """Compile a kernel of `KERNELS` for SM90; needs triton, but no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = KERNELS[name]
    module = importlib.import_module(f"torchsft.ops.{given.module}")
    kernel = getattr(module, f"{name.partition('.')[2]}_kernel")
    kinds = {"*fp8e4nv": given.fp8, "*fp32": given.fp32, "*bf16": given.bf16}
    kinds |= {"*i32": given.int32, "*i64": given.int64}
    types = {argument: kind for kind, names in kinds.items() for argument in names.split()}
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(kernel.arg_names):
        is_constant = argument in given.constants
        signature[argument] = "constexpr" if is_constant else types.get(argument, "i32")
        if is_constant:
            values[(position,)] = given.constants[argument]
        elif argument != "end" and not argument.startswith("scale_stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    done = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options=getattr(module, given.launch) if given.launch else {},
    )
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile() as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = [tool, "-res-usage", file.name]
        printed = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", printed)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    return Usage(registers, stack + local, done.metadata.shared, "wgmma" in done.asm["ptx"])


class Traffic(TorchDispatchMode):
    """Counts operations that are more than views, and the bytes that they read and write: of a
    tensor what it holds, of one that is gathered from as much as is taken.
    """

    GATHERS = ("aten::index", "aten::index_select")
    WRITTEN = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::index_put_")

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if func.is_view or name in ("aten::empty", "aten::new_empty", "aten::empty_like"):
            return result
        read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if name in self.WRITTEN + self.GATHERS:
            read = read[1:]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in self.GATHERS:
            read += written
        if name == "aten::index_put_":
            written = [args[2]]
        self.operations += 1
        self.bytes += sum(held(x) for x in [*read, *written])
        return result


def held(x: Tensor) -> int:
    """Return the bytes of a tensor; what is repeated by a stride of 0 counts once."""
    sizes = zip(x.shape, x.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride else 1
    return count * x.itemsize


@dataclass(frozen=True)
class Sizes:
    """Of one layer: those of DeepSeek-V3 on one of 32 ranks with balanced routing."""

    tokens: int = 4096
    heads: int = 128
    nope: int = 128
    rope: int = 64
    values: int = 128
    width: int = 7168
    expert_width: int = 2048
    rows: int = 32768
    experts: int = 8


class Pair(NamedTuple):
    """A kernel and its plain twin, on the same tensors."""

    twin: Callable[[], object]
    kernel: Callable[[], object]
    bytes: int  # that the kernel reads and writes


def pairs(device: torch.device, sizes: Sizes) -> dict[str, Pair]:
    """Return every kernel beside its twin; triton is imported when a kernel is called."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def kernels(module: str) -> Any:
        return importlib.import_module(f"torchsft.ops.{module}")

    found = {}
    both, grad = normal(sizes.rows, 2 * sizes.expert_width), normal(sizes.rows, sizes.expert_width)
    weights = torch.rand(sizes.rows, 1, device=device)
    found["weighted_swiglu"] = Pair(
        lambda: swiglu.weighted_swiglu_reference(both, weights),
        lambda: kernels("swiglu_kernels").weighted_swiglu(both, weights),
        held(both) + held(weights) + held(grad),
    )
    found["weighted_swiglu_backward"] = Pair(
        lambda: swiglu.weighted_swiglu_backward_reference(both, weights, grad, True),
        lambda: kernels("swiglu_kernels").weighted_swiglu_backward(both, weights, grad, True),
        2 * (held(both) + held(weights) + held(grad)),
    )

    cos, sin = (torch.rand(sizes.tokens, sizes.rope // 2, device=device) for _ in range(2))
    q = normal(sizes.tokens, sizes.heads, sizes.nope + sizes.rope)
    how = {"neighbours": True, "at_end": True, "back": False}
    found["rotate"] = Pair(
        lambda: rotate_reference(q, cos, sin),
        lambda: kernels("rotation_kernels").rotate(q, cos, sin, **how),
        2 * held(q) + 2 * held(cos),
    )

    kv = normal(sizes.tokens, sizes.heads, sizes.nope + sizes.values).requires_grad_()
    k_rope = normal(sizes.tokens, sizes.rope).requires_grad_()
    tables = cos, sin, "neighbours", sizes.nope
    values = normal(sizes.tokens, sizes.heads, sizes.values)
    nope_bytes = sizes.tokens * sizes.heads * sizes.nope * kv.itemsize
    found["latent_keys"] = Pair(
        lambda: rope.latent_keys_reference(kv, k_rope, *tables),
        lambda: kernels("rotation_kernels").keys(kv, k_rope, cos, sin, sizes.nope, True),
        nope_bytes + held(k_rope) + 2 * held(cos) + held(q),
    )

    @functools.cache
    def outputs() -> tuple[Tensor, Tensor]:
        return rope.latent_keys_reference(kv, k_rope, *tables)

    found["latent_keys, backward"] = Pair(
        lambda: torch.autograd.grad(outputs(), (kv, k_rope), (q, values), retain_graph=True),
        lambda: kernels("rotation_kernels").keys_backward(q, values, cos, sin, True),
        held(q) + held(values) + held(kv) + held(k_rope) + 2 * held(cos),
    )

    x = normal(sizes.rows, sizes.width)
    order = torch.randperm(sizes.rows, device="cpu").to(device)
    ends = torch.arange(1, sizes.experts + 1, dtype=torch.int32) * sizes.rows // sizes.experts
    padding = padding_of(ends.to(device), sizes.rows, 16)
    index = torch.arange(padding.count, device=device).clamp(max=sizes.rows - 1)

    def plain(block: int) -> object:
        padded = padding.pad(x[order]).float().unflatten(1, (-1, block))
        scale = scale_of(padded.abs().amax(2, keepdim=True), True)
        return encode(padded, scale).flatten(1), scale

    codes = padding.count * sizes.width
    index_bytes = held(index)
    for name, block in (("quantise_rows", 128), ("quantise_whole_rows", sizes.width)):
        found[f"{name}, permuted and padded"] = Pair(
            functools.partial(plain, block),
            lambda name=name: getattr(kernels("blockwise_mm"), name)(x, True, index),
            held(x) + codes + 4 * codes // block + index_bytes,
        )
    return found


def traffic(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Count operations and bytes of the twins on meta tensors, and bytes of the kernels."""
    found = {}
    with torch.device("meta"):
        together = pairs(torch.device("meta"), sizes)
    for name, pair in together.items():
        pair.twin()  # what a backward pass goes back through is not counted
        with Traffic() as counted:
            pair.twin()
        found[name] = {
            "operations": counted.operations,
            "twin_bytes": counted.bytes,
            "kernel_bytes": pair.bytes,
        }
    return found


def run(json_path: Path | None) -> dict[str, Any]:
    """Print both tables, and write them as JSON."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("error: benchmark.py triton compiles by triton; run pip install triton")
    report: dict[str, Any] = {"traffic": traffic(Sizes()), "compiled": {}}
    print(f"{'kernel':36} registers  spilled bytes  shared bytes")
    for name in KERNELS:
        usage = compiled(name)
        report["compiled"][name] = usage._asdict()
        print(f"{name:36} {usage.registers:9} {usage.spilled:14} {usage.shared:13}", flush=True)
    print(f"\n{'at V3 sizes':42} operations   twin MB  kernel MB  ratio")
    for name, numbers in report["traffic"].items():
        before, after = numbers["twin_bytes"] / 1e6, numbers["kernel_bytes"] / 1e6
        operations = numbers["operations"]
        print(f"{name:42} {operations:10} {before:9.0f} {after:10.0f} {before / after:6.1f}")
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    return report
