"""Reading a config.json: what every family's configuration does with it."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from torchsft.config import InputError
from torchsft.models.rope import Llama3Scaling, Rope, Yarn
from torchsft.precision.formats import described_format, quantization_of

# Two names of one setting, whatever the family.
_DTYPE_NAMES = ("dtype", "torch_dtype")
_ROPE_KINDS = ("default", "yarn", "llama3")


def refuse_if(refused: Any, problem: str) -> None:
    """Refuse a config.json if it has the `problem`.

    Raises:
        InputError: `refused` is true.
    """
    if refused:
        raise InputError(f"config.json has {problem}")


def required_fields(kind: Any) -> list[str]:
    """Return names of a `FamilyConfig`'s fields without a default, but those that the family reads
    itself (`apart`): its sizes.
    """
    required = [field.name for field in fields(kind) if field.default is MISSING]
    return [name for name in required if name not in kind.apart]


def read_fields(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Read the numbers of a configuration.

    Args:
        config: the object in config.json.
        kind: the `FamilyConfig`, which says how, and whose fields are named as in config.json.

    Returns:
        The fields that config.json states, by name. An absent one, and null, means its default.

    Raises:
        InputError: weights are quantised in an unknown way; two names of one setting
            disagree; a field without a default is absent; a value is no number; a setting has a
            value that is not supported.
    """
    _refuse_other_quantisation(config)
    for names in (*kind.spellings, _DTYPE_NAMES):
        _refuse_contradiction(config, names)
    config = dict(config)
    for name, other in kind.spellings:
        if config.get(name) is None and config.get(other) is not None:
            config[name] = config[other]

    missing = [name for name in required_fields(kind) if config.get(name) is None]
    if missing:
        raise InputError(
            f"config.json lacks {', '.join(missing)}, without which the model has no shape"
        )
    odd, stated = [], {}
    for field in fields(kind):
        name, value = field.name, config.get(field.name)
        if name in kind.apart:
            continue
        allowed = int if field.default is MISSING else int | float | None
        if not isinstance(value, allowed):
            odd.append(f"{name} = {value!r}")
        says_something = value is not None or name in kind.null_says_something
        if name in config and says_something:
            stated[name] = value
    refuse_if(odd, f"{', '.join(odd)}, but numbers are needed there")
    for name, supported in kind.supported_values.items():
        value = config.get(name)
        refuse_if(
            value not in (None, supported),
            f"{name} = {value!r}, but only {supported!r} is supported",
        )
    return stated


def _refuse_other_quantisation(config: Mapping[str, Any]) -> None:
    quantization = quantization_of(config)
    if quantization and described_format(config) is None:
        raise InputError(
            f"config.json has quantization_config = {json.dumps(quantization)}, but only "
            "DeepSeek's fp8 (e4m3, blocks such as [128, 128]), INT4 of compressed-tensors (groups "
            "of 32, pack-quantized) and MXFP4 are supported; give such a checkpoint, or a bf16 or "
            "fp32 one"
        )


def _refuse_contradiction(config: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Refuse two names of one setting that are both given, with different values."""
    name, other = names
    value, other_value = config.get(name), config.get(other)
    refuse_if(
        None not in (value, other_value) and value != other_value,
        f"{name} = {value!r} and {other} = {other_value!r}, two names of one setting; keep one",
    )


def read_rope(config: Mapping[str, Any], kind: Any, width: int) -> Rope:
    """Read the rotary embedding from `rope_parameters` (transformers 5), or from `rope_scaling`
    with `rope_theta` beside it (official repositories).

    Args:
        config: the object in config.json.
        kind: the `FamilyConfig`, which says what is meant where config.json is silent.
        width: entries of a head, or those of it that have a position.

    Raises:
        InputError: the two disagree, or describe what is not supported.
    """
    default_partial = kind.partial_rotary_factor
    defaults = {"rope_theta": kind.rope_theta, "partial_rotary_factor": default_partial or 1.0}
    values = _rope_settings(config, defaults)
    scaling, partial = values["rope_type"], values["partial_rotary_factor"]
    dim, said = int(width * partial), f"partial_rotary_factor = {partial}"
    refuse_if(default_partial is None and partial != 1, f"{said}, only 1 is supported")
    refuse_if(
        partial != 1 and (dim % 2 or not 0 < dim <= width),
        f"{said}, which rotates {dim} of {width} entries; the number must be even",
    )
    refuse_if(
        scaling not in _ROPE_KINDS,
        f"rope type {scaling!r}, but only {', '.join(map(repr, _ROPE_KINDS))} are supported",
    )
    longest = config.get("max_position_embeddings") or kind.max_position_embeddings
    return Rope(
        dim=dim,
        theta=float(values["rope_theta"]),
        yarn=_yarn(values, longest) if scaling == "yarn" else None,
        llama3=_llama3(values, longest) if scaling == "llama3" else None,
        pairing=kind.pairing,
        place="start" if dim < width else "end",
    )


def _llama3(values: Mapping[str, Any], longest: int) -> Llama3Scaling:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    absent = [name for name in names if not values.get(name)]
    refuse_if(absent, f"rope type 'llama3' without {', '.join(absent)}")
    return Llama3Scaling(
        original_context=values.get("original_max_position_embeddings") or longest,
        **{name: float(values[name]) for name in names},
    )


def _yarn(values: Mapping[str, Any], longest: int) -> Yarn:
    original = values.get("original_max_position_embeddings") or longest
    factor = float(values.get("factor") or longest / original)
    stated = {key: values[key] for key in ("beta_fast", "beta_slow") if values.get(key)}
    others = {"mscale", "mscale_all_dim", "attention_factor", "truncate"}
    stated |= {key: values[key] for key in others & values.keys()}
    return Yarn(factor=factor, original_context=original, **stated)


def _rope_settings(config: Mapping[str, Any], defaults: Mapping[str, float]) -> dict[str, Any]:
    """Return what config.json says of rotary embeddings, with `rope_type` and those that have
    `defaults` in it.

    Programs differ in which of the two tables they prefer, so where there are both they must say
    the same.
    """
    names = [name for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    tables = [_rope_table(name, config, defaults) for name in names or ["rope_parameters"]]
    if len(tables) == 2:
        new, old = tables
        for key in sorted(new.keys() | old.keys()):
            value, other = new.get(key), old.get(key)
            refuse_if(
                value != other,
                f"{key} = {value!r} in rope_parameters and {other!r} in rope_scaling; keep one of "
                "the two tables",
            )
    return tables[0]


def _rope_table(
    name: str, config: Mapping[str, Any], defaults: Mapping[str, float]
) -> dict[str, Any]:
    """Return one of the two tables, with what stands beside it."""
    table = config.get(name) or {}
    refuse_if(not isinstance(table, Mapping), f"{name} = {table!r}, but it must be an object")
    table = {key: value for key, value in table.items() if value is not None}
    old, new = table.pop("type", None), table.get("rope_type")
    refuse_if(
        old and new and old != new, f"type = {old!r} and rope_type = {new!r} in {name}; keep one"
    )
    table["rope_type"] = new or old or "default"
    for key, default in defaults.items():
        inside, outside = table.get(key), config.get(key)
        refuse_if(
            None not in (inside, outside) and inside != outside,
            f"{key} = {outside!r} and another one, {inside!r}, in {name}; keep one",
        )
        if inside is None:
            table[key] = default if outside is None else outside
    return table
