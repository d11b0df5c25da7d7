"""The training step against a plain `transformers` + `torch.optim` loop, what it does with bad
gradients, and bad input.
"""

from __future__ import annotations

import json
import math
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from recipes import deepseek_v3_sft
from tests.checkpoint.sources import add_mtp
from tests.distributed.test_layouts import SilentTrainer, config_for
from tests.tiny import write_conversations, write_tiny_model
from torchsft.checkpoint import state
from torchsft.checkpoint.publish import output_lock
from torchsft.checkpoint.writer import PublishingWriter
from torchsft.config import InputError, Optim, Precision, Train
from torchsft.parallel.world import World
from torchsft.resolution import resolve
from torchsft.trainer import Trainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trainer")
    write_tiny_model(directory / "model")
    write_conversations(directory / "train.jsonl", 40)
    return directory


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def trainer_for(inputs, tmp_path, **changes):
    config = config_for(str(inputs), ep=1, micro_batch_size=2, output=str(tmp_path / "run"))
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def reference_tokens(messages, tokenizer):
    """Token ids and trained flags of a conversation in the tests' template, written down turn by
    turn.
    """
    tokens, trained = tokenizer.encode("<s>", add_special_tokens=False), [False]
    for message in messages:
        for text, flag in (
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}<|im_end|>", message["role"] == "assistant"),
            ("\n", False),
        ):
            ids = tokenizer.encode(text, add_special_tokens=False)
            tokens += ids
            trained += [flag] * len(ids)
    return tokens, trained


def as_one(name):
    """No parameter is frozen, and all have one peak learning rate and weight decay."""
    return True, 1e-2, 0.1


def apart(name):
    """Whether a parameter is trained, its peak learning rate and weight decay: what `APART` says,
    by hand.
    """
    if ".mlp.gate." in name or "embed_tokens" in name or name.startswith("model.layers.0."):
        return False, 0.0, 0.0
    if ".mlp.experts." in name:
        return True, 2e-3, 0.0
    if "layernorm" in name:
        return True, 0.02, 0.1
    if name.startswith("model.layers.2."):
        return True, 5e-3, 0.1
    return True, 1e-2, 0.5 if "lm_head" in name else 0.1


APART = {
    "freeze": ("router", "embeddings", "layers.0"),
    "groups": (
        "experts:lr=2e-3,weight_decay=0",
        "*layernorm:lr=0.02",
        "lm_head:weight_decay=0.5",
        "layers.2:lr=5e-3",
    ),
}


