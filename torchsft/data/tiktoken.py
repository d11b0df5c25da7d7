"""The tokenizer of Kimi (K2, Moonlight), which is published as `tiktoken.model` beside Python code.

The code is never run. What it computes: byte-pair encoding by the ranks in that file, of the pieces
into which one pattern splits a text; 256 special tokens follow, of which tokenizer_config.json
names some. (`transformers` converts such a file too, but with another pattern.)
"""

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_FILE = "tiktoken.model"
_CLASS = "tokenization_kimi.TikTokenTokenizer"  # what tokenizer_config.json calls the code
_SPECIAL_TOKENS = 256
# Letters but Han: of words, and as parts of words with and without capitals.
_OTHERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CAPITALS, _SMALL = rf"[\p{{Lu}}\p{{Lt}}{_OTHERS}]", rf"[\p{{Ll}}{_OTHERS}]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PIECES = "|".join(
    [
        r"[\p{Han}]+",
        f"{_BEFORE}{_CAPITALS}*{_SMALL}+{_AFTER}",
        f"{_BEFORE}{_CAPITALS}+{_SMALL}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def is_kimi(hf_dir: Path) -> bool:
    """Whether a directory has Kimi's tokenizer and no tokenizer.json."""
    if (hf_dir / "tokenizer.json").is_file() or not (hf_dir / _FILE).is_file():
        return False
    try:
        return _CLASS in json.dumps(_settings(hf_dir).get("auto_map"))
    except (OSError, ValueError, AttributeError):
        return False


def _settings(hf_dir: Path) -> dict[str, Any]:
    return json.loads((hf_dir / "tokenizer_config.json").read_text(encoding="utf-8"))


def read_kimi(hf_dir: Path) -> PreTrainedTokenizerFast:
    """Return Kimi's tokenizer, with what tokenizer_config.json says.

    Raises:
        ValueError, KeyError, OSError: a file is damaged.
    """
    settings = _settings(hf_dir)
    letters = bytes_to_unicode()
    ranks = {}
    for line in (hf_dir / _FILE).read_text(encoding="ascii").splitlines():
        if line:
            token, rank = line.split()
            ranks["".join(letters[byte] for byte in base64.b64decode(token))] = int(rank)
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    # A piece that is a token is that token, as in tiktoken.
    backend = Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    named = settings.get("added_tokens_decoder", {})
    for number in range(len(ranks), len(ranks) + _SPECIAL_TOKENS):
        said = named.get(str(number), {"content": f"<|reserved_token_{number}|>"})
        token = AddedToken(said["content"], normalized=False, special=True)
        backend.add_special_tokens([token])
        if backend.token_to_id(said["content"]) != number:
            raise ValueError(f"{said['content']} is named twice in added_tokens_decoder")
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")
    tokens = {name: settings[name] for name in names if settings.get(name) is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    template = hf_dir / "chat_template.jinja"
    tokenizer.chat_template = settings.get("chat_template")
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer
