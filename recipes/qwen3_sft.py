"""Full-parameter supervised fine-tuning of Qwen3 models, dense and with experts (Qwen3-8B,
Qwen3-30B-A3B, Qwen3-235B-A22B).

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/qwen3_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/qwen3_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: fp8, bf16 and fp32 safetensors (and what tools/convert_checkpoint.py makes of them),
packed rows, fp32, bf16 or fp8 compute, pipeline (pp), replicated (dp_replicate), sharded (dp_shard)
data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that divides. Ctrl-C,
SIGTERM and SIGUSR1 make it save and end; the same command continues.
Refuses: tied embeddings with pp, sliding windows.
"""

from __future__ import annotations

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
# config.json of the debug preset's model, without what follows from its tokenizer.
DEBUG_MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    # Qwen3's 0.02 is for a width of 2048 and more
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}


def debug() -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    return debug_preset("outputs/qwen3_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/qwen3_sft")


def qwen3_30b() -> Config:
    """Qwen3-30B-A3B on 8 H100-80GB (one node): FSDP2 over all of them, 16 of 128 experts on each;
    61 GB a GPU for weights, gradients and moments, activations beside that.
    """
    return Config(
        data=Data(seq_len=4096),
        train=Train(epochs=1, global_batch_size=64, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=8, ep=8),
        optim=Optim(lr=1e-5, warmup_steps=0.03),
        output="outputs/qwen3_30b",
    )


def qwen3_235b() -> Config:
    """Qwen3-235B-A22B on 64 H100-80GB (8 nodes of 8): FSDP2 over all of them, 2 of 128 experts on
    each; 59 GB a GPU for weights, gradients and moments, activations beside that.

    No pipeline: with one, gathered parameters and waiting gradients would take 17 GB more, or 22.
    """
    return Config(
        data=Data(seq_len=4096),
        train=Train(epochs=1, global_batch_size=128, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=64, ep=64, timeout_seconds=1800.0),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/qwen3_235b",
    )


PRESETS = {
    "debug": debug,
    "finetune": finetune,
    "qwen3_30b": qwen3_30b,
    "qwen3_235b": qwen3_235b,
}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES, DEBUG_MODEL)


if __name__ == "__main__":
    run_main(main)
