"""Every preset of a published model fits its GPUs, by prediction, as recipes/README.md says."""

import re
from pathlib import Path

import pytest

import torchsft
from tools.benchmark_memory import H100, predict_preset
from tools.published import PRESETS
from torchsft.planning.memory import IMBALANCE

README = (Path(torchsft.__file__).parents[1] / "recipes" / "README.md").read_text()
# Preset: GB that its row names last.
STATED = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", README, re.MULTILINE))


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"debug", "finetune"}))
def test_a_preset_fits_its_gpus(ranks, preset):
    """On the fullest pipeline rank, which needs most in all of these."""
    arguments = {"preset": preset, "imbalance": IMBALANCE, "ends": False}
    ((memory,),) = ranks(1, predict_preset, **arguments)
    assert memory.needed <= H100
    assert round(memory.needed / 1e9) == int(STATED[preset])
