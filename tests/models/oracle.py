"""Tiny models of `transformers` with nothing trivial in them, and ours with the same weights."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.families import name_in_transformers
from tests.tiny import tiny_config, tiny_qwen3_config
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel

VOCABULARY = 61


def hf_model(
    *, bias: tuple[float, float] = (0.0, 0.3), seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A DeepSeek-V3: random weights, norms around 1, biases around 0; correction biases normal with
    (mean, deviation) = bias.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(vocab_size=VOCABULARY, **changes))
    randomise(model, bias)
    return model


def hf_qwen3(**changes: Any) -> PreTrainedModel:
    """A Qwen3 of `tiny_qwen3_config(**changes)`: random weights, norms around 1, biases around
    0.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_qwen3_config(vocab_size=VOCABULARY, **changes))
    randomise(model)
    return model


def randomise(model: PreTrainedModel, bias: tuple[float, float] = (0.0, 0.3)) -> None:
    """Give a model weights that are nowhere trivial; `bias` is as for `hf_model`."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                tensor.normal_(*bias)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "inv_freq" not in name:
                tensor.normal_(std=0.2)


def our_model(hf: PreTrainedModel, **options: Any) -> LanguageModel:
    """Ours, with the weights of `hf`, whose state dict has the same tensors (tied
    embeddings once).
    """
    architecture = type(hf).__name__
    config = hf.config.to_dict() | {"architectures": [architecture]}
    model = build_model(config, **options)
    state = hf.state_dict()
    if hf.config.tie_word_embeddings:
        del state["lm_head.weight"]
    names = {name_in_transformers(architecture, name): name for name in model.state_dict()}
    model.load_state_dict({names[key]: tensor for key, tensor in state.items()})
    return model


def packed(
    lengths: list[int], padding: int = 0, first_position: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Model inputs: random tokens, labels (some -100) and loss weights (some 0) of documents and
    padding.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    labels = torch.randint(0, VOCABULARY, (total,), generator=generator)
    labels[::4] = -100
    labels[sum(lengths) :] = -100
    loss_weights = torch.rand(total, generator=generator)
    loss_weights[::6] = 0
    positions = [torch.arange(n) + first_position for n in lengths] + [
        torch.zeros(padding, dtype=torch.int64)
    ]
    return {
        "tokens": torch.randint(0, VOCABULARY, (total,), generator=generator),
        "positions": torch.cat(positions),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "labels": labels,
        "loss_weights": loss_weights,
        "max_seqlen": max(lengths, default=0),
    }


def logits_of(model: LanguageModel, inputs: dict[str, Any]) -> Tensor:
    """Logits [T, V] without the labels."""
    return model(
        **{key: value for key, value in inputs.items() if key not in ("labels", "loss_weights")}
    )


def hf_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Logits of the real tokens, every document in a forward pass of its own."""
    bounds = inputs["cu_seqlens"].tolist()
    documents = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return torch.cat(
        [
            model(
                inputs["tokens"][None, rows],
                position_ids=inputs["positions"][None, rows],
                use_cache=False,
            ).logits[0]
            for rows in documents
        ]
    )


def hf_loss(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The weighted loss sum from full logits."""
    real = len(logits)
    nll = torch.nn.functional.cross_entropy(
        logits, inputs["labels"][:real], reduction="none", ignore_index=-100
    )
    return (nll * inputs["loss_weights"][:real]).sum()