@pytest.mark.parametrize(
    ("options", "kind", "objective"),
    [({"freeze": (), "groups": ()}, as_one, (0.0, 0.0)), (APART, apart, (0.2, 0.01))],
)
def test_three_steps_equal_a_transformers_loop(inputs, tmp_path, options, kind, objective):
    """Loss, norm and weights of 3 AdamW steps: warm-up, linear decay, weight decay and clipping;
    frozen parts and groups; label smoothing and z-loss, which the reported loss leaves out.
    """
    config = trainer_for(inputs, tmp_path)
    config.train.label_smoothing, config.train.z_loss = objective
    config.train.freeze, config.optim.groups = options["freeze"], options["groups"]
    lines = [
        json.loads(line)["messages"] for line in (inputs / "train.jsonl").read_text().splitlines()
    ]
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    model = DeepseekV3ForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups, o = [], config.optim
    for name, parameter in model.named_parameters():
        trained, peak, decay = kind(name)
        parameter.requires_grad_(trained)
        if trained:
            groups.append(
                {
                    "params": [parameter],
                    "peak": peak,
                    "weight_decay": decay if parameter.ndim >= 2 else 0.0,
                }
            )
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)
    factors = [1.0, 1.0, 0.5]  # warm-up of 1 step, then linear: 1 and 1/2 of the peak

    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        for factor in factors:
            step = next(trainer.loader)
            record, _ = trainer.train_step(step)
            loss, count, smoothed, squares = 0.0, 0, 0.0, 0.0
            for sample_id in step.sample_ids:
                tokens, trained = reference_tokens(
                    lines[int(sample_id.rsplit(":", 1)[1]) - 1], tokenizer
                )
                logits = model(torch.tensor([tokens])).logits[0, :-1]
                supervised = torch.tensor(trained[1:])
                logits, targets = logits[supervised], torch.tensor(tokens[1:])[supervised]
                nll = partial(torch.nn.functional.cross_entropy, logits, targets, reduction="sum")
                loss += nll().item()
                smoothed = smoothed + nll(label_smoothing=objective[0])
                squares = squares + logits.logsumexp(-1).square().sum()
                count += sum(trained[1:])
            ((smoothed + objective[1] * squares) / count).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
            assert record["supervised_tokens"] == count
            assert record["loss"] == pytest.approx(loss / count, rel=1e-5)
            smoothed, z = smoothed.item() / count, objective[1] * squares.item() / count
            further = {"smoothed_loss": smoothed, "logit_z_loss": z} if objective[0] else {}
            found = {key: record[key] for key in record.keys() & {"smoothed_loss", "logit_z_loss"}}
            assert found == pytest.approx(further, rel=1e-5)
            assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
            assert record["lr"] == pytest.approx(factor * 1e-2)
        trained_state = trainer.model.state_dict()
    expected = model.state_dict()
    for name, tensor in trained_state.items():
        torch.testing.assert_close(
            tensor, expected[name].reshape(tensor.shape), rtol=0, atol=2e-5, msg=name
        )
        still = "correction_bias" in name or not kind(name)[0]
        assert torch.equal(tensor, before[name].reshape(tensor.shape)) == still, name


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(inputs, tmp_path):
    config = trainer_for(inputs, tmp_path)
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        trainer.train_step(next(trainer.loader))
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        moments = [{k: v.clone() for k, v in s.items()} for s in trainer.optimizer.state.values()]
        poison = trainer.model.model.norm.weight.register_hook(
            lambda g: torch.full_like(g, math.nan)
        )
        record, scalars = trainer.train_step(next(trainer.loader))
        assert math.isnan(record["grad_norm"]) and scalars["optim/skipped_steps"] == 1
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        for now, then in zip(trainer.optimizer.state.values(), moments, strict=True):
            assert all(torch.equal(now[k], then[k]) for k in then)
        poison.remove()
        record, _ = trainer.train_step(next(trainer.loader))
        assert math.isfinite(record["grad_norm"])
        counters = trainer.counters
        assert (counters.step, counters.updates) == (3, 2)
        assert (counters.skipped, counters.skipped_in_a_row) == (1, 0)


def test_a_run_ends_after_some_skipped_steps_in_a_row_and_all_are_in_the_metrics(inputs, tmp_path):
    config = trainer_for(inputs, tmp_path)
    config.train.max_nonfinite_steps = 2
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        trainer.model.model.norm.weight.register_hook(lambda g: torch.full_like(g, math.inf))
        with pytest.raises(
            InputError,
            match=r"2 steps in a row changed nothing, the last with "
            r"norm (inf|nan) at step 2",
        ):
            trainer.run()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2] and all(
        line["grad_norm"] is None for line in lines
    )


