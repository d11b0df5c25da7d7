"""plan.py: its command line, figures against closed formulas, what does not fit, and bad input."""

import dataclasses
import json
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
import yaml

from tests.tiny import tiny_config
from tools import plan
from tools.planning import estimate, report, storage
from tools.planning.gpus import GPUS, read_gpu
from torchsft.checkpoint.state import Checkpointer
from torchsft.config import Checkpoint, Config, Data, InputError, Optim, Parallel, Train
from torchsft.models.decoder import local
from torchsft.models.families import family_of, read_model_config
from torchsft.optim.adamw import build_optimizer
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World
from torchsft.planning.build import plan_model
from torchsft.planning.memory import RESERVE, predict

# all that is split divides by 4
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    vocab_size=512,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
# embedding and head; queries and outputs, keys and values, gate, up and down, norms; the last norm
PARAMETERS = 2 * 512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
DEEPSEEK = tiny_config(num_hidden_layers=8, first_k_dense_replace=0, vocab_size=512)
DEEPSEEK = DEEPSEEK.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}


def llama(folder, *options):
    """What plan.py says of a Llama, and its exit code."""
    (folder / "config.json").write_text(json.dumps(LLAMA))
    argv = ["recipes/llama_sft.py", "finetune", "--model.path", folder, "--json", folder / "out"]
    code = plan.run(*plan.read([*map(str, argv), *map(str, options)]))
    return code, json.loads((folder / "out").read_text())


def each_llama(folder, cases):
    return [llama(folder, *options) for options in cases]


FOUR = ["--world-size", "4", "--data.seq-len", "256"]


def test_bytes_are_those_of_closed_formulas(ranks, tmp_path):
    """Of a quarter of the parameters: masters, gradients, moments; of all: checkpoint, export."""
    kinds = [
        ([], 4, 8, 12),
        (["--optim.moments", "bf16"], 4, 4, 8),
        (["--optim.moments", "bf16", "--optim.masters", "bf16"], 2, 4, 6),
    ]
    cases = [[*FOUR, *options, "--checkpoint.keep", "3"] for options, *_ in kinds]
    (plans,) = ranks(1, each_llama, folder=tmp_path, cases=cases)
    trained = 2 + 2 * 9  # parameters, each with a count of its steps
    for (_, master, moments, saved), (code, found) in zip(kinds, plans, strict=True):
        (role,) = found["roles"]
        assert code == 0 and found["fits"] and found["parameters"] == PARAMETERS
        rounding = 512 * (trained + 20)  # of each tensor, to whole blocks
        assert 0 <= role["held"]["parameters"] - master * PARAMETERS / 4 <= rounding
        assert role["held"]["optimizer"] == moments * PARAMETERS / 4
        assert role["needed"] == role["allocated"] + RESERVE == 84_900_000_000 - role["left"]
        assert found["checkpoint"] == saved * PARAMETERS + 4 * (trained + 1)
        assert found["checkpoints_kept"] == 4 and found["export"] == 2 * PARAMETERS
        copied = found["host"]["copy of a checkpoint"]
        assert found["checkpoint"] <= copied <= 2 * found["checkpoint"]  # powers of two


def test_what_does_not_fit_ends_with_1_and_with_changes_that_make_it_fit(ranks, tmp_path):
    gpu = tmp_path / "gpu.yaml"
    gpu.write_text(yaml.dump({"like": "h100-80g", "memory": RESERVE + 18_000_000}))
    options = ["--world-size", "4", "--gpu", str(gpu), "--data.seq-len", "4096"]
    ((found,),) = ranks(1, each_llama, folder=tmp_path, cases=[options])
    code, found = found
    assert code == 1 and not found["fits"]
    assert found["lacking"] == found["roles"][0]["needed"] - RESERVE - 18_000_000 > 0
    assert len(found["remedies"]) == 3
    losses = [remedy["loss"] for remedy in found["remedies"]]
    assert losses == sorted(losses)
    pasted = [[*options, *remedy["options"].split()] for remedy in found["remedies"]]
    pasted = [[*words[2:], *([] if "--world-size" in words[2:] else words[:2])] for words in pasted]
    (after,) = ranks(1, each_llama, folder=tmp_path, cases=pasted)
    for (code, again), remedy in zip(after, found["remedies"], strict=True):
        assert code == 0 and again["roles"][0]["left"] == remedy["left"]


