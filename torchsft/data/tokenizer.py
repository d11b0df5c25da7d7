"""The tokenizer of a Hugging Face directory: its chat templates, its flags, and the tokens that end
generation.
"""

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from torchsft.config import InputError
from torchsft.data.tiktoken import is_kimi, read_kimi

# A call of the function by which chat templates ask for the date, with its format as a plain
# string.
DATE_CALL = re.compile(r"""\bstrftime_now\s*\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""")
# Whose add_bos_token: false takes away a BOS that tokenizer.json adds (in transformers 4, and in
# servers today).
CLASSES_WITH_FLAGS = {
    f"{name}Tokenizer{fast}"
    for name in ("Llama", "CodeLlama", "Gemma", "Cohere")
    for fast in ("", "Fast")
}


def load_tokenizer(
    hf_dir: str | Path, *, chat_template: str | None = None, date: str | None = None
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a Hugging Face directory as servers load it. Local files only; code
    in them is never run.

    `tokenizer(text)` gives what a server makes of a text without chat template: `add_bos_token` and
    `add_prefix_space` of tokenizer_config.json are followed, which transformers 5 drops for classes
    that it does not know.

    Args:
        chat_template: file with a chat template in place of the directory's.
        date: day (YYYY-MM-DD) that templates are given which ask for it (`strftime_now`); None:
            today.

    Raises:
        InputError: no tokenizer.json (nor Kimi's tiktoken.model), an unreadable one, or no usable
            chat template.
    """
    hf_dir = Path(hf_dir)
    if not hf_dir.is_dir():
        raise InputError(
            f"{hf_dir} is not a directory; give --model.path a Hugging Face model directory"
        )
    of_kimi = is_kimi(hf_dir)
    if not of_kimi and not (hf_dir / "tokenizer.json").is_file():
        other = [
            name for name in ("tiktoken.model", "tokenizer.model") if (hf_dir / name).is_file()
        ]
        found = f", only {' and '.join(other)}" if other else ""
        remedy = "convert its tokenizer and add it (Python code in a model directory is never run)"
        raise InputError(f"{hf_dir} has no tokenizer.json{found}; {remedy}")
    try:
        if of_kimi:
            tokenizer = read_kimi(hf_dir)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_dir, local_files_only=True)
        _follow_flags(tokenizer, _read_json(hf_dir / "tokenizer_config.json"))
    # the Rust parser raises plain Exception, a missing key is a KeyError, ...
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"the tokenizer of {hf_dir} cannot be read ({reason}); replace its tokenizer files"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    _check_templates(tokenizer.chat_template, hf_dir)
    day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    tokenizer.chat_template = _each(tokenizer.chat_template, lambda template: at_day(template, day))
    return tokenizer


def read_chat_template(path: str) -> str:
    """Return the chat template in a file.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--data.chat-template {path} cannot be read ({error}); name a Jinja file"
        ) from None
    if not text.strip():
        raise InputError(f"--data.chat-template {path} is empty; name a file with a Jinja template")
    return text


def at_day(template: str, day: datetime.date) -> str:
    """Return a chat template that asks for the date, with `day` in place of the question; any other
    one as it is.

    Raises:
        InputError: it asks with a format that is not a plain string, so that the answer would be
            that of the clock.
    """
    midnight = datetime.datetime.combine(day, datetime.time())
    template = DATE_CALL.sub(
        lambda call: json.dumps(midnight.strftime(call[2]), ensure_ascii=False), template
    )
    if re.search(r"\bstrftime_now\s*\(", template):
        problem = "the chat template calls strftime_now with a format that is not a plain string"
        raise InputError(
            f"{problem}; write the format into the call, and give that file to --data.chat-template"
        )
    return template


def eos_ids(hf_dir: str | Path) -> tuple[int, ...]:
    """Return the ids of the tokens at which servers stop: `eos_token_id` of generation_config.json,
    else of config.json.
    """
    for name in ("generation_config.json", "config.json"):
        found = _read_json(Path(hf_dir) / name).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def _each(templates: str | dict[str, str], change: Callable[[str], str]) -> str | dict[str, str]:
    if isinstance(templates, str):
        return change(templates)
    return {name: change(template) for name, template in templates.items()}


def _check_templates(templates: str | dict[str, str] | None, hf_dir: Path) -> None:
    remedy = (
        "add a chat_template.jinja, such as that of the model's chat version, or give "
        "--data.chat-template FILE"
    )
    if not templates or not isinstance(templates, str | dict):
        raise InputError(f"{hf_dir} has no chat template; {remedy}")
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates))
        remedy = (
            "name one of them default in tokenizer_config.json, or give --data.chat-template FILE"
        )
        raise InputError(
            f"{hf_dir} has chat templates named {names}, but none named default; {remedy}"
        )


def _follow_flags(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> None:
    """Give the backend what tokenizer_config.json says.

    Not `add_eos_token`: servers leave it out, as a prompt does not end there, and a trained text
    gets its end anyway.
    Nor `clean_up_tokenization_spaces`: it changes how ids are shown, not which ids a text has.
    """
    bos, wanted = tokenizer.bos_token_id, settings.get("add_bos_token")
    if bos is not None and isinstance(wanted, bool):
        adds = tokenizer("").input_ids[:1] == [bos]
        has_flag = settings.get("tokenizer_class") in CLASSES_WITH_FLAGS
        if wanted != adds and (wanted or has_flag):
            tokenizer.add_bos_token = wanted
    space, before = settings.get("add_prefix_space"), tokenizer.backend_tokenizer.pre_tokenizer
    if before is not None and isinstance(space, bool):
        state = json.loads(before.__getstate__())
        if _set_prefix_space(state, space, legacy=settings.get("legacy", True)):
            before.__setstate__(json.dumps(state).encode())
            tokenizer.backend_tokenizer.pre_tokenizer = before


def _set_prefix_space(state: dict[str, Any], wanted: bool, legacy: bool) -> bool:
    """Set `add_prefix_space` in the state of a pre-tokenizer, and in those that it is made of.

    Returns:
        Whether anything changed.
    """
    if state.get("type") == "Sequence":
        changed = [_set_prefix_space(part, wanted, legacy) for part in state["pretokenizers"]]
        return any(changed)
    if state.get("type") == "ByteLevel" and state["add_prefix_space"] != wanted:
        state["add_prefix_space"] = wanted
        return True
    if state.get("type") == "Metaspace" and (state["prepend_scheme"] != "never") != wanted:
        state["prepend_scheme"] = ("always" if legacy else "first") if wanted else "never"
        return True
    return False


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it") from None
    return found if isinstance(found, dict) else {}
