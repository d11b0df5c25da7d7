"""Context parallelism: rows over several ranks, with documents that cross them; and what travels
between the ranks.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.passes import compare, training_pass
from tools.benchmark_gpu import V3, hf_config
from tools.published import QWEN3_30B
from torchsft.config import InputError, Parallel
from torchsft.models.attention import locate_documents
from torchsft.models.families import build_model
from torchsft.parallel.context import apply_context_parallel
from torchsft.parallel.sequence import exchange_heads, heads_to_tokens
from torchsft.parallel.tensor import apply_tensor_parallel
from torchsft.parallel.world import World, mesh_sizes


@pytest.fixture(scope="module")
def one_process(ranks):
    return ranks(1, training_pass, parallel={}, balance=3.0)[0]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [(2, {"cp": 2}), (4, {"cp": 4, "ep": 2}), (4, {"cp": 2, "dp_shard": 2, "ep": 4})],
)
def test_loss_and_gradients_do_not_depend_on_context_parallelism(
    ranks, one_process, size, parallel
):
    compare(ranks(size, training_pass, parallel=parallel, balance=3.0), one_process)


def test_neither_do_those_of_a_tied_model_with_biases_and_without_a_query_latent(ranks):
    other = {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True}
    expected = ranks(1, training_pass, parallel={}, **other)[0]
    compare(ranks(4, training_pass, parallel={"cp": 4, "ep": 4}, **other), expected)


# Grouped-query attention.

LENGTHS = (5, 1, 13, 5)  # of 24 tokens: documents cross the bounds of 2 and 4 ranks


def grouped_query_attention(q_THd, k_TGd, v_TGd):
    """Causal attention within documents, one SDPA call each."""
    outputs = []
    for parts in zip(*(x.split(LENGTHS) for x in (q_THd, k_TGd, v_TGd)), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def shared_attention(size, qkv, weights_THd):
    """This rank's part of the output and of the gradients, and how many heads it computed."""
    with World(Parallel(cp=size, timeout_seconds=60), 0) as world:
        group = world.dense.get_group("cp")
        own = [x.chunk(size)[world.rank].clone().requires_grad_() for x in qkv]
        q, k, v = exchange_heads(*own, group)
        out = heads_to_tokens(grouped_query_attention(q, k, v), group)
        (out * weights_THd.chunk(size)[world.rank]).sum().backward()
        return out.detach(), [x.grad for x in own], (q.shape[1], k.shape[1], v.shape[1])


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 4), (2, 2), (4, 2), (4, 1), (4, 8)])
def test_exchanged_heads_give_the_attention_of_one_process(ranks, size, kv_heads):
    """Key/value heads are split, one each, or on several ranks; values have a width of their own.
    fp32 rounding: 1e-6.
    """
    torch.manual_seed(0)
    qkv = [
        torch.randn(24, heads, width) for heads, width in ((8, 16), (kv_heads, 16), (kv_heads, 12))
    ]
    weights = torch.randn(24, 8, 12)
    inputs = [x.clone().requires_grad_() for x in qkv]
    expected = grouped_query_attention(*inputs)
    (expected * weights).sum().backward()
    results = ranks(size, shared_attention, size=size, qkv=qkv, weights_THd=weights)
    torch.testing.assert_close(
        torch.cat([out for out, _, _ in results]), expected.detach(), rtol=0, atol=1e-6
    )
    for number, x in enumerate(inputs):
        gradient = torch.cat([gradients[number] for _, gradients, _ in results])
        torch.testing.assert_close(gradient, x.grad, rtol=0, atol=1e-6 * x.grad.abs().max().item())
    assert {counts for _, _, counts in results} == {
        (8 // size, max(kv_heads // size, 1), max(kv_heads // size, 1))
    }


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "good"),
    [(8, 2, 3, "1, 2, 4, 8"), (12, 6, 4, "1, 2, 3, 6, 12"), (12, 4, 8, "1, 2, 4, 12")],
)
def test_heads_that_do_not_divide_are_refused(heads, kv_heads, size, good):
    q, k, v = (torch.zeros(4, n, 8) for n in (heads, kv_heads, kv_heads))
    sentence = (
        f"{heads} query heads and {kv_heads} key/value heads .* --parallel.cp {size} ranks; set .* "
        f"one of {good}$"
    )
    with pytest.raises(InputError, match=sentence):
        exchange_heads(q, k, v, SimpleNamespace(size=lambda: size))


# Communicated values.


