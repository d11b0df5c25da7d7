"""The command-line contract: names, strictness, presets, what makes two runs different."""

import dataclasses
import json
import re

import pytest

from recipes.deepseek_v3_sft import PRESETS
from recipes.sft import choose_preset
from tests.families import RECIPES
from torchsft.checkpoint.resume import differences
from torchsft.cli import parse
from torchsft.config import (
    Checkpoint,
    Config,
    InputError,
    Metrics,
    Optim,
    Parallel,
    Router,
    Train,
    to_dict,
)
from torchsft.resolution import resolve

# Documentation and tools rely on these names.
CONTRACT = """
model.path data.train data.eval data.seq-len data.mask train.steps train.epochs
train.global-batch-size train.micro-batch-size train.seed parallel.pp parallel.dp-replicate
parallel.dp-shard parallel.cp parallel.tp parallel.ep parallel.pp-schedule optim.lr optim.schedule
optim.warmup-steps optim.clip-norm precision.compute checkpoint.every checkpoint.resume
checkpoint.keep checkpoint.export eval.every output print-config checkpoint.mode checkpoint.if-busy
checkpoint.keep-every checkpoint.keep-best checkpoint.on-error checkpoint.remote router.train
router.bias-update-rate router.aux-loss router.z-loss
""".split()


def options(*argv):
    return parse(PRESETS, choose_preset, argv, "doc")


def test_help_lists_every_option_of_the_contract(capsys):
    with pytest.raises(SystemExit) as end:
        options("--help-all")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert not [name for name in CONTRACT if f"--{name} " not in text]


def test_the_preset_is_named_or_follows_from_the_model_path():
    assert options()[0] == "debug"
    assert options("--model.path", "DIR")[0] == "finetune"
    assert options("--model.path=DIR")[0] == "finetune"
    assert options("debug", "--model.path", "DIR")[0] == "debug"
    with pytest.raises(
        InputError,
        match="preset 'debgu' does not exist; choose one of: debug, finetune, v3_256, "
        "v3_128, v3_64, v3_256_128k, moonlight",
    ):
        options("debgu")


