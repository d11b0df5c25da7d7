"""What is recorded of a model: operations of a pass, and blocks (a layer of each kind, the
embedding, and the head with the loss), which stages are made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Passes of a microbatch that is neither the first nor the last of a step, and what these do more.
FORWARD, RECOMPUTED, BACKWARD, ONCE = "forward", "recomputed forward", "backward", "once"
# Names of blocks besides those of layers.
EMBEDDING, HEAD, MTP, ROOT = "embedding", "head and loss", "MTP layers", "root"
# Kinds of operations besides those of collectives, which tools/sent_bytes.py names.
PRODUCT, GROUPED, ATTENTION, MEMORY, WAIT = "product", "grouped", "attention", "memory", "wait"


@dataclass(frozen=True)
class Operation:
    """What a kernel or a collective does.

    Attributes:
        kind: PRODUCT, GROUPED (of experts), ATTENTION, MEMORY, WAIT (the host's for the device), or
            that of a collective.
        bytes: that a kernel reads and writes, or that a rank sends or receives, what is more.
        flops: 2 for each multiply-add.
        shape: of a product [M, K] x [K, N] M, N and K, of a grouped one those of an expert, and
            the number of experts; of attention heads, width of queries, width of values, and length
            of the documents, or twice that of the window.
        dtype: of a product: "bf16", "fp32" or "fp8".
        ranks: of a collective, by number within the pipeline rank's group.
        flight: number of the exchange that is under way meanwhile, or that it is; 0: none.
        fsdp: whether FSDP2 does it, whose collectives have streams of their own.
        weights: whether it makes the gradient of a weight.
    """

    kind: str
    bytes: int = 0
    flops: float = 0.0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    ranks: tuple[int, ...] = ()
    flight: int = 0
    fsdp: bool = False
    weights: bool = False


Operations = Counter[Operation]


@dataclass(frozen=True)
class Block:
    """A layer of one kind, the embedding, or the head and the loss.

    Attributes:
        name: of the kind.
        operations: by pass, how often; of ONCE numbers below 0 are what a step does less often than
            its microbatches.
        parameters: elements that this rank has a shard of.
        trained: those that are trained.
        gathered: elements that it has in each gathered copy, its own experts among them.
        kept: bytes from a microbatch's forward pass to its backward pass.
        working: bytes on top, at most, while the backward pass (or the forward pass) runs.
        exchange: those of `working` that rows on their way to experts take.
    """

    name: str
    operations: Mapping[str, Operations]
    parameters: int = 0
    trained: int = 0
    gathered: int = 0
    kept: int = 0
    working: int = 0
    exchange: int = 0


@dataclass(frozen=True)
class Blocks:
    """Of a model in a layout.

    Attributes:
        by_name: the blocks.
        layers: of each layer of the model, the name of its block.
        mtp_layers: that are trained.
        tokens: of a microbatch, padding included.
        hidden: bytes of a microbatch's hidden states between stages, on one rank.
    """

    by_name: Mapping[str, Block]
    layers: tuple[str, ...]
    mtp_layers: int
    tokens: int
    hidden: int

    def of_stage(self, layers: Sequence[int], first: bool, last: bool) -> list[Block]:
        """Return the blocks of a stage, in order; see `LanguageModel.part`."""
        names = [EMBEDDING] * first + [self.layers[layer] for layer in layers]
        names += ([MTP] if self.mtp_layers else []) + [HEAD] if last else []
        return [self.by_name[name] for name in names]
