"""--model.compile: the numbers of what is not compiled, how much is compiled, and what is refused.
tests/distributed/test_layouts.py compares layouts.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from tests.parallel.passes import build, fill, microbatch
from torchsft.config import Config, InputError, Model, Parallel, Precision, Train
from torchsft.parallel import compile as compiling
from torchsft.parallel.apply import parallelize
from torchsft.parallel.world import World

CPU = torch.device("cpu")
# Of a DeepSeek-V3: latents and expand, add_and_norm, hidden of dense networks and of shared
# experts, score, choose, weigh, add.
REGIONS = 9


def gradients(compiled: bool, mode: str, family: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Losses and gradients of two microbatches, and the load of experts."""
    with World(Parallel(), 0) as world:
        model = build(family=family, **changes)
        train = Train(activation_checkpointing=mode)
        parallelize([model], world, torch.float32, activations=train, compiled=compiled)
    fill(model)
    moes = model.moe_layers().values()
    for moe in moes:
        moe.balance_scale = moe.z_scale = 0.1
    found = {}
    for number in (0, 3):
        loss = model.train()(**microbatch(number))
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    with torch.no_grad():  # other tokens, not compiled
        short = {"positions": torch.arange(5), "cu_seqlens": torch.tensor([0, 5])}
        found["logits"] = model.eval()(torch.arange(5), **short)
    found["load"] = torch.stack([moe.expert_load for moe in moes]).float()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "mode", "regions"),
    [("", "none", REGIONS), ("", "full", REGIONS), ("gpt_oss", "selective", 6)],
)
def test_layers_share_what_is_compiled_and_compute_the_same(monkeypatch, family, mode, regions):
    """One graph for each region, whole (`fullgraph`), whatever the number of layers and documents;
    sums in another order, as those of layouts.
    """
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch.compiler.reset()
    expected, found = (gradients(compiled, mode, family) for compiled in (False, True))
    assert len(graphs) == regions
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert compiling.compiled_message().startswith("compiled in ")


@pytest.mark.skipif(not compiling._has_compiler(CPU), reason="needs a C++ compiler")
def test_kernels_compute_what_the_region_does():
    """The smallest one, by torch's own backend: sums in another order."""
    layer = build().model.layers["0"].to_empty(device="cpu")
    torch.nn.init.uniform_(layer.post_attention_layernorm.weight, 0.5, 1.5)
    inputs = torch.randn(2, 40, 32).requires_grad_().unbind()
    upstream, weight = torch.randn(2, 40, 32).unbind(), layer.post_attention_layernorm.weight
    results = []
    for region in (layer.add_and_norm, compiling._compiled(layer.add_and_norm)):
        outputs = region(*inputs)
        results.append([*outputs, *torch.autograd.grad(outputs, [*inputs, weight], upstream)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": Model(compile=True, ops="plain")}, "--model.ops plain"),
        ({"parallel": Parallel(tp=2)}, "--parallel.tp 2"),
        ({"precision": Precision(compute="blockwise")}, "--precision.compute blockwise"),
        (
            {"precision": Precision(compute="float8", float8_recipe="tensorwise")},
            "--precision.float8-recipe tensorwise",
        ),
        (
            {"train": Train(activation_checkpointing="stream")},
            "--train.activation-checkpointing stream",
        ),
        (
            {"parallel": Parallel(pp=2, pp_schedule="ZBVZeroBubble")},
            "--parallel.pp-schedule ZBVZeroBubble without activation checkpointing",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(monkeypatch, options, named):
    monkeypatch.setattr(compiling, "_has_compiler", lambda _: True)
    config = Config(**{"model": Model(compile=True)} | options)
    with pytest.raises(InputError) as refusal:
        compiling.check_compile(config, CPU)
    expected = f"--model.compile is not for {named}; leave one of the two out"
    assert str(refusal.value) == expected
    config.model.compile = False
    compiling.check_compile(config, CPU)


def test_a_missing_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(compiling, "_has_compiler", lambda _: False)
    for device, name in ((CPU, "a C++ compiler"), (torch.device("cuda"), "triton")):
        with pytest.raises(InputError, match=re.escape(f"--model.compile needs {name}; install")):
            compiling.check_compile(Config(model=Model(compile=True)), device)
