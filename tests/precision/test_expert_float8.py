"""Products of routed experts in float8 and MXFP8 against torchao's own functions, plain loops in
float64, and one process.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
from torchao.prototype.moe_training import _to_mxfp8_then_scaled_grouped_mm
from torchao.prototype.moe_training import utils as torchao_utils
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.quantization.quantize_.common import KernelPreference

from tests.distributed.test_layouts import config_for
from tests.parallel.passes import build
from tests.precision.test_blockwise_compute import (
    PASSES,
    assert_equal_sums,
    check_experts,
    numbers,
)
from tests.precision.test_float8 import SIZES, first_step
from tests.tiny import write_conversations, write_tiny_model
from torchsft.checkpoint.resume import differences
from torchsft.config import Config, InputError, Parallel, Precision, to_dict
from torchsft.models.decoder import local, seeded_normal
from torchsft.models.moe import Experts
from torchsft.ops.tiles import padding_of
from torchsft.optim.fused import FusedAdamW
from torchsft.parallel.apply import parallelize
from torchsft.parallel.compute_copies import ComputeCopies
from torchsft.parallel.expert_float8 import check_device
from torchsft.parallel.world import World
from torchsft.precision import expert_float8_kernels as kernels
from torchsft.precision.expert_float8 import BLOCK, emulated

# Experts with rows of less than a block, of several, of none; no multiple of 16.
INPUTS, OUTPUTS, COUNTS = 160, 96, [150, 0, 3, 128]
FLOAT8, MXFP8 = emulated(None), emulated(BLOCK)
E4M3 = torch.float8_e4m3fn


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Rows, weights, gradients of results, and bounds."""
    rows, experts = sum(COUNTS), len(COUNTS)
    x, w, dy = numbers(rows, INPUTS), numbers(experts, OUTPUTS, INPUTS), numbers(rows, OUTPUTS)
    offs = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
    return x.to(dtype), w.to(dtype), dy.to(dtype), offs


def torchaos(values: torch.Tensor, block: int | None) -> torch.Tensor:
    """What torchao's quantisation holds of a factor with scales along the last dim, float64."""
    if 0 in values.shape:
        return values.double()
    if block is None:
        rowwise = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1}
        scale = tensor_to_scale(values, E4M3, round_scales_to_power_of_2=True, **rowwise)
        return to_fp8_saturated(values.float() * scale, E4M3).double() / scale.double()
    padded = F.pad(values, (0, -values.shape[-1] % block)).contiguous()
    scale, codes = to_mx(padded, E4M3, block, ScaleCalculationMode.RCEIL)
    held = codes.double() * scale.double().repeat_interleave(block, -1)
    return held[..., : values.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [FLOAT8, MXFP8], ids=["float8", "mxfp8"])
def test_products_are_those_of_torchaos_codes_and_scales(products, dtype):
    """An expert at a time, in float64; in bf16 the result is rounded once: by up to 2^-9 of it."""
    x, w, dy, offs = batch(dtype)

    def held(values: torch.Tensor) -> torch.Tensor:
        return torchaos(values, BLOCK if products is MXFP8 else None)

    y, dx, dw = [], [], []
    for x_e, dy_e, w_e in zip(x.split(COUNTS), dy.split(COUNTS), w, strict=True):
        y.append(held(x_e) @ held(w_e).T)
        dx.append(held(dy_e) @ held(w_e.T).T)
        dw.append(held(dy_e.T) @ held(x_e.T).T)
    found = products.forward(x, w, offs), products.grad_rows(dy, w, offs)
    found = *found, products.grad_weight(dy, x, offs)
    for got, exact in zip(found, (torch.cat(y), torch.cat(dx), torch.stack(dw)), strict=True):
        assert got.dtype == dtype
        if dtype == torch.float32:
            assert_equal_sums(got, exact)
        else:
            assert ((got - exact).abs() <= exact.abs() / 256 + 1e-6 * exact.abs().max()).all()


