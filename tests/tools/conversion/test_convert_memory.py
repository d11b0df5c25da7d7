# ruff: noqa: E501 (programs in strings)
"""Conversion and comparison hold parts of tensors, whatever their size."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_config
from tools.conversion import convert

MEASURED = """
import json, sys
from pathlib import Path
import torch
from tools.conversion import convert, verify

torch.set_num_threads(1)
work, options = Path(sys.argv[1]), {"workers": 1, "part_elements": 1 << 18, "progress": False}

def peak():
    # Not ru_maxrss: a new process takes that over from the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def everything(name):
    convert.to_dcp(work / name, work / f"{name}-dcp", **options)
    peaks = [peak()]
    for dtype in ("bf16", "fp8"):
        convert.to_hf(work / f"{name}-dcp", work / f"{name}-{dtype}", dtype=dtype, **options)
        peaks.append(peak())
    assert not verify.verify(work / name, work / f"{name}-bf16", tolerance=1e-2, **options).differences
    return [*peaks, peak()]

before = everything("small")[-1]
grown = [after - before for after in everything("large")]
options["part_elements"] = 1 << 26
convert.to_dcp(work / "large", work / "at-once", **options)
print(json.dumps([*grown, peak() - before]))
"""


def sparse_source(directory, rows, cols):
    """A directory whose embedding is rows x cols, in zeros that take no room on the disk."""
    directory.mkdir()
    sizes = {
        "vocab_size": rows,
        "hidden_size": cols,
        "num_hidden_layers": 1,
        "intermediate_size": 1024,
    }
    config = tiny_config(
        tie_word_embeddings=True, architectures=["DeepseekV3ForCausalLM"], **sizes
    ).to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for pieces in convert.meta_model(config).checkpoint_pieces().values():
        for piece in pieces:
            size = 4 * torch.Size(piece.hf_shape).numel()
            header[piece.key] = {
                "dtype": "F32",
                "shape": piece.hf_shape,
                "data_offsets": [end, end + size],
            }
            end += size
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="measures memory the way Linux does"
)
def test_memory_is_bounded_by_the_part_and_not_by_the_tensor(tmp_path):
    sparse_source(tmp_path / "small", 512, 256)
    assert sparse_source(tmp_path / "large", 131072, 256) > 134e6  # one tensor of 134 MB
    (tmp_path / "script.py").write_text(MEASURED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    *grown, at_once = json.loads(ended.stdout)
    assert len(grown) == 4 and max(grown) < 15e6, grown  # a part is 1 MB
    assert at_once > 100e6  # the largest tensor, so that the measure is one
