"""What a Hugging Face directory holds beside the model's own weights, and what an export of a model
holds.
"""

import itertools
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchsft.checkpoint.converted import ConvertedWeights, is_dcp
from torchsft.checkpoint.manifest import FileEntry, entry_of
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import (
    DTYPES,
    FP8,
    Contents,
    WeightIndex,
    Weights,
    has_weights,
    listing,
    read_json_object,
)
from torchsft.config import InputError
from torchsft.models.decoder import Piece
from torchsft.models.language_model import Mtp
from torchsft.precision.blockwise import (
    BLOCK,
    SCALE_SUFFIX,
    described_block,
    scale_key,
    scale_shape,
)

# What an export takes over from its source besides config.json. Python files belong to the
# configuration's `auto_map` (other tools may need them); they are copied, never run.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "additional_chat_templates/*.jinja")
_OTHERS = {"config.json", "checkpoint.json", "trainer.json"}  # written anew, or of a DCP directory
# What --checkpoint.export and to-hf --dtype call the dtypes of an export.
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
# What config.json calls the number of MTP layers.
MTP_COUNTS = {"num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules"}
ROTARY = "rotary_emb.inv_freq"  # a buffer that old versions of transformers wrote


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """Return the directory's config.json; an InputError where there is none."""
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        fault = "has no config.json" if path.parent.is_dir() else "does not exist"
        raise InputError(
            f"model directory {path.parent} {fault}; give a Hugging Face model directory"
        )
    return read_json_object(path)


def open_weights(
    directory: str | Path, pieces: Mapping[str, Sequence[Piece]], optional: bool = False
) -> Weights | None:
    """Return the weights of a Hugging Face directory, or of a converted one of a model of these
    `pieces`; None where there are none and they are `optional`.
    """
    if is_dcp(directory):
        return ConvertedWeights(directory, pieces)
    return None if optional and not has_weights(directory) else WeightIndex(directory)


def mismatches(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...] | None]
) -> str:
    """Return what is missing, unexpected or of another shape, in words; empty if nothing is."""
    missing, unexpected = (
        [key for key in expected if key not in found],
        [key for key in found if key not in expected],
    )
    odd = [
        f"{key} ({found[key]} instead of {shape})"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": odd}
    return "; ".join(
        f"{len(keys)} {word}: {listing(keys)}" for word, keys in groups.items() if keys
    )


def is_mtp(key: str, layers: int) -> bool:
    """Whether a key belongs to a multi-token-prediction layer, which follows the model's `layers`
    layers.
    """
    match = re.match(r"model\.layers\.(\d+)\.", key)
    return match is not None and int(match[1]) >= layers


def is_model_key(key: str, layers: int) -> bool:
    """Whether a key is named as the weights of a model of `layers` layers are, so that the model
    must have a place for it.
    """
    named = (
        re.match(r"(model\.layers\.\d+|model\.embed_tokens|model\.norm|lm_head)\.", key) is not None
    )
    return named and not is_mtp(key, layers) and not key.endswith(ROTARY)


def is_carried(key: str, layers: int) -> bool:
    """Whether an export takes a tensor over from its source: MTP layers and what is unknown, but no
    rotary buffers.
    """
    return not is_model_key(key, layers) and not key.endswith(ROTARY)


def carried_keys(weights: Weights, layers: int, drop_mtp: bool) -> tuple[list[str], list[str]]:
    """Return the keys of the source's tensors that an export takes over (scales belong to them),
    and which of them are unknown.
    """
    keys = [
        key
        for key in weights.tensors
        if is_carried(key, layers)
        and not key.endswith(SCALE_SUFFIX)
        and not (drop_mtp and is_mtp(key, layers))
    ]
    return keys, [key for key in keys if not is_mtp(key, layers)]


def copy_side_files(
    source: Path, target: Folder, chat_template: str | None = None
) -> dict[str, FileEntry]:
    """Copy everything that is not weights or config.json: see SIDE_FILES.

    Args:
        chat_template: text in place of all templates of the source; loaders take
            chat_template.jinja before what stands in tokenizer_config.json.

    Returns:
        The files that were written, by path in `target`.
    """
    written = {}
    for path in itertools.chain.from_iterable(sorted(source.glob(p)) for p in SIDE_FILES):
        replaced = chat_template is not None and path.suffix == ".jinja"
        excluded = path.name in _OTHERS or path.name.endswith(".index.json")
        if replaced or excluded or not path.is_file():
            continue
        folder = target if path.parent == source else target.child(path.parent.name)
        folder.make()
        with open(path, "rb") as file, folder.writer(path.name) as copy:
            shutil.copyfileobj(file, copy)
        written[path.relative_to(source).as_posix()] = entry_of(copy)
    if chat_template is not None:
        target.make()
        output = target.write_text("chat_template.jinja", chat_template)
        written["chat_template.jinja"] = entry_of(output)
    return written


def exported_config(
    config: Mapping[str, Any], dtype: torch.dtype, mtp: Mtp = "keep"
) -> dict[str, Any]:
    """Return the source's config.json with the exported dtype, under the name(s) that it uses.
    `quantization_config` is there in fp8 alone (what is not fp8 is bf16 then): the source's, where
    that describes DeepSeek's fp8, else DeepSeek-V3's.
    """
    exported = {key: value for key, value in config.items() if key != "quantization_config"}
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    if dtype == torch.float8_e4m3fn:
        fp8 = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(BLOCK),
        }
        exported["quantization_config"] = (
            config["quantization_config"] if described_block(config) else fp8
        )
        dtype = torch.bfloat16
    if mtp == "drop":
        exported |= dict.fromkeys(MTP_COUNTS & exported.keys(), 0)
    return exported | dict.fromkeys(names, str(dtype).removeprefix("torch."))


