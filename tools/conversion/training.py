"""What a training checkpoint knows of its run, beyond the weights."""

import json
from pathlib import Path

from torchsft.checkpoint.converted import is_dcp
from torchsft.checkpoint.hf_directory import read_config
from torchsft.config import InputError
from torchsft.models.language_model import Mtp

TRAINER = "trainer.json"


def is_training(directory: str | Path) -> bool:
    """Whether a directory is a training checkpoint."""
    return is_dcp(directory) and (Path(directory) / TRAINER).is_file()


def chat_template(source: Path) -> str | None:
    """Return the chat template that a checkpoint's run was given in place of its model's."""
    if not is_training(source):
        return None
    path = (read_config(source).get("data") or {}).get("chat_template")
    if not path:
        return None

    from torchsft.data.tokenizer import read_chat_template  # imports transformers

    return read_chat_template(path)


def trained_ends(source: Path) -> list[int]:
    """Return ids of the tokens that ended the turns trained so far; of a training checkpoint that
    knows them.
    """
    if not is_training(source):
        return []
    counters = json.loads((source / TRAINER).read_text(encoding="utf-8"))["extra"]
    return counters.get("end_tokens", [])


def trained_mtp(source: Path) -> Mtp:
    """Return what a checkpoint's run does with MTP layers."""
    if not is_training(source):
        return "keep"
    return (read_config(source).get("model") or {}).get("mtp", "keep")


def default_base(source: Path) -> Path:
    """Return where to-hf takes what is not in a DCP directory from, unless the user names it.

    Raises:
        InputError: a training checkpoint whose run's model is not known or not there.
    """
    if not is_training(source):
        return source
    path = (read_config(source).get("model") or {}).get("path")
    if path is None or not Path(path).is_dir():
        was = f"that of its run, {path}, is not here"
        if path is None:
            was = "its run's config.json names none"
        raise InputError(
            f"{source} needs the Hugging Face directory that training began with, and "
            f"{was}; name it with --base"
        )
    return Path(path)
