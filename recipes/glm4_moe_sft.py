"""Full-parameter supervised fine-tuning of GLM-4.5, 4.5-Air, 4.6 and 4.7.

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/glm4_moe_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/glm4_moe_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: bf16, fp32 and DeepSeek's fp8 safetensors (and what tools/convert_checkpoint.py makes of
them), packed rows, fp32, bf16 or fp8 compute, pipeline (pp), replicated (dp_replicate) and sharded
(dp_shard) data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that
divides. Ctrl-C, SIGTERM and SIGUSR1 make it save and end; the same command continues.
Refuses: the fp8 of the published FP8 models (compressed-tensors: take the bf16 ones), tied
embeddings with pp.
"""

from __future__ import annotations

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = ("Glm4MoeForCausalLM",)
# config.json of the debug preset's model, without what follows from its tokenizer.
DEBUG_MODEL = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "use_qk_norm": True,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    # GLM's 0.02 is for a width of 4096 and more
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}


def debug() -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    return debug_preset("outputs/glm4_moe_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/glm4_moe_sft")


def glm_4_5_air() -> Config:
    """GLM-4.5-Air on 16 H100-80GB (2 nodes of 8): FSDP2 over all of them, 8 of 128 experts on each,
    masters and moments in bf16; 53 GB a GPU for weights, gradients and moments, activations beside
    that.

    On 32 GPUs (--parallel.dp-shard 32 --parallel.ep 32) these fit in fp32 (--optim.masters fp32
    --optim.moments fp32).
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=64, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=16, ep=16, timeout_seconds=1800.0),
        optim=Optim(lr=1e-5, warmup_steps=0.03, masters="bf16", moments="bf16"),
        output="outputs/glm_4_5_air",
    )


def glm_4_5() -> Config:
    """GLM-4.5, 4.6 or 4.7 on 128 H100-80GB (16 nodes of 8): FSDP2 over all of them, 5 of 160
    experts on each, shared by four; 44 GB a GPU for weights, gradients and moments, activations
    beside that.
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=128, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=128, ep=32, timeout_seconds=1800.0),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/glm_4_5",
    )


PRESETS = {
    "debug": debug,
    "finetune": finetune,
    "glm_4_5_air": glm_4_5_air,
    "glm_4_5": glm_4_5,
}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES, DEBUG_MODEL)


if __name__ == "__main__":
    run_main(main)
