"""Measurements of this machine; results with machine and versions belong in tools/benchmarks.md.

python tools/benchmark.py step            a small model on CPU against a plain transformers + AdamW
                                          loop
python tools/benchmark.py gpu --json OUT  a training step at real widths on an NVIDIA GPU, in
                                          every mode
python tools/benchmark.py triton          registers, spills and shared memory of the Triton kernels
                                          on an H100, and their traffic; needs triton, no GPU
python tools/benchmark.py pipeline        how long pipeline ranks idle under each schedule, beside
                                          its formula
python tools/benchmark.py layouts         step time and bytes sent under each parallel layout,
                                          against one process
python tools/benchmark.py waits           where the host waits for the device in a step, and the
                                          calls of an update
python tools/benchmark.py savings         what a step of DeepSeek-V3's widths holds, predicted, with
                                          and without what saves memory
python tools/benchmark.py kernels         what a layer launches and keeps, with and without
                                          compilation
python tools/benchmark.py rows            the longest row at a fixed memory, of two modes of
                                          activation checkpointing
python tools/benchmark.py checkpoint      conversion, loading and saving, against `cp -r` and the
                                          obvious script
python tools/benchmark.py data            tokenising, packing, starting, against the bare tokenizer
                                          and TRL
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from tools import (
    benchmark_checkpoint,
    benchmark_data,
    benchmark_gpu,
    benchmark_kernels,
    benchmark_layouts,
    benchmark_pipeline,
    benchmark_rows,
    benchmark_savings,
    benchmark_step,
    benchmark_triton,
    benchmark_waits,
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="small model, CPU, against transformers")
    step.add_argument(
        "--repeats", type=int, default=5, help="timed steps of each side (default: %(default)s)"
    )
    step.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    step.add_argument(
        "--profile", action="store_true", help="also print where the time goes, by operator"
    )
    gpu = commands.add_parser("gpu", help="real widths, one NVIDIA GPU")
    gpu.add_argument("--repeats", type=int, default=10, help="timed steps (default: %(default)s)")
    commands.add_parser("triton", help="Triton kernels, compiled for an H100")
    pipeline = commands.add_parser(
        "pipeline", help="bubbles of the pipeline schedules, without arithmetic"
    )
    pipeline.add_argument(
        "--repeats", type=int, default=3, help="recorded steps (default: %(default)s)"
    )
    layouts = commands.add_parser("layouts", help="small model on up to 8 ranks of this machine")
    layouts.add_argument(
        "--repeats", type=int, default=3, help="timed steps of each layout (default: %(default)s)"
    )
    waits = commands.add_parser("waits", help="host waits of a step, by place, on CPU ranks")
    waits.add_argument(
        "--repeats", type=int, default=3, help="timed updates of each layout (default: %(default)s)"
    )
    commands.add_parser("savings", help="what a step holds without what saves memory, predicted")
    commands.add_parser("kernels", help="launches of a layer, with and without compiling")
    rows = commands.add_parser("rows", help="longest row at a fixed memory, CPU")
    rows.add_argument(
        "--repeats", type=int, default=3, help="timed passes of each mode (default: %(default)s)"
    )
    checkpoint = commands.add_parser(
        "checkpoint", help="8.5 GB of V3's shapes; needs 45 GB of disk and 20 GB of memory"
    )
    checkpoint.add_argument(
        "--repeats", type=int, default=3, help="saves of each kind (default: %(default)s)"
    )
    data = commands.add_parser(
        "data", help="200,000 conversations; takes a quarter of an hour, most of it TRL's"
    )
    data.add_argument(
        "--conversations", type=int, default=200_000, help="how many (default: %(default)s)"
    )
    data.add_argument(
        "--no-trl", action="store_true", help="without TRL, which need not be installed then"
    )
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, metavar="OUT", help="write the results there")
    return parser.parse_args(argv)


def main() -> None:
    """Run one measurement."""
    options = parse(sys.argv[1:])
    if options.command == "step":
        benchmark_step.run(options.json, options.repeats, options.threads, options.profile)
    elif options.command == "savings":
        benchmark_savings.run(options.json)
    elif options.command == "kernels":
        benchmark_kernels.run(options.json)
    elif options.command == "triton":
        benchmark_triton.run(options.json)
    elif options.command == "data":
        benchmark_data.run(options.json, options.conversations, not options.no_trl)
    else:
        tools = {
            "gpu": benchmark_gpu,
            "pipeline": benchmark_pipeline,
            "layouts": benchmark_layouts,
            "waits": benchmark_waits,
            "rows": benchmark_rows,
            "checkpoint": benchmark_checkpoint,
        }
        tools[options.command].run(options.json, options.repeats)


if __name__ == "__main__":
    main()
