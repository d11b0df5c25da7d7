"""What the recipes share: the presets that every family has, and a run from its command line to its
end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What imports torch or transformers is imported where it is used, so that a mistyped option is
# refused in a moment.
from torchsft.cli import is_main, parse, refusals
from torchsft.config import (
    Checkpoint,
    Config,
    Data,
    Eval,
    InputError,
    Optim,
    Parallel,
    Train,
    to_dict,
)
from torchsft.launch import (
    check_data,
    check_model,
    check_output,
    keep_freed_memory,
    model_directory,
    record_collectives,
    set_threads,
    use_expandable_segments,
)


def debug_preset(output: str) -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = -(-4 // ranks) * ranks  # about 4 a step, equally many on each rank
    return Config(
        data=Data(seq_len=512),
        train=Train(steps=400, global_batch_size=rows, micro_batch_size=rows // ranks),
        # the model has 8 experts and 3 layers
        parallel=Parallel(ep=math.gcd(ranks, 8), pp_schedule="1F1B"),
        optim=Optim(lr=3e-3, warmup_steps=0.05),
        checkpoint=Checkpoint(every=200, export="fp32"),
        eval=Eval(every=100, answers=32, max_new_tokens=16),
        output=output,
    )


def finetune_preset(output: str) -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return Config(optim=Optim(lr=1e-5), output=output)


def choose_preset(given: Mapping[str, Any]) -> str:
    """`finetune` for a command line or --config file that gives model.path, else `debug`."""
    return "finetune" if given.get("model.path") else "debug"


def with_generated_inputs(
    config: Config, debug_model: Mapping[str, Any] | None
) -> tuple[Config, Callable[[], None]]:
    """Return what the debug preset lacks: its model's config and tokenizer, and its data unless
    given, in OUTPUT/generated.

    Args:
        debug_model: see `run`.

    Returns:
        The configuration that names them, and the function that writes them.
    """
    where = Path(config.output) / "generated"

    def generate() -> None:
        from debug_task import write_debug_data, write_debug_model

        write_debug_model(where, debug_model)
        write_debug_data(where)

    model, data = dataclasses.replace(config.model, path=str(where), random_init=True), config.data
    if not data.train:
        held_out = data.eval or (str(where / "eval.jsonl"),)
        data = dataclasses.replace(data, train=(str(where / "train.jsonl"),), eval=held_out)
    answers = config.eval.answers if data.eval else 0
    complete = dataclasses.replace(
        config, model=model, data=data, eval=dataclasses.replace(config.eval, answers=answers)
    )
    return complete, generate


def checked(config: Config) -> Config:
    """Return the configuration, with the model's directory, once its paths have been looked at.

    Raises:
        InputError: see launch.py.
    """
    if config.model.path is None or not config.data.train:
        raise InputError(
            "--model.path and --data.train must both be given (or neither, for the debug preset)"
        )
    model = dataclasses.replace(config.model, path=model_directory(config.model.path))
    check_model(model.path, weights=not model.random_init)
    check_data(config.data)
    check_output(config.output)
    return dataclasses.replace(config, model=model)


def check_family(model_path: str, architectures: Sequence[str]) -> None:
    """Refuse a model that the recipe is not for, before anything of it is loaded.

    Args:
        model_path: its directory.
        architectures: those that the recipe trains, as a config.json names them.

    Raises:
        InputError: its config.json describes another one.
    """
    from torchsft.checkpoint.hf_directory import read_config
    from torchsft.models.families import FAMILIES, family_of

    described = read_config(model_path)
    if family_of(described) not in [FAMILIES[name].model for name in architectures]:
        found = ", ".join(described.get("architectures") or [str(described.get("model_type"))])
        raise InputError(
            f"--model.path {model_path} holds a {found}, but this recipe trains "
            f"{', '.join(architectures)}; take the recipe of that family (recipes/README.md)"
        )


def debug_config(debug_model: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return config.json of the debug preset's model; `debug_model`: see `run`."""
    from debug_task import write_debug_model

    with tempfile.TemporaryDirectory() as directory:
        write_debug_model(Path(directory), debug_model)
        return json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))


def plan_memory(
    preset: str,
    config: Config,
    architectures: Sequence[str],
    debug_model: Mapping[str, Any] | None,
) -> None:
    """Print what --dry-run says, on rank 0; see `run`.

    Raises:
        InputError: there is no config.json, or it does not fit.
    """
    from torchsft.checkpoint.hf_directory import read_config
    from torchsft.planning.announce import dry_run
    from torchsft.planning.memory import on_gpus
    from torchsft.resolution import number_of_ranks, resolve

    if config.data.train:
        check_data(config.data)
    if config.model.path is not None:
        path = model_directory(config.model.path)
        check_family(path, architectures)
        model_config = read_config(path)
    elif preset == "debug":
        model_config = debug_config(debug_model)
    else:
        raise InputError(
            "--dry-run reads the model's config.json: give --model.path (of published models "
            "python tools/plan.py knows it)"
        )
    if is_main():
        dry_run(resolve(on_gpus(config)), model_config, number_of_ranks(config))


def run(
    presets: Mapping[str, Callable[[], Config]],
    doc: str,
    architectures: Sequence[str],
    debug_model: Mapping[str, Any] | None = None,
) -> None:
    """Read the command line, take this rank's place in the world, train.

    Args:
        presets: name -> function that builds its configuration; `debug` and `finetune` are there.
        doc: text above the options in the help.
        architectures: those that the recipe trains, as a config.json names them.
        debug_model: config.json of what the debug preset trains, without vocabulary and special
            tokens; None: that of a DeepSeek-V3.
    """
    with refusals():
        preset, config = parse(presets, choose_preset, sys.argv[1:], doc)
    generate = None
    if config.print_config:
        from torchsft.resolution import resolve

        # so that --config takes it and trains
        resolved = dataclasses.replace(resolve(config), print_config=False)
        if is_main():
            print(json.dumps(to_dict(resolved), indent=2))
        return
    if config.dry_run:
        plan_memory(preset, config, architectures, debug_model)
        return
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    use_expandable_segments()
    if preset == "debug" and config.model.path is None:
        check_data(config.data)
        check_output(config.output)
        config, generate = with_generated_inputs(config, debug_model)
    else:
        config = checked(config)
        check_family(config.model.path, architectures)
    record_collectives(config.parallel.flight_recorder, config.output)

    from answers import answer
    from torchsft.checkpoint.hf_directory import read_config
    from torchsft.checkpoint.publish import output_lock
    from torchsft.parallel.world import World, deterministic
    from torchsft.planning.announce import Planned, describe_planned, describe_used
    from torchsft.resolution import number_of_ranks, resolve
    from torchsft.trainer import Trainer

    def model_config() -> Mapping[str, Any]:
        return debug_config(debug_model) if generate else read_config(config.model.path)

    planning = planned = None
    if is_main():
        planning = Planned(resolve(config), model_config, number_of_ranks(config))
    with (
        deterministic(config.train.deterministic),
        World(config.parallel, config.train.seed) as world,
        output_lock(Path(config.output), world.is_main),
    ):
        if world.device.type == "cpu":
            keep_freed_memory()
        trainer = Trainer(config, world, generate, answer)
        if planning:
            planned = planning.result()
            trainer.output.message(describe_planned(planned))
        trainer.run()
        used = describe_used(planned, trainer.model, trainer.optimizer, world)
        trainer.output.message(used)
