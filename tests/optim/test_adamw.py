"""AdamW against its definition in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from torchsft.config import Optim
from torchsft.optim.adamw import build_optimizer, set_lr


class Small(nn.Module):
    """A stack of expert matrices, a matrix, a norm and a bias."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 4, 5, generator=generator))
        self.matrix = nn.Parameter(torch.randn(4, 5, generator=generator))
        self.norm = nn.Parameter(torch.randn(5, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))

    def matrices(self):
        return {"experts": 4, "matrix": 4}  # and the rows of each


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)


def adamw_float64(values, gradients, optim, decay):
    """Loshchilov & Hutter 2019, algorithm 2 with decoupled decay scaled by lr, in float64."""
    w = values.double().numpy().copy()
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double().numpy()
        w -= optim.lr * (optim.weight_decay if decay else 0.0) * w
        m = optim.beta1 * m + (1 - optim.beta1) * g
        v = optim.beta2 * v + (1 - optim.beta2) * g * g
        w -= optim.lr * (m / (1 - optim.beta1**t)) / (np.sqrt(v / (1 - optim.beta2**t)) + optim.eps)
    return torch.from_numpy(w)


def test_five_steps_equal_adamw_in_float64_with_decay_on_matrices_only():
    model, optim = Small(), Optim(lr=0.01, weight_decay=0.3)
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, optim)
    gradients = {name: [] for name, _ in model.named_parameters()}
    for step in range(5):
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = adamw_float64(
            before.get_parameter(name).detach(),
            gradients[name],
            optim,
            name in ("experts", "matrix"),
        )
        # five fp32 roundings of values near 1
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_zero_gradients_shrink_matrices_and_leave_vectors():
    model = Small()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, Optim(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name in ("experts", "matrix"):
        torch.testing.assert_close(model.get_parameter(name), before.get_parameter(name) * 0.95)
    for name in ("norm", "bias"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_frozen_parameters_are_left_out():
    model = Small()
    model.matrix.requires_grad_(False)
    before = model.matrix.clone()
    optimizer = build_optimizer(model, Optim(lr=0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    set_gradients(model, 0)
    optimizer.step()
    assert torch.equal(model.matrix, before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moments": "bf16"},
        {"moments": "int8"},
        {"masters": "bf16", "moments": "bf16"},
        {"kind": "muon"},
    ],
    ids=str,
)
def test_a_step_with_found_inf_changes_nothing_and_the_next_is_the_one_it_would_have_been(options):
    """Bit by bit, also as the very first step; gradients of skipped steps are not finite."""
    ends = []
    for skipped in ([False, False], [True, False, True, True, False]):
        model = Small().to(torch.bfloat16 if "masters" in options else torch.float32)
        optimizer = build_optimizer(model, Optim(lr=0.01, weight_decay=0.3, **options))
        updates = 0
        for skip in skipped:
            set_gradients(model, updates)
            if len(skipped) > 2:
                optimizer.found_inf = torch.tensor(float(skip))
            before = held(model, optimizer)
            for number, parameter in enumerate(model.parameters()):
                if skip:
                    parameter.grad.fill_((math.nan, math.inf)[number % 2])
            optimizer.step()
            after = held(model, optimizer)
            if skip:
                same({name: after[name] for name in before}, before)
            updates += not skip
        ends.append(held(model, optimizer))
    same(*ends)


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and state, copied."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name} {key}"] = value.clone()
    return tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_part_of_which_nothing_is_trained_has_an_optimizer_that_does_nothing():
    """A pipeline rank's; that of the whole model nothing is trained is refused before."""
    model = Small().requires_grad_(False)
    optimizer = build_optimizer(model, Optim())
    set_lr(optimizer, 0.5)
    optimizer.step()
    assert not optimizer.state and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), Small().parameters(), strict=True)
    )


def test_learning_rate_of_1e_7_moves_fp32_masters():
    """It would be lost in bf16, whose spacing near 1 is 2^-8; here it is about the spacing of fp32,
    2^-23.
    """
    model = Small()
    model.matrix.data.fill_(0.5)
    optimizer = build_optimizer(model, Optim(lr=1e-7, weight_decay=0.0))
    set_gradients(model, 0)
    for _ in range(100):
        optimizer.step()
    moved = (model.matrix.detach() - 0.5).abs()
    # the same gradient each time: Adam's steps have size lr; 100 fp32 roundings of 2^-25 at most
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-5), rtol=0, atol=100 * 2**-25)
    assert (model.matrix.detach().bfloat16() == 0.5).all()


def _step_on_two_meshes():
    """One step of DTensors of two meshes beside plain tensors, and of the same values as plain
    tensors alone.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo")
    dense = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    expert = init_device_mesh("cpu", (1, 2), mesh_dim_names=("edp", "ep"))
    plain, sharded = Small(), Small()
    sharded.experts = nn.Parameter(
        distribute_tensor(sharded.experts.detach(), expert, [Shard(1), Shard(0)])
    )
    sharded.matrix = nn.Parameter(distribute_tensor(sharded.matrix.detach(), dense, [Shard(0)]))
    sharded.norm = nn.Parameter(distribute_tensor(sharded.norm.detach(), dense, [Shard(0)]))
    optim = Optim(lr=0.01)
    optimizers = [build_optimizer(plain, optim), build_optimizer(sharded, optim)]
    for step in range(3):
        set_gradients(plain, step)
        for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
            b.grad = (
                distribute_tensor(a.grad, b.device_mesh, b.placements)
                if isinstance(b, DTensor)
                else a.grad.clone()
            )
        for optimizer in optimizers:
            optimizer.step()
    full = {
        n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in sharded.named_parameters()
    }
    return {name: (p.detach(), full[name].detach()) for name, p in plain.named_parameters()}


def test_dtensors_of_two_meshes_beside_plain_tensors_step_as_one_process_does(ranks):
    for result in ranks(2, _step_on_two_meshes):
        for name, (plain, sharded) in result.items():
            # vectorised and scalar code of the fused kernel round differently where shards end
            torch.testing.assert_close(sharded, plain, rtol=1e-6, atol=1e-7, msg=name)
