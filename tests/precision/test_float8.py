"""Linear maps in float8 against torchao's own module, and steps of training in layouts of ranks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests.distributed.test_layouts import SilentTrainer, config_for, full
from tests.parallel.passes import build
from tests.tiny import write_conversations, write_tiny_model
from tools.benchmark_layouts import SentBytes
from torchsft.config import Config, InputError, Precision
from torchsft.metrics.summary import not_in_fp8
from torchsft.models.decoder import Linear, local
from torchsft.parallel import float8, fsdp
from torchsft.parallel.blockwise import apply_blockwise
from torchsft.parallel.float8 import check_device, check_shape
from torchsft.parallel.world import World
from torchsft.precision.float8 import float8_product

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_torchaos_module(recipe, bias, dtype):
    """Outputs and gradients, bit by bit; and not what fp32 gives. Tokens are no multiple of 16."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    ours = Linear(64, 48, bias=bias, dtype=dtype)
    plain = nn.Sequential(nn.Linear(64, 48, bias=bias, dtype=dtype))
    plain[0].load_state_dict(ours.state_dict())
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    theirs = convert_to_float8_training(plain, config=config)
    ours.product = float8_product(recipe, emulate=True)
    x, dy = (torch.randn(2, 19, width).to(dtype) for width in (64, 48))
    found = []
    for module in (ours, theirs):
        inputs = [x.clone().requires_grad_(), *module.parameters()]
        y = module(inputs[0])
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert all(map(torch.equal, *found))
    exact = nn.functional.linear(x, ours.weight, ours.bias)
    assert 0.01 < (found[0][0] - exact).norm() / exact.norm() < 0.06  # 3 bits of mantissa


def first_step(config: Config) -> tuple[float, dict[str, torch.Tensor], str]:
    """Loss and gradients of the first step, and what the run says of itself."""
    with World(config.parallel, config.train.seed) as world:
        trainer = SilentTrainer(config, world)
        trainer.optimizer.step = lambda: found.update(
            {name: full(p.grad) for name, p in trainer.model.named_parameters()}
        )
        found: dict[str, torch.Tensor] = {}
        record, _ = trainer.train_step(next(trainer.loader))
        return record["loss"], found, trainer.describe()


# multiples of 16, also of a half
SIZES = dict(
    num_hidden_layers=4,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)
