"""How much of what was fine-tuned survives an fp8 export, and what block-wise fp8 costs.

    python tools/fp8_study.py outputs/fp8_study --seeds 3

First the error of single products at DeepSeek-V3's sizes. Then, for each seed:

1. The debug model learns whole conversations from random weights, once in each
   --precision.compute. Half of their words are drawn at random, so that the loss stays well above
   0, and the losses beside each other say what the number formats cost.
2. It learns the answers alone, with which the phrase book is learnt by heart, in fp32, and is
   exported in fp8, as DeepSeek releases its models.
3. From that release the model learns another phrase book, in which the words have changed places,
   at small learning rates, once in each --precision.compute.
4. The held-out loss on the second book: of the release; then of the fp32 masters, of the bf16 and
   of the fp8 export. All are computed in fp32, and the fp8 export also as it is served, with
   activations in tiles of fp8 (`blockwise`).

Prints tables of means over seeds with the smallest and the largest value; the numbers of single
runs are in OUTPUT/results.json. Everything runs in this process, on a CPU in about a quarter of an
hour a seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from recipes import debug_task
from torchsft.checkpoint import huggingface
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
from torchsft.parallel.world import World
from torchsft.precision.blockwise_compute import BlockwiseProducts
from torchsft.trainer import Trainer

ROWS = 4  # of a step, 512 tokens each


class SilentTrainer(Trainer):
    """Keeps the losses, and writes no checkpoint."""

    losses: Sequence[float] = ()

    def open_output(self) -> None:
        """Write nothing."""

    def save(self, score: float | None = None) -> None:
        """Write nothing."""

    def read_step(self, taken: Any) -> Any:
        """Read the results of a step."""
        record, scalars = super().read_step(taken)
        self.losses = [*self.losses, record["loss"]]
        return record, scalars


def second_book(rows: Path, target: Path) -> Path:
    """Write conversations with the words of each language passed on by one noun."""
    passed_on = {}
    for words in zip(*debug_task.DICTIONARY.values(), strict=True):
        passed_on |= dict(zip(words, (*words[1:], words[0]), strict=True))
    any_word = re.compile(r"\b(" + "|".join(map(re.escape, passed_on)) + r")\b")
    lines = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        for message in messages:
            if message["role"] == "assistant":
                text = message["content"]
                message["content"] = any_word.sub(lambda found: passed_on[found[0]], text)
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def precision_of(name: str) -> Precision:
    """Return what a name of `--compute` means, such as fp32 or float8+mxfp8."""
    compute, _, experts = name.partition("+")
    return Precision(compute=compute, experts=experts or "same")


@dataclasses.dataclass
class Study:
    """One seed's runs, in a directory of their own."""

    directory: Path
    seed: int

    def __post_init__(self) -> None:
        data = self.directory / "data"
        debug_task.write_debug_model(self.directory / "random")
        first = debug_task.write_debug_data(data, seed=self.seed)
        second = [second_book(path, data / f"second-{path.name}") for path in first]
        self.books = {"first": first, "second": second}

    def config(
        self, model: Path, book: str, compute: str, steps: int, lr: float, mask: str = "assistant"
    ) -> Config:
        """Describe a run; random weights where the directory has none."""
        train, held_out = map(str, self.books[book])
        random = not any(model.glob("*.safetensors"))
        return Config(
            model=Model(path=str(model), random_init=random),
            data=Data(train=(train,), eval=(held_out,), seq_len=512, mask=mask),
            train=Train(steps=steps, global_batch_size=ROWS, micro_batch_size=ROWS, seed=self.seed),
            parallel=Parallel(dp_shard=1),
            optim=Optim(lr=lr, warmup_steps=0.05),
            precision=precision_of(compute),
            checkpoint=Checkpoint(export="none", resume="never"),
            metrics=Metrics(tensorboard=False, progress=False),
            output=str(self.directory / "unused"),
        )

    def loss(self, model: Path, book: str, compute: str = "fp32") -> float:
        """Return the held-out loss of a directory's weights."""
        config = self.config(model, book, compute, steps=1, lr=0.0)
        with World(config.parallel, self.seed) as world:
            return SilentTrainer(config, world).evaluate()["eval_loss"]

    def curve(self, compute: str, steps: int, lr: float) -> list[float]:
        """Return the losses of steps on whole conversations, from random weights."""
        config = self.config(self.directory / "random", "first", compute, steps, lr, mask="all")
        with World(config.parallel, self.seed) as world:
            trainer = SilentTrainer(config, world)
            trainer.run()
        return list(trainer.losses)

    def train(
        self, name: str, model: Path, book: str, compute: str, steps: int, lr: float
    ) -> dict[str, Any]:
        """Train, export in every format, and return losses."""
        config = self.config(model, book, compute, steps, lr)
        with World(config.parallel, self.seed) as world:
            trainer = SilentTrainer(config, world)
            trainer.run()
            for dtype in ("fp32", "bf16", "fp8"):
                huggingface.export(
                    trainer.model, self.directory / f"{name}-{dtype}", dtype, trainer.source
                )
        found = {
            dtype: self.loss(self.directory / f"{name}-{dtype}", book)
            for dtype in ("fp32", "bf16", "fp8")
        }
        found["served"] = self.loss(self.directory / f"{name}-fp8", book, "blockwise")
        return found | {"losses": list(trainer.losses)}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each seed has found: `curves` by compute, `release`, the loss of the release on
    the second book, and `second` by learning rate and compute.
    """
    results = []
    for seed in range(options.seeds):
        study = Study(options.output / f"seed-{seed}", seed)
        found: dict[str, Any] = {"curves": {}, "second": {}}
        for compute in options.compute:
            print(f"seed {seed}: conversations, {compute}", flush=True)
            found["curves"][compute] = study.curve(compute, options.first_steps, options.first_lr)
        if options.lr:
            start, steps = study.directory / "random", options.first_steps
            study.train("first", start, "first", "fp32", steps, options.first_lr)
            release = study.directory / "first-fp8"
            found["release"] = study.loss(release, "second")
        for lr in options.lr:
            for compute in options.compute:
                print(f"seed {seed}: second book, lr {lr:g}, {compute}", flush=True)
                found["second"].setdefault(f"{lr:g}", {})[compute] = study.train(
                    f"second-{lr:g}-{compute}", release, "second", compute, options.steps, lr
                )
        results.append(found)
        (options.output / "results.json").write_text(json.dumps(results))
    return results


# inputs and outputs of linear maps of DeepSeek-V3
MAPS = {
    "kv_a_proj_with_mqa": (7168, 576),
    "q_b_proj (a quarter)": (1536, 6144),
    "an expert's gate_proj": (7168, 2048),
    "an expert's down_proj": (2048, 7168),
}


def product_errors(tokens: int = 512) -> str:
    """Return a table of the relative errors (Frobenius) of block-wise products against fp32, and of
    DeepGEMM's difference, 1 - 2 <a, b> / (|a|^2 + |b|^2).

    Rows are normal with 1 % of their columns ten times as large, as activations have outliers;
    weights are normal.
    """
    draw = torch.Generator().manual_seed(0)
    lines = ["| map | y | dx | dw | difference |", "| --- | --- | --- | --- | --- |"]
    for name, (inputs, outputs) in MAPS.items():
        x, dy = (torch.randn(tokens, size, generator=draw) for size in (inputs, outputs))
        x[:, torch.rand(inputs, generator=draw) < 0.01] *= 10
        w = torch.randn(outputs, inputs, generator=draw) * 0.02
        products, offs = BlockwiseProducts(), torch.tensor([tokens], dtype=torch.int32)
        pairs = [
            (products.forward(x, w[None], offs), x @ w.T),
            (products.grad_rows(dy, w[None], offs), dy @ w),
            (products.grad_weight(dy, x, offs)[0], dy.T @ x),
        ]
        errors = [((found - exact).norm() / exact.norm()).item() for found, exact in pairs]
        worst = max(
            1 - 2 * (a * b).sum().item() / (a.square().sum() + b.square().sum()).item()
            for a, b in pairs
        )
        cells = " | ".join(f"{error:.4f}" for error in errors)
        lines.append(f"| {name} {inputs} x {outputs} | {cells} | {worst:.1e} |")
    return "\n".join(lines)


def windows(losses: Sequence[float], steps: int = 50) -> list[float]:
    """Return the mean of each so many losses."""
    return [
        statistics.fmean(losses[begin : begin + steps]) for begin in range(0, len(losses), steps)
    ]


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Return mean, smallest and largest."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):{form}} ({low:{form}} to {high:{form}})"


def report(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of what `run` returned."""
    computes = list(results[0]["curves"])
    lines = ["conversations: mean loss of each 50 steps, and over that of fp32", ""]
    lines += ["| compute | loss | over fp32 |", "| --- | --- | --- |"]
    for compute in computes:
        means = [windows(result["curves"][compute]) for result in results]
        plain = [windows(result["curves"][computes[0]]) for result in results]
        shown = [spread(values, ".3f") for values in zip(*means, strict=True)]
        ratios = [
            spread([a / b - 1 for a, b in zip(one, other, strict=True)], "+.2%")
            for one, other in zip(zip(*means, strict=True), zip(*plain, strict=True), strict=True)
        ]
        lines.append(f"| {compute} | {', '.join(shown)} | {', '.join(ratios)} |")
    if not results[0]["second"]:
        return "\n".join(lines)
    kinds = ("fp32", "bf16", "fp8", "served")
    release = spread([result["release"] for result in results])
    lines += ["", f"second book: held-out losses; {release} of the release. Kept: the part of the"]
    lines += ["masters' gain over the release that the fp8 export has", ""]
    lines += ["| lr | compute | masters | bf16 | fp8 | fp8 as served | kept | kept as served |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for lr in results[0]["second"]:
        for compute in computes:
            found = [result["second"][lr][compute] for result in results]
            cells = [spread([one[kind] for one in found]) for kind in kinds]
            for kind in ("fp8", "served"):
                kept = [
                    (result["release"] - one[kind]) / (result["release"] - one["fp32"])
                    for result, one in zip(results, found, strict=True)
                ]
                cells.append(spread(kept, ".1%"))
            lines.append(f"| {lr} | {compute} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--compute",
        nargs="+",
        default=["fp32", "blockwise"],
        help="--precision.compute, with a --precision.experts behind it as in fp32+mxfp8",
    )
    parser.add_argument("--first-steps", type=int, default=300)
    parser.add_argument("--first-lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--lr", type=float, nargs="*", default=[1e-4, 2e-5], help="none: step 1 alone"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Run the study and print its tables."""
    print(product_errors())
    print(report(run(parse(sys.argv[1:]))))


if __name__ == "__main__":
    main()
