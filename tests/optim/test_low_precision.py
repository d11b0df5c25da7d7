"""Moments and masters of fewer bits: formats against torchao's, decay against beta2^n, steps
against fp32, layouts against one process.
"""

import pytest
import torch
from torch import nn
from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap

from torchsft.config import InputError, Optim
from torchsft.optim.adamw import build_optimizer
from torchsft.optim.low_precision import (
    BLOCK,
    dequantise,
    dynamic_values,
    quantise,
    random_bits,
    read_moment,
    round_to_bf16,
)
from torchsft.parallel.memory import held_bytes

MODES = [("fp32", "bf16"), ("fp32", "int8"), ("bf16", "fp32"), ("bf16", "bf16"), ("bf16", "int8")]
# as in README.md: bytes of weight, gradient and moments
BYTES = {
    ("fp32", "fp32"): 16,
    ("fp32", "bf16"): 12,
    ("fp32", "int8"): 10.0625,
    ("bf16", "fp32"): 12,
    ("bf16", "bf16"): 8,
    ("bf16", "int8"): 6.0625,
}


def one_matrix(rows=8, columns=256, dtype=torch.float32):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(rows, columns, dtype=dtype))
    return model


@pytest.mark.parametrize("signed", [True, False])
def test_codes_rounded_to_nearest_are_torchaos(signed):
    values = dynamic_values(signed, torch.device("cpu"))
    theirs = torch.tensor(create_dynamic_map(signed=signed))
    assert torch.equal(values, theirs)
    x = torch.randn(4, 3 * BLOCK).exp() * (torch.randn(4, 3 * BLOCK).sign() if signed else 1)
    codes, scales = quantise(x, values, torch.full(x.shape, 2**15 - 1))
    y = x / scales.repeat_interleave(BLOCK, 1)
    assert torch.equal(codes, quantize_8bit_with_qmap(y, theirs))
    low, _ = quantise(x, values, torch.full(x.shape, 2**16 - 1))
    inside = y >= values[0]  # theirs has no -1: the smallest is -0.993
    assert (dequantise(low, scales, values) <= x + 1e-6 * x.abs())[inside].all()


def test_the_last_block_of_a_row_may_be_short_and_small_squares_stay_above_zero():
    values = dynamic_values(False, torch.device("cpu"))
    x = torch.full((2, BLOCK + 3), 1e-24)
    x[:, 0] = 1.0
    codes, scales = quantise(x, values, torch.full(x.shape, 2**16 - 1))
    assert scales.tolist() == [[1.0, x[0, 1].item()]] * 2
    assert (dequantise(codes, scales, values) > 0).all()
    assert torch.equal(dequantise(codes, scales, values)[:, BLOCK:], x[:, BLOCK:])


def test_bf16_rounding_is_right_on_average_over_all_random_bits():
    bits = torch.arange(2**16, dtype=torch.int32)
    for number in (1.2345678, -3.1e-20, 7e30, 1.0, 0.0):
        x = torch.full((2**16,), number)
        rounded = round_to_bf16(x, bits).double()
        assert rounded.unique().numel() <= 2
        torch.testing.assert_close(rounded.mean(), x[0].double(), rtol=1e-12, atol=0)


def test_random_bits_are_even_unrelated_and_those_of_the_place():
    bits = random_bits(torch.arange(256), torch.arange(1024), 1)
    low, high = ((bits >> shift & 0xFFFF).double() / 65536 - 0.5 for shift in (0, 16))
    other = (random_bits(torch.arange(256), torch.arange(1024), 2) & 0xFFFF) / 65536 - 0.5
    n = low.numel()
    for x in (low, high):  # 5 standard deviations
        assert abs(x.mean()) < 5 * (1 / 12 / n) ** 0.5
    for a, b in ((low, high), (low, other), (low[1:], low[:-1]), (low[:, 1:], low[:, :-1])):
        assert abs((a * b).mean() * 12) < 5 / a.numel() ** 0.5
    part = random_bits(torch.arange(7, 19), torch.arange(100, 300), 1)
    assert torch.equal(part, bits[7:19, 100:300])


@pytest.mark.parametrize(("moments", "error"), [("bf16", 0.02), ("int8", 1e-3)])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_the_second_moment_decays_without_gradients(moments, error, beta2):
    """As beta2^n on average. Of bf16, a rounding errs by at most 2^-7; 60 of 2048 elements on
    average by less than 2^-7 * 60^0.5 / 2048^0.5 = 1.3e-3. int8's scale decays in fp32.
    """
    model = one_matrix()
    optimizer = build_optimizer(model, Optim(moments=moments, beta2=beta2, lr=0.0))
    model.weight.grad = torch.rand(model.weight.shape) + 0.1
    optimizer.step()
    state = optimizer.state[model.weight]
    start = read_moment(state, "exp_avg_sq").clone()
    model.weight.grad.zero_()
    for _ in range(60):
        optimizer.step()
    ratio = (read_moment(state, "exp_avg_sq") / start).mean() / beta2**60
    assert abs(ratio - 1) < error
    if beta2 == 0.999:  # rounded to nearest, bf16 would stay
        nearest = start.bfloat16()
        assert torch.equal((nearest.float() * beta2).bfloat16(), nearest)


