"""Plan a run before renting GPUs: what a step holds, fits or not, how long it takes, what it costs;
from the real code, in one process, without a GPU.

python tools/plan.py recipes/deepseek_v3_sft.py v3_256 --world-size 256 --gpu h100-80g
python tools/plan.py recipes/deepseek_v3_sft.py --world-size 64 --gpu h100-80g --search
python tools/plan.py --backtest

The recipe, its preset and all its options are those of training; of --model.path only config.json
is read. Exit code 1: it does not fit, or cannot be (the sentence says why); 2: a wrong option.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from tools.planning.gpus import GPUS, read_gpu
from torchsft.cli import options_of, parse, refusals, show_help
from torchsft.config import Config, InputError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# presets that are for no published model
GENERAL = ("debug", "finetune")


@dataclass(kw_only=True)
class Options(Config):
    """A run, and what is asked of its plan."""

    world_size: int | None = None
    """GPUs, one rank on each; absent: the smallest number that the layout has."""
    gpu: str = next(iter(GPUS))
    """h100-80g, h200-141g, a100-80g, b200-192g, or a YAML file that describes another one."""
    imbalance: float = 1.5
    """Rows that a rank's experts receive, over the mean."""
    software: tuple[str, ...] = ()
    """What makes a step faster than torchsft alone, to be assumed in the estimate: fa3, deepep,
    cuda-graphs, forced-balance, hidden-exchange.
    """
    search: bool = False
    """Look for the fastest layouts and modes that fit these GPUs; what the command line gives
    stays.
    """
    trace: str | None = None
    """File for a Chrome trace of the step, one track for each pipeline rank."""
    html: str | None = None
    """File for a page with the pipeline, memory over time and the search; it loads nothing."""
    json: str | None = None
    """File for the plan as JSON."""
    backtest: bool = False
    """Compare the estimate with published runs, and print the errors; needs no recipe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size is not None and self.world_size < 1:
            raise InputError(f"--world-size is {self.world_size}, but it must be at least 1")
        if not 1 <= self.imbalance < float("inf"):
            raise InputError(f"--imbalance is {self.imbalance}, but it must be at least 1")

    def config(self) -> Config:
        """Return the run alone."""
        return Config(**{each.name: getattr(self, each.name) for each in fields(Config)})


def load_recipe(path: str) -> ModuleType:
    """Return the module of a recipe file.

    Raises:
        InputError: it is none.
    """
    file = Path(path)
    if not file.is_file():
        known = ", ".join(f"recipes/{each.name}" for each in sorted(RECIPES.glob("*_sft.py")))
        raise InputError(f"recipe {path} does not exist; those that exist are {known}")
    if file.suffix != ".py":
        raise InputError(f"{path} is no recipe: it is no Python file")
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "PRESETS") or not hasattr(module, "ARCHITECTURES"):
        raise InputError(
            f"{path} is no recipe: it lacks PRESETS or ARCHITECTURES; name a file of recipes/"
        )
    return module


def read(argv: Sequence[str]) -> tuple[ModuleType, str, Options]:
    """Read `RECIPE [PRESET] [options]`; the recipe, the preset's name and the options.

    Raises:
        InputError: what is not understood.
    """
    if argv[:1] == ["--backtest"]:
        argv = [str(RECIPES / "deepseek_v3_sft.py"), "debug", *argv]
    if not argv or argv[0] in ("-h", "--help", "--help-all"):
        run = options_of(Config)
        own = {name: each for name, each in options_of(Options).items() if name not in run}
        defaults = {name: option.default for name, option in own.items()}
        doc = f"{__doc__.strip()}\n\nRECIPE [PRESET] --help lists those of training too."
        show_help(doc, own, defaults, "help_all")
    recipe = load_recipe(argv[0])
    preset, options = parse(
        recipe.PRESETS, lambda _: "finetune", argv[1:], __doc__ or "", kind=Options
    )
    return recipe, preset, options


def model_of(recipe: ModuleType, preset: str, config: Config) -> tuple[str, Mapping[str, Any]]:
    """Return where the model's config.json is from, and what it says.

    Raises:
        InputError: there is none, or the recipe is for other models.
    """
    from sft import check_family, debug_config
    from tools import published
    from torchsft.checkpoint.hf_directory import read_config
    from torchsft.launch import model_directory

    if config.model.path is not None:
        path = model_directory(config.model.path)
        check_family(path, recipe.ARCHITECTURES)
        return path, read_config(path)
    if preset == "debug":
        return "the generated model", debug_config(getattr(recipe, "DEBUG_MODEL", None))
    names = [name for name in recipe.PRESETS if name not in GENERAL]
    name = preset if preset in names else next(iter(names), preset)
    if name not in published.PRESETS:
        raise InputError(f"preset {name} is for no model known here; give its --model.path")
    return f"the published model of {name}", published.model_config(name)


def check_outputs(options: Options) -> None:
    """Refuse a file that cannot be written, before anything is planned."""
    for name in ("trace", "html", "json"):
        path = getattr(options, name)
        if not path:
            continue
        existed = Path(path).exists()
        try:
            with open(path, "a"):
                pass
        except OSError as error:
            raise InputError(
                f"--{name} {path} cannot be written ({error.strerror}); name a file in a directory "
                "that exists and can be written"
            ) from None
        if not existed:
            Path(path).unlink()


def run_search(recipe: ModuleType, preset: str, options: Options, fixed: frozenset[str]) -> int:
    """Search, and print what was found; the exit code. `fixed`: options that are given."""
    check_outputs(options)
    from tools.planning import search, search_report
    from tools.planning.candidates import Task
    from torchsft.planning.memory import on_gpus
    from torchsft.resolution import smallest_number_of_ranks

    config = options.config()
    _, model_config = model_of(recipe, preset, config)
    size = options.world_size or smallest_number_of_ranks(config.parallel)
    task = Task(
        on_gpus(config), fixed, model_config, size, read_gpu(options.gpu), options.imbalance
    )
    found = search.search(task, lambda text: print(text, file=sys.stderr, flush=True))
    begin = [f"recipes/{Path(recipe.__file__).name}", preset]
    print(*search_report.lines_of(found, *begin), sep="\n", flush=True)
    if options.html:
        table = search_report.table_of(found, *begin)
        _write_page(options.html, f"{preset} on {size} {task.gpu.name}", tables=[table])
    if options.json:
        Path(options.json).write_text(
            json.dumps(search_report.to_json(found, *begin), indent=2) + "\n"
        )
    return 0 if found.best else 1


def _write_page(path: str, title: str, **content: Any) -> None:
    from tools.planning.page import render

    Path(path).write_text(render(title, {}, **content), encoding="utf-8")


def read_searched(argv: Sequence[str]) -> tuple[ModuleType, str, Options, frozenset[str]]:
    """Read the command line of a search, and which options it gives: without a preset that of the
    recipe's first published model, with as many rows a step for each GPU.
    """
    from tools.planning.options import changed
    from tools.planning.search_report import fixed_by
    from torchsft.resolution import smallest_number_of_ranks

    recipe, preset, options = read(argv)
    fixed = fixed_by(argv[1:], recipe.PRESETS, Options)
    names = [name for name in recipe.PRESETS if name not in GENERAL]
    if preset in GENERAL and "model.path" not in fixed and names:
        ranks = smallest_number_of_ranks(recipe.PRESETS[names[0]]().parallel)
        recipe, preset, options = read([argv[0], names[0], *argv[1:]])
        if options.world_size and "train.global_batch_size" not in fixed:
            rows = options.train.global_batch_size * options.world_size // ranks
            options = changed(options, {"train.global_batch_size": max(rows, 1)})
    return recipe, preset, options, fixed


def run(recipe: ModuleType, preset: str, options: Options) -> int:
    """Plan and print; the exit code."""
    check_outputs(options)
    gpu, config = read_gpu(options.gpu), options.config()
    if options.backtest:
        from tools.planning import backtest

        print(*backtest.run_all(), sep="\n")
        return 0
    where, model_config = model_of(recipe, preset, config)
    from tools.planning import changes, estimate, report
    from tools.planning.costs import software_of
    from tools.planning.trace import write_trace
    from torchsft.resolution import smallest_number_of_ranks

    size = options.world_size or smallest_number_of_ranks(config.parallel)
    software = software_of(options.software, gpu)
    planned = report.run_of(config, model_config, size, gpu, options.imbalance)
    architecture = ", ".join(model_config.get("architectures", ()))
    print(f"{Path(recipe.__file__).stem} {preset}: {architecture}, config.json of {where}")
    plan = report.make_plan(planned)
    print(*report.lines_of(plan), sep="\n", flush=True)
    remedies = [] if plan.fits else changes.Search(plan).cheapest(3)
    if not plan.fits:
        print(*changes.lines_of(plan, remedies), sep="\n")
    estimated = estimate.of_run(
        planned.config, model_config, size, gpu, options.imbalance, software
    )
    print(*estimate.lines_of(estimated, gpu, plan.fits), sep="\n", flush=True)
    if options.trace:
        write_trace(Path(options.trace), estimated.events)
    if options.html:
        _write_page(
            options.html,
            f"{preset} on {size} {gpu.name}",
            memories=[role.memory for role in plan.roles],
            available=gpu.memory,
            events=estimated.events,
        )
    if options.json:
        content = report.to_json(plan) | {"estimate": estimate.to_json(estimated)}
        content |= {"remedies": [each.to_json() for each in remedies]}
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n")
    return 0 if plan.fits else 1


def main() -> int:
    """Parse and run; what can be mended is told in one sentence."""
    with refusals():
        arguments = read(sys.argv[1:])
    try:
        if arguments[-1].search:
            return run_search(*read_searched(sys.argv[1:]))
        return run(*arguments)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
