"""Training checkpoints on one process: exact restoration, atomicity, retention, refusals."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torchsft.checkpoint import state
from torchsft.config import InputError


class Toy(nn.Module):
    """Matrices, a bias and both kinds of buffers."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.down = nn.Linear(width, 1)
        self.register_buffer("kept", torch.full((3,), 5.01))
        self.register_buffer("transient", torch.zeros(2), persistent=False)


def build(seed, width=6):
    torch.manual_seed(seed)
    model = Toy(width)
    matrices, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.05)


def train(model, optimizer, steps):
    """Steps on random data from torch's global generator: any difference in any state shows."""
    for _ in range(steps):
        model.down(torch.tanh(model.up(torch.randn(8, 4)))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save(directory, step, model, optimizer, keep=0, **extra):
    return state.save(directory, step, model, optimizer, extra=extra, config={"train": {"seed": 3}}, keep=keep)


@pytest.fixture(params=["without a process group", "with one rank"])
def world(request):
    if request.param == "with one rank":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_restored_run_continues_bit_for_bit(world, tmp_path, recwarn):
    model, optimizer = build(0)
    train(model, optimizer, 3)
    model.kept += 1
    path = save(tmp_path, 3, model, optimizer, position=[1, 20], loss=math.nan)
    expected = train(model, optimizer, 3)

    other, other_optimizer = build(1)  # another seed; its optimizer has not stepped yet
    extra = state.load(path, other, other_optimizer)
    assert extra["position"] == [1, 20] and math.isnan(extra["loss"])
    for name, tensor in train(other, other_optimizer, 3).items():
        assert torch.equal(tensor, expected[name]), name
    assert state.saved_config(path) == {"train": {"seed": 3}}
    assert not [w for w in recwarn if "torch.distributed is disabled" in str(w.message)]


def test_loading_touches_neither_options_nor_other_state(tmp_path):
    """State is created by a step with zero learning rate: weight decay must not act, and the options must come back."""
    model, optimizer = build(0)
    train(model, optimizer, 2)
    path = save(tmp_path, 2, model, optimizer)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    other, other_optimizer = build(1)
    for group in other_optimizer.param_groups:
        group["lr"] = 0.7
    other.transient += 4
    other.up.weight.grad = torch.ones_like(other.up.weight)  # a left-over gradient must not stop the state's creation
    state.load(path, other, other_optimizer)
    assert all(torch.equal(v, saved[k]) for k, v in other.state_dict().items())
    assert [g["lr"] for g in other_optimizer.param_groups] == [0.7, 0.7]
    assert [g["weight_decay"] for g in other_optimizer.param_groups] == [0.1, 0.0]
    assert torch.equal(other.transient, torch.full((2,), 4.0))
    assert all(p.grad is None for p in other.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][name]), name


def test_a_checkpoint_before_the_first_step_restores_a_fresh_optimizer(tmp_path):
    model, optimizer = build(0)
    path = save(tmp_path, 0, model, optimizer)
    assert not optimizer.state
    expected = train(model, optimizer, 3)
    other, other_optimizer = build(1)
    train(other, other_optimizer, 2)
    state.load(path, other, other_optimizer)
    for name, tensor in train(other, other_optimizer, 3).items():
        assert torch.equal(tensor, expected[name]), name


def test_moments_of_another_dtype_keep_it(tmp_path):
    """`Optimizer.load_state_dict` would turn bf16 moments into fp32."""
    model, optimizer = build(0)
    train(model, optimizer, 1)
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()
    path = save(tmp_path, 1, model, optimizer)
    saved = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
    state.load(path, model, optimizer)
    for value, entry in zip(saved, optimizer.state.values(), strict=True):
        assert entry["exp_avg"].dtype == torch.bfloat16 and torch.equal(entry["exp_avg"], value)


def test_only_tensors_are_in_the_checkpoint(tmp_path):
    """Anything else would be pickled by DCP and unpickled on load."""
    model, optimizer = build(0)
    train(model, optimizer, 1)
    path = save(tmp_path, 1, model, optimizer)
    stored = pickle.loads((path / ".metadata").read_bytes()).state_dict_metadata
    assert {type(entry).__name__ for entry in stored.values()} == {"TensorStorageMetadata"}
    assert {name.split(".")[0] for name in stored} == {"model", "optimizer", "rng"}
    assert {"model.kept", "optimizer.state.up.weight.exp_avg", "rng.0.cpu"} <= stored.keys()
    assert "model.transient" not in stored


