"""Options of --data through the trainer: what the data layer promises has to hold for losses,
gradients and checkpoints.
"""

import json
import warnings

import pytest
import torch

from tests.distributed.test_layouts import SilentTrainer, config_for, full
from tests.tiny import write_conversations, write_tiny_model
from torchsft.config import Data, InputError
from torchsft.parallel.world import World
from torchsft.trainer import Trainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("training_data")
    write_tiny_model(directory / "model")
    write_conversations(directory / "train.jsonl", 40)
    write_conversations(directory / "other.jsonl", 24, seed=1)
    write_conversations(directory / "held.jsonl", 15, seed=2)
    return directory


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    # a run that failed leaves its group, as its process ends there
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(inputs, output, steps=6, stop=None, **data):
    """Metrics of a run that ends itself at `steps`, or by a signal's flag behind step `stop`;
    continues what is in `output`.
    """
    config = config_for(str(inputs), micro_batch_size=2, output=str(output))
    config.train.steps, config.eval.every = steps, 2
    for name, value in data.items():
        setattr(config.data, name, value)
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        if stop:
            save = trainer.save
            trainer.at_interval = lambda every: (
                trainer.counters.step == stop or (every > 0 and trainer.counters.step % every == 0)
            )

            def save_and_stop(score=None):
                save(score)
                trainer.output.checkpointer.wait()
                trainer.signalled = True

            trainer.save = save_and_stop
        trainer.run()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def numbers(lines):
    return [
        (line["loss"], line["grad_norm"], line["tokens"], line["supervised_tokens"], line["epoch"])
        for line in lines
    ]


def test_weighted_sources_train_the_same_whatever_prepares_them_and_resume_where_they_were(
    inputs, tmp_path
):
    sources = (f"{inputs / 'train.jsonl'}:0.5", f"{inputs / 'other.jsonl'}:2")
    whole = run(inputs, tmp_path / "whole", train=sources, workers=0)
    assert {line["epoch"] for line in whole} == {0, 1} and all(
        0 <= line["data_wait_share"] < 1 for line in whole
    )
    run(inputs, tmp_path / "legs", train=sources, workers=3, stop=2)
    assert numbers(run(inputs, tmp_path / "legs", train=sources, workers=1)) == numbers(whole)
    with pytest.raises(InputError, match=r"data.train: .*other.jsonl:2"):
        run(inputs, tmp_path / "legs", train=sources[:1])


def test_streamed_training_resumes_where_it_was(inputs, tmp_path):
    sources = (str(inputs / "train.jsonl"), str(inputs / "other.jsonl"))
    options = {"train": sources, "streaming": True, "packing_buffer": 16, "steps": 10}
    whole = run(inputs, tmp_path / "whole", **options)
    assert {line["epoch"] for line in whole} >= {0, 1}
    run(inputs, tmp_path / "legs", **options, workers=0, stop=3)
    assert numbers(run(inputs, tmp_path / "legs", **options, workers=2)) == numbers(whole)


@pytest.mark.parametrize("streaming", [False, True])
def test_skipped_rows_are_counted_and_listed(inputs, tmp_path, capsys, streaming):
    good = (inputs / "train.jsonl").read_text()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good + '{"messages": []}\n' + good.splitlines()[0] + "\nno JSON\n")
    with pytest.raises(InputError, match=rf"{bad}, line 41: no assistant message"):
        run(inputs, tmp_path / "raise", train=(str(bad),), streaming=streaming)
    torch.distributed.destroy_process_group()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(inputs, tmp_path / "skip", train=(str(bad),), streaming=streaming, on_error="skip")
    out = capsys.readouterr().out
    assert "skipped 2" in out or streaming
    assert (
        f"\n  skipped: {bad}, line 41: no assistant message" in out
        and f"\n  skipped: {bad}, line 43: not JSON" in out
    )


def test_variables_that_the_chat_template_does_not_have_are_refused(inputs, tmp_path):
    with pytest.raises(
        InputError,
        match=r"--data.template-kwargs has 'thinking', which is no "
        r"variable of the chat template",
    ):
        run(inputs, tmp_path / "run", template_kwargs='{"thinking": true}')
    with pytest.raises(InputError, match="must be a JSON object of the template's own variables"):
        Data(template_kwargs='{"messages": []}')


def test_streaming_without_a_number_of_steps_is_refused(inputs, tmp_path):
    with pytest.raises(
        InputError,
        match=r"--data.streaming reads an unknown .* --train.epochs is "
        r"1; give --train.steps",
    ):
        run(inputs, tmp_path / "run", steps=None, streaming=True)


def test_named_evaluation_sets_have_the_losses_of_runs_with_one_set_each(inputs, tmp_path):
    held, other = f"held={inputs / 'held.jsonl'}", f"second={inputs / 'other.jsonl'}"
    together = run(inputs, tmp_path / "both", eval=(held, other))
    for name, spec in (("held", held), ("second", other)):
        alone = run(inputs, tmp_path / name, eval=(spec,))
        for one, both in zip(alone, together, strict=True):
            assert one.keys() <= both.keys() and ("eval_loss" in one) == (one["step"] % 2 == 0)
            if "eval_loss" in one:
                assert both[f"eval_loss/{name}"] == one["eval_loss"]
                assert both[f"eval_perplexity/{name}"] == one["eval_perplexity"]
    last = together[-1]
    low, high = sorted((last["eval_loss/held"], last["eval_loss/second"]))
    assert low < last["eval_loss"] < high


def first_step(directory, balance):
    """Loss, gradients and how the attention's costs are spread, of the first step on this number of
    ranks.
    """
    config = config_for(directory, global_batch_size=16, seq_len=192)
    config.data.balance, config.data.packing = balance, "none"
    with World(config.parallel, 0) as world:
        trainer = SilentTrainer(config, world)
        step = next(trainer.loader)
        costs = [
            sum(length**2 for length in batch.cu_seqlens.diff().tolist())
            for batch in step.microbatches
        ]
        update = trainer.optimizer.step
        gradients = {}

        def keep():
            gradients.update(
                {name: full(parameter.grad) for name, parameter in trainer.model.named_parameters()}
            )
            update()

        trainer.optimizer.step = keep
        record, _ = trainer.train_step(step)
    return {"loss": record["loss"], "gradients": gradients, "costs": costs, "ids": step.sample_ids}


def test_balanced_ranks_train_the_same_step_with_equal_work(inputs, ranks):
    plain, balanced = (
        ranks(2, first_step, directory=str(inputs), balance=balance)
        for balance in ("none", "attention")
    )
    ids = [
        sorted(name for rank in results for name in rank["ids"]) for results in (plain, balanced)
    ]
    assert ids[0] == ids[1]

    def apart(results):
        """What the slower rank of each microbatch costs the other."""
        return sum(
            abs(a - b) for a, b in zip(results[0]["costs"], results[1]["costs"], strict=True)
        )

    assert apart(balanced) < 0.3 * apart(plain)
    assert balanced[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    for name, gradient in plain[0]["gradients"].items():
        torch.testing.assert_close(
            balanced[0]["gradients"][name],
            gradient,
            rtol=0,
            atol=1e-5 * float(gradient.abs().max()) + 1e-12,
            msg=name,
        )
