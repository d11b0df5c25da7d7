"""Whether a change of the code changes a number: losses, norms and learning rates of a set of runs.

    python tests/same_numbers.py record TREE DIRECTORY
    python tests/same_numbers.py record TREE DIRECTORY --checkpoints DIRECTORY_OF_ANOTHER_TREE
    python tests/same_numbers.py compare DIRECTORY DIRECTORY

`record` runs the debug preset with the code of TREE (a checkout): 60 steps on 2 ranks, 10 steps of
four layouts, and 5 steps that continue the checkpoint of step 5 of the first of them on its own
layout and on another. `compare` prints the runs whose numbers are not equal bit by bit, and exits
with 1 if there are any. With --checkpoints the resumed runs continue what another tree's code
saved. It is run by hand, before and after a change that must not change a number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

SHORT = ["--train.steps", "10", "--optim.warmup-steps", "2", "--train.global-batch-size", "8"]
SHORT += ["--train.micro-batch-size", "2", "--eval.every", "5"]
# name: (ranks, options)
RUNS = {
    "debug": (2, ["--train.steps", "60", "--eval.every", "20"]),
    "pp2-ep2": (
        4,
        [*SHORT, "--parallel.pp", "2", "--parallel.ep", "2", "--checkpoint.every", "5"],
    ),
    "tp2": (2, [*SHORT, "--parallel.tp", "2", "--router.aux-loss", "0.01"]),
    "cp2-ep2": (2, [*SHORT, "--parallel.cp", "2", "--parallel.ep", "2"]),
    "replicate2": (2, [*SHORT, "--parallel.dp-replicate", "2", "--parallel.ep", "1"]),
}
CHECKPOINT = "pp2-ep2/checkpoints/step-00000005"
RESUMED = {
    "resumed-pp2-ep2": (4, [*SHORT, "--parallel.pp", "2", "--parallel.ep", "2"]),
    "resumed-tp2": (2, [*SHORT, "--parallel.tp", "2"]),
}
# Times differ from run to run.
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "epoch", "aux_loss")


def record(tree: Path, directory: Path, checkpoints: Path) -> None:
    """Run everything with the code of `tree`; outputs go to `directory`/NAME."""
    for name, (ranks, options) in RUNS.items():
        run(tree, directory / name, ranks, options)
    for name, (ranks, options) in RESUMED.items():
        resume = ["--checkpoint.resume", str(checkpoints / CHECKPOINT)]
        run(tree, directory / name, ranks, [*options, *resume])


def run(tree: Path, output: Path, ranks: int, options: list[str]) -> None:
    """Run the debug preset on so many ranks, unless its output is there already."""
    if (output / "finished").exists():
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launch += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*launch, str(tree / "recipes/deepseek_v3_sft.py"), "debug", *options]
    command += ["--eval.answers", "0", "--checkpoint.export", "fp32", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    (output / "finished").touch()


def numbers(output: Path) -> list[dict[str, float]]:
    """What must be equal of each step of a run, evaluation losses included."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key in COMPARED or key.startswith("eval_")}
        for line in lines
    ]


def weights(output: Path) -> dict[str, bytes]:
    """The exported weights, file by file."""
    return {path.name: path.read_bytes() for path in sorted((output / "hf").glob("*.safetensors"))}


def compare(before: Path, after: Path) -> int:
    """Print how the runs of two directories differ; the number of those that do."""
    different = 0
    for name in [*RUNS, *RESUMED]:
        old, new = numbers(before / name), numbers(after / name)
        at = [line["step"] for line, other in zip(old, new, strict=True) if line != other]
        equal_weights = weights(before / name) == weights(after / name) != {}
        if at or not equal_weights:
            different += 1
            first = f"first at step {at[0]}" if at else "in the exported weights alone"
            print(f"{name}: {len(at)} of {len(old)} steps differ, {first}")
        else:
            print(f"{name}: {len(old)} steps and the exported weights are equal")
    return different


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("tree", type=Path)
    recording.add_argument("directory", type=Path)
    recording.add_argument("--checkpoints", type=Path, help="a recorded directory of another tree")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    """Record or compare."""
    arguments = parse(sys.argv[1:])
    if arguments.command == "record":
        directory = arguments.directory.resolve()
        checkpoints = (arguments.checkpoints or directory).resolve()
        record(arguments.tree.resolve(), directory, checkpoints)
    elif compare(arguments.before, arguments.after):
        sys.exit(1)


if __name__ == "__main__":
    main()