class ReceivedValues(TorchDispatchMode):
    """Counts the values that this rank receives from others, by collective; refuses those that it
    does not know.
    """

    def __init__(self):
        super().__init__()
        self.received = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("_c10d_functional", "c10d") and name not in (
            "wait_tensor",
            "_wrap_tensor_autograd",
        ):
            if name == "all_gather_into_tensor":
                count = result.numel() - args[0].numel()
            elif name == "reduce_scatter_tensor":
                count = args[0].numel() - result.numel()
            elif name == "all_to_all_single":
                own, *others = args[1]  # rows received from each rank; all the same here
                assert set(others) <= {own}
                count = result.numel() * len(others) // len(args[1])
            else:
                raise AssertionError(f"{function} is not counted")
            self.received[name] = self.received.get(name, 0) + count
        return result


def attention_traffic(cp, tp, tokens, config):
    """Values that one rank receives per token of the row in a layer's attention, by pass and
    collective: on meta, one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=cp * tp, store=FakeStore())
    meshes = {
        name: init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        for name, axes in mesh_sizes(Parallel(cp=cp, tp=tp), cp * tp).items()
    }
    with torch.device("meta"):
        model = build_model(config)
    world = SimpleNamespace(**meshes)
    if tp > 1:
        apply_tensor_parallel(model, world)
    if cp > 1:
        apply_context_parallel(model, world)
    angles = torch.zeros(tokens, model.config.rope.dim // 2)
    documents = locate_documents(
        "sdpa", angles, angles, torch.tensor([0, tokens], dtype=torch.int32), tokens, model.layout
    )
    documents = replace(documents, cos_TP=angles.to("meta"), sin_TP=angles.to("meta"))
    shape_SD = (tokens // (cp * tp), model.config.hidden_size)
    x_SD = torch.empty(shape_SD, device="meta", requires_grad=True)
    with ReceivedValues() as forward:
        out_SD = model.model.layers["0"].self_attn(x_SD, documents)
    assert out_SD.shape == x_SD.shape
    with ReceivedValues() as backward:
        out_SD.sum().backward()
    return [
        {name: count / tokens for name, count in counted.received.items()}
        for counted in (forward, backward)
    ]


@pytest.mark.parametrize(("cp", "tp"), [(2, 1), (8, 1), (4, 2), (1, 8)])
def test_latents_travel_and_not_keys_and_values(ranks, cp, tp):
    """Measured from the collectives themselves for V3's sizes, against the formula of
    parallel/context.py.
    """
    n = cp * tp
    config = hf_config(V3.sizes | {"vocab_size": 129280}, experts=256, moe_layers=1) | {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
    }
    ((forward, backward),) = ranks(1, attention_traffic, cp=cp, tp=tp, tokens=64, config=config)
    latents = (1536 + 512 + 64) * (n - 1) / n
    outputs = 128 * 128 / n * (cp - 1) / cp
    summed = 7168 / cp * (tp - 1) / tp
    gathered = 128 * (192 + 128) * (cp - 1) / cp  # keys and values instead
    there = {
        "all_gather_into_tensor": latents,
        "all_to_all_single": outputs,
        "reduce_scatter_tensor": summed,
    }
    back = {
        "reduce_scatter_tensor": latents,
        "all_to_all_single": outputs,
        "all_gather_into_tensor": summed,
    }
    assert forward == {name: count for name, count in there.items() if count}
    assert backward == {name: count for name, count in back.items() if count}
    assert math.isclose(
        latents + outputs, {(2, 1): 5152, (8, 1): 3640, (4, 2): 3384, (1, 8): 1848}[cp, tp]
    )
    if cp == 8:
        assert (latents + outputs) * 9 < gathered == 35840


@pytest.mark.parametrize(("cp", "tp"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_of_grouped_query_attention_heads_travel_and_not_whole_rows(ranks, cp, tp):
    """Measured for Qwen3-30B-A3B's sizes, 32 query and 4 key/value heads of 128, against the
    formula of parallel/context.py.
    """
    config = QWEN3_30B | {"num_hidden_layers": 1}
    ((forward, backward),) = ranks(1, attention_traffic, cp=cp, tp=tp, tokens=64, config=config)
    heads = (2 * 32 + 2 * 4) / tp * 128 * (cp - 1) / cp**2
    tokens = 2048 / cp * (tp - 1) / tp
    expected = {
        "all_gather_into_tensor": tokens,
        "all_to_all_single": heads,
        "reduce_scatter_tensor": tokens,
    }
    expected = {name: count for name, count in expected.items() if count}
    assert forward == expected and backward == expected
