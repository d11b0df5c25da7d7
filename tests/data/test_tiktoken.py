"""Kimi's tokenizer, as it is published: `tiktoken.model` beside Python code that is never run.

The expected ids were computed by the package `tiktoken` with Kimi's own pattern.
"""

from __future__ import annotations

import base64
import json

import pytest

from torchsft.config import InputError
from torchsft.data.tokenizer import load_tokenizer

HAN = "中文".encode()
TOKENS = [bytes([byte]) for byte in range(256)]
TOKENS += [b"He", b"ll", b"Hell", b"Hello", b" w", HAN[:2], HAN[:3], HAN[:5], HAN]
TOKENS += ["文E".encode(), b"12", b"'s", b"\n\n"]
SETTINGS = {
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "added_tokens_decoder": {"269": {"content": "[BOS]"}, "271": {"content": "<|im_end|>"}},
    "bos_token": "[BOS]",
    "eos_token": "<|im_end|>",
    "additional_special_tokens": ["<|im_end|>"],
    "chat_template": "{{ messages[0]['content'] }}<|im_end|>",
}


def write(directory, settings):
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(TOKENS)]
    (directory / "tiktoken.model").write_text("".join(lines))
    (directory / "tokenization_kimi.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello w", [259, 260]),
        ("中文English", [264, *b"English"]),  # Han is split from other letters
        ("HelloHell's", [259, 258, 267]),  # a capital begins a piece
        ("12345", [266, *b"345"]),
        ("a\n\n  b", [97, 268, 32, 32, 98]),
        ("[BOS]Hello<|im_end|>", [269, 259, 271]),
        ("<|reserved_token_270|><|reserved_token_524|>", [270, 524]),
    ],
)
def test_ids_are_those_of_the_published_code_which_is_not_run(tmp_path, text, ids):
    write(tmp_path, SETTINGS)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (269, 271, 525)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "He"}], tokenize=False)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_refused(tmp_path):
    write(tmp_path, SETTINGS)
    (tmp_path / "tiktoken.model").write_text("aGVsbG8=\n")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
