"""Each mode of memory and precision on a GPU, against its reference; never run so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.precision.test_float8 import RECIPES
from tests.ranks import RankPool
from tests.tiny import tiny_config
from tools.benchmark_modes import LEARNING_RATE, MODES, Mode, Side
from torchsft.config import Parallel
from torchsft.models.decoder import local
from torchsft.models.families import build_model
from torchsft.models.loss import Objective, vocabulary_loss, vocabulary_loss_reference
from torchsft.parallel.blockwise import CAPABILITY as BLOCKWISE
from torchsft.parallel.expert_float8 import FORMATS
from torchsft.parallel.world import World
from torchsft.precision.float8 import CAPABILITY as FLOAT8
from torchsft.precision.float8 import float8_product

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
# What fp8 kernels multiply: multiples of 16, experts of 128.
SIZES = dict(
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=128,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)
Weights = dict[str, Tensor]


def needs(capability: tuple[int, int]) -> None:
    """Skip a test whose kernels this GPU does not have."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < capability:
        pytest.skip(f"needs compute capability {capability}")


def begin(mode: Mode, world: World, dtype: torch.dtype) -> tuple[Side, Weights, Tensor]:
    """A tiny model, its weights, and tokens of two steps."""
    config = tiny_config(**SIZES).to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=draw) * 0.05 + ("norm" in name)
        for name, value in build_model(config).state_dict().items()
    }
    # A large eps: else rounding decides the direction of elements without a gradient.
    mode = replace(mode, optim=mode.optim | {"eps": 1e-3})
    tokens = torch.randint(0, 272, (2, 2, 64), generator=draw)
    return Side(mode, world, config, weights, dtype), weights, tokens.to(world.device)


def two_steps(name: str, dtype: torch.dtype) -> tuple[list[float], Weights]:
    """Losses of two steps in a mode on this process's device, and what they changed, fp32."""
    with World(Parallel(), 0) as world:
        side, weights, tokens = begin(MODES[name], world, dtype)
        losses = [side.step(rows) for rows in tokens]
        found = side.model.state_dict()
    return losses, {key: local(found[key]).float().cpu() - weights[key] for key in weights}


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Callable[[str], tuple[list[float], Weights]]]:
    """`two_steps` in fp32 in a process that sees no GPU; of each mode once."""
    pool = RankPool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert pool.run(1, torch.cuda.is_available) == [False]
    yield cache(lambda name: pool.run(1, two_steps, name=name, dtype=torch.float32)[0])
    pool.close()


def size(changes: Weights, others: Weights | None = None) -> float:
    """Norm of all changes together, or of what they differ by from others."""
    parts = changes if others is None else {n: c - others[n] for n, c in changes.items()}
    return sum(part.square().sum().item() for part in parts.values()) ** 0.5


IN_FP8 = [name for name in MODES if name.startswith("--precision")]


@pytest.mark.parametrize("name", [name for name in MODES if name not in IN_FP8])
def test_two_steps_in_fp32_are_those_of_a_cpu(on_cpu, name):
    """Sums in another order are 1e-3 of what is learnt; where bf16 and int8 are rounded at random
    (by the same bits), an element here and there goes to its other neighbour; Muon iterates in
    bf16.
    """
    expected_losses, expected = on_cpu(name)
    losses, changes = two_steps(name, torch.float32)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    low = "bf16" in name or "int8" in name
    bound = 3e-2 if "muon" in name else 1e-2 if low else 1e-3
    assert size(changes, expected) < bound * size(expected)


