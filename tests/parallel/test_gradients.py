"""One norm, against float64, on plain tensors and on DTensors of two meshes."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchsft.config import Parallel
from torchsft.parallel.gradients import clip_factor, global_norm, scale_gradients
from torchsft.parallel.world import World


def parameter(gradient):
    p = nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient
    return p


def test_norm_and_clip_on_one_rank():
    torch.manual_seed(0)
    gradients = [torch.randn(5, 7), torch.randn(3), torch.zeros(0, 2)]
    # the last has no gradient
    parameters = [parameter(g.clone()) for g in gradients] + [nn.Parameter(torch.ones(2))]
    expected = torch.cat([g.double().flatten() for g in gradients]).norm()
    norm = global_norm(parameters)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-7)
    scale_gradients(parameters, clip_factor(norm, 0.5))
    assert global_norm(parameters).item() == pytest.approx(0.5, rel=1e-5)
    assert clip_factor(norm, 1e9).item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_makes_the_norm_not_finite(bad):
    g = torch.ones(4, 4)
    g[2, 1] = bad
    assert not torch.isfinite(global_norm([parameter(torch.ones(3)), parameter(g)]))


def norms_of_sharded_gradients(gradients):
    """The same gradients, each sharded in another way over 4 ranks."""
    with World(Parallel(timeout_seconds=60), 0):
        line = init_device_mesh("cpu", (4,))
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        ways = [
            (line, [Shard(0)]),
            (square, [Shard(1), Shard(0)]),
            (square, [Replicate(), Shard(0)]),
            (line, [Replicate()]),
        ]
        return [
            global_norm([parameter(distribute_tensor(g, *way)) for g in gradients]).item()
            for way in ways
        ]


def test_norm_counts_every_element_once_however_it_is_sharded(ranks):
    torch.manual_seed(1)
    gradients = [torch.randn(6, 8), torch.randn(2, 4)]
    expected = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    for norms in ranks(4, norms_of_sharded_gradients, gradients=gradients):
        assert norms == pytest.approx([expected] * 4, rel=1e-6)
