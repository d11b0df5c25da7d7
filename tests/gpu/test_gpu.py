"""What only a GPU can show; `pytest -m gpu` on a machine that has one. Elsewhere skipped, with a
sentence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import test_layouts
from tests.ops.passes import Operations
from tests.precision.test_blockwise_compute import assert_no_sorted_copy_is_needed, experts
from tests.ranks import RankPool
from tests.tiny import tiny_qwen3_config, write_conversations, write_tiny_model
from tools.benchmark_modes import MODES, SELECTIVE
from torchsft import load_model, ops
from torchsft.config import Train
from torchsft.models import rope
from torchsft.models.attention import attend, flash_kernel, locate_documents
from torchsft.ops import swiglu
from torchsft.parallel import activation_offload
from torchsft.parallel.activation import apply_activation_checkpointing
from torchsft.parallel.world import World, deterministic
from torchsft.precision.blockwise import quantise
from torchsft.precision.blockwise_compute import BlockwiseProducts

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
LENGTHS = [70, 1, 130, 30]
PADDING = 25


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """V3's head widths (192-wide keys, 128-wide values) in a model that is otherwise tiny."""
    path = tmp_path_factory.mktemp("gpu")
    return write_tiny_model(
        path,
        hidden_size=64,
        moe_intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3"])
def either(request, tmp_path_factory, directory):
    """That model, or one whose query heads share key/value heads, with Qwen3's head width."""
    if request.param == "deepseek_v3":
        return directory
    config = tiny_qwen3_config(hidden_size=64, moe_intermediate_size=32, head_dim=128)
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), config=config)


def batch(device):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS) + PADDING
    tokens = torch.randint(0, 272, (total,), generator=generator)
    labels = torch.randint(0, 272, (total,), generator=generator)
    labels[sum(LENGTHS) :] = -100
    positions = torch.cat(
        [torch.arange(n) for n in LENGTHS] + [torch.zeros(PADDING, dtype=torch.int64)]
    )
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "tokens": tokens.to(device),
        "labels": labels.to(device),
        "positions": positions.to(device),
        "cu_seqlens": cu_seqlens.to(device),
        "max_seqlen": max(LENGTHS),
    }


def results(model, device):
    """Logits of real tokens, loss, gradients; all on the CPU in fp32."""
    inputs = batch(device)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs)[: sum(LENGTHS)].float().cpu()
    loss = model(**inputs, labels=labels)
    loss.backward()
    return logits, loss.item(), {n: p.grad.float().cpu() for n, p in model.named_parameters()}


def with_attention(directory, attention, dtype, device):
    model = load_model(directory, dtype=dtype, device=device)
    model.attention = attention
    return model


@pytest.fixture(scope="module")
def reference(either):
    return results(load_model(either), "cpu")


