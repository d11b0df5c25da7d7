"""Seconds of kernels and collectives by hand, and what an estimate says of a run."""

import dataclasses
import json

import pytest
import torch

from tests.tools.planning.test_blocks import LATENT, config_of
from tools import benchmark_products, published
from tools.benchmark_products import Shape
from tools.planning import backtest, costs, estimate
from tools.planning.blocks import measure
from tools.planning.costs import COLLECTIVES, EXCHANGE, PRODUCTS, Software, seconds_of
from tools.planning.gpus import GPUS, Measured, read_gpu
from tools.planning.operations import GROUPED, MEMORY, PRODUCT, Operation
from torchsft.config import Data, InputError, Model, Train
from torchsft.metrics.throughput import mfu
from torchsft.models.families import read_model_config

H100 = GPUS["h100-80g"]
OURS = Software()


def test_a_kernel_takes_as_long_as_its_products_or_its_bytes():
    gpu = dataclasses.replace(H100, efficiency={**H100.efficiency, "memory": 0.5})
    copy = Operation(MEMORY, bytes=3_350_000_000)
    assert costs.kernel_seconds(copy, gpu, OURS, False) == pytest.approx(2e-3 + costs.KERNEL)
    size = 4096
    square = Operation(PRODUCT, 3, 2.0 * size**3, (size, size, size), "bf16")
    share = 0.72 * size / (size + 64) * size / (size + 200)
    seconds = costs.kernel_seconds(square, H100, OURS, False)
    assert seconds == pytest.approx(2 * size**3 / (989.4e12 * share) + costs.KERNEL)
    in_fp8 = dataclasses.replace(square, dtype="fp8")
    with pytest.raises(InputError, match="in fp8, of which a100-80g has none"):
        costs.kernel_seconds(in_fp8, GPUS["a100-80g"], OURS, False)
    assert costs.kernel_seconds(in_fp8, H100, OURS, False) < 0.7 * seconds


def test_collectives_take_what_their_links_take():
    """Within a node by NVLink; over nodes each border is crossed once, on all ports together; rows
    of an all-to-all go straight.
    """
    node, network = 450e9 * 0.75, 50e9 * 0.8
    eight, sixteen, rail = tuple(range(8)), tuple(range(16)), (0, 8, 16, 24)

    def seconds(kind, ranks, size, software=OURS):
        return costs.collective_seconds(Operation(kind, size, ranks=ranks), H100, software)

    size = 15 * 10**8
    assert seconds("all-gather", eight, size) == pytest.approx(size / node + 3 * 10e-6)
    whole = size * 16 / 15
    assert seconds("reduce-scatter", sixteen, size) == pytest.approx(
        max(whole / 2 / 8 / network, size / node) + 4 * 25e-6
    )
    assert seconds("all-gather", rail, size) == pytest.approx(size / network + 2 * 25e-6)
    leaving = size * 8 / 15 / network / 0.85
    assert seconds("all-to-all", sixteen, size) == pytest.approx(leaving + 25e-6)
    deepep = Software(deepep=True)
    assert seconds("all-to-all", rail, size, deepep) == pytest.approx(size / 45e9 + 25e-6)


def test_what_runs_beside_a_collective_hides_it():
    """Rows as far as shared experts go on meanwhile, FSDP2's collectives as far as anything does;
    a collective of tp is waited for.
    """
    ranks = tuple(range(8))
    product = Operation(PRODUCT, 0, 2.0 * 8192**3, (8192, 8192, 8192), "bf16")
    one = costs.kernel_seconds(product, H100, OURS, False)
    rows = Operation("all-to-all", int(2 * one * 450e9 * 0.75 * 0.85), ranks=ranks, flight=1)
    rows_take = costs.collective_seconds(rows, H100, OURS)
    beside = dataclasses.replace(product, flight=1)
    found = seconds_of(costs.Counter([product, beside, rows]), H100, OURS, False)
    assert found[PRODUCTS] == pytest.approx(2 * one)
    assert found[EXCHANGE] == pytest.approx(rows_take - one)
    gather = Operation("all-gather", int(1.5 * one * 450e9 * 0.75), ranks=ranks, fsdp=True)
    assert seconds_of(costs.Counter([product, product, gather]), H100, OURS, False)[
        COLLECTIVES
    ] == pytest.approx(0)
    of_tp = dataclasses.replace(gather, fsdp=False)
    found = seconds_of(costs.Counter([product, product, of_tp]), H100, OURS, False)
    assert found[COLLECTIVES] == pytest.approx(costs.collective_seconds(of_tp, H100, OURS))


def test_measured_products_correct_those_of_like_shapes(tmp_path):
    """What the benchmark measures, here on this CPU, is read from its file."""
    shapes = [Shape(64, 32, 64), Shape(16, 32, 64, experts=2)]
    found = benchmark_products.measure(
        torch.device("cpu"), {"bf16": 1e9}, lambda call: call().sum().item() * 0 + 1e-3, shapes
    )
    assert [each["share"] for each in found] == pytest.approx(
        [2 * 64 * 32 * 64 / 1e6, 2 * 2 * 16 * 32 * 64 / 1e6]
    )
    report, file = tmp_path / "gpu.json", tmp_path / "gpu.yaml"
    measured = Measured("bf16", 4096, 7168, 2048, 0, 0.4)
    report.write_text(json.dumps({"products": [dataclasses.asdict(measured)]}))
    file.write_text("like: h100-80g\nproducts: gpu.json\nnetwork_bandwidth: 12.5e9\n")
    gpu = read_gpu(str(file))
    assert gpu.products == (measured,)
    assert gpu.source("products").startswith("measured") and gpu.network_bandwidth == 12.5e9

    def share(gpu, *shape, kind=PRODUCT):
        return costs.product_share(Operation(kind, shape=shape, dtype="bf16"), gpu)

    assert share(gpu, 4096, 7168, 2048) == pytest.approx(0.4, rel=0.01)
    assumed = share(H100, 4096, 7168, 4096)
    assert 0.4 < share(gpu, 4096, 7168, 4096) < assumed
    assert share(gpu, 64, 64, 64) == pytest.approx(share(H100, 64, 64, 64), rel=0.05)
    grouped = {"kind": GROUPED}
    shape = 1024, 4096, 7168, 8
    assert share(gpu, *shape, **grouped) == share(H100, *shape, **grouped)
    file.write_text("like: h100-80g\nproducts: none.json\n")
    with pytest.raises(InputError, match=r"none\.json cannot be read"):
        read_gpu(str(file))


