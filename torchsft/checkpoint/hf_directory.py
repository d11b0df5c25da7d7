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
    Contents,
    WeightIndex,
    Weights,
    has_weights,
    listing,
    read_json_object,
)
from torchsft.config import Config, InputError
from torchsft.models.decoder import Piece
from torchsft.models.families import family_of
from torchsft.models.language_model import Mtp
from torchsft.precision.formats import Format, Fp8Blocks, described_format

# What an export takes over from its source besides config.json. Python files belong to the
# configuration's `auto_map` (other tools may need them); they are copied, never run.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "additional_chat_templates/*.jinja")
_OTHERS = {"config.json", "checkpoint.json", "trainer.json"}  # written anew, or of a DCP directory
# What --checkpoint.export and to-hf --dtype call the dtypes and formats of an export, and the dtype
# of what is in no format of few bits.
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPORT_DTYPES |= dict.fromkeys(("fp8", "int4", "mxfp4"), torch.bfloat16)
Kind = torch.dtype | Format
# What config.json calls the number of MTP layers.
MTP_COUNTS = {"num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules"}
# How keys of a language model begin; those of models that see, with the part that does not.
_MODEL = r"(?:language_model\.)?model\."
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
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
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
    match = re.match(rf"{_MODEL}layers\.(\d+)\.", key)
    return match is not None and int(match[1]) >= layers


def is_model_key(key: str, layers: int) -> bool:
    """Whether a key is named as the weights of a model of `layers` layers are, so that the model
    must have a place for it.
    """
    own = rf"({_MODEL}(layers\.\d+|embed_tokens|norm)|(language_model\.)?lm_head)\."
    named = re.match(own, key) is not None
    return named and not is_mtp(key, layers) and not key.endswith(ROTARY)


def is_carried(key: str, layers: int) -> bool:
    """Whether an export takes a tensor over from its source: MTP layers and what is unknown, but no
    rotary buffers.
    """
    return not is_model_key(key, layers) and not key.endswith(ROTARY)


