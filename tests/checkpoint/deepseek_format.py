"""Directories in the format in which DeepSeek publishes V3: fp8 in blocks of 128 x 128 with scales
beside, an MTP layer, files cut anywhere. Made from a directory of `transformers` by a plain loop
over blocks that shares no code with torchsft."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoint.sources import INDEX, change_config, read_tensors, weight_files
from tests.tiny import write_tiny_model

BLOCK = 128
# Several blocks and ragged ones: kv_a_proj_with_mqa has 132 + 8 rows, q_b_proj 4 * 44, kv_b_proj 4
# * 68, gate_proj 200 or 48.
SIZES = {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 48,
    "q_lora_rank": 136,
    "kv_lora_rank": 132,
    "qk_nope_head_dim": 36,
    "v_head_dim": 32,
}
LAYERS = 3  # and one for multi-token prediction
# The last words but "weight" of the names that DeepSeek-V3's index has scales for.
QUANTISED = {
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
}


def is_fp8(key: str) -> bool:
    """As the published index has it."""
    *_, module, kind = ["", *key.split(".")]
    return kind == "weight" and module in QUANTISED


def quantised(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """e4m3 and scales of a weight, block by block."""
    rows, cols = weight.shape
    q = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    for i, top in enumerate(range(0, rows, BLOCK)):
        for j, left in enumerate(range(0, cols, BLOCK)):
            block = weight[top : top + BLOCK, left : left + BLOCK].float()
            scale[i, j] = block.abs().max() / 448
            if power_of_two:
                scale[i, j] = 2.0 ** torch.ceil(torch.log2(scale[i, j]))
            q[top : top + BLOCK, left : left + BLOCK] = (block / scale[i, j]).to(
                torch.float8_e4m3fn
            )
    return q, scale


def dequantised(q: Tensor, scale: Tensor) -> Tensor:
    """fp32 values of a whole weight, block by block."""
    values = torch.empty(q.shape)
    for i, top in enumerate(range(0, q.shape[0], BLOCK)):
        for j, left in enumerate(range(0, q.shape[1], BLOCK)):
            block = q[top : top + BLOCK, left : left + BLOCK]
            values[top : top + BLOCK, left : left + BLOCK] = block.float() * scale[i, j]
    return values


def write_files(directory: Path, tensors: dict[str, Tensor], files: int) -> None:
    """Weight files and their index, in place of those that are there; cut by bytes, so that scales
    can part from weights.
    """
    for path in weight_files(directory):
        path.unlink()
    total, names, seen = sum(t.nbytes for t in tensors.values()), {}, 0
    for key in sorted(tensors):
        names[key] = f"model-{seen * files // total + 1:05d}-of-{files:06d}.safetensors"
        seen += tensors[key].nbytes
    for name in set(names.values()):
        part = {key: tensors[key].contiguous() for key, place in names.items() if place == name}
        save_file(part, directory / name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def write_deepseek(
    directory: Path, *, power_of_two: bool = False, files: int = 7, seed: int = 0, **changes
) -> Path:
    """A tiny model as DeepSeek would publish it.

    Args:
        power_of_two: as V3.1 ("scale_fmt": "ue8m0").
        changes: of the sizes.
    """
    sizes = SIZES | {"num_hidden_layers": LAYERS} | changes
    write_tiny_model(directory, seed=seed, dtype=torch.bfloat16, **sizes)
    tensors = read_tensors(directory)
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    mtp = f"model.layers.{layers}."
    for key in [key for key in tensors if key.startswith(f"model.layers.{layers - 1}.")]:
        tensors[mtp + key.split(".", 3)[3]] = (
            torch.randn(tensors[key].shape).mul(0.1).to(tensors[key].dtype)
        )
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{mtp}{norm}.weight"] = torch.rand(width).bfloat16()
    tensors[f"{mtp}eh_proj.weight"] = torch.randn(width, 2 * width).bfloat16()
    for name, original in (
        ("embed_tokens", "model.embed_tokens.weight"),
        ("shared_head.head", "lm_head.weight"),
    ):
        tensors[f"{mtp}{name}.weight"] = tensors.get(
            original, tensors["model.embed_tokens.weight"]
        ).clone()
    for key in list(tensors):
        if key.endswith("e_score_correction_bias"):
            tensors[key] = 5 + 0.01 * torch.randn(tensors[key].shape)
        if is_fp8(key):
            masters = 1.0007 * tensors[key].float()  # no bf16 numbers
            tensors[key], tensors[f"{key}_scale_inv"] = quantised(masters, power_of_two)
    write_files(directory, tensors, files)
    fp8 = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    scale_format = {"scale_fmt": "ue8m0"} if power_of_two else {}
    change_config(
        directory,
        num_nextn_predict_layers=1,
        torch_dtype="bfloat16",
        quantization_config=fp8 | scale_format,
    )
    return directory


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A directory's tensors without fp8: fp32 values in place of fp8 weights and scales."""
    scales = {
        key.removesuffix("_scale_inv"): tensor
        for key, tensor in tensors.items()
        if key.endswith("_scale_inv")
    }
    values = {key: tensor for key, tensor in tensors.items() if not key.endswith("_scale_inv")}
    return values | {key: dequantised(values[key], scale) for key, scale in scales.items()}


def write_plain(source: Path, target: Path) -> Path:
    """The dequantised fp32 copy of a directory, without MTP: what `transformers` reads."""
    tensors = plain(read_tensors(source))
    own = {
        key: tensor.float()
        for key, tensor in tensors.items()
        if not key.startswith(f"model.layers.{LAYERS}.")
    }
    target.mkdir()
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target
