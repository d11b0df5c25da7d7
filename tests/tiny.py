"""Tiny Hugging Face directories and data sets for tests, written by `transformers` and `tokenizers`
themselves.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ "
    "message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte plus ChatML-style special tokens: any text, no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(**changes: Any) -> DeepseekV3Config:
    """3 layers (1 dense), 8 experts in 4 groups, top-3 in 2 groups; widths that differ from each
    other.
    """
    sizes = dict(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return DeepseekV3Config(**(sizes | changes))


def tiny_qwen3_config(*, dense: bool = False, **changes: Any) -> Qwen3MoeConfig | Qwen3Config:
    """3 layers, the first and the third with 8 experts, top-3; 4 query heads share 2 key/value
    heads, which are wider than hidden_size / heads. `dense`: without experts.
    """
    sizes = dict(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    if dense:
        return Qwen3Config(**(sizes | changes))
    sizes |= dict(
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    return Qwen3MoeConfig(**(sizes | changes))


def write_tiny_model(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config: PreTrainedConfig | None = None,
    **changes: Any,
) -> Path:
    """A tiny model with random weights, biases and norms, and a byte tokenizer, saved by
    `transformers`: that of `config`, else a DeepSeek-V3 of `tiny_config(**changes)`.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_config(**changes))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            if "e_score_correction_bias" in name:
                tensor.normal_(0, 0.3)
    model.to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_conversations(path: Path, count: int, *, seed: int = 0) -> Path:
    """`count` conversations of one to three turns with answers of 1 to 40 characters: ragged
    supervised counts.
    """
    draw = random.Random(seed)
    letters = "abcdefgh "
    with open(path, "w") as file:
        for _ in range(count):
            messages = [{"role": "system", "content": "say it"}] if draw.random() < 0.5 else []
            for _ in range(draw.randint(1, 3)):
                messages.append(
                    {
                        "role": "user",
                        "content": "".join(draw.choices(letters, k=draw.randint(1, 20))),
                    }
                )
                answer = "x" + "".join(draw.choices(letters, k=draw.randint(0, 38))) + "x"
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
