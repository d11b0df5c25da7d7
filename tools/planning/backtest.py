"""`python tools/plan.py --backtest`: the estimate of published runs, beside what was published.

Nothing here is fitted to a row. Software that was published with a row, and that torchsft lacks, is
told to the estimate (`costs.Software`), and the table says which; what torchsft does instead is the
estimate's second column. Layouts are theirs as near as torchsft has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tools.planning.costs import OPTIONS, software_of
from tools.planning.estimate import Text, estimate
from tools.planning.gpus import GPUS, PUBLISHED, Gpu
from tools.published import model_config
from torchsft.config import Config, Data, Model, Parallel, Precision, Train

H100 = GPUS["h100-80g"]
H800 = dataclasses.replace(
    H100,
    name="h800-80g",
    node_bandwidth=200e9,
    sources={**H100.sources, "node_bandwidth": f"{PUBLISHED}: half of 400 GB/s"},
)
# Pre-training rows are one document each.
WHOLE_ROWS = "rows of one document"


@dataclass(frozen=True)
class Published:
    """A run that was published.

    Attributes:
        name: of the model, the GPUs and the software.
        source: where it was.
        tokens: per second and GPU.
        preset: whose model it is (tools/published.py).
        size: GPUs.
        software: options of `costs.OPTIONS` that it had.
        config: the run as torchsft would do it.
        notes: what is not the same.
        steps: of `config` that a step of theirs is.
        imbalance: where routing is natural.
    """

    name: str
    source: str
    tokens: float
    preset: str
    size: int
    software: Sequence[str]
    config: Config
    notes: str = ""
    steps: int = 1
    imbalance: float = 1.5
    gpu: Gpu = field(default=H100)


def config(
    rows: int,
    micro: int = 1,
    row: int = 4096,
    checkpointing: str = "none",
    precision: Mapping[str, str] | None = None,
    **parallel: Any,
) -> Config:
    """Return a run of a global batch of so many rows."""
    train = Train(
        global_batch_size=rows,
        micro_batch_size=micro,
        activation_checkpointing=checkpointing,
        steps=1,
    )
    return Config(
        model=Model(),
        data=Data(seq_len=row),
        train=train,
        parallel=Parallel(**parallel),
        precision=Precision(**{"compute": "bf16"} | dict(precision or {})),
    )


def virtual(layers: int, stages: int) -> tuple[int, ...]:
    """Return layers of so many stages, the last of which (with the head) has fewest."""
    base, more = divmod(layers, stages)
    return tuple(base + (stage < more) for stage in range(stages))


AUTOMODEL = "NeMo Automodel, performance summary 2026"
BRIDGE = "Megatron-Bridge, performance summary"
FULL = {"checkpointing": "full"}
THEIRS = ("fa3", "deepep", "forced-balance")
INTERLEAVED = {"pp_schedule": "Interleaved1F1B"}
DEEPSEEK_V3 = {"pp": 4, "ep": 64, "pp_layers": virtual(61, 32), **INTERLEAVED}
MEGATRON = {"pp": 8, "tp": 2, "ep": 64, "pp_layers": virtual(61, 32), **INTERLEAVED}
RUNS = (
    Published(
        "DeepSeek-V3, 256 H100",
        AUTOMODEL,
        1002,
        "v3_256",
        256,
        THEIRS,
        config(512, **FULL, **DEEPSEEK_V3),
    ),
    Published(
        "DeepSeek-V3, 1,024 H100",
        AUTOMODEL,
        865,
        "v3_256",
        1024,
        THEIRS,
        config(2048, **FULL, **DEEPSEEK_V3),
        "four pipelines of 8 microbatches a step",
        steps=4,
    ),
    Published(
        "DeepSeek-V3, 1,024 H100, fp8",
        BRIDGE,
        1297,
        "v3_256",
        1024,
        THEIRS,
        config(8192, precision={"compute": "blockwise"}, **MEGATRON),
        "they compute projections from latents and dense networks again, here nothing",
    ),
    Published(
        "DeepSeek-V3, 1,024 H100, bf16",
        BRIDGE,
        1061,
        "v3_256",
        1024,
        THEIRS,
        config(8192, **MEGATRON),
        "they compute projections from latents and dense networks again, here nothing",
    ),
    Published(
        "DeepSeek-V3, 2,048 H800, fp8",
        "DeepSeek-V3's report: 2.664 M hours, 14.8 T tokens",
        14.8e12 / 2.664e6 / 3600,
        "v3_256",
        2048,
        ("fa3", "deepep", "hidden-exchange"),
        config(
            15360,
            precision={"compute": "blockwise"},
            pp=16,
            ep=64,
            pp_schedule="DualPipeV",
        ),
        "without their MTP layer; both directions of a pipeline as one V; balanced by their bias, "
        "taken as 1.1 x the mean",
        imbalance=1.1,
        gpu=H800,
    ),
    Published(
        "Qwen3-30B-A3B, 8 H100",
        AUTOMODEL,
        12040,
        "qwen3_30b",
        8,
        THEIRS,
        config(512, 4, **FULL, dp_shard=8, ep=8),
    ),
    Published(
        "Qwen3-30B-A3B, 16 H100, natural routing",
        "NeMo Automodel",
        8655,
        "qwen3_30b",
        16,
        ("fa3", "deepep"),
        config(512, 4, **FULL, dp_shard=16, ep=16),
        "layout not published: as on 8",
    ),
    Published(
        "gpt-oss-20b, 8 H100",
        AUTOMODEL,
        13058,
        "gpt_oss_20b",
        8,
        ("deepep", "forced-balance"),
        config(256, 2, dp_shard=8, ep=8),
        "FlexAttention: here FlashAttention 2 with a window",
    ),
    Published(
        "Moonlight-16B-A3B, 8 H100, rows of 8,192",
        "NeMo Automodel, full SFT",
        14573,
        "moonlight",
        8,
        ("fa3", "deepep"),
        config(32, row=8192, dp_shard=8, ep=8),
        "batch not published",
    ),
    Published(
        "Qwen3-235B-A22B, 256 H800, rows of 65,536",
        "XTuner V1, FSDP alone",
        2000,
        "qwen3_235b",
        256,
        ("fa3",),
        config(256, row=65536, **FULL, dp_shard=256, ep=1),
        "documents of a row not published: 4,096 each",
        gpu=H800,
    ),
)


class Row(NamedTuple):
    """A run beside its estimates.

    Attributes:
        theirs: tokens per second and GPU, with the software that it had.
        ours: with torchsft's own.
    """

    run: Published
    theirs: float
    ours: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Of the estimate, as a share of what was published."""
        return self.theirs / self.run.tokens - 1


