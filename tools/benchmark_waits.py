"""`tools/benchmark.py waits`: where the host of a rank waits for values of tensors in a training
step, and what the update asks of torch.

The step is the real `Trainer.train_step` of a small DeepSeek-V3 with full activation checkpointing.
On a CPU no device is waited for, but the calls are those that a GPU would see: a wait is whatever
gives Python a tensor's values (`item`, `tolist`, `bool`, `numpy`, ...), an operation whose result
has a shape that depends on values (`nonzero`, a boolean index, ...), a copy to the CPU that is not
told to be asynchronous, and a tensor made on the device from numbers of the host, which would go
there from pageable memory.

Not counted is what the host reads of its own numbers: of batches, of sums over hosts, and of
results that were copied to it. These places are `ON_HOST`, and those that only a CPU takes
`ON_CPU`.

Calls of the update (norm, clipping, optimizer) are those that Python makes: a list of tensors in
one call counts once, as torch treats it in few kernels on a GPU. Views, which compute nothing, are
counted by themselves.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tools.benchmark_layouts import ROW, QuietTrainer, config_for, layout, write_inputs
from tools.benchmark_pipeline import on_ranks
from torchsft.config import Config
from torchsft.parallel.world import World

ROOT = Path(__file__).resolve().parents[1]
# Places where the host reads what lies on the host whatever computes.
ON_HOST = {
    "data/": "batches",
    "metrics/step.py count_rows": "batches, in the loader's threads",
    "metrics/step.py count_global_batch": "batches, and sums over hosts",
    "trainer.py share": "sums over hosts",
    "metrics/step.py of": "results that have been copied",
    "metrics/step.py load_scalars": "results that have been copied",
}
# Places of paths that a GPU does not take.
ON_CPU = {
    "models/attention.py locate_documents": "--model.attention sdpa, CUDA has varlen",
    "models/loss.py forward": "chunks without supervised tokens, on a CPU only",
    "models/loss.py _gradient_of_logits": "whether some tokens are not supervised, likewise",
    "parallel/gradients.py sum_summands": "to the device of the ranks, where gradients lie",
}
LAYOUTS = [
    layout(activation_checkpointing="full", micro_batch_size=4),
    layout(dp_shard=2, ep=2, activation_checkpointing="full", micro_batch_size=2),
    layout(dp_shard=2, tp=2, ep=4, activation_checkpointing="full", micro_batch_size=4),
    layout(pp=2, dp_shard=2, ep=2, activation_checkpointing="full", micro_batch_size=2),
]


class Waits(TorchDispatchMode):
    """Counts, within its context and in its thread, the places at which the host waits.

    Attributes:
        found: "forward", "backward" or "behind" (of a pass), and file and function in `torchsft/`
            -> number.
    """

    METHODS = ("tolist", "numpy", "cpu", "to")
    MAKERS = ("tensor", "as_tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Any:
        self.before = [(Tensor, name, getattr(Tensor, name)) for name in self.METHODS]
        self.before.append((Tensor, "new_tensor", Tensor.new_tensor))
        self.before += [(torch, name, getattr(torch, name)) for name in self.MAKERS]
        for owner, name, function in self.before:
            setattr(owner, name, self._noting(name, function))
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        for owner, name, function in self.before:
            setattr(owner, name, function)

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, which counts when it is a wait."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            if name == "to":
                given = (*args[1:], *kwargs.values())
                places = [str(x) for x in given if isinstance(x, str | torch.device)]
                waits = "cpu" in places and not kwargs.get("non_blocking")
            elif name in self.MAKERS:
                waits = kwargs.get("device") is not None and not isinstance(args[0], Tensor)
            else:
                waits = True
            if waits:
                self._note()
            return function(*args, **kwargs)

        return noting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_shape = torch.Tag.dynamic_output_shape in func.tags or "index_put" in func.name()
        if torch.Tag.data_dependent_output in func.tags or (
            by_shape and self._depends(func, args, kwargs)
        ):
            self._note()
        return func(*args, **kwargs)

    @staticmethod
    def _depends(func: Any, args: Any, kwargs: Any) -> bool:
        """Whether this call of an operation needs values to know a shape."""
        if "index" in func.name():
            masks = (torch.bool, torch.uint8)
            return any(index is not None and index.dtype in masks for index in args[1])
        return kwargs.get("output_size") is None  # of repeat_interleave

    def _note(self) -> None:
        names, files, frame = [], [], sys._getframe(1)
        while frame is not None:
            names.append(frame.f_code.co_name)
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        inside = str(ROOT / "torchsft") + "/"
        place = next(
            (
                f"{file.removeprefix(inside)} {name}"
                for file, name in zip(files, names, strict=True)
                if file.startswith(inside) and not name.startswith("<")
            ),
            "elsewhere",
        )
        phase = "behind"
        if any(file == f"{inside}parallel/pipeline.py" for file in files):
            phase = "backward" if "_engine_run_backward" in names else "forward"
        self.found[phase, place] += 1

    def of_device(self) -> Counter[tuple[str, str]]:
        """Return those that a GPU would have, without what is on the host and paths of the CPU."""
        known = tuple({**ON_HOST, **ON_CPU})
        return Counter({key: n for key, n in self.found.items() if not key[1].startswith(known)})


class Calls(TorchDispatchMode):
    """Counts calls of operations by name, within its context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def steps(config: Config, repeats: int) -> dict[str, Any]:
    """On each rank: the waits of one step, the calls of one update, and how long updates take."""
    with World(config.parallel, 0) as world:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = QuietTrainer(config, world)
        trainer.train_step(next(trainer.loader))
        step = next(trainer.loader)
        with Waits() as waits:
            trainer.train_step(step)
        update, seconds, calls = trainer.update_weights, [], Calls()

        def counted(*args: Any) -> Any:
            with calls:
                return update(*args)

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            result = update(*args)
            seconds.append(time.perf_counter() - began)
            return result

        trainer.update_weights = counted
        trainer.train_step(next(trainer.loader))
        trainer.update_weights = timed
        for _ in range(repeats):
            trainer.train_step(next(trainer.loader))
        parameters = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
        moe_layers = len(trainer.model.moe_layers())
        microbatches = len(step.microbatches)
    return {
        "waits": sorted([*key, n] for key, n in waits.of_device().items()),
        "parameters": parameters,
        "moe_layers": moe_layers,
        "microbatches": microbatches,
        "update_seconds": min(seconds),
        "groups": len(trainer.optimizer.param_groups),
        "calls": dict(calls.calls),
    }


