"""The recipe as a user runs it: `torchrun recipes/deepseek_v3_sft.py ...`, on generated and on real
conversations.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.sft import check_family
from tests.families import RECIPES
from tests.tiny import write_tiny_model
from tools.planning.storage import checkpoint_bytes, export_bytes
from torchsft.cli import build, options_of, read_file
from torchsft.config import Config, InputError
from torchsft.models.families import FAMILIES
from torchsft.planning.memory import planned_rank

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def launch(
    ranks: int, *options: object, seconds: int = 240, recipe: str = "deepseek_v3_sft.py"
) -> subprocess.CompletedProcess:
    """Run a recipe under torchrun; a run that outlasts `seconds` is ended with all its ranks and
    fails the test.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    command += [str(ROOT / "recipes" / recipe), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {
        k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end after {seconds} s\n{out[-3000:]}\n{err[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def succeed(ranks: int, *options: object, recipe: str = "deepseek_v3_sft.py") -> str:
    """The standard output of a run that must end well."""
    result = launch(ranks, *options, recipe=recipe)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", [Path(module.__file__).name for module in RECIPES])
def test_every_recipe_has_a_debug_preset_that_trains(tmp_path, recipe):
    output = tmp_path / "run"
    options = ["--train.steps", 1, "--eval.answers", 0]
    succeed(1, *options, "--data.seq-len", 128, "--output", output, recipe=recipe)
    assert len(records(output)) == 1 and (output / "hf" / "config.json").is_file()
    check_planned_sizes(output)


def check_planned_sizes(output: Path):
    """What plan.py counts for the disk is what a run of one rank has written."""
    config = build(Config, read_file(str(output / "config.json"), options_of(Config)))
    model_config = json.loads((output / "generated" / "config.json").read_text())
    with planned_rank(config, model_config, 1) as (plan, _):
        counted = checkpoint_bytes(plan.model, config.optim)
    folder = output / "checkpoints" / "step-00000001"
    tensors = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = [entry for name, entry in tensors.items() if not name.startswith("rng.")]
    assert counted == sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors)
    written = (folder / "__0_0.distcp").stat().st_size
    assert 0 < written - counted < 2_000 * len(tensors) + 10_000  # each in an archive of its own
    index = json.loads((output / "hf" / "model.safetensors.index.json").read_text())
    assert export_bytes(config, model_config) == index["metadata"]["total_size"]


def test_a_recipe_trains_its_own_families_alone(tmp_path):
    """Said from config.json, before weights are opened: there are none."""
    listed = [name for module in RECIPES for name in module.ARCHITECTURES]
    assert sorted(listed) == sorted(FAMILIES)
    for architecture in FAMILIES:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        for module in RECIPES:
            if architecture in module.ARCHITECTURES:
                check_family(str(tmp_path), module.ARCHITECTURES)
                continue
            sentence = f"holds a {architecture}, but this recipe trains {module.ARCHITECTURES[0]}"
            with pytest.raises(InputError, match=sentence):
                check_family(str(tmp_path), module.ARCHITECTURES)


@pytest.mark.parametrize("recipe", ["deepseek_v3_sft.py", "qwen3_sft.py"])
def test_debug_preset_gives_every_output_and_transformers_gives_its_answers(tmp_path, recipe):
    output = tmp_path / "run"
    out = succeed(
        2,
        "--train.steps",
        6,
        "--optim.warmup-steps",
        2,
        "--checkpoint.every",
        3,
        "--eval.every",
        3,
        "--eval.answers",
        6,
        "--output",
        output,
        recipe=recipe,
    )
    assert out.count("held-out answers are exactly right") == 2
    for expected in (
        "loss   ",
        "eval loss   ",
        "tokens/s   ",
        f"tensorboard --logdir {output}/tensorboard",
    ):
        assert expected in out
    assert "memory planned for rank 0: tensors of 0.0" in out
    # parameters and moments, as planned and as there
    held = re.search(r"parameters and moments (\S+ GB) \((\S+ GB) planned\); torch counts no", out)
    assert held[1] == held[2]
    lines = records(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "supervised_tokens",
        "tokens_per_second",
        "step_seconds",
        "epoch",
    }
    assert all(expected <= line.keys() and math.isfinite(line["loss"]) for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert {p.name for p in (output / "checkpoints").iterdir()} == {
        "step-00000003",
        "step-00000006",
    }
    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    wanted = {
        "train/loss",
        "eval/loss",
        "optim/lr",
        "optim/grad_norm",
        "speed/tokens_per_second",
        "speed/step_seconds",
    }
    wanted |= {
        "checkpoint/stall_seconds",
        "checkpoint/write_seconds",
        "speed/data_wait_share",
        "data/epochs/train.jsonl",
    }
    wanted |= {
        "speed/supervised_tokens_per_second",
        "expert_load/layer_1_max_over_mean",
        "expert_load/layer_2_max_over_mean",
        "expert_load/unused_share",
        "eval/routing_drift",
    }
    wanted |= (
        {"memory/peak_resident_gib"}
        if not torch.cuda.is_available()
        else {"memory/peak_allocated_gib", "speed/mfu"}
    )
    assert wanted <= set(board.Tags()["scalars"])
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in lines]
    )
    assert all(
        1 <= event.value <= 8 for event in board.Scalars("expert_load/layer_1_max_over_mean")
    )
    assert any("config" in tag for tag in board.Tags()["tensors"])
    for config in (
        output / "config.json",
        output / "checkpoints" / "step-00000006" / "config.json",
    ):
        assert json.loads(config.read_text())["parallel"]["ep"] == 2

    model = AutoModelForCausalLM.from_pretrained(output / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(output / "hf")
    answers = [
        json.loads(line) for line in (output / "answers-after.jsonl").read_text().splitlines()
    ]
    assert len(answers) >= 6
    for answer in answers:
        prompt = torch.tensor([answer["prompt"]])
        full = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=answer["reference"][-1],
            pad_token_id=tokenizer.pad_token_id,
        )
        assert full[0, prompt.shape[1] :].tolist() == answer["generated"]


def test_eight_ranks_of_a_pipeline_with_tensor_and_expert_parallelism_print_what_one_rank_prints(
    tmp_path,
):
    """Same seed, data and global batch, fp32: losses and norms to 1e-5, the same held-out answers
    and exported weights. A large eps, so that rounding does not decide the direction of an element
    without a gradient.
    """
    shared = (
        "--train.steps 5 --optim.warmup-steps 1 --optim.eps 1e-5 --train.global-batch-size 8 "
        "--train.micro-batch-size 1 --router.aux-loss 0.01 --router.z-loss 0.01"
    )
    shared = f"{shared} --eval.answers 6 --eval.every 4".split()
    layouts = {
        "one": (1, []),
        "eight": (8, ["--parallel.pp", 2, "--parallel.tp", 2, "--parallel.ep", 2]),
    }
    for name, (ranks, options) in layouts.items():
        succeed(ranks, *shared, *options, "--output", tmp_path / name)
    one, eight = (records(tmp_path / name) for name in layouts)
    assert len(one) == len(eight) == 5
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_second", "step_seconds", "data_wait_share"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    answers = [(tmp_path / name / "answers-after.jsonl").read_text() for name in layouts]
    assert answers[0] == answers[1]
    models = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path / name / "hf", dtype=torch.float32
        ).state_dict()
        for name in layouts
    ]
    for name, expected in models[0].items():
        torch.testing.assert_close(
            models[1][name], expected, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


# The recipe, but rank 1 fails in its third step.
FAULTY = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/recipes"]
from recipes import deepseek_v3_sft
from torchsft.parallel.pipeline import Pipeline
step, steps = Pipeline.step, []
def faulty(self, *arguments):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 3:
        raise ArithmeticError("the third step of rank 1 broke")
    return step(self, *arguments)
Pipeline.step = faulty
deepseek_v3_sft.run_main(deepseek_v3_sft.main)
"""


@pytest.mark.parametrize("fault", ["killed", "raises"])
def test_a_rank_that_dies_takes_the_job_down_with_its_own_error(tmp_path, fault):
    """In the middle of a pipeline's training: torchrun ends the other rank at once, and the one
    that died is named.
    """
    script = ROOT / "recipes" / "deepseek_v3_sft.py"
    if fault == "raises":
        script = tmp_path / "faulty.py"
        script.write_text(FAULTY.format(root=str(ROOT)))
    options = [
        "--parallel.pp",
        "2",
        "--parallel.ep",
        "1",
        "--parallel.timeout-seconds",
        "30",
        "--output",
        str(tmp_path / "run"),
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        told = "the third step of rank 1 broke"
        if fault == "killed":
            metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
            while not metrics.exists() or metrics.read_text().count("\n") < 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            victim = next(pid for pid in children if environ_of(pid).get("RANK") == "1")
            os.kill(int(victim), signal.SIGKILL)
            told = f"Signal 9 (SIGKILL) received by PID {victim}"
        _, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert told in err
    dead = [line for line in err.splitlines() if line.startswith("error: a rank has died")]
    # gloo's own words and traceback are not shown: the only one is torchrun's
    if fault == "killed":
        assert len(dead) == 1 and err.count("Traceback") == 1 and "Connection closed" not in err
    else:
        assert not dead and told in err.split("Root Cause")[1]


def environ_of(pid: str) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@pytest.mark.skipif(
    not GSM8K.exists(), reason="the GSM8K conversations lie beside the repository, not in it"
)
def test_gsm8k_from_a_transformers_model_on_2_and_4_ranks(tmp_path):
    """Same losses on both, loss falls, and `transformers` finds the final eval loss in the exported
    directory.
    """
    write_tiny_model(tmp_path / "model")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:300]]
    for name, part in {"train": rows[:280], "eval": rows[280:]}.items():
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for row in part:
                messages = [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
    losses = {}
    for ranks, ep in ((2, 2), (4, 2)):
        output = tmp_path / f"run{ranks}"
        succeed(
            ranks,
            *("--model.path", tmp_path / "model", "--data.train", tmp_path / "train.jsonl"),
            *("--data.eval", tmp_path / "eval.jsonl", "--data.seq-len", 1024, "--train.steps", 6),
            *(
                "--optim.lr",
                3e-3,
                "--parallel.ep",
                ep,
                "--checkpoint.export",
                "fp32",
                "--output",
                output,
            ),
        )
        losses[ranks] = [
            (line["loss"], line["grad_norm"], line.get("eval_loss", 0.0))
            for line in records(output)
        ]
    assert losses[2][-1][2] > 0
    for two, four in zip(losses[2], losses[4], strict=True):
        assert four == pytest.approx(two, rel=1e-5)
    assert losses[2][-1][0] < losses[2][0][0] - 0.3

    tokenizer = AutoTokenizer.from_pretrained(output / "hf")
    model = AutoModelForCausalLM.from_pretrained(output / "hf", dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows[280:]:
            head = f"<s><|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
            answer = tokenizer(row["answer"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            if len(prompt) + len(answer) + 1 > 1024:  # the newline after the end of turn counts too
                continue
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(
                logits, torch.tensor(answer), reduction="sum"
            ).item()
            count += len(answer)
    assert records(output)[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data.train", "{tmp}/absent.jsonl"], "absent.jsonl"),
        (["--train.global-batch-size", "3"], "--train.global-batch-size (3) must divide by"),
    ],
)
def test_bad_input_ends_all_ranks_with_one_sentence(tmp_path, options, sentence):
    """Told once, no hang, exit code not 0."""
    result = launch(
        2, *(o.format(tmp=tmp_path) for o in options), "--output", tmp_path / "run", seconds=60
    )
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and sentence in told[0], result.stderr[-3000:]
    # of torchrun's report: nothing is looked for further up
    last = result.stderr.rstrip("=\n").splitlines()[-1]
    assert last == f"  traceback : {told[0]}"


def test_unknown_option_is_refused_with_a_suggestion():
    result = launch(2, "--train.step", 3, seconds=60)
    assert result.returncode != 0
    assert (
        result.stderr.count("error: there is no option --train.step; did you mean --train.steps")
        == 1
    )