def test_data_that_fails_behind_a_step_leaves_its_line_in_the_metrics(inputs, tmp_path):
    config = trainer_for(inputs, tmp_path)
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        plan, planned = trainer.run_data.loader.plan, []

        def plan_two():
            if len(planned) == 2:
                raise InputError("row 7 is broken")
            planned.append(plan())
            return planned[-1]

        trainer.run_data.loader.plan = plan_two
        with pytest.raises(InputError, match="row 7"):
            trainer.run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def choices(trainer):
    """(token, layer, expert) of each choice in the first row of the first evaluation set."""
    (samples,) = trainer.run_data.eval_sets["train"].rows[:1]
    row = [trainer.run_data.eval_sets["train"].sources[s].samples[i] for s, i in samples]
    tokens = torch.tensor([token for sample in row for token in sample.tokens])
    lengths = torch.tensor([0, *(len(sample.tokens) for sample in row)])
    found = set()
    hooks = [
        moe.gate.register_forward_hook(
            lambda _, __, out, name=name: found.update(
                (token, name, expert)
                for token, experts in enumerate(out.experts_SK.tolist())
                for expert in experts
            )
        )
        for name, moe in trainer.model.moe_layers().items()
    ]
    positions = torch.cat([torch.arange(len(sample.tokens)) for sample in row])
    with torch.no_grad():
        trainer.model(tokens, positions=positions, cu_seqlens=lengths.cumsum(0).int())
    for hook in hooks:
        hook.remove()
    return found


def test_routing_drift_is_against_the_model_before_the_first_step_also_when_a_run_continues(
    inputs, tmp_path, capsys
):
    """Against sets of choices; the continued run has other rows a microbatch. Where the evaluation
    data is another one there is no drift, but a line.
    """

    def run(name, **changes):
        config = trainer_for(inputs, tmp_path, output=str(tmp_path / name))
        config.data.eval, config.eval.every = (f"train={inputs / 'train.jsonl'}",), 1
        config.checkpoint.every, config.checkpoint.keep = 1, 0
        for group, option, value in changes.get("options", ()):
            setattr(getattr(config, group), option, value)
        with World(config.parallel, 0) as world:
            trainer = Trainer(config, world)
            before = choices(trainer)
            trainer.run()
            after = choices(trainer)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        drifts = [json.loads(line).get("eval_routing_drift") for line in lines]
        return before, after, drifts

    before, after, drifts = run("whole")
    assert min(drifts) > 0 and drifts[-1] == pytest.approx(len(after - before) / len(after))
    write_conversations(tmp_path / "other.jsonl", 5, seed=1)
    step_1 = str(tmp_path / "whole" / "checkpoints" / "step-00000001")
    resumed = [("checkpoint", "resume", step_1), ("train", "micro_batch_size", 1)]
    assert run("resumed", options=resumed)[2] == drifts[1:]
    other = [*resumed, ("data", "eval", (str(tmp_path / "other.jsonl"),))]
    capsys.readouterr()
    run_other = trainer_for(inputs, tmp_path, output=str(tmp_path / "other"))
    for group, option, value in other:
        setattr(getattr(run_other, group), option, value)
    with World(run_other.parallel, 0) as world:
        trainer = Trainer(run_other, world)
        assert "eval_routing_drift" not in trainer.evaluate()
    assert (
        "no routing drift: --data.eval begins otherwise than at step 0" in capsys.readouterr().out
    )


def test_a_run_that_keeps_mtp_layers_says_what_that_means(inputs, tmp_path, capsys):
    directory = bad_model(inputs, tmp_path, {})
    for told in (False, True):
        config = trainer_for(inputs, tmp_path)
        config.model.path = str(directory)
        with World(config.parallel, 0) as world:
            SilentTrainer(config, world)
        line = "MTP layers are exported as they are: drafts of a server that uses them"
        assert (line in capsys.readouterr().out) == told
        add_mtp(directory)


def test_automatic_options_are_resolved_in_the_saved_configuration(inputs, tmp_path):
    config = trainer_for(inputs, tmp_path)
    resolved = resolve(config)
    assert resolved.parallel.dp_shard == 1
    assert resolved.precision.compute == ("bf16" if torch.cuda.is_available() else "fp32")