def test_the_newest_complete_checkpoints_stay(tmp_path):
    model, optimizer = build(0)
    assert state.find_latest(tmp_path / "nowhere") is None and state.find_latest(tmp_path) is None
    (tmp_path / "notes").mkdir()
    for step in (9, 10, 200):
        assert save(tmp_path, step, model, optimizer) == tmp_path / f"step-{step:08d}"
    torn = tmp_path / "step-00000300"  # a name alone does not make it complete
    torn.mkdir()
    with pytest.raises(
        InputError, match=r"step-00000300 is damaged: it has no .metadata, trainer.json, config.json; delete it"
    ):
        state.find_latest(tmp_path)
    save(tmp_path, 201, model, optimizer, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000200", "step-00000201", "step-00000300"]
    torn.rmdir()
    save(tmp_path, 50, model, optimizer, keep=1)  # resumed from an older one: what was just written always stays
    assert state.find_latest(tmp_path).name == "step-00000201" and (tmp_path / "step-00000050").is_dir()


def test_a_failed_save_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    model, optimizer = build(0)
    first = save(tmp_path, 1, model, optimizer)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full_disk)
    with pytest.raises(OSError, match=r"step-00000002 could not be written: rank 0: OSError: .*No space left"):
        save(tmp_path, 2, model, optimizer, keep=1)
    assert state.find_latest(tmp_path) == first and not (tmp_path / "step-00000002").exists()
    monkeypatch.undo()
    assert state.find_latest(tmp_path) == first
    assert save(tmp_path, 2, model, optimizer, keep=1) == state.find_latest(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    model, optimizer = build(0)
    save(tmp_path, 1, model, optimizer, run="first")
    path = save(tmp_path, 1, model, optimizer, run="second")
    assert state.load(path, model, optimizer) == {"run": "second"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_what_cannot_be_json_is_refused_before_anything_is_written(tmp_path):
    model, optimizer = build(0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, model, optimizer, position={1, 2})
    assert not list(tmp_path.iterdir())


def refusal(path, model, optimizer):
    with pytest.raises(InputError) as error:
        state.load(path, model, optimizer)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unusable_checkpoints_are_refused_in_one_sentence(tmp_path):
    model, optimizer = build(0)
    train(model, optimizer, 1)
    assert "does not exist" in refusal(tmp_path / "step-00000001", model, optimizer)

    path = save(tmp_path, 1, model, optimizer)
    wide, wide_optimizer = build(0, width=7)
    text = refusal(path, wide, wide_optimizer)
    assert "another model" in text and "model.up.weight ((6, 4) instead of (7, 4))" in text
    assert "optimizer.state.up.weight.exp_avg" in text

    class Bigger(Toy):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    bigger = Bigger()
    text = refusal(path, bigger, torch.optim.AdamW(bigger.parameters()))
    assert "missing: model.extra.weight, model.extra.bias" in text
    smaller = nn.Sequential()
    smaller.add_module("up", model.up)
    text = refusal(path, smaller, torch.optim.AdamW(smaller.parameters()))
    assert "unexpected" in text and "model.down.weight" in text

    (path / "trainer.json").rename(tmp_path / "elsewhere.json")
    assert "is not a complete checkpoint: it has no trainer.json" in refusal(path, model, optimizer)
    (path / "trainer.json").write_text("{")
    assert "damaged: trainer.json is not JSON" in refusal(path, model, optimizer)
    (path / "trainer.json").write_text(json.dumps({"step": 1, "extra": {}}))
    for data in path.glob("*.distcp"):
        data.write_bytes(data.read_bytes()[:-3000])
    assert "damaged: rank 0" in refusal(path, model, optimizer)
    (path / ".metadata").write_bytes(b"not a pickle")
    assert "damaged: unreadable .metadata" in refusal(path, model, optimizer)
