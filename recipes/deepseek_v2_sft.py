"""Full-parameter supervised fine-tuning of DeepSeek-V2 models (V2, V2-Lite, Coder-V2).

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/deepseek_v2_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/deepseek_v2_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: bf16, fp32 and fp8 safetensors (and what tools/convert_checkpoint.py makes of them),
packed rows, fp32, bf16 or fp8 compute, pipeline (pp), replicated (dp_replicate), sharded (dp_shard)
data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that divides. Ctrl-C,
SIGTERM and SIGUSR1 make it save and end; the same command continues.
Refuses: tied embeddings with pp.
"""

from __future__ import annotations

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = ("DeepseekV2ForCausalLM",)
# config.json of the debug preset's model, without what follows from its tokenizer.
DEBUG_MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    # V2's 0.02 is for a width of 2048 and more
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}


def debug() -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    return debug_preset("outputs/deepseek_v2_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/deepseek_v2_sft")


def v2_lite() -> Config:
    """DeepSeek-V2-Lite (or Coder-V2-Lite) on 4 H100-80GB: FSDP2 over all of them, 16 of 64 experts
    on each; 63 GB a GPU for weights, gradients and moments, activations beside that.
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=32, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=4, ep=4),
        optim=Optim(lr=1e-5, warmup_steps=0.03),
        output="outputs/deepseek_v2_lite",
    )


def v2() -> Config:
    """DeepSeek-V2 (or Coder-V2) on 64 H100-80GB (8 nodes of 8): FSDP2 over all of them, 5 of 160
    experts on each, shared by two; 59 GB a GPU for weights, gradients and moments, activations
    beside that.
    """
    return Config(
        data=Data(seq_len=4096),
        train=Train(epochs=1, global_batch_size=128, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=64, ep=32, timeout_seconds=1800.0),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/deepseek_v2",
    )


PRESETS = {"debug": debug, "finetune": finetune, "v2_lite": v2_lite, "v2": v2}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES, DEBUG_MODEL)


if __name__ == "__main__":
    run_main(main)