def estimated(preset="v3_256"):
    """Of V3 on 256 GPUs with room for what is asked of it."""
    config, found = published.PRESETS[preset](), published.model_config(preset)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=100, epochs=None)
    )
    blocks = measure(config, found, 256)
    even = measure(config, found, 256, imbalance=1.0)
    options = {"with_range": False}
    results = {
        "plain": estimate.estimate(config, found, 256, H100, blocks=blocks),
        "b200": estimate.estimate(config, found, 256, GPUS["b200-192g"], blocks=blocks, **options),
        "even": estimate.estimate(config, found, 256, H100, blocks=even, **options),
    }
    for software in ({"deepep": True}, {"hidden_exchange": True}, {"cuda_graphs": True}):
        results[next(iter(software))] = estimate.estimate(
            config, found, 256, H100, blocks=blocks, software=Software(**software), **options
        )
    return config, results


def test_an_estimate_is_consistent(ranks):
    ((config, found),) = ranks(1, estimated)
    plain = found["plain"]
    assert plain.low < plain.step_seconds < plain.high
    assert sum(plain.parts.values()) == pytest.approx(plain.step_seconds)
    assert max(event.end for event in plain.events) == plain.step_seconds
    assert {event.pp_rank for event in plain.events} == set(range(16))
    assert plain.bubble == pytest.approx(
        plain.parts["waiting for other pipeline ranks"] / plain.step_seconds
    )
    # interleaved, of unequal stages: at least (pp - 1) / (v M + pp - 1)
    assert 15 / (2 * 32 + 15) < plain.bubble < 0.35
    tokens = config.train.global_batch_size * 4096
    assert plain.tokens_per_second_per_gpu == pytest.approx(tokens / plain.step_seconds / 256)
    flops = read_model_config(published.model_config("v3_256")).flops([512] * 8) * 512 / 256
    assert plain.mfu == pytest.approx(mfu(flops, plain.step_seconds, 989.4))
    assert plain.gpu_hours == pytest.approx(100 * plain.step_seconds * 256 / 3600)
    assert plain.money == pytest.approx(plain.gpu_hours * H100.price)
    for faster in ("b200", "even", "deepep", "hidden_exchange"):
        assert found[faster].step_seconds < plain.step_seconds
    assert found["cuda_graphs"].step_seconds <= plain.step_seconds
    text = "\n".join(estimate.lines_of(plain, H100))
    for said in ("USD at 2.5", "matrix products", "1.5 x the mean rows", "none measured"):
        assert said in text
    assert "events" not in estimate.to_json(plain)


def test_options_of_software_are_checked():
    with pytest.raises(InputError, match="those known are fa3, deepep"):
        costs.software_of(["deep-ep"], H100)
    with pytest.raises(InputError, match=r"9\.0, but a100-80g has 8\.0"):
        costs.software_of(["fa3"], GPUS["a100-80g"])
    assert costs.software_of(["cuda-graphs"], H100) == Software(cuda_graphs=True)


def test_documents_are_those_of_the_data(tmp_path):
    """Packed as training packs them: as many tokens, and steps of an epoch."""
    from recipes.debug_task import write_debug_data, write_debug_model

    write_debug_model(tmp_path)
    write_debug_data(tmp_path, train=64, held_out=1)
    config = config_of(rows=2, dp_shard=2)
    config = dataclasses.replace(
        config,
        model=Model(path=str(tmp_path)),
        data=Data(train=(str(tmp_path / "train.jsonl"),), seq_len=256, template_date="2026-01-01"),
        train=Train(global_batch_size=2, epochs=1),
    )
    text = estimate.read_text(config, LATENT | {"vocab_size": 4096}, 2)
    assert 0.5 < text.filled <= 1
    assert max(text.documents) <= 256 and sum(text.documents) > 0
    tokens = text.filled * 256 * 2 * text.steps
    assert len(text.documents) <= 64 and tokens >= 0.9 * sum(text.documents)
    assert "train.jsonl" in text.source


def test_a_row_of_the_backtest_is_honest_about_what_differs(ranks):
    """Qwen3-30B-A3B: with their software and with ours; what it was told stands in the table."""
    run = next(each for each in backtest.RUNS if "natural" in each.name)
    (row,) = ranks(1, backtest.row_of, run=run)
    assert row.low < row.theirs < row.high and row.ours < row.theirs
    assert row.error == row.theirs / 8655 - 1
    head, _, line, *more = backtest.lines_of([row])
    assert head.count("|") == line.count("|")
    for said in (
        "8,655",
        f"{row.theirs:,.0f}",
        f"{row.error:+.0%}",
        "fa3, deepep",
        "not published",
    ):
        assert said in line
    assert any("deepep; without it NCCL's" in text for text in more)