def test_options_override_the_preset():
    _, config = options(
        "debug", "--optim.lr", "0.5", "--data.train", "a", "b", "--optim.clip-norm", "None"
    )
    expected = PRESETS["debug"]()
    assert (config.optim.lr, config.data.train, config.optim.clip_norm) == (0.5, ("a", "b"), None)
    assert config.train == expected.train


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Train(steps=1, epochs=1), "both set"),
        (lambda: Train(steps=0), "--train.steps is 0, but it must be at least 1"),
        (lambda: Train(epochs=0), "--train.epochs is 0, but it must be above 0"),
        (lambda: Train(epochs=-0.5), "--train.epochs is -0.5"),
        (lambda: Train(epochs=float("nan")), "--train.epochs is nan"),
        (lambda: Train(epochs=float("inf")), "--train.epochs is inf"),
        (lambda: Train(micro_batch_size=0), "--train.micro-batch-size is 0"),
        (lambda: Optim(lr=-1.0), "--optim.lr is -1.0"),
        (lambda: Optim(lr=float("nan")), "--optim.lr is nan"),
        (lambda: Optim(lr=float("inf")), "--optim.lr is inf, but it must be a finite number"),
        (lambda: Optim(eps=float("inf")), "--optim.eps is inf, but it must be a finite number"),
        (lambda: Optim(weight_decay=float("inf")), "--optim.weight-decay is inf"),
        (lambda: Router(aux_loss=float("inf")), "--router.aux-loss is inf"),
        (lambda: Train(seed=2**64), "--train.seed is 18446744073709551616"),
        (lambda: Metrics(peak_tflops=0.0), "--metrics.peak-tflops is 0.0"),
        (lambda: Parallel(timeout_seconds=float("inf")), "--parallel.timeout-seconds is inf"),
        (lambda: Optim(beta2=1.0), "--optim.beta2 is 1.0"),
        (
            lambda: Optim(offload=True, moments="int8"),
            "--optim.offload keeps fp32 masters and moments of AdamW on the host, but "
            "--optim.moments is int8; leave one of the two out",
        ),
        (lambda: Optim(offload=True, kind="muon"), "but --optim.kind is muon"),
        (lambda: Optim(clip_norm=0.0), "--optim.clip-norm is 0.0"),
        (lambda: Optim(min_lr_ratio=2.0), "--optim.min-lr-ratio is 2.0"),
        (lambda: Parallel(tp=0), "--parallel.tp is 0, but it must be at least 1"),
        (
            lambda: Parallel(pp_layers=(4, -1)),
            "--parallel.pp-layers is (4, -1), but a stage cannot have fewer than 0 layers",
        ),
        (lambda: Router(aux_loss=-1.0), "--router.aux-loss is -1.0"),
        (lambda: Router(z_loss=-1.0), "--router.z-loss is -1.0"),
        (lambda: Router(bias_update_rate=float("nan")), "--router.bias-update-rate is nan"),
        (lambda: Parallel(dp_shard=0), "--parallel.dp-shard is 0"),
        (lambda: Parallel(timeout_seconds=0.0), "--parallel.timeout-seconds is 0.0"),
        (
            lambda: Checkpoint(keep_every=-1),
            "--checkpoint.keep-every is -1, but it must be at least 0",
        ),
        (lambda: Checkpoint(keep_best=-1), "--checkpoint.keep-best is -1"),
        (
            lambda: Checkpoint(remote="bucket/run"),
            "--checkpoint.remote is 'bucket/run', but it must be a URL such as s3://",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_with_the_option_and_the_number(build, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build()


def test_differences_name_what_changes_the_training_and_nothing_else():
    old = Config()
    new = dataclasses.replace(
        old,
        train=Train(seed=3, max_nonfinite_steps=9),
        parallel=Parallel(ep=2),
        optim=Optim(lr=0.5),
        output="elsewhere",
    )
    assert differences(to_dict(old), to_dict(new)) == [
        "optim.lr: 1e-05 -> 0.5",
        "train.seed: 0 -> 3",
    ]
    assert differences(to_dict(old), to_dict(old)) == []


def test_an_option_that_an_older_version_did_not_have_had_its_default_there():
    old, new = to_dict(Config()), Config()
    del old["train"]["freeze"], old["optim"]["groups"], old["optim"]["decay_steps"]
    assert differences(old, to_dict(new)) == []
    new.train.freeze = ("router",)
    assert differences(old, to_dict(new)) == ["train.freeze: [] -> ['router']"]


def test_an_option_that_is_no_more_counts_where_it_asked_for_something():
    """--train.aux-loss became --router.aux-loss: a run that did not use it can go on."""
    old, new = to_dict(Config()), to_dict(Config())
    del old["router"]
    old["train"]["aux_loss"] = 0.0
    assert differences(old, new) == []
    old["train"]["aux_loss"] = 1e-4
    assert differences(old, new) == ["train.aux_loss: 0.0001 -> None"]


def test_epochs_are_numbers_with_or_without_a_point():
    assert options("finetune", "--train.epochs", "2")[1].train.epochs == 2
    assert options("finetune", "--train.epochs", "0.5")[1].train.epochs == 0.5
    assert (
        differences(
            to_dict(Config(train=Train(epochs=1))), to_dict(Config(train=Train(epochs=1.0)))
        )
        == []
    )
    assert '"epochs": 2,' in json.dumps(to_dict(options("finetune", "--train.epochs", "2")[1]))


@pytest.mark.parametrize(
    "preset", [preset for recipe in RECIPES for preset in recipe.PRESETS.values()]
)
def test_every_preset_can_be_looked_at_without_its_ranks(preset, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = dataclasses.replace(preset(), print_config=True)
    parallel = resolve(config).parallel
    assert parallel == dataclasses.replace(
        config.parallel, dp_shard=max(config.parallel.dp_shard, 1)
    )


def test_a_layout_that_fills_up_can_be_looked_at_too(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    _, config = options("finetune", "--parallel.ep", "8", "--parallel.tp", "2", "--print-config")
    assert resolve(config).parallel.dp_shard == 4