def run(
    json_path: Path | None,
    repeats: int,
    layouts: Sequence[dict[str, Any]] = LAYOUTS,
    row: int = ROW,
    **sizes: Any,
) -> dict[str, Any]:
    """Count in each layout, print a table of rank 0, and write all as JSON."""
    report: dict[str, Any] = {"torch": torch.__version__, "results": []}
    print("| layout | waits | calls of the update | views | groups of the optimizer | shortest |")
    print("|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory), **sizes)
        for one in layouts:
            names = ("pp", "dp_shard", "tp")
            count = 1
            for name in names:
                count *= one.get(name, 1)
            config = config_for(Path(directory), row, **one)
            ranks = on_ranks(count, steps, config=config, repeats=repeats)
            report["results"].append({"layout": one, "ranks": ranks})
            first = ranks[0]
            name = " ".join(f"{key}={value}" for key, value in one.items() if value != 1)
            waits = "; ".join(f"{n} {phase}: {place}" for phase, place, n in first["waits"])
            shape = f"{first['moe_layers']} MoE layers x {first['microbatches']} microbatches"
            cells = [f"{name} ({shape}, {first['parameters']} parameters)", waits or "none"]
            views = first["calls"].get("aten::view", 0)
            cells += [str(sum(first["calls"].values()) - views), str(views), str(first["groups"])]
            print(f"| {' | '.join(cells)} | {1e3 * first['update_seconds']:.1f} ms |", flush=True)
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    return report