@pytest.mark.parametrize("name", IN_FP8)
def test_two_steps_in_fp8_are_those_of_the_emulation_on_a_cpu(on_cpu, name):
    """Hidden states are bf16 here and fp32 there, so some values round to the other neighbour in
    fp8: were all roundings independent, results would differ by 1.41 of what fp8 changes.
    """
    needs(BLOCKWISE if "blockwise" in name else FLOAT8)
    experts = FORMATS.get(MODES[name].precision.get("experts"))
    if experts and DEVICE.type == "cuda":
        major, _ = torch.cuda.get_device_capability()
        if major != experts.capability:
            pytest.skip(f"needs compute capability {experts.capability}.x")
    _, exact = on_cpu("plain")
    expected_losses, expected = on_cpu(name)
    losses, changes = two_steps(name, torch.bfloat16)
    assert losses == pytest.approx(expected_losses, rel=1e-2)
    rounding = size(expected, exact)
    assert size(changes, expected) < 1.5 * rounding < 1.5 * size(exact)
    assert size(changes, exact) > 0.5 * rounding


@pytest.mark.parametrize("recipe", RECIPES)
def test_float8_products_are_those_of_the_emulation(recipe):
    """The same fp8 values, summed otherwise: bf16 rounds the results, and fast accumulation has 14
    bits over some terms. Tokens are no multiple of 16.
    """
    needs(FLOAT8)
    draw = torch.Generator().manual_seed(0)
    shapes = (77, 256), (192, 256), (77, 192)
    x, weight, dy = (torch.randn(shape, generator=draw).to(DEVICE).bfloat16() for shape in shapes)
    inputs = x.requires_grad_(), weight.requires_grad_()
    found = []
    for emulate in (False, True):
        y = float8_product(recipe, emulate=emulate)(*inputs, None)
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for kernel, emulated in zip(*found, strict=True):
        difference = (kernel.float() - emulated.float()).abs().max()
        assert difference <= 1e-2 * emulated.abs().max()


def test_a_deterministic_run_computes_the_same_bits_twice():
    """In bf16, where attention's backward pass adds by atomics otherwise."""
    runs = [two_steps("--train.deterministic", torch.bfloat16) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_an_offloaded_update_is_that_of_adamw_on_the_cpu():
    """Bit by bit, given the gradients."""
    with World(Parallel(), 0) as world:
        side, weights, tokens = begin(MODES["--optim.offload"], world, torch.bfloat16)
        names = [name for name, _ in side.model.named_parameters()]
        copies = {name: torch.nn.Parameter(weights[name]) for name in names}
        decays = {
            decay: [p for p in copies.values() if (p.ndim > 1) == (decay > 0)]
            for decay in (0.0, 0.01)
        }
        groups = [{"params": params, "weight_decay": decay} for decay, params in decays.items()]
        adamw = torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.999), eps=1e-3, fused=True)
        for rows in tokens:
            side.compute(rows)
            for name, parameter in side.model.named_parameters():
                assert local(parameter.grad).device.type == "cpu"
                copies[name].grad = local(parameter.grad).clone()
            side.update()
            adamw.step()
            masters = side.model.state_dict()  # waits
            assert all(torch.equal(local(masters[name]), copies[name]) for name in names)


@pytest.mark.parametrize("chunk", [40, None])
@pytest.mark.parametrize("objective", [Objective(), Objective(0.1, 1e-2)])
def test_the_loss_of_bf16_logits_in_fp32_is_that_of_float64(objective, chunk):
    """Products return what they have accumulated (mm with `out_dtype`), so the loss is exact to
    fp32, and gradients to their own rounding to bf16, as the probabilities are before them.
    """
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=draw).bfloat16() / 4 for n in (100, 272))
    labels = torch.randint(0, 272, (100,), generator=draw)
    found = []
    for device, dtype, loss in (
        (DEVICE, torch.bfloat16, vocabulary_loss),
        (torch.device("cpu"), torch.float64, vocabulary_loss_reference),
    ):
        inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        options = {"chunk": chunk} if loss is vocabulary_loss else {}
        total = loss(*inputs, labels.to(device), None, objective=objective, **options)
        gradients = torch.autograd.grad(total, inputs)
        found.append([x.double().cpu() for x in (total.detach(), *gradients)])
    (total, *gradients), (expected, *exact) = found
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, reference in zip(gradients, exact, strict=True):
        assert (gradient - reference).norm() < 2**-8 * reference.norm()
