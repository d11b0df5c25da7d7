"""Every preset of a published model fits its GPUs, by prediction, as recipes/README.md says."""

import re
from pathlib import Path

import pytest

import torchsft
from tools.planning.gpus import GPUS
from tools.planning.report import parts_of, role_of, run_of
from tools.published import PRESETS, model_config
from torchsft.planning.memory import IMBALANCE
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
    role = role_of(run, parts_of(run).alike[0])
    return role.memory.needed, sum(role.host.values()) * min(size, H100.ranks_per_node)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"debug", "finetune"}))
def test_a_preset_fits_its_gpus(ranks, preset):
    """On the pipeline ranks with most parameters, which need most in all of these."""
    ((found, on_host),) = ranks(1, needed, preset=preset)
    assert found <= H100.memory and on_host <= H100.host_memory
    assert round(found / 1e9) == int(STATED[preset])
