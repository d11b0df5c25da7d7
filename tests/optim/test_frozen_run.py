"""A run with frozen parameters from the command line: what it says, leaves behind and refuses."""

import json

import pytest
import torch

from recipes import deepseek_v3_sft
from tests.checkpoint.deepseek_format import LAYERS, write_deepseek
from tests.checkpoint.sources import read_tensors, same_bits
from tests.tiny import write_conversations, write_tiny_model
from torchsft.config import InputError

FROZEN = ["experts", "embeddings", "layers.0", "*.kv_a_proj_with_mqa"]


def is_frozen(key):
    """By hand, of the keys of a checkpoint; scales and what no run trains (MTP layers, the routing
    bias) too.
    """
    parts = (
        ".mlp.experts.",
        "embed_tokens",
        "model.layers.0.",
        ".kv_a_proj_with_mqa.",
        "correction_bias",
        f"layers.{LAYERS}.",
    )
    return any(part in key for part in parts)


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("rows") / "train.jsonl", 10)


def run(monkeypatch, source, rows, output, *options):
    argv = [
        "recipe",
        "--model.path",
        source,
        "--data.train",
        rows,
        "--data.seq-len",
        192,
        "--output",
        output,
    ]
    argv += ["--train.steps", 2, "--train.global-batch-size", 2, "--checkpoint.every", 1, *options]
    monkeypatch.setattr("sys.argv", [*map(str, argv)])
    try:
        deepseek_v3_sft.main()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_what_is_frozen_is_exported_bit_for_bit_and_no_checkpoint_has_moments_of_it(
    rows, tmp_path, monkeypatch, capsys, kind
):
    source = tmp_path / "source"
    if kind == "fp8":
        write_deepseek(source, num_hidden_layers=LAYERS)
    else:
        write_tiny_model(source, dtype=torch.bfloat16)
    groups = ["--optim.groups", "router:lr=0.01", "*.o_proj:weight_decay=0.5"]
    options = ["--optim.lr", 1e-2, "--checkpoint.export", kind, *groups]
    run(monkeypatch, source, rows, tmp_path / "run", "--train.freeze", *FROZEN, *options)
    before, after = read_tensors(source), read_tensors(tmp_path / "run" / "hf")
    assert before.keys() == after.keys()
    moved = {key for key in before if not same_bits(before[key], after[key])}
    assert not {key for key in moved if is_frozen(key)}
    trained = {key for key in before if not is_frozen(key) and not key.endswith("_scale_inv")}
    assert trained - moved == set()

    metadata = torch.distributed.checkpoint.FileSystemReader(
        tmp_path / "run/checkpoints/step-00000002"
    ).read_metadata()
    names = metadata.state_dict_metadata.keys()
    moments = {
        name.removeprefix("optimizer.state.").removesuffix(".exp_avg")
        for name in names
        if name.endswith(".exp_avg")
    }
    parameters = {
        n.removeprefix("model.")
        for n in names
        if n.startswith("model.") and not n.endswith("correction_bias")
    }
    assert moments == {name for name in parameters if not is_frozen(name)}

    said = capsys.readouterr().out
    numbers = {
        name: metadata.state_dict_metadata[f"model.{name}"].size.numel() for name in parameters
    }
    few = sum(numbers[name] for name in moments)
    assert (
        f"{sum(numbers.values()) / 1e6:,.2f} M parameters, of which {few / 1e6:,.2f} M are trained"
        in said
    )
    with pytest.raises(
        InputError,
        match=r"differs in train.freeze: \['experts', .*\] -> "
        r"\['experts'\]",
    ):
        run(monkeypatch, source, rows, tmp_path / "run", "--train.freeze", "experts", *options)
    with pytest.raises(InputError, match=r"differs in optim.groups: "):
        run(monkeypatch, source, rows, tmp_path / "run", "--train.freeze", *FROZEN, *options[:-2])


def test_the_learning_rate_of_a_group_is_on_tensorboard_and_follows_the_schedule(
    rows, tmp_path, monkeypatch, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source = write_tiny_model(tmp_path / "source", tie_word_embeddings=True)
    options = [
        "--optim.lr",
        1e-2,
        "--optim.schedule",
        "linear",
        "--optim.warmup-steps",
        0,
        "--checkpoint.export",
        "none",
    ]
    options += ["--optim.groups", "router:lr=0.25", "--train.freeze", "embeddings"]
    run(monkeypatch, source, rows, tmp_path / "run", *options)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["lr"] for line in lines] == [0.01, 0.005]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("optim/lr/router")] == [0.25, 0.125]
    assert (
        "frozen with the embeddings: the output embedding, which is tied to them"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--train.freeze", "routr"],
            "--train.freeze 'routr' matches no parameter; similar names: router",
        ),
        (["--optim.groups", "layers.7:lr=1"], "names layer 7, but the model's are 0 to 2"),
        (["--train.freeze", "*"], "leaves no parameter to train"),
        (
            ["--optim.schedule", "wsd", "--optim.decay-steps", "3"],
            "decay-steps is 3, but the warm-up leaves only 2 of",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_weight_is_loaded(
    rows, tmp_path, monkeypatch, options, sentence
):
    source = write_tiny_model(tmp_path / "source")
    monkeypatch.setattr("torchsft.checkpoint.huggingface.load_weights", None)
    with pytest.raises(InputError, match=sentence.replace("*", r"\*")):
        run(monkeypatch, source, rows, tmp_path / "run", *options)