LAYOUTS = [
    (2, {"dp_shard": 2, "ep": 2}),
    (2, {"cp": 2}),
    (2, {"tp": 2, "micro_batch_size": 2}),
    (4, {"pp": 2, "dp_replicate": 2, "pp_schedule": "ZBVZeroBubble"}),
    (1, {"activation_checkpointing": "full"}),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layout_changes_a_step_by_less_than_rounding_does(ranks, tmp_path_factory, recipe):
    """Scales belong to a rank's rows and parts of matrices, so layouts round otherwise: what that
    changes in all gradients together is no more than the distance of either to fp32.
    """
    base = tmp_path_factory.mktemp("float8")
    write_tiny_model(base / "model", **SIZES)
    write_conversations(base / "train.jsonl", 10)

    def run(n: int, options: dict[str, object]) -> list[tuple[float, dict[str, torch.Tensor]]]:
        return ranks(n, first_step, config=config_for(str(base), **options))

    ((exact_loss, exact, plain),) = run(1, {})
    ((loss, alone, _),) = run(1, {"compute": "float8", "recipe": recipe})
    assert "fp8" not in plain

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return sum((a[name] - b[name]).square().sum().item() for name in exact) ** 0.5

    rounding = distance(alone, exact)
    assert rounding > 0 and abs(loss - exact_loss) < 0.01 * exact_loss
    for n, layout in LAYOUTS:
        results = run(n, layout | {"compute": "float8", "recipe": recipe})
        gradients = {name: value for _, found, _ in results for name, value in found.items()}
        assert gradients.keys() == exact.keys()
        assert distance(gradients, alone) < 1.2 * rounding, layout
        assert abs(results[0][0] - loss) < 0.01 * loss, layout
        for *_, said in results:
            assert "(not in fp8: embed_tokens, mlp.gate, mlp.experts, lm_head), on" in said


def gathering(config: Config, in_float8: bool) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses of two steps, what they end with, and the bytes that the second gathered; with fp8's,
    the elements of weights that are gathered in it.
    """
    if not in_float8:
        fsdp.gather_in_float8 = lambda stage: None  # a rank is a fork of its own
    with World(config.parallel, config.train.seed) as world:
        trainer = SilentTrainer(config, world)
        losses = [trainer.train_step(next(trainer.loader))[0]["loss"]]
        with SentBytes() as sent:
            losses.append(trainer.train_step(next(trainer.loader))[0]["loss"])
        parameters = dict(trainer.model.named_parameters())
        assert all(type(local(p).data) is torch.Tensor for p in parameters.values())
        low = [p for p in parameters.values() if hasattr(p._local_tensor, "fsdp_pre_all_gather")]
        elements = sum(local(weight).numel() for weight in low)
        return losses, {n: full(p) for n, p in parameters.items()}, (sent.sent, elements)


@pytest.mark.parametrize(
    "layout", [{"dp_shard": 2, "tp": 2}, {"dp_shard": 2, "pp": 2, "pp_layers": (1,) * 8}], ids=str
)
def test_tensorwise_weights_are_gathered_in_a_byte_an_element_and_nothing_else_changes(
    ranks, tmp_path, layout
):
    """Bit by bit; over two ranks each sends its part to the other, in each of two passes through
    four microbatches, in fp32 or in fp8. A schedule of four stages on a rank gathers whenever it
    will, also when no forward pass follows before weights change: it gathers as
    without.
    """
    layers = 8 if "pp" in layout else SIZES["num_hidden_layers"]
    write_tiny_model(tmp_path / "model", **(SIZES | {"num_hidden_layers": layers}))
    write_conversations(tmp_path / "train.jsonl", 10)
    options = layout | {"compute": "float8", "recipe": "tensorwise"}
    config = config_for(str(tmp_path), **options)
    plain, low = (ranks(4, gathering, config=config, in_float8=each) for each in (False, True))
    for (losses, parameters, (sent, none)), (*found, (fewer, elements)) in zip(
        plain, low, strict=True
    ):
        assert found[0] == losses and none == 0
        assert (elements > 0) == ("pp" not in layout)
        assert all(torch.equal(found[1][name], value) for name, value in parameters.items())
        if "pp" not in layout:
            assert sent["all-gather"] - fewer["all-gather"] == (4 - 1) * elements * 2 * 4


def test_what_is_not_in_fp8_is_found_in_the_modules():
    """V3.2's indexer chooses tokens; its releases have two of its three matrices in fp8."""
    indexer = [f"self_attn.indexer.{name}" for name in ("wq_b", "wk", "weights_proj")]
    first, cpu = build(family="deepseek_v32"), torch.device("cpu")
    with patch.object(float8, "check_shape"):
        float8.apply_float8(first, cpu, "rowwise")
    assert not_in_fp8(first) == ["embed_tokens", *indexer, "mlp.gate", "mlp.experts", "lm_head"]
    second = build(family="deepseek_v32")
    apply_blockwise(second, cpu, power_of_two=False, keep=False)
    assert not_in_fp8(second) == ["embed_tokens", indexer[2], "mlp.gate", "lm_head"]


def test_what_float8_cannot_be_used_for_is_refused():
    with pytest.raises(InputError, match=r"capability 8\.9, but this one has 8\.0"):
        check_device((8, 0))
    check_device((9, 0))
    with pytest.raises(InputError, match=r"q is \[24, 16\] on a rank"):
        check_shape("q", Linear(16, 24))
    with pytest.raises(
        InputError, match=r"tensorwise is for --precision\.compute float8, not bf16"
    ):
        Precision(compute="bf16", float8_recipe="tensorwise")