def compare(got, reference, tolerance):
    """Logits, loss and every gradient, relative to each tensor's largest entry."""
    logits, loss, gradients = reference
    assert (got[0] - logits).abs().max() <= tolerance * logits.abs().max()
    assert got[1] == pytest.approx(loss, rel=tolerance)
    wrong = {}
    for name, expected in gradients.items():
        error = ((got[2][name] - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            wrong[name] = error
    assert not wrong


def test_fp32_on_the_gpu_equals_the_cpu(either, reference):
    """Full fp32 products (no TF32), `auto` attention (one SDPA call per document): only the order
    of sums differs.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    compare(results(load_model(either, device="cuda"), "cuda"), reference, 1e-4)


def test_experts_and_documents_without_tokens_get_zero_gradients(directory):
    """Every parameter has a gradient, an expert that no token chose a zero one (kernels may leave
    it uninitialised).
    """
    model = with_attention(directory, "varlen", torch.bfloat16, "cuda")
    inputs = batch("cuda")
    gate = model.model.layers["1"].mlp.gate
    gate.e_score_correction_bias[3] = -100.0
    for documents in (
        inputs,
        inputs
        | {
            "cu_seqlens": inputs["cu_seqlens"][:1],
            "max_seqlen": 0,
            "labels": inputs["labels"] * 0 - 100,
        },
    ):
        model.zero_grad()
        # freed at once: uninitialised memory is then not zero
        torch.full((1 << 28,), float("nan"), device="cuda")
        model(**documents).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all((p.grad == 0).all() for p in model.parameters())
    model(**inputs).backward()
    experts = model.model.layers["1"].mlp.experts
    assert (experts.gate_up_proj.grad[3] == 0).all() and (experts.down_proj.grad[3] == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "varlen", "flex"])
def test_bf16_on_the_gpu_is_as_close_to_fp32_as_bf16_on_the_cpu(either, reference, attention):
    """bf16 routing can flip near ties, so the bound is what the CPU's bf16 reference itself is off
    by, doubled.
    """
    cpu = results(with_attention(either, "sdpa", torch.bfloat16, "cpu"), "cpu")
    got = results(with_attention(either, attention, torch.bfloat16, "cuda"), "cuda")
    assert got[1] == pytest.approx(reference[1], rel=2e-2)
    pairs = {"logits": (cpu[0], got[0], reference[0])}
    pairs |= {
        name: (cpu[2][name], got[2][name], expected) for name, expected in reference[2].items()
    }
    wrong = {}
    for name, (on_cpu, on_gpu, expected) in pairs.items():
        largest = expected.abs().max()
        off_on_cpu, off_on_gpu = ((x - expected).abs().max() / largest for x in (on_cpu, on_gpu))
        if not off_on_gpu <= max(2 * off_on_cpu, 0.03):
            wrong[name] = (off_on_cpu.item(), off_on_gpu.item())
    assert not wrong


def test_fa3_computes_latent_attention_with_narrow_values_as_sdpa_does():
    """Widths of V3 in bf16, documents and padding: outputs and gradients. Never run so far."""
    if flash_kernel(torch.device("cuda")) != "FA3":
        pytest.skip("needs Hopper, and the package flash_attn_interface")
    total, found = sum(LENGTHS) + PADDING, []
    bounds = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    tables = [torch.ones(total, 2, device="cuda")] * 2
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    inputs = [torch.randn(total, 4, width, **options) for width in (192, 192, 128, 128)]
    *qkv, upstream = [x.requires_grad_() for x in inputs]
    for implementation in ("varlen", "sdpa"):
        where = locate_documents(implementation, *tables, bounds, max(LENGTHS), padding=PADDING)
        out = attend(*qkv, 0.1, where)
        assert out.shape == upstream.shape
        found.append([out, *torch.autograd.grad(out, qkv, upstream)])
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_the_step_does_not_wait_for_the_device(either):
    """No host synchronisation in forward and backward: torch raises on each."""
    model = with_attention(either, "varlen", torch.bfloat16, "cuda").train()
    inputs = batch("cuda")
    model(**inputs).backward()  # the first call may initialise libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKPOINTED = [mode.train for mode in MODES.values() if "activation_checkpointing" in mode.train]


@pytest.mark.parametrize("options", [*CHECKPOINTED, SELECTIVE | {"activation_offload": True}])
def test_checkpointed_layers_compute_the_same_and_keep_less(directory, monkeypatch, options):
    """Deterministic, so that gradients can be compared bit by bit; attention is not run again where
    its output is kept, and what is on the host takes no memory of the device. Never run so far.
    """
    monkeypatch.setattr(activation_offload, "LEAST", 0)
    with deterministic(True):
        model = with_attention(directory, "varlen", torch.bfloat16, "cuda").train()
        inputs, found, memory = batch("cuda"), [], []
        for train in (Train(), Train(**options)):
            apply_activation_checkpointing(model, train, torch.device("cuda"))
            for _ in range(2):  # the first call may initialise libraries
                model.zero_grad()
                before = torch.cuda.memory_allocated()
                loss = model(**inputs)
                torch.cuda.synchronize()
                kept = torch.cuda.memory_allocated() - before
                with Operations() as backward:
                    loss.backward()
            found.append([p.grad for p in model.parameters()])
            memory.append(kept)
    for expected, gradient in zip(*found, strict=True):
        if options["activation_checkpointing"] == "stream":  # sums in another order
            assert (gradient - expected).norm() < 2e-2 * expected.norm()
        else:
            assert torch.equal(gradient, expected)
    assert memory[1] < memory[0]
    selective = options["activation_checkpointing"] == "selective"
    assert (backward.count["torch_attn::_varlen_attn"] == 0) == selective


def test_debug_preset_trains_over_nccl_on_one_rank(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
    ]
    command += [str(ROOT / "recipes" / "deepseek_v3_sft.py"), "--output", str(tmp_path / "run")]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    answers = [
        json.loads(line)
        for line in (tmp_path / "run" / "answers-after.jsonl").read_text().splitlines()
    ]
    assert sum(a["correct"] for a in answers) >= 0.9 * len(answers)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs 4 GPUs")
@pytest.mark.parametrize(
    "sizes",
    [
        {"pp": 2, "tp": 2, "dp_shard": 1, "ep": 2, "pp_schedule": "1F1B"},
        {"pp": 2, "cp": 2, "dp_shard": 1, "ep": 2, "pp_schedule": "ZBVZeroBubble"},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    ],
)
def test_layouts_over_nccl_equal_one_gpu(tmp_path, sizes):
    """The invariance matrix on real ranks; fp32 without TF32, where only the order of sums differs.
    Never run so far.
    """
    write_tiny_model(tmp_path / "model", num_hidden_layers=8, first_k_dense_replace=2)
    write_conversations(tmp_path / "train.jsonl", 10)
    pool = RankPool()
    try:
        one, four = (
            test_layouts.on_ranks(pool.run, n, directory=str(tmp_path), **part)
            for n, part in ((1, {}), (4, sizes))
        )
    finally:
        pool.close()
    for got, expected in zip(four, one, strict=True):
        test_layouts.compare(got, expected)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="block-wise fp8 needs compute capability 9.0",
)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_wise_kernels_compute_what_the_plain_products_do(power_of_two, dtype):
    """Weights to the same bits; sums in fp32, in the tensor cores of 14 bits over 128 terms, and
    rounded to `dtype`.
    """
    from torchsft.ops import blockwise_mm
    from torchsft.precision.blockwise_kernels import BlockwiseKernels

    (x, w, dy, offs), _ = experts(power_of_two)
    x, w, dy = (values.to("cuda", dtype) for values in (x, w, dy))
    offs = offs.cuda()
    plain, kernels = BlockwiseProducts(power_of_two), BlockwiseKernels(power_of_two)
    assert_no_sorted_copy_is_needed(kernels, "cuda")
    values, scales = blockwise_mm.quantise_weight(w, power_of_two, False)
    for matrix, found, scale in zip(w, values, scales, strict=True):
        expected = quantise(matrix.float(), power_of_two=power_of_two)
        assert found.view(torch.uint8).equal(expected[0].view(torch.uint8))
        assert scale.equal(expected[1])
    for name, arguments in (
        ("forward", (x, w)),
        ("grad_rows", (dy, w)),
        ("grad_weight", (dy, x)),
    ):
        expected = getattr(plain, name)(*arguments, offs).float()
        found = getattr(kernels, name)(*arguments, offs).float()
        bound = 1e-3 if dtype == torch.float32 else 1e-2
        assert (found - expected).abs().max() <= bound * expected.abs().max(), name


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="e4m3 in Triton needs compute capability 9.0",
)
@pytest.mark.parametrize(
    "kernels", ["swiglu_rows", "grouped_swiglu", "rotation", "latent_keys", "rows_in_fp8"]
)
def test_triton_kernels_compute_what_their_plain_twins_do(kernels, monkeypatch):
    """What is asserted of them under Triton's interpreter. Never run so far."""
    pytest.importorskip("triton")
    from tests.ops import interpreted_rows

    for module in (rope, swiglu):  # put back afterwards
        monkeypatch.setattr(module, "kernels", module.kernels)
    getattr(interpreted_rows, kernels)("cuda")


def test_a_step_by_kernels_is_as_close_to_fp32_as_one_without(directory):
    """Gradients of all weights, in bf16: by the kernels at most twice as far from fp32's as those
    of the plain twins. Never run so far.
    """
    pytest.importorskip("triton")
    exact = results(load_model(directory, device="cuda"), "cuda")
    far = {}
    for plain in (False, True):
        ops.use_plain(plain)
        try:
            found = results(with_attention(directory, "varlen", torch.bfloat16, "cuda"), "cuda")
        finally:
            ops.use_plain(False)
        differences = [(found[2][name] - value).norm() for name, value in exact[2].items()]
        far[plain] = torch.stack(differences).norm()
    assert far[False] <= 2 * far[True]


@pytest.mark.parametrize(("name", "major"), [("float8", 9), ("mxfp8", 10)])
def test_kernels_of_experts_compute_what_the_emulated_products_do(name, major):
    """Widths that all kernels take, an expert without rows. Float8's tensor cores sum 14 bits of up
    to some hundred terms, and exp2 in its casts is approximate: a scale may be the next.
    """
    if torch.cuda.get_device_capability()[0] != major:
        pytest.skip(f"needs compute capability {major}.x")
    from torchsft.precision import expert_float8, expert_float8_kernels

    make = expert_float8_kernels.float8_kernels
    make = make if name == "float8" else expert_float8_kernels.mxfp8_kernels
    block = {"float8": None, "mxfp8": expert_float8.BLOCK}[name]
    plain, kernels = expert_float8.emulated(block), make()
    draw = torch.Generator().manual_seed(0)
    x, w, dy = (
        torch.randn(shape, generator=draw).to("cuda", torch.bfloat16)
        for shape in ((281, 256), (4, 128, 256), (281, 128))
    )
    offs = torch.tensor([150, 150, 153, 281], dtype=torch.int32, device="cuda")
    for product, arguments in (
        ("forward", (x, w)),
        ("grad_rows", (dy, w)),
        ("grad_weight", (dy, x)),
    ):
        expected = getattr(plain, product)(*arguments, offs).float()
        found = getattr(kernels, product)(*arguments, offs).float()
        assert (found - expected).norm() <= 1e-2 * expected.norm(), product


def test_an_offloaded_run_has_its_weights_and_moments_on_the_host_and_learns_the_same(tmp_path):
    """Three steps in bf16. A GPU's AdamW rounds otherwise than a CPU's: 1e-3 of the losses."""
    write_tiny_model(tmp_path / "model", hidden_size=256, moe_intermediate_size=256)
    write_conversations(tmp_path / "train.jsonl", 20)
    losses, held = {}, {}
    for offload in (False, True):
        config = test_layouts.config_for(str(tmp_path), compute="bf16")
        config.optim.offload, config.data.workers = offload, 0
        before = torch.cuda.memory_allocated()
        with World(config.parallel, 0) as world:
            trainer = test_layouts.SilentTrainer(config, world)
            records = [trainer.train_step(next(trainer.loader))[0] for _ in range(3)]
            losses[offload] = [record["loss"] for record in records]
            parameters = list(trainer.model.parameters())
            trainer.model.state_dict()  # waits
            held[offload] = torch.cuda.memory_allocated() - before
            if offload:
                assert all(p.device.type == "cpu" for p in parameters)
                assert all(p.to_local().is_pinned() for p in parameters)
                moments = trainer.optimizer.state[parameters[0]]
                assert moments["exp_avg"].device.type == "cpu"
                for masters, copy in trainer.optimizer.copies.values():
                    assert torch.equal(copy.cpu(), masters.to(copy.dtype))
        del trainer, parameters
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert held[True] < held[False] / 3  # 2 bytes a parameter in place of 12, and buffers
