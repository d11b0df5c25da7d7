"""Full-parameter supervised fine-tuning of MiniMax-M2 and M2.1 to M2.7.

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/minimax_m2_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/minimax_m2_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: fp8 as published, bf16 and fp32 safetensors (and what tools/convert_checkpoint.py makes of
them), packed rows, fp32, bf16 or fp8 compute, pipeline (pp), replicated (dp_replicate) and sharded
(dp_shard) data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that
divides. Ctrl-C, SIGTERM and SIGUSR1 make it save and end; the same command continues.
Refuses: tied embeddings with pp, training of MTP modules (the
published models do not hold theirs).
"""

from __future__ import annotations

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = ("MiniMaxM2ForCausalLM",)
# config.json of the debug preset's model, without what follows from its tokenizer.
DEBUG_MODEL = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    # of an expert
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 16,
    "attention_dropout": 0.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    # MiniMax-M2's 0.02 is for a width of 3072
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}


def debug() -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    return debug_preset("outputs/minimax_m2_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/minimax_m2_sft")


def minimax_m2() -> Config:
    """MiniMax-M2 on 64 H100-80GB (8 nodes of 8): FSDP2 over all of them, 4 of 256 experts on each;
    57 GB a GPU for weights, gradients and moments, activations beside that.
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=64, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=64, ep=64, timeout_seconds=1800.0),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/minimax_m2",
    )


PRESETS = {"debug": debug, "finetune": finetune, "minimax_m2": minimax_m2}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES, DEBUG_MODEL)


if __name__ == "__main__":
    run_main(main)
