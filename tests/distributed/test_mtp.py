"""MTP layers in training: every layout computes the steps of one process; an export has the keys of
the source, and is what a conversion of the checkpoint gives; resuming is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.sources import add_mtp, change_tensors, read_tensors, same_bits
from tests.distributed.test_families import runs
from tests.distributed.test_layouts import compare, config_for, refused
from tests.tiny import write_conversations, write_tiny_model
from tools.conversion.convert import to_hf
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

LAYOUTS = {
    2: [
        {"dp_shard": 2, "ep": 2},
        {"cp": 2},
        {"tp": 2, "activation_checkpointing": "full"},
        {"pp": 2, "pp_schedule": "Interleaved1F1B", "pp_layers": (1, 1, 1, 0)},
    ],
    4: [
        {"cp": 2, "tp": 2, "ep": 4},
        {"pp": 2, "dp_shard": 2, "ep": 2, "pp_schedule": "InterleavedZeroBubble"}
        | {"pp_layers": (1, 1, 1, 0)},
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two MTP layers, of which a copy of the embedding is another one than the model's; a head that
    prefers a few tokens, so that some drafts are accepted.
    """
    directory = tmp_path_factory.mktemp("mtp")
    write_tiny_model(directory / "model")
    head = read_tensors(directory / "model")["lm_head.weight"]
    head[60:62] *= 4
    change_tensors(directory / "model", {"lm_head.weight": head})
    add_mtp(directory / "model", modules=2)
    change_tensors(directory / "model", {"model.layers.4.embed_tokens.weight": torch.ones(272, 32)})
    write_conversations(directory / "train.jsonl", 8)
    return directory


def test_a_step_does_not_depend_on_the_layout(ranks, inputs):
    """Losses, gradients of all parameters, three updates, and accepted drafts."""
    options: dict[str, Any] = {"directory": str(inputs), "mtp": "train", "seq_len": 128}
    options |= {"micro_batch_size": 2, "global_batch_size": 4}
    options["eval"] = (str(inputs / "train.jsonl"),)
    ((expected,),) = [runs(ranks, 1, [{}], **options)]
    without, _ = expected
    assert 0 < without["evaluation"]["eval_mtp_acceptance"] < 1
    assert all(4 < loss < 8 for loss in without["mtp"])  # of each step alone
    assert "model.layers.4.eh_proj.weight" in without["gradients"]
    for n, layouts in LAYOUTS.items():
        for layout, results in zip(layouts, runs(ranks, n, layouts, **options), strict=True):
            for result, reference in zip(results, expected, strict=True):
                compare(result, reference, label=str(layout))


def train(directory: str, output: str, mtp: str, steps: int, **options: Any) -> None:
    """A run of so many steps of four, with checkpoint and export."""
    config = config_for(directory, mtp=mtp, output=output, seq_len=128, **options)
    config.train.steps, config.optim.schedule = steps, "constant"
    config.checkpoint.export, config.checkpoint.resume = "fp32", "auto"
    with World(config.parallel, 0) as world:
        Trainer(config, world).run()


def test_exports_have_the_keys_of_the_source_and_are_what_conversions_give(
    ranks, inputs, tmp_path, capsys
):
    """Trained: all of it moves, and copies of embedding and head are the trained ones. A run in two
    layouts is the run in one. Dropped: no such keys, and config.json says so.
    """
    source = read_tensors(inputs / "model")
    options = {"directory": str(inputs), "global_batch_size": 4}
    outputs = {name: str(tmp_path / name) for name in ("whole", "legs", "drop", "keep")}
    ranks(1, train, mtp="train", steps=4, output=outputs["whole"], **options)
    ranks(2, train, mtp="train", steps=2, output=outputs["legs"], tp=2, **options)
    pipeline = {"pp": 2, "pp_schedule": "1F1B"}
    ranks(2, train, mtp="train", steps=4, output=outputs["legs"], **pipeline, **options)
    ranks(1, train, mtp="drop", steps=1, output=outputs["drop"], **options)
    trained, legs, dropped = (
        read_tensors(Path(outputs[name], "hf")) for name in ("whole", "legs", "drop")
    )
    assert trained.keys() == legs.keys() == source.keys()
    for key, tensor in trained.items():
        assert torch.equal(tensor, source[key]) == key.endswith("e_score_correction_bias"), key
        torch.testing.assert_close(legs[key], tensor, rtol=0, atol=2e-5, msg=key)
    for layer in (3, 4):
        for copy, key in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            own = trained[f"model.layers.{layer}.{copy}.weight"]
            assert same_bits(own, trained[f"{key}.weight"])
    mine = {key for key in source if not key.startswith(("model.layers.3.", "model.layers.4."))}
    assert dropped.keys() == mine
    for name, count in (("whole", 2), ("drop", 0)):
        config = json.loads(Path(outputs[name], "hf", "config.json").read_text())
        assert config["num_nextn_predict_layers"] == count
    for name, steps in (("whole", 4), ("drop", 1)):
        checkpoint = Path(outputs[name], "checkpoints", f"step-{steps:08d}")
        converted = tmp_path / f"{name}-converted"
        to_hf(checkpoint, converted, dtype="fp32", workers=1, progress=False)
        export, found = read_tensors(Path(outputs[name], "hf")), read_tensors(converted)
        assert found.keys() == export.keys()
        assert all(same_bits(found[key], tensor) for key, tensor in export.items())
        files = [place / "config.json" for place in (converted, Path(outputs[name], "hf"))]
        assert len({path.read_text() for path in files}) == 1


def test_a_rank_that_has_the_first_and_the_last_stage_is_refused(ranks, inputs):
    told = ranks(2, refused, directory=str(inputs), mtp="train", pp=2, pp_schedule="DualPipeV")
    assert all("DualPipeV has the first and the last stage on one rank" in words for words in told)