def most_of_all_and_of_roles(schedule):
    """Bytes of the fullest of all pipeline ranks, and of the roles."""
    config = Config(
        data=Data(seq_len=512),
        train=Train(global_batch_size=4),
        parallel=Parallel(pp=4, dp_shard=1, pp_schedule=schedule),
    )
    run = report.run_of(config, DEEPSEEK, 4, GPUS["h100-80g"], 1.5)
    ranks = [predict(config, DEEPSEEK, 4, rank).allocated for rank in range(4)]
    found = report.make_plan(run)
    assert sorted(rank for role in found.roles for rank in role.pp_ranks) == [0, 1, 2, 3]
    assert len(found.roles) <= 3
    return max(ranks), found.fullest.memory.allocated


def all_schedules():
    schedules = ("Interleaved1F1B", "InterleavedZeroBubble")
    return {schedule: most_of_all_and_of_roles(schedule) for schedule in schedules}


def test_roles_hold_what_the_fullest_of_all_ranks_holds(ranks):
    (found,) = ranks(1, all_schedules)
    for schedule, (of_ranks, of_roles) in found.items():
        assert of_roles == pytest.approx(of_ranks, rel=0.005), schedule


def saved_and_counted(folder):
    """Bytes that this rank copies to the host for a checkpoint, and what is counted for it."""
    found = []
    for optim in (Optim(), Optim(moments="bf16", masters="bf16")):
        config = Config(
            data=Data(seq_len=64), optim=optim, parallel=Parallel(pp=2, pp_schedule="1F1B")
        )
        family = family_of(DEEPSEEK)
        with World(config.parallel, seed=0) as world:
            plan = plan_model(config, family, read_model_config(DEEPSEEK), world)
            allocate(plan.stages, world.device, offload=False)
            with torch.no_grad():
                for parameter in plan.model.parameters():
                    local(parameter).zero_()
                    parameter.grad = torch.zeros_like(parameter)
            optimizer = build_optimizer(plan.model, optim, None, plan.stages)
            optimizer.step()
            with patch.object(torch, "get_rng_state", lambda: torch.zeros(0)):
                saver = Checkpointer(f"{folder}/{optim.moments}", group=world.writers)
                saver.save(1, plan.model, optimizer, extra={}, config={})
                saver.wait()
            copied = sum(x.nbytes for x in saver._stager.host.values())
            with patch.object(storage, "pinned_bytes", lambda size, _: size):
                counted = storage.copied_bytes(plan.model, optim, world.size // 2)
            steps = 4 * len(optimizer.state)
            found.append((copied - steps, counted))
    return found


def test_the_copy_of_a_checkpoint_has_the_size_that_is_counted(ranks, tmp_path):
    for of_rank in ranks(2, saved_and_counted, folder=str(tmp_path)):
        for copied, counted in of_rank:
            assert counted == pytest.approx(copied, abs=200)  # rounded for each tensor


@pytest.mark.parametrize(
    ("options", "steps", "most"),
    [
        ({}, None, 3),
        ({"keep": 0, "every": 10}, 95, 10),
        ({"keep": 0}, None, None),
        ({"keep": 2, "every": 10, "keep_every": 50}, 100, 5),
        ({"keep": 2, "keep_best": 2, "every": 10}, 1000, 5),
        ({"every": 0}, 100, 1),
    ],
)
def test_checkpoints_kept_at_one_time(options, steps, most):
    assert storage.checkpoints_kept(Checkpoint(**options), steps) == most


# Bad input


def test_help_without_a_recipe_lists_what_plan_has_itself(capsys):
    with pytest.raises(SystemExit):
        plan.read(["--help"])
    said = capsys.readouterr().out
    assert "--gpu" in said and "--backtest" in said and "--optim.lr" not in said


def test_data_that_is_not_read_is_named():
    config = Config(data=Data(train=("mine.jsonl",), seq_len=256), train=Train(global_batch_size=1))
    with patch.object(estimate, "estimate", lambda *_, text, **__: text.source):
        said = estimate.of_run(config, LLAMA, 1, GPUS["h100-80g"], 1.5, None)
    assert "--data.train was not read (without the tokenizer of --model.path)" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["recipes/none.py"], "recipe recipes/none.py does not exist; those that exist are"),
        (["README.md"], "README.md is no recipe"),
        (["recipes/llama_sft.py", "llama_7b"], "choose one of: debug, finetune, llama_8b"),
        (["recipes/llama_sft.py", "--world-sise", "8"], "did you mean --world-size"),
        (["recipes/llama_sft.py", "--optim.momets", "int8"], "did you mean --optim.moments"),
        (["recipes/llama_sft.py", "--world-size", "0"], "must be at least 1"),
        (["recipes/llama_sft.py", "--imbalance", "0.5"], "must be at least 1"),
    ],
)
def test_a_wrong_command_line_is_refused_with_what_was_meant(argv, said):
    with pytest.raises(InputError, match=said):
        plan.read(argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("llama_sft.py llama_8b --gpu h100", "did you mean h100-80g"),
        ("llama_sft.py llama_8b --world-size 7", "set --parallel.dp-shard -1 or 7"),
        ("llama_sft.py --world-size 6 --parallel.tp 4", "start 8 ranks or lower"),
        ("llama_sft.py --world-size 8 --precision.experts float8", "has no experts"),
        ("qwen3_sft.py qwen3_30b --model.mtp train", "set --model.mtp keep"),
        ("gpt_oss_sft.py gpt_oss_20b --checkpoint.export fp8", "choose bf16"),
        ("llama_sft.py llama_8b --precision.compute blockwise --gpu a100-80g", "capability 9.0"),
        ("llama_sft.py llama_8b --model.path none", "none"),
        ("deepseek_v3_sft.py v3_256 --train.global-batch-size 500", "500"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(ranks, argv, said):
    (sentence,) = ranks(1, refusal, argv=argv)
    assert said in sentence and "\n" not in sentence


def refusal(argv):
    with suppress(SystemExit), pytest.raises(InputError) as error:
        plan.run(*plan.read([f"recipes/{argv.split()[0]}", *argv.split()[1:]]))
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory: 80e9", "lacks compute_capability, peak_flops.bf16"),
        ("like: h100-80g\nmemori: 1", "did you mean memory or"),
        ("like: h100-80g\nxyz: 1", "those there are: like, name, memory, "),
        ("like: h100\n", "must be one of h100-80g"),
        ("like: h100-80g\nprice: -1", "must be above 0"),
        ("like: h100-80g\npeak_flops: {bf16: fast}", "must be a number"),
        ("memory: [1", "cannot be read"),
        ("like: a\nlike: b", "given twice"),
        ("", "lacks memory"),
    ],
)
def test_a_faulty_file_of_a_gpu_is_refused(tmp_path, text, said):
    (tmp_path / "gpu.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_gpu(str(tmp_path / "gpu.yaml"))
    assert said in str(error.value)


def test_a_file_of_a_gpu_changes_what_it_says_and_marks_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("like: h100-80g\nmemory: 60e9\npeak_flops:\n  bf16: 800e12\n")
    gpu, like = read_gpu(str(file)), GPUS["h100-80g"]
    flops = like.peak_flops | {"bf16": 800e12}
    changed = {"name": str(file), "memory": 60_000_000_000, "peak_flops": flops}
    assert dataclasses.replace(gpu, sources={}) == dataclasses.replace(like, **changed, sources={})
    assert gpu.source("memory") == gpu.source("peak_flops.bf16") == f"given in {file}"
    assert gpu.source("peak_flops.fp8") == like.source("peak_flops.fp8")


def test_every_figure_of_a_built_in_gpu_has_a_source():
    for gpu in GPUS.values():
        for field in dataclasses.fields(gpu):
            if field.name not in ("name", "sources") and getattr(gpu, field.name):
                assert gpu.source(field.name).split(":")[0] in ("measured", "published", "assumed")
