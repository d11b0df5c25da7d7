"""Hugging Face directories to load from: written by `transformers`, with what it does not write
added by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from tests.tiny import write_tiny_model

INDEX = "model.safetensors.index.json"


def weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, read file by file with safetensors' own loader."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for key, tensor in load_file(path).items():
            assert key not in tensors, f"{key} is in two files"
            tensors[key] = tensor
    return tensors


def change_tensors(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add (to the last file) or remove (None) tensors, and keep an index true."""
    changes = dict(changes)
    files = weight_files(directory)
    weight_map = {}
    for path in files:
        tensors = load_file(path)
        here = changes.keys() if path == files[-1] else changes.keys() & tensors.keys()
        tensors |= {key: changes.pop(key) for key in list(here)}
        tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        weight_map |= dict.fromkeys(tensors, path.name)
        save_file(tensors, path, metadata={"format": "pt"})
    index = directory / INDEX
    if index.exists():
        index.write_text(json.dumps(json.loads(index.read_text()) | {"weight_map": weight_map}))


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_source(
    directory: Path, dtype: torch.dtype, *, sharded: bool, mtp: bool, **changes
) -> Path:
    """A tiny model directory as published ones look: fp32 routing biases near 5, maybe shards and
    an MTP layer.
    """
    write_tiny_model(directory, dtype=dtype, **changes)
    if sharded:
        # newer ones load the router in fp32
        model = DeepseekV3ForCausalLM.from_pretrained(directory).to(dtype)
        (directory / "model.safetensors").unlink()
        model.save_pretrained(directory, max_shard_size="60KB")
        assert len(weight_files(directory)) > 2 and (directory / INDEX).exists()
    torch.manual_seed(1)
    tensors = read_tensors(directory)
    new = {
        k: 5 + 0.01 * torch.randn(v.shape)
        for k, v in tensors.items()
        if k.endswith("e_score_correction_bias")
    }
    assert all(not torch.equal(bias, bias.bfloat16().float()) for bias in new.values())
    if mtp:
        layers = changes.get("num_hidden_layers", 3)
        for key, tensor in tensors.items():
            if key.startswith(f"model.layers.{layers - 1}."):
                new[key.replace(f".{layers - 1}.", f".{layers}.", 1)] = torch.randn(
                    tensor.shape
                ).to(tensor.dtype)
        new[f"model.layers.{layers}.eh_proj.weight"] = torch.randn(32, 64).to(dtype)
        new[f"model.layers.{layers}.mlp.gate.e_score_correction_bias"] = 5 + torch.randn(8)
        change_config(directory, num_nextn_predict_layers=1)
    change_tensors(directory, new)
    (directory / "configuration_deepseek.py").write_text(
        "raise RuntimeError('remote code is copied, never run')\n"
    )
    return directory


def add_mtp(directory: Path, modules: int = 1) -> None:
    """Give a tiny model of random weights MTP layers, in the format of published ones."""
    config = json.loads((directory / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    tensors = read_tensors(directory)
    torch.manual_seed(2)
    new = {}
    for layer in range(layers, layers + modules):
        prefix = f"model.layers.{layer}."
        for key, tensor in tensors.items():
            if key.startswith(f"model.layers.{layers - 1}."):
                std = tensor.float().std()
                values = 1 + std * torch.randn(tensor.shape)
                values = values if "norm" in key else values - 1
                new[prefix + key.split(".", 3)[3]] = values.to(tensor.dtype)
        dtype = tensors["model.norm.weight"].dtype
        for part in ("enorm", "hnorm", "shared_head.norm"):
            new[f"{prefix}{part}.weight"] = torch.rand(width).to(dtype) + 0.5
        new[f"{prefix}eh_proj.weight"] = (0.1 * torch.randn(width, 2 * width)).to(dtype)
        embedding = tensors["model.embed_tokens.weight"]
        new[f"{prefix}embed_tokens.weight"] = embedding.clone()
        new[f"{prefix}shared_head.head.weight"] = tensors.get("lm_head.weight", embedding).clone()
    change_tensors(directory, new)
    change_config(directory, num_nextn_predict_layers=modules)


def copy(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (a, b)))
    )
