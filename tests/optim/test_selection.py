"""What patterns of parameters mean, against names written by hand, and what is refused."""

import math
import re

import pytest
import torch

from tests.tiny import tiny_config
from torchsft.config import InputError, Optim
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from torchsft.optim.selection import matching, select
from torchsft.parallel.memory import held_bytes


def meta_model():
    """12 layers, the first of them dense."""
    with torch.device("meta"):
        return DeepseekV3(DeepseekV3Config.from_hf(tiny_config(num_hidden_layers=12).to_dict()))


SHAPES = {name: tuple(parameter.shape) for name, parameter in meta_model().named_parameters()}
ROUTERS = {f"model.layers.{i}.mlp.gate.weight" for i in range(1, 12)}
EXPERTS = {
    f"model.layers.{i}.mlp.experts.{part}"
    for i in range(1, 12)
    for part in ("gate_up_proj", "down_proj")
}


def of_layers(*numbers):
    return {
        name for name in SHAPES if name.startswith(tuple(f"model.layers.{i}." for i in numbers))
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("router", ROUTERS),
        ("embeddings", {"model.embed_tokens.weight"}),
        ("experts", EXPERTS),
        ("layers", of_layers(*range(12))),
        ("layers.1", of_layers(1)),  # not 10 and 11
        ("layers.0-2", of_layers(0, 1, 2)),
        ("layers.9-11", of_layers(9, 10, 11)),
        ("lm_head", {"lm_head.weight"}),
        ("lm_head.weight", {"lm_head.weight"}),
        ("model.layers.1", of_layers(1)),
        ("model.layers.1?", of_layers(10, 11)),
        ("*.mlp.gate", ROUTERS),  # not gate_proj, not gate_up_proj
        ("model.layers.3.mlp.experts.down_proj", {"model.layers.3.mlp.experts.down_proj"}),
        ("*.mlp.experts.*", EXPERTS),
        ("*norm*", {name for name in SHAPES if "norm" in name}),
        (
            "model.layers.[45].self_attn.o_proj",
            {f"model.layers.{i}.self_attn.o_proj.weight" for i in (4, 5)},
        ),
    ],
)
def test_a_pattern_means_these_names(pattern, names):
    assert matching(pattern, SHAPES, DeepseekV3.parts, "--train.freeze") == names


def chosen(freeze=(), groups=()):
    return select(SHAPES, freeze, Optim(groups=groups).parameter_groups(), DeepseekV3.parts)


def test_the_first_group_that_matches_decides_and_frozen_parameters_have_none():
    selection = chosen(
        ["layers.0-9", "router"],
        ["experts:lr=1e-4", "layers.11:weight_decay=0,lr=1e-3", "*:lr=0.5"],
    )
    assert selection.frozen == of_layers(*range(10)) | ROUTERS
    assert selection.groups.keys() == SHAPES.keys() - selection.frozen
    of = {name: (group.lr, group.weight_decay) for name, group in selection.groups.items()}
    assert of["model.layers.11.mlp.experts.down_proj"] == (1e-4, None)
    assert of["model.layers.11.input_layernorm.weight"] == (1e-3, 0.0)
    assert of["model.layers.10.input_layernorm.weight"] == of["lm_head.weight"] == (0.5, None)


def test_a_frozen_parameter_takes_memory_for_its_weight_alone():
    """4 bytes an element; a trained one has a gradient and two moments too."""
    model = meta_model()
    chosen(["experts"]).apply(model)
    experts = sum(math.prod(SHAPES[name]) for name in EXPERTS)
    others = sum(map(math.prod, SHAPES.values())) - experts
    assert held_bytes(model, torch.bfloat16, True, Optim()) == (
        4 * experts + 16 * others,
        0,
    )


@pytest.mark.parametrize(
    ("freeze", "groups", "sentence"),
    [
        (["routers"], [], "--train.freeze 'routers' matches no parameter; similar names: router"),
        (
            ["model.layers.1.mlp.experts.0.up_proj.weight"],
            [],
            "are stacked in parameters such as model.layers.1.mlp.experts.down_proj",
        ),
        (["gate"], [], "words: router, embeddings, experts, layers, layers.N, layers.A-B"),
        (["qqqq"], [], "a name is such as model.embed_tokens.weight"),
        (
            ["layers.12"],
            [],
            "--train.freeze 'layers.12' names layer 12, but the model's are 0 to 11",
        ),
        (
            ["layers.10-61"],
            [],
            "--train.freeze 'layers.10-61' names layer 12, but the model's are 0 to 11",
        ),
        (["layers.3-1"], [], "'layers.3-1' ends before it begins; write layers.1-3"),
        (["*"], [], "--train.freeze leaves no parameter to train"),
        (
            ["layers", "embeddings", "lm_head", "model.norm"],
            [],
            "--train.freeze leaves no parameter to train",
        ),
        (
            ["experts"],
            ["*.mlp.experts:lr=1"],
            "'*.mlp.experts' matches only parameters that are not trained",
        ),
        (
            [],
            ["layers:lr=1", "router:lr=2"],
            "'router' matches only parameters that groups before it have taken; the first",
        ),
        (
            [],
            ["*norm*:weight_decay=0.1"],
            "'*norm*' sets weight_decay, but matches only norms and biases",
        ),
        (
            [],
            ["rooter:lr=1"],
            "--optim.groups 'rooter' matches no parameter; similar names: router",
        ),
    ],
)
def test_patterns_that_do_nothing_are_refused_in_a_sentence(freeze, groups, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)) as error:
        chosen(freeze, tuple(groups))
    assert ". " not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "router",
            "'router', but it must be PATTERN:lr=NUMBER,weight_decay=NUMBER (or one of the two)",
        ),
        (":lr=1", "must be PATTERN:lr=NUMBER"),
        ("router:", "must be PATTERN:lr=NUMBER"),
        ("router:lr", "lr = '' is not a number"),
        ("router:lr=fast", "lr = 'fast' is not a number"),
        ("router:lr=-1e-3", "lr is -0.001; it must be a finite number of at least 0"),
        ("router:lr=nan", "lr is nan"),
        ("router:lr=1,lr=2", "which gives lr twice; give it once"),
        ("router:beta1=0.5", "but a group has no 'beta1'; it can have lr and weight_decay"),
    ],
)
def test_groups_that_are_not_understood_are_refused(text, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        Optim(groups=(text,))


def test_a_field_of_a_group_may_be_written_as_an_option_is():
    (group,) = Optim(groups=("experts:weight-decay=0.25, lr=1e-3",)).parameter_groups()
    assert (group.pattern, group.lr, group.weight_decay) == ("experts", 1e-3, 0.25)
