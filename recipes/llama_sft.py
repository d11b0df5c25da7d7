"""Full-parameter supervised fine-tuning of dense models of Llama's kind (Llama 2 and 3, SmolLM2 and
SmolLM3, Mistral, Qwen2 and Qwen2.5).

    # the debug preset: learns a generated task
    torchrun --nproc-per-node 2 recipes/llama_sft.py
    # your model, your data
    torchrun --nproc-per-node 8 recipes/llama_sft.py finetune \\
        --model.path HF_DIR --data.train chats.jsonl

Supports: fp8, bf16 and fp32 safetensors (and what tools/convert_checkpoint.py makes of them),
packed rows, fp32, bf16 or fp8 compute, pipeline (pp), replicated (dp_replicate), sharded (dp_shard)
data, context (cp) and tensor (tp) parallelism in any combination that divides. Ctrl-C, SIGTERM and
SIGUSR1 make it save and end; the same command continues.
Refuses: tied embeddings with pp, biases in feed-forward
networks, sliding windows of Qwen2 and SmolLM3.
"""

from __future__ import annotations

from sft import debug_preset, finetune_preset, run
from torchsft.config import Config, Data, Optim, Parallel, Train
from torchsft.interruption import run_main

# What this recipe trains, as config.json names it.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "SmolLM3ForCausalLM")
# config.json of the debug preset's model, without what follows from its tokenizer.
DEBUG_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    # Llama's 0.02 is for a width of 2048 and more
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}


def debug() -> Config:
    """Small random model that learns a generated chat task in about 2 minutes on 2 CPU cores."""
    return debug_preset("outputs/llama_debug")


def finetune() -> Config:
    """Your model and data (--model.path, --data.train): cosine schedule from 1e-5 without warm-up,
    1 epoch.
    """
    return finetune_preset("outputs/llama_sft")


def llama_8b() -> Config:
    """Llama-3.1-8B on 8 H100-80GB (one node): FSDP2 over all of them; 16 GB a GPU for weights,
    gradients and moments, activations beside that.
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=64, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=8),
        optim=Optim(lr=1e-5, warmup_steps=0.03),
        output="outputs/llama_8b",
    )


def llama_70b() -> Config:
    """Llama-3.1-70B on 32 H100-80GB (4 nodes of 8): FSDP2 over all of them; 35 GB a GPU for
    weights, gradients and moments, activations beside that.
    """
    return Config(
        data=Data(seq_len=8192),
        train=Train(epochs=1, global_batch_size=64, activation_checkpointing="full"),
        parallel=Parallel(dp_shard=32, timeout_seconds=1800.0),
        optim=Optim(lr=5e-6, warmup_steps=0.03),
        output="outputs/llama_70b",
    )


PRESETS = {"debug": debug, "finetune": finetune, "llama_8b": llama_8b, "llama_70b": llama_70b}


def main() -> None:
    """Train as the command line says."""
    run(PRESETS, __doc__ or "", ARCHITECTURES, DEBUG_MODEL)


if __name__ == "__main__":
    run_main(main)
