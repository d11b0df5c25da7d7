"""`tools/benchmark.py layouts`: step time and bytes sent by a rank under each parallel layout,
against one process.

The step is the real `Trainer.train_step` of a small DeepSeek-V3 in fp32 over gloo, the same global
batch in every layout. Bytes are counted at the collectives themselves (`tools/sent_bytes.py`), as
what a rank has to send.

Beside them stands what the layout has to send (`expected_bytes`); where it sends something else,
the table shows both (1 %; 5 % for all-to-alls, since these depend on the routing and are expected
as if it were even). All are means over ranks.

Ranks share this machine's cores, so no layout can be faster than 1 / min(ranks, cores) of one
process. The processor time of all ranks together depends less on what else runs; it says what a
layout copies and manages besides. "products" are the multiply-adds of matrix products of all ranks
together: more than 1 is computed more than once. In brackets: one process is 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from recipes.debug_task import write_debug_data, write_debug_model
from tools import benchmark_exchange
from tools.benchmark_pipeline import on_ranks
from tools.sent_bytes import SentBytes
from torchsft.config import (
    Checkpoint,
    Config,
    Data,
    Metrics,
    Model,
    Optim,
    Parallel,
    Precision,
    Train,
)
from torchsft.data.stream import microbatches_per_step
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.stages import plan_stages
from torchsft.parallel.world import World, mesh_sizes
from torchsft.trainer import Trainer

ROWS, ROW = 8, 256
# The debug preset's model with more layers, and a vocabulary that divides.
SIZES = {"num_hidden_layers": 8, "first_k_dense_replace": 2, "vocab_size": 1024}
FP32 = 4


def layout(**sizes: Any) -> dict[str, Any]:
    """Fields of Parallel and Train; dp_shard is 1 where it is not named."""
    return {"dp_shard": 1} | sizes


LAYOUTS = [
    layout(),
    # one axis alone
    layout(dp_replicate=2),
    layout(dp_shard=2),
    layout(dp_shard=4),
    layout(cp=2),
    layout(cp=4),
    layout(tp=2),
    layout(tp=4),
    layout(pp=2, pp_schedule="1F1B"),
    layout(pp=2, pp_schedule="Interleaved1F1B"),
    layout(pp=2, pp_schedule="ZBVZeroBubble"),
    layout(pp=4, pp_schedule="1F1B"),
    layout(pp=4, pp_schedule="DualPipeV"),
    # pairs
    layout(dp_shard=2, ep=2),
    layout(dp_shard=4, ep=2),
    layout(dp_shard=4, ep=4),
    layout(cp=2, ep=2),
    layout(tp=2, ep=2),
    layout(dp_replicate=2, dp_shard=2),
    layout(dp_shard=2, cp=2),
    layout(dp_shard=2, tp=2),
    layout(cp=2, tp=2),
    layout(pp=2, dp_shard=2),
    layout(pp=2, cp=2),
    layout(pp=2, tp=2),
    # three and more
    layout(pp=2, dp_shard=2, ep=2),
    layout(dp_shard=2, tp=2, ep=4),
    layout(dp_shard=2, cp=2, ep=4),
    layout(dp_replicate=2, dp_shard=2, tp=2, ep=4),
    layout(pp=2, dp_shard=2, tp=2, ep=4, pp_schedule="DualPipeV"),
    layout(pp=2, cp=2, tp=2, ep=4),
    # larger microbatches, activation checkpointing
    layout(dp_shard=2, micro_batch_size=4),
    layout(activation_checkpointing="full"),
    layout(dp_shard=2, tp=2, ep=4, activation_checkpointing="full"),
    layout(pp=2, cp=2, ep=2, activation_checkpointing="full"),
]


def expected_bytes(
    model: LanguageModel, parallel: Parallel, train: Train, row: int, world_size: int
) -> dict[str, float]:
    """Return what a rank has to send in a training step of a `model` with latent attention (whole,
    on meta), by kind; fp32, mean over ranks, tokens spread evenly over experts.

        parameters    gathered for the forward pass of each microbatch and again for its backward
                      pass, where FSDP frees them in between (without a pipeline); the embedding,
                      last norm and head, of which nothing would be saved, once. Gradients are
                      summed over shards for each microbatch (no rank holds whole gradients), over
                      replicas once. With a pipeline: gathered once, summed once. Shards of what
                      is replicated over tp are summed over tp once.
        attention     latents gathered over cp x tp, outputs back: parallel/context.py
        tp            a sum scattered behind the output projection, the dense layers and the
                      embedding, a gather before the dense layers and the head; three numbers a
                      token for the loss
        ep            rows to their experts and back
        pp            hidden states between stages on different ranks
        step          counts, norm, loss and expert loads: float64

    Backward passes send what forward passes did, the other way; activation checkpointing repeats
    forward passes.
    """
    sizes = mesh_sizes(parallel, world_size)
    pp, replicas, shard, cp, tp = sizes["dense"].values()
    edp, ep = sizes["expert"]["edp"], sizes["expert"]["ep"]
    parallel = dataclasses.replace(parallel, dp_shard=shard)
    microbatches = microbatches_per_step(
        train.global_batch_size, train.micro_batch_size, replicas * shard
    )
    tokens = train.micro_batch_size * row
    config, attention = model.config, model.model.layers["0"].self_attn
    width, heads = config.hidden_size, config.num_attention_heads
    forwards = 2 if train.activation_checkpointing != "none" else 1
    sent: Counter[str] = Counter()

    def share(ranks: int) -> float:
        return (ranks - 1) / ranks

    for name, parameter in model.named_parameters():
        split = any(
            fnmatchcase(name.rpartition(".")[0], pattern) and style != "gather"
            for pattern, style in model.tensor_parallel.items()
        )
        expert = ".experts." in name
        size = parameter.numel() * FP32 / (ep if expert else tp if split else 1)
        shards = edp if expert else shard * cp
        gathers = 1 if pp > 1 else 2 * microbatches if ".layers." in name else microbatches
        sums = 1 if pp > 1 else microbatches
        sent["all-gather"] += gathers * size * share(shards)
        sent["reduce-scatter"] += sums * size * share(shards)
        sent["all-reduce"] += 2 * share(replicas) * size / shards
        if not expert and not split:
            sent["all-reduce"] += 2 * share(tp) * size / shards

    here = tokens // cp  # of a tensor group
    moved: Counter[str] = Counter()  # values of a microbatch
    for layer in range(config.num_hidden_layers):
        latents = (attention.q_rank or width) + attention.kv_rank + attention.rope.dim
        gathered = tokens * latents * share(cp * tp)
        summed = here * width * share(tp)
        dense = 0 if config.is_moe(layer) else summed
        moved["all-gather"] += forwards * (gathered + dense) + summed + dense
        # a repetition ends before its last sum
        moved["reduce-scatter"] += forwards * summed + dense + gathered + dense
        moved["all-to-all"] += (
            (forwards + 1) * tokens * heads * attention.v_dim / (cp * tp) * share(cp)
        )
        if config.is_moe(layer):
            rows = here // tp * config.num_experts_per_tok
            # there with a weight each; no repetition sends them back
            there, back = (forwards + 1) * (width + 1), 2 * width
            moved["all-to-all"] += rows * (there + back) * share(ep)
            moved["all-to-all"] += 2 * config.routed_experts(layer) * share(ep)  # counts, int64
    ends = 2 * here * width * share(tp)  # embedding and head, there and back
    moved["all-gather"] += ends
    moved["reduce-scatter"] += ends
    moved["all-reduce"] += 2 * share(tp) * 3 * here
    stages = plan_stages(parallel, config, microbatches).ranks
    borders = sum(a != b for a, b in itertools.pairwise(stages))
    moved["point-to-point"] += 2 * borders * here // tp * width
    for kind, values in moved.items():
        sent[kind] += microbatches * values * FP32
    total = {kind: count / pp for kind, count in sent.items()}

    # counts of the batch; the norm; losses (of MTP layers, smoothed targets, the z-loss too), two
    # flags, and of each MoE layer balance loss, z-loss and load
    experts = [config.routed_experts(layer) for layer in range(config.num_hidden_layers)]
    numbers = 4 + 1 + 6 + sum(2 + max(experts) for count in experts if count)
    total["all-reduce"] += 2 * share(world_size) * numbers * 8
    return total


class QuietTrainer(Trainer):
    """Writes nothing."""

    def open_output(self) -> None:
        """No metric files."""


def config_for(directory: Path, row: int, **sizes: Any) -> Config:
    """`sizes`: fields of Parallel and of Train."""
    names = {field.name for field in dataclasses.fields(Train)}
    train = {name: sizes.pop(name) for name in names & sizes.keys()}
    return Config(
        model=Model(path=str(directory), random_init=True),
        data=Data(train=(str(directory / "train.jsonl"),), seq_len=row),
        train=Train(steps=1_000_000, global_batch_size=ROWS, **train),
        parallel=Parallel(timeout_seconds=120, **sizes),
        optim=Optim(lr=1e-4),
        precision=Precision(compute="fp32"),
        checkpoint=Checkpoint(export="none"),
        metrics=Metrics(tensorboard=False, progress=False),
        output=str(directory / "output"),
    )


def train_steps(config: Config, repeats: int) -> dict[str, Any]:
    """On each rank: time of some steps (after one that is not timed), then what one more sends and
    multiplies.
    """
    with World(config.parallel, 0) as world:
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints of rows and weights
            trainer = QuietTrainer(config, world)
        trainer.train_step(next(trainer.loader))
        began = time.process_time()
        seconds = [
            trainer.train_step(next(trainer.loader))[0]["step_seconds"] for _ in range(repeats)
        ]
        cpu_seconds = (time.process_time() - began) / repeats
        with SentBytes() as counted:
            trainer.train_step(next(trainer.loader))
    counts = {
        "sent": dict(counted.sent),
        "calls": dict(counted.calls),
        "multiply_adds": counted.multiply_adds,
    }
    return {"seconds": seconds, "cpu_seconds": cpu_seconds} | counts


def write_inputs(directory: Path, **sizes: Any) -> LanguageModel:
    """Write configuration, tokenizer and data; `sizes` change those of the debug preset's model,
    which is returned, on the meta device.
    """
    write_debug_model(directory)
    write_debug_data(directory, train=200, held_out=1)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | SIZES | sizes
    file.write_text(json.dumps(config))
    with torch.device("meta"):
        return build_model(config)


def measure(
    directory: Path, model: LanguageModel, row: int, repeats: int, sizes: dict[str, Any]
) -> dict[str, Any]:
    """Return one line of the table."""
    axes = {axis: sizes.get(axis, 1) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    n = math.prod(axes.values())
    config = config_for(directory, row, **sizes)
    ranks = on_ranks(n, train_steps, config=config, repeats=repeats)
    kinds = sorted({kind for rank in ranks for kind in rank["sent"]})
    expected = expected_bytes(model, config.parallel, config.train, row, n)
    return {
        "layout": " ".join(f"{name}={value}" for name, value in sizes.items() if value != 1)
        or "one process",
        "ranks": n,
        "step_seconds": statistics.median(ranks[0]["seconds"]),  # ranks end a step together
        "cpu_seconds": sum(rank["cpu_seconds"] for rank in ranks),
        "multiply_adds": sum(rank["multiply_adds"] for rank in ranks),
        "load": os.getloadavg()[0],
        "sent": {
            kind: statistics.mean(rank["sent"].get(kind, 0) for rank in ranks) for kind in kinds
        },
        "most_sent": max(sum(rank["sent"].values()) for rank in ranks),
        "calls": {
            kind: statistics.mean(rank["calls"].get(kind, 0) for rank in ranks) for kind in kinds
        },
        "expected": {kind: count for kind, count in expected.items() if count},
    }


KINDS = {
    "all-gather": 0.01,
    "reduce-scatter": 0.01,
    "all-reduce": 0.01,
    "all-to-all": 0.05,
    "point-to-point": 0.01,
}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown; bytes in MiB."""
    head = ["layout", "ranks", "step", "processor time", "products", *KINDS, "sent", "calls"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]

    def both(sent: float, expected: float, tolerance: float) -> str:
        shown = f"{sent / 2**20:.2f}" if sent else ""
        if math.isclose(sent, expected, rel_tol=tolerance, abs_tol=2**10):
            return shown
        return f"**{shown or 0}** ({expected / 2**20:.2f})"

    for r in results:
        cells = [r["layout"], str(r["ranks"])]
        cells += [
            f"{r[key]:.2f} s ({r[key] / results[0][key]:.2f})"
            for key in ("step_seconds", "cpu_seconds")
        ]
        cells.append(f"{r['multiply_adds'] / results[0]['multiply_adds']:.2f}")
        cells += [
            both(r["sent"].get(kind, 0), r["expected"].get(kind, 0), KINDS[kind]) for kind in KINDS
        ]
        cells.append(f"{sum(r['sent'].values()) / 2**20:.2f}")
        cells.append(f"{sum(r['calls'].values()):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(
    json_path: Path | None,
    repeats: int,
    layouts: Sequence[dict[str, Any]] = LAYOUTS,
    row: int = ROW,
    exchange: bool = True,
    **sizes: Any,
) -> dict[str, Any]:
    """Measure layouts, the first of them on one process, and how tokens get to experts on several
    nodes, if `exchange`; print the tables, and write them as JSON.
    """
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory() as directory:
        model = write_inputs(Path(directory), **sizes)
        report["results"] = []
        print(table([]))
        for one in layouts:
            report["results"].append(measure(Path(directory), model, row, repeats, one))
            print(table(report["results"]).splitlines()[-1], flush=True)
    if exchange:
        report["exchange"] = benchmark_exchange.run()
    report["load_after"] = os.getloadavg()
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    return report
