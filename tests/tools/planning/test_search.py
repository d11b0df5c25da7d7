"""The search: what it enumerates, its quick sum beside execution, and a whole search."""

import shlex
from unittest.mock import patch

from tests.tiny import tiny_config
from tools.planning import search, search_report
from tools.planning.candidates import CHECKPOINTING, Task, layouts
from tools.planning.gpus import read_gpu
from tools.planning.options import changed
from tools.planning.search_report import command_of
from tools.planning.weighing import Layouts, quick_sum
from torchsft.cli import parse
from torchsft.config import Config, Data, Precision, Train
from torchsft.parallel.world import mesh_sizes
from torchsft.planning.memory import RESERVE, predict

MODEL = tiny_config(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=6,
    first_k_dense_replace=1,
).to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
CONFIG = Config(
    data=Data(seq_len=4096),
    train=Train(global_batch_size=16),
    precision=Precision(compute="bf16"),
)
GPU = read_gpu("h100-80g")


def task(*fixed, config=CONFIG, size=8):
    return Task(config, frozenset(fixed), MODEL, size, GPU, 1.5)


def test_layouts_multiply_to_the_gpus_and_what_is_given_stays():
    found = list(layouts(task()))
    assert len({str(each) for each in found}) == len(found) > 100
    for each in found:
        mesh_sizes(each.parallel, 8)
    assert {each.parallel.pp for each in found} == {1, 2, 4}  # not more than layers
    given = changed(CONFIG, {"parallel.pp": 2, "train.micro_batch_size": 2})
    found = list(layouts(task("parallel.pp", "train.micro_batch_size", config=given)))
    assert {(e.parallel.pp, e.train.micro_batch_size) for e in found} == {(2, 2)}


LAYOUTS = [
    ({"pp": 1, "dp_shard": 8, "ep": 4}, CHECKPOINTING[3], {}),
    ({"pp": 2, "dp_shard": 4, "ep": 4, "pp_schedule": "Interleaved1F1B"}, CHECKPOINTING[0], {}),
    ({"pp": 4, "dp_shard": 2, "ep": 2, "pp_schedule": "1F1B"}, CHECKPOINTING[2], {}),
    ({"pp": 2, "dp_shard": 2, "tp": 2, "pp_schedule": "ZBVZeroBubble"}, CHECKPOINTING[3], {}),
    ({"pp": 2, "dp_shard": 4, "pp_schedule": "1F1B"}, CHECKPOINTING[1], {"optim.moments": "int8"}),
]


def sums_and_predictions():
    """Bytes but the reserve of each of LAYOUTS, by the quick sum and from execution."""
    found = []
    for axes, modes, optimizer in LAYOUTS:
        values = {f"parallel.{axis}": size for axis, size in axes.items()}
        config = changed(CONFIG, values | modes | optimizer)
        blocks = search._measured(task(), config)
        needed, rank, _ = quick_sum(config, blocks, Layouts(task()).roles(config, blocks.layers))
        found.append((needed - RESERVE, predict(config, MODEL, 8, rank).allocated))
    return found


def test_the_quick_sum_is_near_execution(ranks):
    """Never a tenth too low, which would show what cannot fit, and never a third too high."""
    (found,) = ranks(1, sums_and_predictions)
    for quick, executed in found:
        assert 0.9 * executed < quick < 1.35 * executed, found


def test_a_command_gives_what_was_decided():
    # what a candidate has as by default is said too where the preset has something else
    preset = changed(CONFIG, {"parallel.ep": 8, "train.micro_batch_size": 2})
    given = changed(preset, {"optim.lr": 2e-5})
    values = {"parallel.ep": 1, "train.micro_batch_size": 1}
    values |= {"parallel.pp": 2, "parallel.dp_shard": 4, "parallel.pp_schedule": "1F1B"}
    config = changed(given, values | CHECKPOINTING[3] | {"optim.offload": True})
    candidate = search.Candidate(config, 4, 1.0, 0, 0, 0)
    asked = task("optim.lr", config=given)
    words = shlex.split(command_of(asked, candidate, "recipes/deepseek_v3_sft.py", "finetune"))
    assert words[:6] == "torchrun --nnodes 1 --nproc-per-node 8 recipes/deepseek_v3_sft.py".split()
    _, parsed = parse({"finetune": lambda: preset}, str, words[6:], "")
    assert parsed.parallel == config.parallel and parsed.optim == config.optim
    assert parsed.train == config.train


def test_what_a_search_shows_fits_and_was_constructed():
    given = changed(CONFIG, {"parallel.tp": 1, "parallel.cp": 1})
    asked = task("parallel.tp", "parallel.cp", "precision.compute", config=given, size=2)
    with patch.multiple(search, MEASURED=4, TOGETHER=4, EACH=2, SHOWN=3):
        found = search.search(asked, lambda _: None)
    assert 1 <= len(found.best) <= 4 and found.smallest[0] == 1
    for each in found.best:
        assert each.predicted[0] <= GPU.memory and each.estimate.step_seconds == each.seconds
    assert [each.seconds for each in found.best] == sorted(each.seconds for each in found.best)
    lines = search_report.lines_of(found, "recipes/deepseek_v3_sft.py", "finetune")
    assert sum(line.strip().startswith("torchrun") for line in lines) == len(found.best)
