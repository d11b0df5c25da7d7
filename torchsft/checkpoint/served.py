"""What an exported directory says of the tokens that end a turn, so that a server stops where training let turns end.

Fine-tuning often teaches another end than the base model's (ChatML's `<|im_end|>` where the base has `<|endoftext|>`). A server
reads `eos_token_id` of generation_config.json, or else of config.json, and would go on for ever. Both name the base's ids
first, and then those that training added; everything else stays the base's.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torchsft.checkpoint.hf_directory import read_config
from torchsft.checkpoint.weight_files import read_json_object

GENERATION = "generation_config.json"
# What a generation_config.json that is written anew takes from config.json.
_TOKENS = ("bos_token_id", "pad_token_id")


def stop_ids(source: str | Path, ends: Iterable[int]) -> list[int]:
    """The tokens at which a server stops that has an export of a model from `source`.

    Args:
        source: the directory that training began with.
        ends: ids of tokens that ended trained turns.
    """
    return _listed(generation_config(source, ends).get("eos_token_id"))


def generation_config(source: str | Path, ends: Iterable[int]) -> dict[str, Any]:
    """The export's generation_config.json: the base's with all ends, or one made of the base's config.json."""
    path = Path(source) / GENERATION
    config = read_config(source)
    if path.is_file():
        found = read_json_object(path)
        if found.get("eos_token_id") is None:
            found = found | {"eos_token_id": _of_config(config)}
    else:
        found = {key: _value(config, key) for key in _TOKENS} | {"eos_token_id": _of_config(config)}
        found = {key: value for key, value in found.items() if value is not None}
    eos = _with(found.get("eos_token_id"), ends)
    return found if eos is None else found | {"eos_token_id": eos}


def config_with_ends(config: Mapping[str, Any], ends: Iterable[int]) -> dict[str, Any]:
    """The export's config.json with all ends, wherever the base keeps its eos ids (a `text_config`, too)."""
    found, ends = dict(config), list(ends)
    text = found.get("text_config")
    in_text = isinstance(text, dict) and text.get("eos_token_id") is not None
    if in_text:
        found["text_config"] = text | {"eos_token_id": _with(text["eos_token_id"], ends)}
    if found.get("eos_token_id") is not None or not in_text:
        eos = _with(found.get("eos_token_id"), ends)
        found |= {} if eos is None else {"eos_token_id": eos}
    return found


def _value(config: Mapping[str, Any], key: str) -> Any:
    text = config.get("text_config")
    below = text.get(key) if isinstance(text, dict) else None
    return config[key] if config.get(key) is not None else below


def _of_config(config: Mapping[str, Any]) -> Any:
    return _value(config, "eos_token_id")


def _listed(eos: Any) -> list[int]:
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]


def _with(eos: Any, ends: Iterable[int]) -> Any:
    """The base's ids and those of `ends` that it lacks; as the base has them where it lacks none."""
    known = _listed(eos)
    new = sorted(set(ends) - set(known))
    return known + new if new else eos
