"""The kernels compile for an H100 without a GPU, and what is said of their traffic is counted."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tools import benchmark_triton
from tools.benchmark_triton import KERNELS, SHARED, Sizes, compiled, pairs, traffic

SMALL = Sizes(tokens=3, heads=2, nope=8, rope=4, values=8, width=256, expert_width=16, rows=32)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_an_h100(name):
    """Without spilling registers; products by wgmma, on shared memory that an SM has."""
    usage = compiled(name)
    assert usage.spilled == 0 and usage.registers <= 255
    assert usage.shared <= SHARED
    assert usage.tensor_cores == name.endswith("product")


def test_the_traffic_of_the_twins_is_that_of_their_formulas():
    """Of SwiGLU in 16 pieces of 2 rows: bytes an element that is read and written, in turn cast to
    fp32, silu, times up, times weight, cast to bf16, put together; and of the rotation.
    """
    counted, sizes = traffic(SMALL), SMALL
    elements = sizes.rows * sizes.expert_width
    of_elements = (2 + 4) + (4 + 4) + (4 + 2 + 4) + (4 + 4) + (4 + 2) + (2 + 2)
    forward = counted["weighted_swiglu"]
    assert forward["operations"] == 5 * 16 + 1
    assert forward["twin_bytes"] == of_elements * elements + 4 * sizes.rows
    assert forward["kernel_bytes"] == (2 + 2 + 2) * elements + 4 * sizes.rows
    # copies of the others; for either half of the pairs two products of bf16 by cos or sin, which
    # give fp32, their sum or difference, and its place among the results
    heads = sizes.tokens * sizes.heads
    products = 2 * (2 + 4) + (4 + 4 + 4) + (4 + 2)
    rotated = heads * (sizes.nope * (2 + 2) + sizes.rope * products)
    tables = 4 * sizes.tokens * sizes.rope // 2 * 4  # each of cos and sin twice
    assert counted["rotate"]["operations"] == 9
    assert counted["rotate"]["twin_bytes"] == rotated + tables


def test_twins_run_on_this_machine():
    """What `benchmark.py gpu` times is callable; tests/ops and tests/gpu compare results."""
    for pair in pairs(torch.device("cpu"), SMALL).values():
        pair.twin()


def test_a_machine_without_triton_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: benchmark\.py triton compiles by triton; run"):
        benchmark_triton.run(tmp_path / "triton.json")
