"""The Triton kernels: their numbers under Triton's interpreter. That they compile for an H100 is in
tests/tools/test_benchmark_triton.py. Skipped where triton is not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchsft

pytest.importorskip("triton")


def test_kernels_compute_what_their_plain_twins_do():
    """What is asserted stands in interpreted.py and interpreted_rows.py."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.ops.interpreted"]
    root = Path(torchsft.__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
