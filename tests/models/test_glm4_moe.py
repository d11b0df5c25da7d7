"""What is special to GLM-4.5 and its like."""

import pytest
import torch

from tests.families import PUBLISHED, tiny
from torchsft.config import InputError
from torchsft.models.families import build_model, read_model_config


# What the weights on the hub have, all together.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("glm_4_5_air", 110_468_824_832), ("glm_4_5", 358_337_791_296)],
)
def test_the_published_numbers_are_met_with_the_mtp_layer(name, parameters):
    """Which the files give an embedding and a head of its own, and with the correction biases."""
    config = PUBLISHED[name].config
    with torch.device("meta"):
        model = build_model(config, mtp="train")
    tensors = dict(model.state_dict())
    shared = [tensors[name] for name in model.shared_keys().values()]
    assert len(shared) == 2
    assert sum(tensor.numel() for tensor in [*tensors.values(), *shared]) == parameters


def test_half_of_each_head_is_rotated_at_its_start_and_norms_are_as_said():
    for name, norms in (("glm_4_5_air", False), ("glm_4_5", True)):
        config = read_model_config(PUBLISHED[name].config)
        assert config.rope.dim == 64 and config.rope.theta == 1000000
        assert (config.rope.place, config.rope.pairing) == ("start", "halves")
        with torch.device("meta"):
            model = build_model(PUBLISHED[name].config, layers=[0])
        attention = model.model.layers["0"].self_attn
        assert (attention.q_norm is not None) == norms
        assert attention.k_proj.bias is not None and attention.o_proj.bias is None


def test_the_published_fp8_weights_are_refused_by_name():
    """Their scales are of channels."""
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    with pytest.raises(InputError, match=r"compressed-tensors.*DeepSeek's fp8"):
        read_model_config(PUBLISHED["glm_4_5_air"].config | {"quantization_config": said})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 and another one, 0.5"),
        ({"n_group": 3}, r"8 n_routed_experts, which n_group \(3\) does not divide"),
        ({"num_experts_per_tok": 5}, r"\(topk_group\) hold only 4 experts"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) does not divide"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0, but it must be at least 1"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        read_model_config(tiny("glm4_moe").to_dict() | change)