def row_of(run: Published) -> Row:
    """Estimate a run twice."""
    row = run.config.data.seq_len
    lengths = [min(row, 4096)] * (row // min(row, 4096))
    text = Text(lengths, 1.0, 1, WHOLE_ROWS)
    found = []
    for names in (run.software, ()):
        found.append(
            estimate(
                run.config,
                model_config(run.preset),
                run.size,
                run.gpu,
                software=software_of(names, run.gpu),
                text=text,
                imbalance=run.imbalance,
                with_range=bool(names),
            )
        )
    theirs, ours = found
    # Parts of a step of theirs have one update together, which is no longer than all parts'.
    speed = theirs.tokens_per_second_per_gpu
    seconds = theirs.step_seconds
    return Row(
        run,
        speed,
        ours.tokens_per_second_per_gpu,
        speed * seconds / theirs.high,
        speed * seconds / theirs.low,
    )


def lines_of(rows: Sequence[Row]) -> list[str]:
    """Return the table in Markdown, and what it means."""
    head = "run | published | estimate | error | range | as torchsft is | told it has | differs in"
    lines = [f"| {head} |", "|" + " --- |" * 8]
    for row in rows:
        run = row.run
        cells = [
            f"{run.name} ({run.source})",
            f"{run.tokens:,.0f}",
            f"{row.theirs:,.0f}",
            f"{row.error:+.0%}",
            f"{row.low:,.0f} to {row.high:,.0f}",
            f"{row.ours:,.0f}",
            ", ".join(run.software),
            run.notes,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    errors = [abs(row.error) for row in rows]
    inside = sum(row.low <= row.run.tokens <= row.high for row in rows)
    lines += [
        "",
        f"Tokens per second and GPU. Errors are {sum(errors) / len(errors):.0%} on average and "
        f"{max(errors):.0%} at most; {inside} of {len(rows)} lie in the range. Nothing is fitted.",
        "What the estimate can be told (`--software`), as theirs has it and torchsft's does not:",
    ]
    return lines + [f"- {name}; without it {instead}" for name, instead in OPTIONS.items()]


def run_all() -> list[str]:
    """Estimate all runs; the table."""
    return lines_of([row_of(run) for run in RUNS])
