"""What GPUs, their nodes and the network between these give: built-in ones, and files of one's own.

A file (YAML, TOML or JSON) has the fields of `Gpu`; what it leaves out is as in the built-in one
that it names as `like`:

    like: h100-80g
    network_bandwidth: 12.5e9
    peak_flops:
      bf16: 800e12
    products: gpu.json

`products` is what `tools/benchmark.py gpu --json gpu.json` has written on such a GPU.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchsft.cli import Option, Values, read_file
from torchsft.config import InputError

MEASURED, PUBLISHED, ASSUMED = "measured", "published", "assumed"
TABLES = ("peak_flops", "latency_seconds", "efficiency")  # fields that are tables of numbers
WHOLE = ("memory", "ranks_per_node", "host_memory")


@dataclass(frozen=True)
class Measured:
    """A matrix product [m, k] x [k, n] that was measured, or one of each of `experts` (0: one).

    Attributes:
        dtype: "bf16", "fp8" or "fp32".
        share: of the peak that it reaches.
    """

    dtype: str
    m: int
    n: int
    k: int
    experts: int
    share: float


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, in nodes of several.

    Attributes:
        name: as the command line has it, or the file that says it.
        memory: bytes that torch finds (`total_memory`).
        compute_capability: NVIDIA's, such as 9.0.
        peak_flops: dense, per second, by dtype: "bf16", "fp8" (a GPU that has none lacks it),
            "fp32".
        memory_bandwidth: bytes per second.
        node_bandwidth: bytes per second that a GPU sends to others of its node.
        network_bandwidth: bytes per second that a GPU sends to other nodes.
        latency_seconds: of a message, within a "node" and over the "network".
        ranks_per_node: GPUs of a node.
        host_memory: bytes of a node.
        price: USD an hour.
        efficiency: share of a peak that is reached, by kind of work: of large products by dtype,
            what grouped ones have of that; of attention in long documents by FlashAttention 2, and
            by its third version (fa3); of memory, node and network by large messages, what rows to
            experts have of that (exchange), and DeepEP's of the links' own speed.
        products: those that were measured.
        sources: by field (of tables FIELD.KEY, or FIELD for all): MEASURED, PUBLISHED or ASSUMED,
            and from where.
    """

    name: str
    memory: int
    compute_capability: float
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    latency_seconds: Mapping[str, float]
    ranks_per_node: int
    host_memory: int
    price: float
    efficiency: Mapping[str, float]
    products: tuple[Measured, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def capability(self) -> tuple[int, int]:
        """As torch has it, (9, 0)."""
        major = int(self.compute_capability)
        return major, round(10 * (self.compute_capability - major))

    def source(self, name: str) -> str:
        """Return where a figure comes from; `name` is a field, or FIELD.KEY of a table."""
        return self.sources.get(name) or self.sources[name.partition(".")[0]]


H100 = Gpu(
    "h100-80g",
    memory=84_900_000_000,
    compute_capability=9.0,
    peak_flops={"bf16": 989.4e12, "fp8": 1978.9e12, "fp32": 66.9e12},
    memory_bandwidth=3.35e12,
    node_bandwidth=450e9,
    network_bandwidth=50e9,
    latency_seconds={"node": 10e-6, "network": 25e-6},
    ranks_per_node=8,
    host_memory=2_000_000_000_000,
    price=2.5,
    efficiency={
        "product_bf16": 0.72,
        "product_fp8": 0.6,
        "product_fp32": 0.8,
        "grouped": 0.85,
        "attention_forward": 0.36,
        "attention_backward": 0.3,
        "fa3_forward": 0.62,
        "fa3_backward": 0.5,
        "memory": 0.85,
        "node": 0.75,
        "network": 0.8,
        "exchange": 0.85,
        "deepep": 0.9,
    },
    sources={
        "memory": f"{MEASURED}: torch finds 79.1 GiB",
        "compute_capability": f"{PUBLISHED}: NVIDIA",
        "peak_flops": f"{PUBLISHED}: NVIDIA H100 SXM data sheet, without sparsity",
        "memory_bandwidth": f"{PUBLISHED}: NVIDIA H100 SXM data sheet",
        "node_bandwidth": f"{PUBLISHED}: half of NVLink 4's 900 GB/s, which count both ways",
        "network_bandwidth": f"{PUBLISHED}: DGX H100, one 400 Gb/s port a GPU",
        "latency_seconds": f"{ASSUMED}: NCCL's usual, launch included",
        "ranks_per_node": f"{PUBLISHED}: DGX H100",
        "host_memory": f"{PUBLISHED}: DGX H100, 2 TB",
        "price": f"{ASSUMED}: rented by the hour in 2026",
        "efficiency": ASSUMED,
        "efficiency.attention_forward": f"{PUBLISHED}: 370 TFLOP/s, Shah et al. 2024, figure 5",
        "efficiency.fa3_forward": f"{PUBLISHED}: 648 TFLOP/s, the same; less with a causal mask",
        "efficiency.deepep": f"{PUBLISHED}: 43 to 47 GB/s over 50 GB/s ports, DeepEP's README",
    },
)
H200 = dataclasses.replace(
    H100,
    name="h200-141g",
    memory=150_000_000_000,
    memory_bandwidth=4.8e12,
    price=3.5,
    sources={
        **H100.sources,
        "memory": f"{PUBLISHED}: torch finds 139.8 GiB",
        "peak_flops": f"{PUBLISHED}: NVIDIA H200 SXM data sheet, without sparsity",
        "memory_bandwidth": f"{PUBLISHED}: NVIDIA H200 SXM data sheet",
    },
)
A100 = dataclasses.replace(
    H100,
    name="a100-80g",
    memory=84_900_000_000,
    compute_capability=8.0,
    peak_flops={"bf16": 312e12, "fp32": 19.5e12},
    memory_bandwidth=2.039e12,
    node_bandwidth=300e9,
    network_bandwidth=25e9,
    price=1.5,
    efficiency=H100.efficiency
    | {"product_bf16": 0.82, "attention_forward": 0.62, "attention_backward": 0.52},
    sources={
        **H100.sources,
        "efficiency.attention_forward": f"{PUBLISHED}: 50 to 73 %, Dao 2023",
        "memory": f"{PUBLISHED}: torch finds 79.1 GiB",
        "peak_flops": f"{PUBLISHED}: NVIDIA A100 SXM data sheet, without sparsity; it has no fp8",
        "memory_bandwidth": f"{PUBLISHED}: NVIDIA A100 80GB SXM data sheet",
        "node_bandwidth": f"{PUBLISHED}: half of NVLink 3's 600 GB/s, which count both ways",
        "network_bandwidth": f"{PUBLISHED}: DGX A100, one 200 Gb/s port a GPU",
        "ranks_per_node": f"{PUBLISHED}: DGX A100",
        "host_memory": f"{PUBLISHED}: DGX A100 640GB, 2 TB",
    },
)
B200 = dataclasses.replace(
    H100,
    name="b200-192g",
    memory=191_500_000_000,
    compute_capability=10.0,
    peak_flops={"bf16": 2250e12, "fp8": 4500e12, "fp32": 75e12},
    memory_bandwidth=8e12,
    node_bandwidth=900e9,
    price=5.0,
    efficiency=H100.efficiency | {"attention_forward": 0.2, "attention_backward": 0.16},
    sources={
        **H100.sources,
        "efficiency.attention_forward": f"{ASSUMED}: FlashAttention 2 does not know Blackwell",
        "memory": f"{PUBLISHED}: torch finds 178.4 GiB",
        "peak_flops": f"{PUBLISHED}: NVIDIA HGX B200 data sheet, without sparsity",
        "memory_bandwidth": f"{PUBLISHED}: NVIDIA B200 data sheet",
        "node_bandwidth": f"{PUBLISHED}: half of NVLink 5's 1,800 GB/s, which count both ways",
        "network_bandwidth": f"{PUBLISHED}: DGX B200, one 400 Gb/s port a GPU",
        "ranks_per_node": f"{PUBLISHED}: DGX B200",
        "host_memory": f"{PUBLISHED}: DGX B200, 2 TB in its smallest form",
    },
)
GPUS = {gpu.name: gpu for gpu in (H100, H200, A100, B200)}


def read_gpu(text: str) -> Gpu:
    """Return a built-in GPU, or what a file says of one.

    Raises:
        InputError: there is no such GPU or file, or the file says what cannot be.
    """
    if text in GPUS:
        return GPUS[text]
    if Path(text).suffix in (".yaml", ".yml", ".toml", ".json") or Path(text).exists():
        return _read_file(text)
    found = difflib.get_close_matches(text, GPUS, 2, 0.3)
    nearest = f"did you mean {' or '.join(found)}? " if found else ""
    raise InputError(
        f"--gpu {text} is not known; {nearest}those known are {', '.join(GPUS)}, and any other can "
        "be described in a YAML file (tools/README.md)"
    )


def _read_file(path: str) -> Gpu:
    """Read a file of the fields of `Gpu`."""
    options = _options()
    given = read_file(path, options, "--gpu")
    like = given.pop("like", None)
    if like is not None and like not in GPUS:
        raise InputError(f"like in {path} is {like!r}, but it must be one of {', '.join(GPUS)}")
    products = given.pop("products", None)
    for name, value in given.items():
        positive = isinstance(value, str) or (0 < value < math.inf)
        if not positive and not (name == "price" and value == 0):
            raise InputError(f"{name} in {path} is {value}, but it must be above 0 and finite")
        if name in WHOLE:
            given[name] = round(value)  # YAML has no whole number 80e9
    values = {"efficiency": H100.efficiency}
    if like is not None:
        values = {each: getattr(GPUS[like], each) for each in _fields()}
    sources = dict(values.get("sources", {"efficiency": ASSUMED}))
    values["name"] = path
    if products is not None:
        values["products"] = read_products(Path(path).parent / products)
        sources["products"] = f"{MEASURED}: {products}"
    for name, value in given.items():
        table, dot, key = name.partition(".")
        values[table] = {**values.get(table, {}), key: value} if dot else value
        sources[name] = f"given in {path}"
    lacking = [
        name
        for name in options
        if name not in ("like", "name", "products", "peak_flops.fp8")
        and not name.startswith("efficiency.")
        and not _has(values, name)
    ]
    if lacking:
        raise InputError(
            f"--gpu {path} lacks {', '.join(lacking)}; give them, or name a GPU that the rest is "
            f"as in (like: {H100.name})"
        )
    return Gpu(**values | {"sources": sources})


def read_products(path: Path) -> tuple[Measured, ...]:
    """Return the products that `tools/benchmark.py gpu` has measured.

    Raises:
        InputError: the file has none.
    """
    try:
        return tuple(Measured(**each) for each in json.loads(path.read_text())["products"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"products {path} cannot be read ({type(error).__name__}: {error}); give a file that "
            "tools/benchmark.py gpu --json has written"
        ) from None


def _fields() -> list[str]:
    return [each.name for each in dataclasses.fields(Gpu)]


def _has(values: Mapping[str, Any], name: str) -> bool:
    table, dot, key = name.partition(".")
    return key in values.get(table, {}) if dot else name in values


def _options() -> dict[str, Option]:
    """Return what a file may say: fields, those of tables by FIELD.KEY, and `like`."""
    kinds: Values = {"like": str}
    for name in _fields():
        if name in TABLES:
            kinds |= {f"{name}.{key}": float for key in getattr(H100, name)}
        elif name != "sources":
            kinds[name] = str if name in ("name", "products") else float
    return {name: Option(name, kind, "", None) for name, kind in kinds.items()}
