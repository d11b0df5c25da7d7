"""Muon against torch's own, which takes 2-D matrices on one process, and in layouts of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.test_layouts import SilentTrainer, config_for, full
from tests.families import tiny
from tests.tiny import tiny_config, write_conversations, write_tiny_model
from torchsft.config import Config, Optim, differences, to_dict
from torchsft.models.families import build_model
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.optim.muon import orthogonalise
from torchsft.parallel.memory import held_bytes
from torchsft.parallel.world import World


def deepseek() -> nn.Module:
    config = tiny_config().to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    model.init_buffers()
    return model


def tensors_of_files(name: str, values: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a checkpoint holds of a parameter: each expert's, gate and up apart."""
    if name.endswith("experts.down_proj"):
        return list(values)
    if name.endswith("experts.gate_up_proj"):
        return [half for expert in values for half in expert.chunk(2)]
    return [values]


def is_adamws(name: str) -> bool:
    return "norm" in name or name in ("model.embed_tokens.weight", "lm_head.weight")


def test_four_steps_equal_torchs_muon_on_the_tensors_of_the_files(monkeypatch):
    # torch's rounds to bf16 inside, on every device
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    model, lr, decay = deepseek(), 0.02, 0.3
    apart = {
        name: [nn.Parameter(values.clone()) for values in tensors_of_files(name, parameter.data)]
        for name, parameter in model.named_parameters()
    }
    matrices = [p for name, parts in apart.items() if not is_adamws(name) for p in parts]
    norms = [p for name, (p, *_) in apart.items() if "norm" in name]
    others = [p for name, (p, *_) in apart.items() if is_adamws(name) and "norm" not in name]
    assert len(matrices) == 3 * 5 + 3 + 2 * (3 * 8 + 3 + 1)  # attention, dense, 2 layers of experts
    muon = torch.optim.Muon(matrices, lr, decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": others, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}],
        lr,
        betas=(0.9, 0.95),
    )
    optimizer = build_optimizer(model, Optim(kind="muon", lr=2 * lr, weight_decay=decay))
    set_lr(optimizer, 0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradients = tensors_of_files(name, parameter.grad)
            for part, gradient in zip(apart[name], gradients, strict=True):
                part.grad = gradient.clone()
        for each in (muon, adamw, optimizer):
            each.step()
    for name, parameter in model.named_parameters():
        parts = tensors_of_files(name, parameter.detach())
        for part, expected in zip(parts, apart[name], strict=True):
            # fp32 products in another order, which the iteration magnifies up to 485 times where a
            # matrix has hardly anything
            torch.testing.assert_close(part, expected.detach(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (24, 24)])
def test_in_bf16_the_iteration_is_as_exact_as_torchs(shape):
    """Relative errors against float64: both round three times in each of five iterations."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    torchs = -weight.detach() / (0.2 * max(shape) ** 0.5)
    (exact,) = orthogonalise(gradient.double().unsqueeze(0))
    values = torch.linalg.svdvals(exact)
    assert values.min() > 0.65 and values.max() < 1.25  # as the iteration is published
    ours = orthogonalise(gradient.bfloat16().unsqueeze(0))[0]
    of_torchs, of_ours = ((each - exact).norm() / exact.norm() for each in (torchs, ours))
    assert of_ours < 0.025 and of_ours < 1.25 * of_torchs


def test_a_matrix_is_what_the_files_hold():
    with torch.device("meta"):
        gpt_oss = build_model(tiny("gpt_oss").to_dict()).matrices()
    layer = {n.split(".", 3)[3]: rows for n, rows in gpt_oss.items() if ".layers.0." in n}
    assert layer == {
        "self_attn.q_proj.weight": 48,
        "self_attn.k_proj.weight": 24,
        "self_attn.v_proj.weight": 24,
        "self_attn.o_proj.weight": 32,
        "mlp.gate.weight": 8,
        "mlp.experts.gate_up_proj": 32,  # gate and up of an expert in one matrix
        "mlp.experts.down_proj": 16,
    }


def test_matrices_have_one_moment_and_a_change_of_optimizer_is_another_run():
    with torch.device("meta"):
        model = build_model(tiny("gpt_oss").to_dict())
    matrices = sum(model.get_parameter(name).numel() for name in model.matrices())
    whole = [
        held_bytes(model, torch.bfloat16, True, Optim(kind=kind))[0] for kind in ("adamw", "muon")
    ]
    assert whole[0] - whole[1] == 4 * matrices
    old, new = to_dict(Config()), to_dict(Config(optim=Optim(kind="muon")))
    assert differences(old, new) == ["optim.kind: 'adamw' -> 'muon'"]
    del old["optim"]["kind"]  # written before there was Muon
    assert differences(old, new) == ["optim.kind: 'adamw' -> 'muon'"]


def test_the_learning_rate_of_adamw_serves_muon_too():
    """40 steps on one microbatch of random tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 272, (64,), generator=generator)
    batch = {
        "positions": torch.arange(64),
        "cu_seqlens": torch.tensor([0, 64], dtype=torch.int32),
        "labels": tokens.roll(-1),
    }
    losses = {}
    for kind in ("adamw", "muon"):
        model = deepseek()
        optimizer = build_optimizer(model, Optim(kind=kind, lr=3e-3))
        set_lr(optimizer, 1.0)
        for _ in range(40):
            optimizer.zero_grad()
            loss = model(tokens, **batch) / 64
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses["adamw"] < 1 and losses["muon"] < 1, losses  # from 5.7


