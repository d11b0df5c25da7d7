"""At which tokens the answers of an exported model end when it is served.

`transformers` and servers stop at the `eos_token_id` of generation_config.json (vLLM and SGLang
also at config.json's and the tokenizer's). What ended the turns that were trained has to be among
them: where a base model's end of text is another token, its fine-tuned answers would never end.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import read_json_object
from torchsft.config import InputError

if TYPE_CHECKING:  # an import of seconds, which conversions do without
    from transformers import PreTrainedTokenizerBase

CONFIG, GENERATION = "config.json", "generation_config.json"
_KEY = "eos_token_id"


def read_generation_config(hf_dir: str | Path) -> dict[str, Any] | None:
    """Return the directory's generation_config.json; None where there is none."""
    path = Path(hf_dir) / GENERATION
    return read_json_object(path) if path.is_file() else None


def stop_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None, ends: Iterable[int]
) -> list[int]:
    """Return ids of the tokens at which generation with an export's files stops.

    Args:
        config, generation: of the base, the latter None where it has no such file.
        ends: ids of the tokens that ended trained turns.

    Returns:
        Those that generation_config.json (else config.json) names, then the others that ended
        trained turns.

    Raises:
        InputError: one of the files has an `eos_token_id` that is neither an id nor a list of ids.
    """
    own = _ids((generation or {}).get(_KEY), GENERATION)
    return _joined(own or _ids(_holder(config).get(_KEY), CONFIG), ends)


def with_ends(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None, ends: Iterable[int]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Both files' contents as an export has them: `eos_token_id` names all of `ends` too, wherever
    the base keeps it.

    Arguments and errors as of `stop_ids`.

    Returns:
        config.json, and generation_config.json: one is made where the base has none. Without
            `ends`, as they were.
    """
    ends = list(ends)
    if not ends:
        return dict(config), generation and dict(generation)
    stops = stop_ids(config, generation, ends)
    config = dict(config)
    places = [config]
    if isinstance(text := config.get("text_config"), Mapping) and text.get(_KEY) is not None:
        config["text_config"] = dict(text)
        places = [config["text_config"]] + [config] * (config.get(_KEY) is not None)
    for place in places:
        _name(place, stops, ends, CONFIG)
    if generation is not None:
        generation = dict(generation)
        _name(generation, stops, ends, GENERATION)
    else:
        base = _holder(config)
        others = {
            key: base[key] for key in ("bos_token_id", "pad_token_id") if base.get(key) is not None
        }
        generation = {_KEY: base[_KEY]} | others
    return config, generation


def about(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    ends: Iterable[int],
    tokenizer: "PreTrainedTokenizerBase",
) -> str:
    """Return what is to be said of an export's ends, in words that go on a sentence: what its base
    lacks, and what is odd.
    """

    def shown(token: int) -> str:
        return f"{tokenizer.convert_ids_to_tokens(token)} ({token})"

    known, said = stop_ids(config, generation, ()), ""
    if added := [shown(token) for token in ends if token not in known]:
        said += f"; its eos ids name {', '.join(added)} too, with which trained turns ended"
    pads = (
        tokenizer.pad_token_id,
        _holder(config).get("pad_token_id"),
        (generation or {}).get("pad_token_id"),
    )
    for pad in dict.fromkeys(pads):
        if pad in ends:
            said += (
                f"; {shown(pad)}, with which trained turns ended, stays the pad token too, so that "
                "a tool which leaves padding out of the loss by its id would not train it"
            )
    return said


def write_generation_config(
    generation: Mapping[str, Any] | None, source: Path, folder: Folder
) -> None:
    """Write it in place of the one that was copied from the `source`; not where that is the
    same.
    """
    if generation is not None and generation != read_generation_config(source):
        folder.write_text(GENERATION, json.dumps(generation, indent=2) + "\n")


def _holder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that has the model's special tokens."""
    text = config.get("text_config")
    return (
        text
        if config.get(_KEY) is None and isinstance(text, Mapping) and text.get(_KEY) is not None
        else config
    )


def _name(place: dict[str, Any], stops: list[int], ends: list[int], file: str) -> None:
    """Add to one file's eos ids what they lack; where the file had none, these are `stops`."""
    own = _ids(place.get(_KEY), file)
    named = _joined(own, ends) if own else stops
    if named != own:
        place[_KEY] = named


def _joined(ids: Iterable[int], more: Iterable[int]) -> list[int]:
    return list(dict.fromkeys([*ids, *more]))


def _ids(value: Any, file: str) -> list[int]:
    """`eos_token_id` as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if all(type(each) is int for each in ids):
        return ids
    raise InputError(
        f"{file} of the model has eos_token_id {value!r}, where an id or a list of "
        f"ids is needed; correct it"
    )
