"""Something real: a published model's weights and real conversations, given by hand.

    TORCHSFT_REAL_MODEL=/models/SmolLM2-135M-Instruct pytest tests/test_real_model.py

Any supported directory will do whose weights, gradients and moments fit into memory in fp32 (16
bytes a parameter). The conversations are those of GSM8K (`../shared/data/gsm8k`).
"""

from __future__ import annotations

import gc
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchsft.checkpoint.publish import output_lock
from torchsft.config import Checkpoint, Config, Data, Eval, Metrics, Model, Optim, Precision, Train
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

MODEL = os.environ.get("TORCHSFT_REAL_MODEL")
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
HELD_OUT, STEPS, ROWS = 200, 30, 4

pytestmark = pytest.mark.skipif(
    MODEL is None, reason="needs real weights: set TORCHSFT_REAL_MODEL to a model directory"
)


def write_conversations(path: Path, rows: list[dict]) -> Path:
    """One user turn and one answer each."""
    conversations = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, conversations)))
    return path


def loss_of_transformers(directory, batches) -> float:
    """Its mean loss over the supervised tokens, each document in a forward pass of its own."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total = weight = 0.0
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(bounds):
            rows = slice(begin, end)
            with torch.no_grad():
                logits = model(batch.tokens[None, rows], use_cache=False).logits[0]
            nll = torch.nn.functional.cross_entropy(
                logits, batch.labels[rows], reduction="none", ignore_index=-100
            )
            total += (nll * batch.loss_weights[rows]).double().sum().item()
            weight += batch.loss_weights[rows].double().sum().item()
    return total / weight


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 30 steps: what is held out, its loss before and after, and the export."""
    directory = tmp_path_factory.mktemp("real")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    rows = rows[: HELD_OUT + STEPS * ROWS]
    held_out = write_conversations(directory / "eval.jsonl", rows[:HELD_OUT])
    train = write_conversations(directory / "train.jsonl", rows[HELD_OUT:])
    config = Config(
        model=Model(path=MODEL),
        data=Data(train=(str(train),), eval=(str(held_out),), seq_len=2048, packing="none"),
        train=Train(steps=STEPS, global_batch_size=ROWS),
        optim=Optim(lr=1e-5, schedule="constant", warmup_steps=3),
        precision=Precision(compute="fp32"),
        eval=Eval(every=STEPS),
        checkpoint=Checkpoint(export="fp32"),
        metrics=Metrics(tensorboard=False, progress=False),
        output=str(directory / "run"),
    )
    with World(config.parallel, 0) as world, output_lock(Path(config.output), world.is_main):
        trainer = Trainer(config, world)
        (held_out,) = trainer.run_data.eval_sets.values()
        batches = [held_out[number] for number in range(len(held_out))]
        before = trainer.evaluate()["eval_loss"]
        trainer.run()
        del trainer
    gc.collect()
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return batches, before, json.loads(lines[-1])["eval_loss"], directory / "run" / "hf"


def test_the_supervised_tokens_are_the_answers(run):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:HELD_OUT]]
    trained = "".join(
        tokenizer.decode(batch.labels[batch.loss_weights > 0], clean_up_tokenization_spaces=False)
        for batch in run[0]
    )
    assert all(row["answer"] in trained for row in rows)
    assert not any(row["question"] in trained for row in rows)


def test_the_untrained_model_has_the_loss_that_transformers_computes(run):
    batches, before, _, _ = run
    assert before == pytest.approx(loss_of_transformers(MODEL, batches), abs=1e-4)
    assert before < 3


def test_training_lowers_the_loss_and_the_export_has_what_training_reported(run):
    batches, before, after, exported = run
    print(f"held-out loss {before:.4f} -> {after:.4f}")
    assert after < before
    assert after == pytest.approx(loss_of_transformers(exported, batches), abs=1e-4)