@pytest.mark.gpu
def test_on_a_gpu_an_update_is_that_of_a_cpu_in_bf16():
    """Never run so far."""
    models = deepseek(), deepseek().cuda()
    before = {name: parameter.detach().clone() for name, parameter in models[0].named_parameters()}
    generator = torch.Generator().manual_seed(4)
    gradients = {n: torch.randn(w.shape, generator=generator) for n, w in before.items()}
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].to(parameter.device)
        build_optimizer(model, Optim(kind="muon", lr=0.1)).step()
    for name in models[0].matrices():
        cpu, gpu = (m.get_parameter(name).detach().cpu() - before[name] for m in models)
        assert (gpu - cpu).norm() < 0.025 * cpu.norm(), name  # as in bf16 above


def train(directory: str, *, legs: list[tuple[str, int, int]], **sizes: Any) -> list[Any]:
    """Of each leg (directory of checkpoints, steps before and after it) what it ends with."""
    sizes = {"seq_len": 128, "global_batch_size": 4} | sizes
    ends = []
    with World(config_for(directory, **sizes).parallel, 0) as world:
        for output, start, stop in legs:
            config = config_for(directory, output=output, kind="muon", **sizes)
            config.train.steps, config.data.workers, config.checkpoint.mode = 4, 0, "sync"
            trainer = SilentTrainer(config, world)
            world.barrier()
            assert trainer.counters.step == start
            while trainer.counters.step < stop:
                trainer.train_step(next(trainer.loader))
            trainer.save()
            trainer.output.checkpointer.wait()
            named = dict(trainer.model.named_parameters())
            weights = {name: full(parameter) for name, parameter in named.items()}
            moments = {
                name: full(trainer.optimizer.state[named[name]]["momentum_buffer"])
                for name in trainer.model.matrices()
            }
            ends.append({"weights": weights, "moments": moments})
    return ends


def test_every_layout_continues_what_one_process_trains(ranks, tmp_path):
    """Four steps in legs on one process are bit-equal to four in one go; the same legs in
    other layouts, each from the checkpoint of the one before, agree at the end of each.
    """
    # Odd numbers of rows do not divide over ranks.
    write_tiny_model(tmp_path / "model", q_lora_rank=23, kv_lora_rank=19)
    write_conversations(tmp_path / "train.jsonl", 20)
    whole, one, other = (str(tmp_path / name) for name in ("whole", "one", "other"))
    legs = [(one, step, step + 1) for step in range(4)]
    (ends,) = ranks(1, train, directory=str(tmp_path), legs=[(whole, 0, 4), *legs])
    for key in ("weights", "moments"):
        for name, expected in ends[0][key].items():
            assert torch.equal(ends[4][key][name], expected), (key, name)
    layouts = [
        (4, {"dp_shard": 2, "tp": 2}),
        (4, {"dp_shard": 4, "ep": 2}),
        (4, {"pp": 2, "dp_replicate": 2, "pp_schedule": "1F1B"}),
        (2, {"tp": 2, "ep": 2}),
    ]
    wrong = []
    for step, (n, sizes) in enumerate(layouts):
        leg = (other, step, step + 1)
        results = ranks(n, train, directory=str(tmp_path), legs=[leg], **sizes)
        for key in ("weights", "moments"):
            found = {name: tensor for (end,) in results for name, tensor in end[key].items()}
            assert found.keys() == ends[0][key].keys()
            for name, expected in ends[1 + step][key].items():
                error = ((found[name] - expected).abs().max() / expected.abs().max()).item()
                if not error <= 1e-5:
                    wrong.append(f"{sizes}: {key} of {name} by {error:.1e}")
    assert not wrong, "\n".join(wrong)
