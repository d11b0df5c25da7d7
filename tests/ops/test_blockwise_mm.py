"""The Triton kernels of block-wise fp8: their numbers under Triton's interpreter, and that they
compile for an H100 without a GPU. Skipped where triton is not installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchsft

triton = pytest.importorskip("triton")
FP8, FP32, BF16, INT = "*fp8e4nv", "*fp32", "*bf16", "*i32"
QUANTISES = {"x": BF16, "w": BF16, "q": FP8, "scales": FP32, "first": INT, "end": INT}
MULTIPLIES = {"x_scales": FP32, "w_scales": FP32, "a_scales": FP32, "b_scales": FP32, "y": BF16}
MULTIPLIES |= {"x": FP8, "w": FP8, "a": FP8, "b": FP8}
MULTIPLIES |= {"first": INT, "expert_of": INT, "end": INT, "bounds": INT}


def test_kernels_compute_what_the_plain_products_do():
    """And quantise weights to the bytes of a file, once for each step of the optimizer."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.ops.interpreted"]
    root = Path(torchsft.__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "name, types, constants",
    [
        ("rows", QUANTISES, {"power_of_two": True, "height": 16}),
        ("columns", QUANTISES, {"power_of_two": True, "width": 64}),
        ("weight", QUANTISES, {"power_of_two": True, "transposed": True}),
        ("rows_product", MULTIPLIES, {}),
        ("columns_product", MULTIPLIES, {}),
    ],
)
def test_kernels_compile_for_an_h100(name, types, constants, tmp_path):
    """Without spilling registers; products by wgmma, on shared memory that an SM has (227 KiB)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchsft.ops import blockwise_mm

    kernel = getattr(blockwise_mm, f"_{name}_kernel")
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        given = "constexpr" if argument in constants else types.get(argument, "i32")
        signature[argument] = given
        if given.startswith("*") or argument in ("R", "C", "O", "I", "M"):  # multiples of 16
            attributes[(position,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    is_product = name.endswith("product")
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options=blockwise_mm.LAUNCH if is_product else {},
    )
    assert compiled.metadata.shared <= 227 * 1024
    assert ("wgmma" in compiled.asm["ptx"]) == is_product
    (tmp_path / "kernel").write_bytes(compiled.asm["cubin"])
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    usage = [tool, "-res-usage", tmp_path / "kernel"]
    printed = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", printed) == ["0"]
