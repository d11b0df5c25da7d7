"""Full-parameter supervised fine-tuning of DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with sparse
attention in documents longer than index_topk (2048) tokens.

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/deepseek_v32_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/deepseek_v32_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl --parallel.ep 8

Supports: fp8, bf16 and fp32 safetensors (and what tools/convert_checkpoint.py makes of them),
packed rows, fp32, bf16 or fp8 compute, pipeline (pp), replicated (dp_replicate), sharded (dp_shard)
data, context (cp), tensor (tp) and expert (ep) parallelism in any combination that divides. Ctrl-C,
SIGTERM and SIGUSR1 make it save and end; the same command continues.
The indexer, which chooses what tokens see, is never trained: exports have it as it was.
Refuses: tied embeddings with pp, documents longer than
index_topk where layers share the choice of others (indexer_types).
"""

from __future__ import annotations

import dataclasses

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
# config.json of the debug preset's model, without what follows from its tokenizer.
DEBUG_MODEL = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "index_topk": 32,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    # V3's 0.02 is for a width of 2048 and more
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
    return debug_preset("outputs/deepseek_v32_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/deepseek_v32_sft")


def v32_256() -> Config:
    """DeepSeek-V3.2 on 256 H100-80GB (32 nodes of 8): 16 pipeline ranks, 16 experts of each layer
    on a GPU; weights, gradients and moments take up to 57 GB a GPU, activations the rest.
    """
    return Config(
        data=Data(seq_len=4096),
        train=Train(epochs=1, global_batch_size=512, activation_checkpointing="full"),
        parallel=Parallel(
            pp=16, pp_schedule="Interleaved1F1B", dp_shard=16, ep=16, timeout_seconds=1800.0
        ),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/deepseek_v32",
    )


def glm_5_512() -> Config:
    """GLM-5 on 512 H100-80GB (64 nodes of 8): as v32_256, with twice its data ranks; weights,
    gradients and moments take up to 34 GB a GPU, activations the rest.
    """
    config = v32_256()
    parallel = dataclasses.replace(config.parallel, dp_shard=32, ep=32)
    train = dataclasses.replace(config.train, global_batch_size=1024)
    return dataclasses.replace(config, parallel=parallel, train=train, output="outputs/glm_5")


PRESETS = {"debug": debug, "finetune": finetune, "v32_256": v32_256, "glm_5_512": glm_5_512}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES, DEBUG_MODEL)


if __name__ == "__main__":
    run_main(main)