def fp8_format(exported: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
    """Return of an fp8 export's config.json: rows and columns of a block, and whether scales are
    powers of two.
    """
    return described_block(exported), exported["quantization_config"].get("scale_fmt") == "ue8m0"


def contents_of(
    key: str, dtype: torch.dtype, shape: tuple[int, ...], block: tuple[int, int]
) -> Contents:
    """Return what an export has in `dtype` for a tensor: itself, and in fp8 the fp32 scales of its
    blocks.
    """
    scales = (
        {scale_key(key): (torch.float32, scale_shape(shape, block))}
        if dtype == torch.float8_e4m3fn
        else {}
    )
    return {key: (dtype, shape)} | scales


def exported_dtype(
    key: str, dtype: torch.dtype, source: Weights | None, *, constant: bool, quantised: bool
) -> torch.dtype:
    """In which dtype an export in `dtype` has a tensor of the model: in fp8 as an fp8 source has
    it, else fp8 where it is `quantised` (`LanguageModel.is_quantised`), or bf16. A `constant`
    (`LanguageModel.constants`, such as the routing bias) keeps the source's if that is not fp8, and
    is fp32 without one.
    """
    stored = source.tensors.get(key) if source is not None else None
    if constant and (stored is None or stored.dtype != FP8):
        return torch.float32 if stored is None else DTYPES[stored.dtype]
    if dtype != torch.float8_e4m3fn:
        return dtype
    if source is not None and source.fp8 and key in source.tensors:
        return torch.float8_e4m3fn if key in source.fp8 else DTYPES[source.tensors[key].dtype]
    return torch.float8_e4m3fn if quantised else torch.bfloat16


def carried_dtype(key: str, dtype: torch.dtype, source: Weights, *, quantised: bool) -> torch.dtype:
    """In which dtype an export in `dtype` has a tensor of the source. As it is, except that loaders
    expect like weights in one
    format: fp8 becomes `dtype`, and in fp8, what is `quantised` (`LanguageModel.is_quantised`)
    becomes fp8. A dtype that torch lacks is an InputError.
    """
    stored = source.tensors[key].dtype
    if stored not in DTYPES:
        raise InputError(
            f"{source.directory}: {key} has dtype {stored}, which cannot be exported; remove it"
        )
    floating = DTYPES[stored] in (torch.float32, torch.float16, torch.bfloat16)
    becomes_fp8 = dtype == torch.float8_e4m3fn and not source.fp8 and floating and quantised
    return dtype if becomes_fp8 or stored == FP8 else DTYPES[stored]
