"""Full-parameter supervised fine-tuning of DeepSeek-V3-architecture models (V3, R1, V3.1, Kimi-K2,
Moonlight).

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/deepseek_v3_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/deepseek_v3_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: fp8, bf16 and fp32 safetensors (and what tools/convert_checkpoint.py makes of them),
packed rows, fp32 or bf16 compute, pipeline (pp), replicated (dp_replicate) and sharded (dp_shard)
data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that divides. Ctrl-C,
SIGTERM and SIGUSR1 make it save and end; the same command continues.
Refuses: fp8 compute (not in this version), tied embeddings with pp.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
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
from torchsft.interruption import guarded
from torchsft.launch import check_data, check_model, check_output, model_directory, set_threads


def debug() -> Config:
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
        output="outputs/deepseek_v3_debug",
    )


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return Config(optim=Optim(lr=1e-5), output="outputs/deepseek_v3_sft")


def v3_256() -> Config:
    """DeepSeek-V3 on 256 H100-80GB (32 nodes of 8): 8 pipeline ranks, 8 experts of each layer on a
    GPU.

    Weights, gradients and moments take up to 63 GB a GPU, activations the rest. A pipeline rank has
    about 8 layers in two stages; its 32 GPUs, on 4 nodes, read other rows and exchange tokens by
    expert. 16 microbatches fill the pipeline.
    """
    return Config(
        data=Data(seq_len=4096),
        train=Train(epochs=1, global_batch_size=512, activation_checkpointing="full"),
        parallel=Parallel(
            pp=8, pp_schedule="Interleaved1F1B", dp_shard=32, ep=32, timeout_seconds=1800.0
        ),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/deepseek_v3",
    )


def v3_128() -> Config:
    """DeepSeek-V3 on 128 GPUs of 141 GB (H200): as v3_256, with half its data ranks; up to 114 GB a
    GPU.
    """
    config = v3_256()
    parallel = dataclasses.replace(config.parallel, dp_shard=16, ep=16)
    return dataclasses.replace(
        config, parallel=parallel, train=dataclasses.replace(config.train, global_batch_size=256)
    )


def v3_64() -> Config:
    """DeepSeek-V3 on 64 GPUs: as v3_256, a quarter of its data ranks; up to 217 GB a GPU until
    optimizers can be offloaded.
    """
    config = v3_256()
    parallel = dataclasses.replace(config.parallel, dp_shard=8, ep=8)
    return dataclasses.replace(
        config, parallel=parallel, train=dataclasses.replace(config.train, global_batch_size=128)
    )


def moonlight() -> Config:
    """Moonlight-16B-A3B on 8 H100-80GB (one node): FSDP2 over all of them, 8 of 64 experts on each;
    32 GB a GPU.
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=32, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=8, ep=8),
        optim=Optim(lr=1e-5, warmup_steps=0.03),
        output="outputs/moonlight",
    )


PRESETS = {
    "debug": debug,
    "finetune": finetune,
    "v3_256": v3_256,
    "v3_128": v3_128,
    "v3_64": v3_64,
    "moonlight": moonlight,
}


def choose_preset(given: Mapping[str, Any]) -> str:
    """`finetune` for a command line or --config file that gives model.path, else `debug`."""
    return "finetune" if given.get("model.path") else "debug"


def with_generated_inputs(config: Config) -> tuple[Config, Callable[[], None]]:
    """What the debug preset lacks: its model's config and tokenizer, and its data unless given, in
    OUTPUT/generated.

    Returns:
        The configuration that names them, and the function that writes them.
    """
    where = Path(config.output) / "generated"

    def generate() -> None:
        from debug_task import write_debug_data, write_debug_model

        write_debug_model(where)
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
    """The configuration, with the model's directory, once its paths have been looked at. Raises
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


def main() -> None:
    """Read the command line, take this rank's place in the world, train."""
    with refusals():
        preset, config = parse(PRESETS, choose_preset, sys.argv[1:], __doc__ or "")
    generate = None
    if config.print_config:
        from torchsft.trainer import resolve

        # so that --config takes it and trains
        resolved = dataclasses.replace(resolve(config), print_config=False)
        if is_main():
            print(json.dumps(to_dict(resolved), indent=2))
        return
    if preset == "debug" and config.model.path is None:
        check_data(config.data)
        check_output(config.output)
        config, generate = with_generated_inputs(config)
    else:
        config = checked(config)
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    from answers import answer
    from torchsft.checkpoint.publish import output_lock
    from torchsft.parallel.world import World
    from torchsft.trainer import Trainer

    with (
        World(config.parallel, config.train.seed) as world,
        output_lock(Path(config.output), world.is_main),
    ):
        Trainer(config, world, generate, answer).run()


if __name__ == "__main__":
    guarded(main)