@pytest.mark.parametrize(("masters", "moments"), MODES)
def test_steps_stay_close_to_fp32(masters, moments):
    """Ten steps with gradients of a constant mean: the way is the same to a few percent; what bf16
    masters round off, 2^-8 of a weight a step, averages out.
    """
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[masters]
    model, exact = one_matrix(dtype=dtype), one_matrix()
    exact.weight.data = model.weight.data.float()
    before = exact.weight.detach().clone()
    optimizers = [
        build_optimizer(model, Optim(lr=1e-3, masters=masters, moments=moments)),
        build_optimizer(exact, Optim(lr=1e-3)),
    ]
    for _ in range(10):
        exact.weight.grad = torch.randn(exact.weight.shape) + 0.5
        model.weight.grad = exact.weight.grad.to(dtype)
        for optimizer in optimizers:
            optimizer.step()
    way, expected = model.weight.detach().float() - before, exact.weight.detach() - before
    assert (way * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.05)
    apart = (way - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert apart < (0.1 if masters == "fp32" else 1.5)


@pytest.mark.parametrize(("masters", "moments"), BYTES)
def test_bytes_per_parameter_are_those_of_the_real_tensors(masters, moments):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[masters]
    model = one_matrix(dtype=dtype)
    optimizer = build_optimizer(model, Optim(masters=masters, moments=moments))
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    kept = [model.weight, model.weight.grad]
    kept += [t for name, t in optimizer.state[model.weight].items() if name != "step"]
    total = sum(t.nbytes for t in kept)
    assert total / model.weight.numel() == BYTES[masters, moments]
    assert held_bytes(model, torch.bfloat16, True, moments) == (total, 0)


def _layouts():
    """Three steps of the same gradients in five layouts and as plain tensors, int8 moments and bf16
    masters: elements that differ, and whether copies do; and what is refused.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    dist.init_process_group("gloo")
    four = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    layouts = [
        ((9, 260), four, [Shard(0)]),
        ((8, 256), two, [Shard(0), Shard(1)]),
        ((8, 200), two, [Replicate(), Shard(0)]),
        ((4, 6, 130), two, [Shard(1), Shard(0)]),
        ((8, 200), two, [_StridedShard(0, split_factor=2), Shard(0)]),
        ((260,), four, [Shard(0)]),
    ]
    options = Optim(lr=1e-2, masters="bf16", moments="int8")
    seen = []
    for shape, mesh, placements in layouts:
        torch.manual_seed(0)
        plain, sharded = nn.Module(), nn.Module()
        plain.weight = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))
        place = dict(device_mesh=mesh, placements=placements, src_data_rank=None)
        strided = any(isinstance(p, _StridedShard) for p in placements)

        def cut(x, place=place, strided=strided):
            if not strided:
                return distribute_tensor(x, **place)
            rank = place["device_mesh"].get_coordinate()
            rows = x.unflatten(0, (4, -1))[rank[1] * 2 + rank[0]]
            return DTensor.from_local(
                rows.clone(),
                place["device_mesh"],
                place["placements"],
                run_check=False,
                shape=x.shape,
                stride=x.stride(),
            )

        sharded.weight = nn.Parameter(cut(plain.weight.detach()))
        optimizers = [build_optimizer(plain, options), build_optimizer(sharded, options)]
        for _ in range(3):
            plain.weight.grad = torch.randn(shape, dtype=torch.bfloat16)
            sharded.weight.grad = cut(plain.weight.grad)
            for optimizer in optimizers:
                optimizer.step()
        states = [o.state[m.weight] for o, m in zip(optimizers, (plain, sharded), strict=True)]
        pairs = [(plain.weight, sharded.weight), *((v, states[1][k]) for k, v in states[0].items())]
        wrong = 0
        for expected, tensor in pairs:
            if isinstance(tensor, DTensor):
                tensor, expected = tensor.to_local(), cut(expected.detach()).to_local()
            assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
            wrong += (tensor != expected).sum().item()
        seen.append((wrong, sharded.weight.to_local().detach().float().numpy().copy()))
    narrow = nn.Module()
    narrow.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 200), two, [Shard(0), Shard(1)]))
    try:
        build_optimizer(narrow, Optim(moments="int8"))
    except InputError as error:
        return seen, str(error)


def test_every_layout_rounds_as_one_process_does(ranks):
    results = ranks(4, _layouts)
    for seen, refused in results:
        # an fp32 rounding where vectorised code ends may move a code
        assert [wrong <= 2 for wrong, _ in seen] == [True] * 6, [wrong for wrong, _ in seen]
        assert "2 ranks share the 200 entries of a row of weight; choose" in refused
    copies = [seen[2][1] for seen, _ in results]  # ranks 0 and 2 hold the same part, 1 and 3 too
    assert (copies[0] == copies[2]).all() and (copies[1] == copies[3]).all()
