"""Full-parameter supervised fine-tuning of DeepSeek-V3-architecture models (V3, R1, V3.1, Kimi-K2,
Kimi-K2-Thinking, K2.5 to K2.7, Moonlight, GLM-4.7-Flash).

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/deepseek_v3_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/deepseek_v3_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: fp8, INT4, bf16 and fp32 safetensors (and what tools/convert_checkpoint.py makes of them),
packed rows, fp32, bf16 or fp8 compute, pipeline (pp), replicated (dp_replicate), sharded (dp_shard)
data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that divides. Ctrl-C,
SIGTERM and SIGUSR1 make it save and end; the same command continues.
Refuses: tied embeddings with pp.
"""

from __future__ import annotations

import dataclasses

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "KimiK25ForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
)


def debug() -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    return debug_preset("outputs/deepseek_v3_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/deepseek_v3_sft")


def v3_256() -> Config:
    """DeepSeek-V3 on 256 H100-80GB (32 nodes of 8): 16 pipeline ranks, 16 experts of each layer on
    a GPU.

    Weights, gradients and moments take up to 57 GB a GPU, activations the rest. A pipeline rank has
    about 4 layers in two stages; its 16 GPUs, on 2 nodes, read other rows and exchange tokens by
    expert. 32 microbatches fill the pipeline. 75 GB are predicted in all where a rank's experts
    receive 1.5 or 2 times the mean, the reserve among them; more microbatches take no more.
    """
    return Config(
        data=Data(seq_len=4096),
        train=Train(epochs=1, global_batch_size=512, activation_checkpointing="full"),
        parallel=Parallel(
            pp=16, pp_schedule="Interleaved1F1B", dp_shard=16, ep=16, timeout_seconds=1800.0
        ),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/deepseek_v3",
    )


def v3_128() -> Config:
    """DeepSeek-V3 on 128 H100-80GB (16 nodes of 8): as v3_256, with half its data ranks and the
    optimizer on the host.

    Gathered parameters, their gradients and the copies that are gathered take up to 51 GB a GPU,
    activations the rest; masters, moments and gradients up to 0.8 TB of a node's memory.
    """
    config = v3_256()
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, dp_shard=8, ep=8),
        train=dataclasses.replace(config.train, global_batch_size=256),
        optim=dataclasses.replace(config.optim, offload=True),
    )


def v3_64() -> Config:
    """DeepSeek-V3 on 64 H100-80GB (8 nodes of 8), without a pipeline, which would keep gathered
    parameters and their gradients: 4 experts of each layer on a GPU, the optimizer on the host.

    The copies that are gathered take 21 GB a GPU, activations the rest; masters, moments and
    gradients 1.4 TB of a node's memory. Nodes of 2 TB have no room for a copy of a checkpoint
    besides (1 TB): training waits while one is written. A step is one microbatch of two rows, so
    that gradients go to the host once.
    """
    config = v3_128()
    parallel = Parallel(dp_shard=64, ep=64, timeout_seconds=config.parallel.timeout_seconds)
    train = dataclasses.replace(config.train, global_batch_size=128, micro_batch_size=2)
    checkpoint = dataclasses.replace(config.checkpoint, mode="sync")
    return dataclasses.replace(config, parallel=parallel, train=train, checkpoint=checkpoint)


def v3_256_128k() -> Config:
    """DeepSeek-V3 on 256 H100-80GB (32 nodes of 8) with rows of 131,072 tokens, each on 32 GPUs
    (context parallelism), without a pipeline: 4 experts of each layer on a GPU, shared by four.

    Weights, gradients and moments take 42 GB a GPU, activations the rest.
    """
    config = v3_256()
    timeout = config.parallel.timeout_seconds
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=131072),
        train=dataclasses.replace(config.train, global_batch_size=8),
        parallel=Parallel(dp_shard=8, cp=32, ep=64, timeout_seconds=timeout),
        output="outputs/deepseek_v3_128k",
    )


def moonlight() -> Config:
    """Moonlight-16B-A3B on 8 H100-80GB (one node): FSDP2 over all of them, 8 of 64 experts on each;
    32 GB a GPU for weights, gradients and moments.

    All activations are kept: 76 GB are predicted where a rank's experts receive 1.5 times the mean,
    the reserve among them, 82 GB at twice the mean. Beyond that, or for longer rows, checkpoint
    (--train.activation-checkpointing full: 50 GB at 8 times the mean).
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=32),
        parallel=Parallel(dp_shard=8, ep=8),
        optim=Optim(lr=1e-5, warmup_steps=0.03),
        output="outputs/moonlight",
    )


def kimi_k2() -> Config:
    """Kimi-K2, K2-Thinking or K2.5 on 256 H100-80GB (32 nodes of 8): as v3_256, with 24 experts of
    each layer on a GPU and moments in int8; weights, gradients and moments take up to 55 GB a GPU,
    activations the rest.

    On 512 GPUs (--parallel.dp-shard 32 --parallel.ep 32 --train.global-batch-size 1024) moments fit
    in fp32 (--optim.moments fp32).
    """
    config = v3_256()
    optim = dataclasses.replace(config.optim, moments="int8")
    return dataclasses.replace(config, optim=optim, output="outputs/kimi_k2")


def glm_4_7_flash() -> Config:
    """GLM-4.7-Flash on 8 H100-80GB (one node): FSDP2 over all of them, 8 of 64 experts on each;
    60 GB a GPU for weights, gradients and moments, activations beside that.
    """
    config = moonlight()
    train = dataclasses.replace(config.train, activation_checkpointing="full")
    data = Data(seq_len=4096)
    return dataclasses.replace(config, data=data, train=train, output="outputs/glm_4_7_flash")


PRESETS = {
    "debug": debug,
    "finetune": finetune,
    "v3_256": v3_256,
    "v3_128": v3_128,
    "v3_64": v3_64,
    "v3_256_128k": v3_256_128k,
    "moonlight": moonlight,
    "kimi_k2": kimi_k2,
    "glm_4_7_flash": glm_4_7_flash,
}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES)


if __name__ == "__main__":
    run_main(main)
