"""Full-parameter supervised fine-tuning of gpt-oss (gpt-oss-20b, gpt-oss-120b).

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/gpt_oss_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/gpt_oss_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: MXFP4, bf16 and fp32 safetensors (and what tools/convert_checkpoint.py makes of them),
packed rows, fp32 or bf16 compute, pipeline (pp), replicated (dp_replicate) and sharded (dp_shard)
data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that divides. Ctrl-C,
SIGTERM and SIGUSR1 make it save and end; the same command continues.
Refuses: block-wise fp8 compute, fp8 exports, tied embeddings with pp.
"""

from __future__ import annotations

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = ("GptOssForCausalLM",)
# config.json of the debug preset's model, without what follows from its tokenizer.
DEBUG_MODEL = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    # of an expert
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    # shorter than the task's conversations
    "sliding_window": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    # gpt-oss's 0.02 is for a width of 2880
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}


def debug() -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    return debug_preset("outputs/gpt_oss_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/gpt_oss_sft")


def gpt_oss_20b() -> Config:
    """gpt-oss-20b on 4 H100-80GB: FSDP2 over all of them, 8 of 32 experts on each, moments in bf16;
    63 GB a GPU for weights, gradients and moments, activations beside that.
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=64, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=4, ep=4),
        optim=Optim(lr=1e-5, warmup_steps=0.03, moments="bf16"),
        output="outputs/gpt_oss_20b",
    )


def gpt_oss_120b() -> Config:
    """gpt-oss-120b on 16 H100-80GB (2 nodes of 8): FSDP2 over all of them, 8 of 128 experts on
    each, masters and moments in bf16; 58 GB a GPU for weights, gradients and moments, activations
    beside that.

    On 32 GPUs (--parallel.dp-shard 32 --parallel.ep 32) these fit in fp32 (--optim.masters fp32
    --optim.moments fp32).
    """
    return Config(
        data=Data(seq_len=4096),
        train=Train(epochs=1, global_batch_size=128, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=16, ep=16, timeout_seconds=1800.0),
        optim=Optim(lr=5e-6, warmup_steps=0.03, masters="bf16", moments="bf16"),
        output="outputs/gpt_oss_120b",
    )


PRESETS = {
    "debug": debug,
    "finetune": finetune,
    "gpt_oss_20b": gpt_oss_20b,
    "gpt_oss_120b": gpt_oss_120b,
}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES, DEBUG_MODEL)


if __name__ == "__main__":
    run_main(main)