def carried_keys(weights: Weights, layers: int, drop_mtp: bool) -> tuple[list[str], list[str]]:
    """Return the keys of the source's tensors that an export takes over (parts belong to them),
    and which of them are unknown.
    """
    keys = [
        key
        for key in weights.tensors
        if is_carried(key, layers)
        and key not in weights.parts
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


def exported_config(config: Mapping[str, Any], export: str, mtp: Mtp = "keep") -> dict[str, Any]:
    """Return the source's config.json with the exported dtype, under the name(s) that it uses.

    In formats of few bits it has a `quantization_config` (what is in no such format is bf16 then):
    the source's, where that describes the format, else, for fp8, DeepSeek-V3's.

    Args:
        export: a key of EXPORT_DTYPES.
        mtp: `drop` sets the number of MTP layers to 0.

    Raises:
        InputError: the format is one that only releases in it can be exported in, and the source is
            none; the family has no format in fp8.
    """
    form, dtype = described_format(config), EXPORT_DTYPES[export]
    exported = dict(config)
    if form is None or form.name != export:
        if export in ("int4", "mxfp4"):
            found = "no quantised weights" if form is None else f"{form.name} weights"
            raise InputError(
                f"--checkpoint.export {export} (to-hf: --dtype) needs a source that is released in "
                f"it, but config.json describes {found}; choose bf16"
            )
        exported = _without_quantization(config)
        if export == "fp8":
            if (family := family_of(config)).quantised is None:
                raise InputError(
                    f"--checkpoint.export fp8 (to-hf: --dtype): no program reads a "
                    f"{family.__name__} in fp8; choose bf16"
                )
            exported["quantization_config"] = Fp8Blocks().description
            if family.never_quantised:
                modules = {"modules_to_not_convert": list(family.never_quantised)}
                exported["quantization_config"] |= modules
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    if mtp == "drop":
        exported = _without_mtp(exported)
    return exported | dict.fromkeys(names, str(dtype).removeprefix("torch."))


def check_export(config_json: Mapping[str, Any], config: Config) -> None:
    """Refuse a run's export of a source before anything is loaded.

    Raises:
        InputError: see `exported_config`; or it would be quantised otherwise than training does.
    """
    export, precision = config.checkpoint.export, config.precision
    if export == "none":
        return
    form = export_kind(exported_config(config_json, export), export)
    trained = Fp8Blocks(power_of_two=precision.power_of_two_scales)
    if export == "fp8" and precision.compute == "blockwise" and form != trained:
        kinds = {True: "powers of two", False: "any value"}
        fault = (
            f"--precision.compute blockwise would train with scales of "
            f"{kinds[trained.power_of_two]} in blocks of {trained.block}, but an fp8 export of "
            f"this model has scales of {kinds[form.power_of_two]} in blocks of {form.block}"
        )
        wanted = str(form.power_of_two).lower()
        raise InputError(
            f"{fault}; set --precision.power-of-two-scales {wanted}, or another --checkpoint.export"
        )


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's object without quantization_config, here and in `text_config`."""
    left = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(left.get("text_config"), Mapping):
        left["text_config"] = _without_quantization(left["text_config"])
    return left


def _without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's object that counts no MTP layers, here and in `text_config`."""
    left = dict(config) | dict.fromkeys(MTP_COUNTS & config.keys(), 0)
    if isinstance(left.get("text_config"), Mapping):
        left["text_config"] = _without_mtp(left["text_config"])
    return left


def export_kind(exported: Mapping[str, Any], export: str) -> Kind:
    """Return in which dtype or format an export has its weights.

    Args:
        exported: its config.json.
        export: a key of EXPORT_DTYPES.
    """
    return described_format(exported) or EXPORT_DTYPES[export]


def contents_of(key: str, kind: Kind, shape: tuple[int, ...]) -> Contents:
    """Return what a file has of a tensor: itself, or the parts of a format."""
    return {key: (kind, shape)} if isinstance(kind, torch.dtype) else kind.parts(key, shape)


def exported_kind(
    key: str, kind: Kind, source: Weights | None, *, constant: bool, quantised: bool
) -> Kind:
    """Return in which dtype or format an export in `kind` has a tensor of the model.

    In a format of few bits: as a source in the same format has it, else so where it is `quantised`
    (`LanguageModel.is_quantised`), and bf16. Another `constant` (`LanguageModel.constants`, such as
    the routing bias) keeps the source's if that is not of few bits, and is fp32 without one.
    """
    stored = source.tensors.get(key) if source is not None else None
    constant = constant and (isinstance(kind, torch.dtype) or not quantised)
    if constant and (stored is None or key not in source.packed):
        return torch.float32 if stored is None else DTYPES[stored.dtype]
    if isinstance(kind, torch.dtype):
        return kind
    if stored is not None and source.stores(kind):
        return kind if key in source.packed else DTYPES[stored.dtype]
    return kind if quantised else torch.bfloat16


def carried_kind(key: str, kind: Kind, source: Weights, *, quantised: bool) -> Kind:
    """Return in which dtype or format an export in `kind` has a tensor that it takes over.

    As it is, except that loaders expect like weights in one format: what is of few bits in another
    one becomes `kind`, and in fp8, what is `quantised` (`LanguageModel.is_quantised`) fp8.

    Raises:
        InputError: it has a dtype that torch lacks.
    """
    stored, form = source.tensors[key].dtype, source.packed.get(key)
    if isinstance(kind, torch.dtype):
        as_format = kind
    else:
        as_format = kind if quantised or source.stores(kind) else torch.bfloat16
    if form is not None:
        return as_format
    if stored not in DTYPES:
        raise InputError(
            f"{source.directory}: {key} has dtype {stored}, which cannot be exported; remove it"
        )
    floating = DTYPES[stored] in (torch.float32, torch.float16, torch.bfloat16)
    if isinstance(kind, torch.dtype) or source.stores(kind) or not (floating and quantised):
        return DTYPES[stored]
    return kind
