"""Which architectures there are, what a family must offer, and that nobody else knows one by
name.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.oracle import packed
from tests.models.test_config import V3
from tests.models.test_qwen3 import QWEN3_8B
from tools.published import QWEN3_30B
from torchsft.config import InputError
from torchsft.models.attention import GroupedQueryAttention, LatentAttention
from torchsft.models.decoder import RMSNorm, SwigluMLP
from torchsft.models.families import FAMILIES, build_model, family_of, read_model_config
from torchsft.models.language_model import DecoderLayer, LanguageModel, ModelConfig
from torchsft.models.moe import Experts, MoE
from torchsft.models.qwen3 import Qwen3MoeConfig
from torchsft.models.routers import SoftmaxRouter

ROOT = Path(__file__).resolve().parents[2]
FAMILY_FILES = sorted({family.model.__module__ for family in FAMILIES.values()})
# What only one family's configuration has.
OWN_FIELDS = {
    *("first_k_dense_replace", "n_routed_experts", "n_shared_experts", "n_group", "topk_group"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("routed_scaling_factor", "num_nextn_predict_layers", "num_experts", "decoder_sparse_step"),
    *("mlp_only_layers", "norm_topk_prob", "moe_intermediate_size", "head_dim"),
}


def modules_without_families():
    """The files of torchsft/ and tools/ that are not in models/."""
    paths = sorted([*ROOT.glob("torchsft/**/*.py"), *ROOT.glob("tools/**/*.py")])
    return [path for path in paths if "models" not in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("path", modules_without_families(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_outside_models_and_recipes_knows_a_family(path):
    """Neither by import nor by a field that its configuration alone has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        assert not set(names) & set(FAMILY_FILES), f"line {node.lineno} imports a family"
        if isinstance(node, ast.Attribute):
            assert node.attr not in OWN_FIELDS, f"line {node.lineno} asks for {node.attr}"


@pytest.mark.parametrize("config", [V3, QWEN3_30B, QWEN3_8B], ids=lambda c: c["architectures"][0])
def test_a_configuration_offers_all_that_the_protocol_asks_for(config):
    found = read_model_config(config)
    for name in ModelConfig.__annotations__:
        getattr(found, name)
    layers = range(found.num_hidden_layers)
    assert len(found.layer_costs()) == found.num_hidden_layers
    assert [found.is_moe(layer) for layer in layers] == [
        found.routed_experts(layer) > 0 for layer in layers
    ]
    assert found.pair_cost > 0 and found.head_cost > found.embedding_cost > 0
    assert all(size > 0 for size in found.split_widths.values())


def test_the_architecture_decides_and_the_model_type_where_none_is_named():
    for architecture, family in FAMILIES.items():
        assert family_of({"architectures": [architecture], "model_type": "kimi"}) is family.model
        assert family_of({"model_type": family.model_type}) is family.model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "describes GPT2LMHeadModel, but only "),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "qwen3"}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "gpt2"}, "no architectures and model_type 'gpt2'"),
        ({}, "no architectures and model_type None"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_list(config, message):
    with pytest.raises(InputError, match=message) as error:
        family_of(config)
    *others, last = sorted(FAMILIES)
    assert str(error.value).endswith(f"only {', '.join(others)} and {last} are supported")


class Mixed(LanguageModel):
    """Layers of different kinds: latent attention with a dense network, grouped-query attention
    with biases and without norms, with norms and experts, with shared experts.
    """

    config: Qwen3MoeConfig
    config_class = Qwen3MoeConfig

    def build_layer(self, layer: int, experts: str) -> DecoderLayer:
        config, width = self.config, self.config.hidden_size
        attention: nn.Module
        if layer == 0:
            attention = LatentAttention(
                width=width,
                heads=4,
                q_rank=None,
                kv_rank=16,
                nope_dim=4,
                v_dim=8,
                rope=config.rope,
                bias=False,
            )
        else:
            attention = GroupedQueryAttention(
                width=width,
                heads=4,
                kv_heads=layer,
                head_dim=config.head_dim,
                rope=config.rope,
                bias=layer == 1,
                output_bias=layer == 1,
                qk_norm_eps=None if layer == 1 else 1e-6,
            )
        network: SwigluMLP | MoE = SwigluMLP(width, config.intermediate_size)
        if layer >= 2:
            gate = SoftmaxRouter(width, 4 * layer, top_k=2, normalise=False)
            shared = SwigluMLP(width, 8) if layer == 4 else None
            network = MoE(gate, Experts(4 * layer, width, 16, experts), shared)
        return DecoderLayer(width, 1e-6, attention, network)


def test_layers_of_different_kinds_live_in_one_model():
    """It computes, every parameter gets a gradient, begins as its module says and has its pieces;
    a part shares its layers.
    """
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    sizes |= {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
    model = Mixed(Qwen3MoeConfig.from_hf(sizes), layers=(0, 1, 2, 4))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(model.initial_value(name, tuple(parameter.shape), seed=0))
    model(**packed([9, 1, 20], padding=4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            assert (module.weight == 1).all(), name
    assert model.moe_layers().keys() == {"2", "4"}
    keys = [p.key for parts in model.checkpoint_pieces().values() for p in parts]
    assert len(keys) == len(set(keys)) and "model.layers.4.mlp.experts.15.up_proj.weight" in keys
    assert "model.layers.4.mlp.shared_experts.up_proj.weight" in keys
    part = model.part(layers=[1, 2], first=False, last=False)
    assert part.model.layers["2"] is model.model.layers["2"] and part.family is Mixed


def test_a_model_is_made_from_config_json_alone():
    with torch.device("meta"):
        model = build_model(QWEN3_8B, loss_chunk=7)
    assert type(model) is FAMILIES["Qwen3ForCausalLM"].model and model.loss_chunk == 7