def test_mxfp8_is_torchaos_emulation():
    """Its differentiable function, padding and all, whose sums are those of the same bf16 factors:
    an entry is rounded to bf16 after sums in another order.
    """
    x, w, dy, offs = batch(torch.bfloat16)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
    options = {"offs": offs, "kernel_preference": KernelPreference.EMULATED}
    y = _to_mxfp8_then_scaled_grouped_mm(
        x_leaf, w_leaf.mT, pad_token_groups_for_grouped_mm=True, **options
    )
    y.backward(dy)
    pairs = [
        (MXFP8.forward(x, w, offs), y),
        (MXFP8.grad_rows(dy, w, offs), x_leaf.grad),
        (MXFP8.grad_weight(dy, x, offs), w_leaf.grad),
    ]
    for ours, theirs in pairs:
        difference = (ours.float() - theirs.float()).abs()
        assert (difference <= ours.float().abs() / 128 + 1e-6 * ours.abs().max()).all()


@pytest.mark.parametrize("multiple", [16, 32, 128])
@pytest.mark.parametrize("products", [FLOAT8, MXFP8], ids=["float8", "mxfp8"])
def test_padding_changes_nothing(products, multiple):
    """Bit by bit; rows come back in their order, and every expert has a multiple."""
    x, w, dy, offs = batch()
    padding = padding_of(offs, len(x), multiple)
    assert padding.offs_E.tolist()[0] == -(-150 // multiple) * multiple
    assert not (padding.offs_E % multiple).any() and padding.count % multiple == 0
    assert padding.count >= padding.offs_E[-1]
    assert torch.equal(padding.pad(x)[padding.place_R], x)
    assert padding.pad(x).count_nonzero() == x.count_nonzero()
    end = int(padding.offs_E[-1])
    x_pad, dy_pad = padding.pad(x)[:end], padding.pad(dy)[:end]
    place = padding.place_R
    y = products.forward(x_pad, w, padding.offs_E)
    dx = products.grad_rows(dy_pad, w, padding.offs_E)
    dw = products.grad_weight(dy_pad, x_pad, padding.offs_E)
    assert_equal_sums(y[place], products.forward(x, w, offs))
    assert_equal_sums(dx[place], products.grad_rows(dy, w, offs))
    assert_equal_sums(dw, products.grad_weight(dy, x, offs))


def stand_in(monkeypatch) -> None:
    """Put torchao's references in PyTorch for its kernels, and a product of what they hold."""

    def cast(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        rowwise = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": dim}
        scale = tensor_to_scale(values, E4M3, round_scales_to_power_of_2=True, **rowwise)
        return to_fp8_saturated(values.float() * scale, E4M3), scale

    def by_group(grad, x, offs, *_):
        found = []
        for values in (grad, x):
            parts = values.tensor_split(offs.tolist())  # the last has zeros alone
            pairs = [cast(F.pad(part, (0, 0, 0, 1)), 0) for part in parts]
            codes = torch.cat([codes[:-1] for codes, _ in pairs]).t().contiguous().t()
            found += [codes, torch.cat([scale.flatten() for _, scale in pairs[:-1]])]
        return found

    def transposed(values, dtype, power_of_two):
        codes, scale = torchao_utils.torch_to_3d_rowwise_float8_transpose_rhs(
            values, dtype, power_of_two
        )
        return codes, scale.squeeze(1)

    def product(a, b, scale_a, recipe_a, scale_b, recipe_b, *, offs, use_fast_accum):
        assert recipe_a == recipe_b == F.ScalingType.RowWise and use_fast_accum
        assert not (offs % 16).any()
        # torch's own checks of strides, shapes and scales, which are those of its CUDA kernel
        arguments = (tensor.to("meta") for tensor in (a, b, scale_a, scale_b, offs))
        torch._scaled_grouped_mm(*arguments, out_dtype=torch.bfloat16)
        ends = [0, *offs.tolist()]
        groups = [slice(*pair) for pair in pairwise(ends)]
        if b.ndim == 3:
            a, b = a.float() * scale_a[:, None], b.float() * scale_b[:, None]
            rows = [a[group] @ b[e] for e, group in enumerate(groups)]
            rows.append(torch.full((len(a) - ends[-1], b.shape[2]), torch.nan))
            return torch.cat(rows).bfloat16()
        scales = zip(scale_a.chunk(len(groups)), scale_b.chunk(len(groups)), strict=True)
        return torch.stack(
            [
                (a[:, group].float() * of_a[:, None]) @ (b[group].float() * of_b)
                for group, (of_a, of_b) in zip(groups, scales, strict=True)
            ]
        ).bfloat16()

    def padded_rows(padding, rows):
        codes, scale = cast(padding.pad(rows), -1)
        return codes, scale.squeeze(1).reciprocal()

    monkeypatch.setattr(kernels, "_float8_rows", padded_rows)
    for name, function in {
        "triton_fp8_colwise_3d_scale_and_cast": lambda values, *_: cast(values, -2),
        "triton_fp8_rowwise_3d_transpose_rhs": transposed,
        "triton_fp8_per_group_colwise_scales_dual": by_group,
    }.items():
        assert hasattr(kernels.kernels, name)
        monkeypatch.setattr(kernels.kernels, name, function)
    monkeypatch.setattr(kernels.F, "scaled_grouped_mm", product)


@pytest.mark.parametrize("name", ["float8", "mxfp8"])
def test_what_calls_the_kernels_computes_what_the_plain_products_do(name, monkeypatch):
    """With torchao's references in place of its kernels (of MXFP8 its emulation), on rows that no
    kernel takes as they are; sums in bf16's rounding.
    """
    stand_in(monkeypatch)
    if name == "float8":
        plain, products = FLOAT8, kernels.float8_kernels()
    else:
        plain, products = MXFP8, kernels.mxfp8_kernels(KernelPreference.EMULATED)
    x, w, dy, offs = batch(torch.bfloat16)
    for product, *arguments in (
        ("forward", x, w),
        ("grad_rows", dy, w),
        ("grad_weight", dy, x),
    ):
        expected = getattr(plain, product)(*arguments, offs).float()
        found = getattr(products, product)(*arguments, offs).float()
        assert found.shape == expected.shape
        bound = expected.abs() / 128 + 1e-6 * expected.abs().max()
        assert ((found - expected).abs() <= bound).all(), product


@pytest.mark.parametrize("products", [FLOAT8, MXFP8], ids=["float8", "mxfp8"])
def test_the_error_of_a_product_is_that_of_three_bits(products):
    """As that of block-wise fp8: 2.6 % of each factor's values, so 3.6 % of a sum
    (test_blockwise_compute.py).
    """
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(512, n, generator=draw) for n in (1024, 512))
    w = torch.randn(512, 1024, generator=draw) * 0.02
    offs = torch.tensor([512], dtype=torch.int32)
    for found, exact in (
        (products.forward(x, w[None], offs), x @ w.T),
        (products.grad_rows(dy, w[None], offs), dy @ w),
        (products.grad_weight(dy, x, offs)[0], dy.T @ x),
    ):
        assert 0.03 * exact.norm() < (found - exact).norm() < 0.038 * exact.norm()


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("products", [FLOAT8, MXFP8], ids=["float8", "mxfp8"])
def test_experts_multiply_so(products, passes):
    """As `--model.experts loop` does."""
    check_experts((products, products), width=64, inner=32, passes=passes)


LAYOUTS = [
    {"dp_shard": 2},
    {"dp_shard": 2, "ep": 2},
    {"pp": 2, "pp_schedule": "ZBVZeroBubble"},
    {"tp": 2, "micro_batch_size": 2},
]


def first_steps(directory: str, options: list[dict[str, object]]) -> list[object]:
    """`first_step` with each of several options; for `ranks`."""
    return [first_step(config_for(directory, **each)) for each in options]


def test_a_layout_changes_a_step_by_less_than_rounding_does(ranks, tmp_path):
    """Powers of two scale without rounding, so which rows share a scale on a rank matters only for
    what falls below e4m3's smallest. But a sum in another order, as `tp` has them, moves values on
    the edge to the neighbour (by 1/16 of them): 1e-4 of the loss, and of all gradients together a
    quarter of the distance that rounding itself takes them from those of fp32.
    """
    write_tiny_model(tmp_path / "model", **SIZES)
    write_conversations(tmp_path / "train.jsonl", 10)
    modes = [{}, {"experts": "float8"}, {"experts": "mxfp8"}]
    exact, *alone = ranks(1, first_steps, directory=str(tmp_path), options=modes)[0]
    options = [layout | mode for mode in modes[1:] for layout in LAYOUTS]
    together = ranks(2, first_steps, directory=str(tmp_path), options=options)

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return sum((a[name] - b[name]).square().sum().item() for name in exact[1]) ** 0.5

    for number, (loss, gradients, _) in enumerate(alone):
        rounding = distance(gradients, exact[1])
        assert rounding > 0 and 0 < abs(loss - exact[0]) < 0.01 * exact[0]
        for place, layout in enumerate(LAYOUTS):
            found = [rank[number * len(LAYOUTS) + place] for rank in together]
            whole = {name: value for _, part, _ in found for name, value in part.items()}
            assert whole.keys() == exact[1].keys()
            assert found[0][0] == pytest.approx(loss, rel=1e-4), layout
            assert distance(whole, gradients) < 0.25 * rounding, layout


@pytest.mark.parametrize("products", [FLOAT8, MXFP8], ids=["float8", "mxfp8"])
def test_the_optimizer_moves_experts_of_one_rank_by_their_gradients(products):
    """Plain ones, and on a mesh, whose gradients came transposed, as torchao's kernels leave
    them.
    """
    x, offs, updated = numbers(12, 32).bfloat16(), torch.tensor([5, 12]).int(), []
    with World(Parallel(), 0) as world:
        for is_split in (False, True):
            experts = Experts(2, 32, 64, "grouped_mm")
            experts.products, experts.read = (products, products), ComputeCopies(x.dtype, True)
            for name, parameter in list(experts.named_parameters()):
                value = seeded_normal(name, tuple(parameter.shape), 0.1, seed=0)
                if is_split:
                    value = distribute_tensor(value, world.expert["ep"], [Shard(0)])
                experts.register_parameter(name, torch.nn.Parameter(value))
            experts(x, torch.ones(12, 1), offs).float().square().sum().backward()
            FusedAdamW(experts.parameters(), lr=1e-2, fused=True).step()
            updated.append([local(parameter).detach() for parameter in experts.parameters()])
    for plain, split in zip(*updated, strict=True):
        assert torch.equal(plain, split)


def refused_in_a_pipeline() -> str:
    """What a stage says, of which the first has no experts."""
    with World(Parallel(pp=2, timeout_seconds=60), 0) as world:
        rank = world.dense.get_local_rank("pp")
        layers = [[0], [1, 2]][rank]
        stage = build(hidden_size=32, moe_intermediate_size=16).part(layers, rank == 0, rank == 1)
        with pytest.raises(InputError) as refused:
            parallelize([stage], world, torch.float32, precision=Precision(experts="mxfp8"))
        return str(refused.value)


def test_a_stage_without_experts_refuses_what_the_others_refuse(ranks):
    first, second = ranks(2, refused_in_a_pipeline)
    assert "layer 2's experts are 32 x 16, not multiples of 32" in second
    assert first == second


def test_what_cannot_be_in_fp8_is_refused():
    def refusal(name: str, **changes: object) -> str:
        with World(Parallel(), 0) as world, pytest.raises(InputError) as refused:
            model = build(**changes)
            parallelize([model], world, torch.float32, precision=Precision(experts=name))
        return str(refused.value)

    widths = {"hidden_size": 32, "moe_intermediate_size": 16}
    assert "experts are 32 x 16, not multiples of 32" in refusal("mxfp8", **widths)
    assert "experts are 32 x 24, not" in refusal("float8", **widths | {"moe_intermediate_size": 24})
    assert "experts of a GptOss have biases" in refusal("float8", family="gpt_oss")
    assert "this model has no experts" in refusal("float8", family="llama")
    bf16 = torch.bfloat16
    for arguments, fault in (
        (("float8", (8, 9), bf16, "0.18.0"), r"capability 9\.x, but this one has 8\.9"),
        (("mxfp8", (9, 0), bf16, "0.18.0"), r"capability 10\.x, but this one has 9\.0"),
        (("float8", (9, 0), torch.float32, "0.18.0"), "bf16 or float8, but it is torch.float32"),
        (("mxfp8", (10, 0), bf16, "0.17.1"), r"torchao 0\.18\.x, but 0\.17\.1 is installed"),
    ):
        with pytest.raises(InputError, match=fault):
            check_device(*arguments)
    check_device("float8", (9, 0), bf16, "0.18.0")
    with pytest.raises(InputError, match="blockwise has the experts in fp8 already"):
        Precision(compute="blockwise", experts="mxfp8")


def test_a_run_does_not_change_it_when_it_continues():
    """As --precision.compute; a run of an earlier version had none."""
    earlier, old, new = (to_dict(Config()) for _ in range(3))
    del earlier["precision"]["experts"]
    new["precision"]["experts"] = "mxfp8"
    assert differences(earlier, old) == []
    assert differences(earlier, new) == ["precision.experts: 'same' -> 'mxfp8'"]
