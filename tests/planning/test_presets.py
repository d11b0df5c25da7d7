"""Every preset of a published model fits its GPUs, by prediction, as recipes/README.md says."""

import dataclasses
import re
from pathlib import Path

import pytest

import torchsft
from tools.planning.gpus import GPUS
from tools.planning.report import role_of, run_of
from tools.published import PRESETS, model_config
from torchsft.planning import simulation
from torchsft.planning.memory import IMBALANCE, RESERVE, predict
from torchsft.planning.roles import parts_of
from torchsft.resolution import smallest_number_of_ranks

README = (Path(torchsft.__file__).parents[1] / "recipes" / "README.md").read_text()
# Preset: GB that its row names last.
STATED = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", README, re.MULTILINE))
H100 = GPUS["h100-80g"]


def needed(preset):
    """Bytes that the pipeline ranks with most parameters need, and a node of them on its host."""
    config = PRESETS[preset]()
    size = smallest_number_of_ranks(config.parallel)
    run = run_of(config, model_config(preset), size, H100, IMBALANCE)
    role = role_of(run, parts_of(run.config, run.model_config, size).alike[0])
    return role.memory.needed, sum(role.host.values()) * min(size, H100.ranks_per_node)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"debug", "finetune"}))
def test_a_preset_fits_its_gpus(ranks, preset):
    """On the pipeline ranks with most parameters, which need most in all of these."""
    ((found, on_host),) = ranks(1, needed, preset=preset)
    assert found <= H100.memory and on_host <= H100.host_memory
    assert round(found / 1e9) == int(STATED[preset])


# GB of a reviewer who added up the fullest of 8 pipeline ranks by hand, with even experts.
BY_HAND = {
    "masters and moments": 34.5,
    "gathered copies": 9.4,
    "gradients": 18.7,
    "receive buffers": 3.8,
    "in flight": 4.5,
    "layer": 4.6,
    "reserve": 5.5,
}


def eight_pipeline_ranks():
    config = PRESETS["v3_256"]()
    parallel = dataclasses.replace(config.parallel, pp=8, dp_shard=32, ep=32)
    config = dataclasses.replace(config, parallel=parallel)
    return predict(config, model_config("v3_256"), 256, 2, 1.0).held


def test_an_independent_sum_of_deepseek_v3_is_explained(ranks):
    """That sum had a receive buffer for each of 16 microbatches, two stages and two directions, of
    which those in flight are left, and more of a layer that is computed again.
    """
    (held,) = ranks(1, eight_pipeline_ranks)
    held = {name: size / 1e9 for name, size in held.items()} | {"reserve": RESERVE / 1e9}
    found = {
        "masters and moments": held[simulation.PARAMETERS] + held[simulation.MOMENTS],
        "gathered copies": held[simulation.GATHERED],
        "gradients": held[simulation.GRADIENTS],
        "receive buffers": held[simulation.RECEIVED],
        "in flight": held[simulation.IN_FLIGHT],
        "layer": held[simulation.LAYER] + held[simulation.EXCHANGE],
        "reserve": held["reserve"],
    }
    for name in ("masters and moments", "gathered copies", "gradients", "reserve"):
        assert found[name] == pytest.approx(BY_HAND[name], abs=0.1), name
    assert found["in flight"] == pytest.approx(BY_HAND["in flight"], abs=0.5)
    assert BY_HAND["layer"] - 1 < found["layer"] < BY_HAND["layer"]
    assert BY_HAND["receive buffers"] - 2.6 < found["receive buffers"] < BY_HAND["receive buffers"]
    assert sum(found.values()) == pytest.approx(sum(BY_HAND.values()), abs=3)