def run_recipe(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["deepseek_v3_sft.py", *map(str, options)])
    try:
        deepseek_v3_sft.main()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def bad_model(inputs, tmp_path, change):
    """A copy of the model directory with a changed config.json."""
    directory = tmp_path / "changed"
    directory.mkdir()
    for path in (inputs / "model").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        (
            {"moe_intermediate_size": 24},
            r"of another shape: .*experts.0.gate_proj.weight \(\(16, "
            r"32\) instead of \(24, 32\)\)",
        ),
        ({"num_hidden_layers": 4}, r"missing: model\.layers\.3\."),
        ({"hidden_size": "32"}, "hidden_size = '32', but numbers are needed"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch, change, sentence):
    directory = bad_model(inputs, tmp_path, change)
    with pytest.raises(InputError, match=sentence):
        run_recipe(
            monkeypatch,
            "--model.path",
            directory,
            "--data.train",
            inputs / "train.jsonl",
            "--output",
            tmp_path / "run",
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model.path", "/absent"], "/absent"),
        (["--parallel.ep", "3"], "ep is 3"),
        (["--data.seq-len", "8"], "no supervised token"),
        (
            ["--train.global-batch-size", "3", "--train.micro-batch-size", "2"],
            r"size \(3\) must "
            r"divide by .* \(2\)",
        ),
        (
            ["--optim.warmup-steps", "100", "--train.steps", "10"],
            "warmup-steps is 100, but the run has only 10 steps",
        ),
        (["--eval.answers", "3"], "eval.answers is 3, but there is no --data.eval"),
        (
            ["--checkpoint.keep-best", "2"],
            "keep-best is 2, but without --data.eval no checkpoint has an eval loss",
        ),
        (
            ["--checkpoint.remote", "nosuch://bucket"],
            "nosuch://bucket/checkpoints cannot be reached",
        ),
        (["--checkpoint.resume", "/absent"], "/absent does not exist"),
        (
            ["--model.attention", "varlen", "--precision.compute", "fp32"],
            "varlen needs bf16 on a CUDA device",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(inputs, tmp_path, monkeypatch, options, sentence):
    path = [] if "--model.path" in options else ["--model.path", inputs / "model"]
    with pytest.raises(InputError, match=sentence):
        run_recipe(
            monkeypatch,
            *path,
            "--data.train",
            inputs / "train.jsonl",
            *options,
            "--output",
            tmp_path / "run",
        )


def test_an_output_directory_of_another_run_is_refused(inputs, tmp_path, monkeypatch):
    options = [
        "--model.path",
        inputs / "model",
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
    ]
    options += [
        "--train.steps",
        2,
        "--optim.warmup-steps",
        1,
        "--output",
        tmp_path / "run",
        "--metrics.no-progress",
    ]
    run_recipe(monkeypatch, *options)
    with pytest.raises(InputError, match=r"optim.lr: 1e-05 -> 0.5"):
        run_recipe(monkeypatch, *options, "--optim.lr", 0.5)
    with pytest.raises(InputError, match="already holds checkpoints"):
        run_recipe(monkeypatch, *options, "--checkpoint.resume", "never")
    with pytest.raises(
        InputError,
        match=r"checkpoint .*step-00000002 is of another run, which "
        r"differs in train.seed: 0 -> 1",
    ):
        where = tmp_path / "run" / "checkpoints" / "step-00000002"
        elsewhere = [
            tmp_path / "elsewhere" if option == tmp_path / "run" else option for option in options
        ]
        run_recipe(monkeypatch, *elsewhere, "--train.seed", 1, "--checkpoint.resume", where)
    run_recipe(monkeypatch, *options)  # the same run again: nothing left to train, exported anew
    (tmp_path / "run" / "config.json").write_text("")
    with pytest.raises(InputError, match=r"config.json is damaged; delete it"):
        run_recipe(monkeypatch, *options)


def test_an_output_that_is_a_file_is_refused(inputs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is a file; choose another --output"):
        run_recipe(
            monkeypatch,
            "--model.path",
            inputs / "model",
            "--data.train",
            inputs / "train.jsonl",
            "--output",
            tmp_path / "file",
        )


def test_only_the_debug_preset_generates_a_model(inputs, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--model\.path and --data.train must both be given"):
        run_recipe(
            monkeypatch,
            "finetune",
            "--data.train",
            inputs / "train.jsonl",
            "--output",
            tmp_path / "run",
        )


def test_the_debug_preset_loads_the_weights_of_a_given_model(inputs, tmp_path, monkeypatch, capsys):
    options = [
        "--model.path",
        inputs / "model",
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
    ]
    options += [
        "--train.steps",
        1,
        "--optim.warmup-steps",
        0,
        "--eval.answers",
        0,
        "--checkpoint.export",
        "none",
    ]
    run_recipe(monkeypatch, "debug", *options, "--output", tmp_path / "run")
    assert f"loading weights from {inputs / 'model'}" in capsys.readouterr().out


def test_weights_of_one_microbatch_count_as_they_would_in_one_big_batch(inputs, tmp_path):
    """The answers of every third conversation weigh 0.3: the same loss and norm whether they share
    a microbatch or not.
    """
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    for message in (
        message
        for row in rows[::3]
        for message in row["messages"]
        if message["role"] == "assistant"
    ):
        message["weight"] = 0.3
    weighted = tmp_path / "train.jsonl"
    weighted.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def first_step(data, micro_batch_size):
        config = trainer_for(inputs, tmp_path / data.parent.name)
        config.train.micro_batch_size, config.data.train = micro_batch_size, (str(data),)
        with World(config.parallel, 0) as world:
            trainer = Trainer(config, world)
            record, _ = trainer.train_step(next(trainer.loader))
        return record["loss"], record["grad_norm"], record["supervised_tokens"]

    together = first_step(weighted, 8)
    assert first_step(weighted, 1) == pytest.approx(together, rel=1e-6)
    assert first_step(inputs / "train.jsonl", 8)[0] != pytest.approx(together[0], rel=1e-3)


def test_print_config_prints_the_resolved_options_and_trains_nothing(tmp_path, monkeypatch, capsys):
    run_recipe(monkeypatch, "--print-config", "--optim.lr", 0.25, "--output", tmp_path / "run")
    assert json.loads(capsys.readouterr().out)["optim"]["lr"] == 0.25
    assert not (tmp_path / "run").exists()


def test_bf16_compute_with_fp32_masters_follows_fp32_for_200_steps(inputs, tmp_path):
    """Loss within 1 % at every step (bf16 keeps 8 bits, 0.4 %), masters and moments fp32, routing
    bias untouched.
    """
    losses = {}
    for compute in ("fp32", "bf16"):
        config = trainer_for(
            inputs, tmp_path, precision=Precision(compute=compute), optim=Optim(lr=1e-3)
        )
        config.train = Train(steps=200, global_batch_size=2, micro_batch_size=2)
        with World(config.parallel, 0) as world:
            trainer = SilentTrainer(config, world)
            bias = {k: v.clone() for k, v in trainer.model.state_dict().items() if "bias" in k}
            losses[compute] = [
                trainer.train_step(next(trainer.loader))[0]["loss"] for _ in range(200)
            ]
            assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
            assert all(
                s["exp_avg_sq"].dtype == torch.float32 for s in trainer.optimizer.state.values()
            )
            now = trainer.model.state_dict()
            assert bias and all(
                torch.equal(now[k], v) and v.dtype == torch.float32 for k, v in bias.items()
            )
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["bf16"] != losses["fp32"] and losses["fp32"][-1] < 0.5 * losses["fp32"][0]


def test_loss_weights_stay_fp32_in_bf16_compute(inputs, tmp_path):
    """0.3 has no exact bf16: were weights rounded on the way in, the loss would be off by 0.2 %."""
    config = trainer_for(inputs, tmp_path, precision=Precision(compute="bf16"))
    with World(config.parallel, 0) as world, torch.no_grad():
        trainer = Trainer(config, world)
        batch = next(trainer.loader).microbatches[0]
        forward = {
            "positions": batch.positions,
            "cu_seqlens": batch.cu_seqlens,
            "labels": batch.labels,
        }
        ones = (batch.labels != -100).float()
        whole, part = (
            trainer.model(batch.tokens, **forward, loss_weights=w * ones).item() for w in (1.0, 0.3)
        )
    assert part == pytest.approx(0.3 * whole, rel=1e-5)


def test_two_runs_in_one_output_are_refused(inputs, tmp_path, monkeypatch):
    with (
        output_lock(tmp_path / "run", main=True),
        pytest.raises(
            InputError,
            match=r"another run is writing to .*run; wait for it or choose "
            r"another",
        ),
    ):
        run_recipe(
            monkeypatch,
            "--model.path",
            inputs / "model",
            "--data.train",
            inputs / "train.jsonl",
            "--output",
            tmp_path / "run",
        )


def test_an_older_checkpoint_is_not_continued_under_later_ones(inputs, tmp_path, monkeypatch):
    """It would leave a hole in metrics.jsonl, and the next `auto` would jump over it."""
    options = [
        "--model.path",
        inputs / "model",
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
    ]
    options += [
        "--train.steps",
        4,
        "--checkpoint.every",
        2,
        "--checkpoint.export",
        "none",
        "--output",
        tmp_path / "run",
    ]
    run_recipe(monkeypatch, *options)
    older = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(
        InputError,
        match=r"holds a later checkpoint \(step-00000004\) than "
        r".*step-00000002",
    ):
        run_recipe(monkeypatch, *options, "--checkpoint.resume", older)
    (tmp_path / "run" / "checkpoints" / "step-00000004" / ".metadata").unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "trainer.json").unlink()
    with pytest.raises(InputError, match=r"step-00000004 is damaged: .*\.metadata.*delete it"):
        run_recipe(monkeypatch, *options)


def test_a_damaged_newest_checkpoint_is_passed_over_aloud_and_written_again(
    inputs, tmp_path, monkeypatch, capsys
):
    options = [
        "--model.path",
        inputs / "model",
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
    ]
    options += ["--train.steps", 4, "--checkpoint.every", 2, "--checkpoint.export", "fp32"]
    for name in ("whole", "run"):
        run_recipe(monkeypatch, *options, "--output", tmp_path / name)
    damaged = tmp_path / "run" / "checkpoints" / "step-00000004"
    with open(damaged / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)
    capsys.readouterr()
    run_recipe(monkeypatch, *options, "--output", tmp_path / "run")
    told = capsys.readouterr()
    assert (
        told.err.count("warning: checkpoint") == 1
        and "step-00000004 is damaged: __0_0.distcp has 1000 " in told.err
    )
    assert "step-00000002 at step 2 of 4" in told.out
    assert state.find_latest(tmp_path / "run" / "checkpoints") == (str(damaged), [])
    whole, run = (
        load_file(next((tmp_path / name / "hf").glob("*.safetensors"))) for name in ("whole", "run")
    )
    assert whole.keys() == run.keys() and all(torch.equal(run[key], whole[key]) for key in whole)


def test_checkpoints_are_kept_by_age_step_and_eval_loss(inputs, tmp_path, monkeypatch):
    """The last one, every fourth, and of the evaluated ones (every third step, and the last) the
    best.
    """
    options = [
        "--model.path",
        inputs / "model",
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
    ]
    options += ["--data.eval", inputs / "train.jsonl", "--train.steps", 10, "--eval.every", 3]
    options += [
        "--checkpoint.every",
        1,
        "--checkpoint.keep",
        1,
        "--checkpoint.keep-every",
        4,
        "--checkpoint.keep-best",
        1,
    ]
    losses = iter([2.0, 1.0, 4.0, 3.0])
    monkeypatch.setattr(
        "torchsft.evaluation.evaluate_loss",
        lambda *_: {"eval_loss": next(losses), "eval_perplexity": 1.0},
    )
    run_recipe(monkeypatch, *options, "--checkpoint.export", "none", "--output", tmp_path / "run")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 10]
    assert sorted(
        state.saved_step(path) for path in (tmp_path / "run" / "checkpoints").iterdir()
    ) == [4, 6, 8, 10]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for name in ("checkpoint/stall_seconds", "checkpoint/write_seconds"):
        assert [event.step for event in board.Scalars(name)] == list(range(1, 11))


def test_a_checkpoint_that_is_due_too_soon_is_left_out_if_asked(
    inputs, tmp_path, monkeypatch, capsys
):
    """The first one is written for as long as training goes on; the last one is written all the
    same.
    """
    options = [
        "--model.path",
        inputs / "model",
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
    ]
    options += [
        "--train.steps",
        4,
        "--checkpoint.every",
        1,
        "--checkpoint.if-busy",
        "skip",
        "--checkpoint.export",
        "none",
    ]
    ended = threading.Event()
    write, trainer_save = PublishingWriter.write_data, Trainer.save

    def slow(self, *arguments):
        ended.wait(60)
        return write(self, *arguments)

    def save(self, *arguments):
        if self.counters.step == self.total_steps:
            ended.set()
        return trainer_save(self, *arguments)

    monkeypatch.setattr(PublishingWriter, "write_data", slow)
    monkeypatch.setattr(Trainer, "save", save)
    run_recipe(monkeypatch, *options, "--output", tmp_path / "run")
    saved = sorted(state.saved_step(path) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [1, 4]
    assert capsys.readouterr().out.count("is still being written") == 2


def test_a_refused_debug_run_leaves_the_directory_of_another_run_alone(
    inputs, tmp_path, monkeypatch
):
    options = [
        "--model.path",
        inputs / "model",
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
    ]
    run_recipe(
        monkeypatch,
        *options,
        "--train.steps",
        1,
        "--checkpoint.export",
        "none",
        "--output",
        tmp_path / "run",
    )
    with pytest.raises(InputError, match="holds another run"):
        run_recipe(monkeypatch, "debug", "--output", tmp_path / "run")
    assert not (tmp_path / "run" / "generated").exists()


def test_conversations_beyond_the_models_context_are_named(inputs, tmp_path, monkeypatch, capsys):
    directory = bad_model(inputs, tmp_path, {"max_position_embeddings": 64})
    options = [
        "--model.path",
        directory,
        "--data.train",
        inputs / "train.jsonl",
        "--data.seq-len",
        192,
        "--train.steps",
        1,
    ]
    run_recipe(monkeypatch, *options, "--checkpoint.export", "none", "--output", tmp_path / "run")
    assert "but the model's max_position_embeddings is 64" in capsys.readouterr().out


def test_a_model_that_cannot_fit_a_device_is_refused_before_weights_are_loaded(
    inputs, tmp_path, monkeypatch
):
    """16 bytes for each parameter (fp32 weight, gradient, two moments), activations not counted."""
    config = trainer_for(inputs, tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    needed = 16 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("torchsft.parallel.memory.device_bytes", lambda device: needed)
    with World(config.parallel, 0) as world:
        Trainer(config, world)
    monkeypatch.setattr("torchsft.parallel.memory.device_bytes", lambda device: needed // 2 - 1)
    monkeypatch.setattr(
        "torchsft.checkpoint.huggingface.load_weights",
        lambda *_: pytest.fail("weights were loaded"),
    )
    config = trainer_for(inputs, tmp_path / "other")
    with (
        World(config.parallel, 0) as world,
        pytest.raises(
            InputError,
            match=r"but its device has "
            r".* start at least 3 "
            r"ranks",
        ),
    ):
        Trainer(config, world)
