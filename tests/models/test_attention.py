"""Attention implementations and how documents are described to them."""

import inspect
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchsft.config import InputError
from torchsft.models.attention import attend, choose_implementation, locate_documents

H, QK, V = 4, 12, 8


def pack(implementation, lengths, padding, max_seqlen=None):
    total = sum(lengths) + padding
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    factors = torch.ones(total, 2)
    return locate_documents(implementation, factors, factors, cu_seqlens, max_seqlen)


def dense_attention(q, k, v, scale, lengths, padding):
    """Full scores, masked: softmax over earlier tokens of one's own document."""
    document = torch.cat(
        [torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)]
    )
    index = torch.arange(len(document))
    visible = (document[:, None] == document) & (index[:, None] >= index)
    copies = q.shape[1] // k.shape[1]  # neighbouring query heads share a key/value head
    k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    return torch.where((document >= 0)[:, None, None], out, 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
@pytest.mark.parametrize(
    ("lengths", "padding"), [([5, 1, 30], 0), ([36], 0), ([7, 20], 9), ([], 6)]
)
@pytest.mark.parametrize("kv_heads", [H, 2, 1])
def test_documents_attend_causally_to_themselves(implementation, lengths, padding, kv_heads):
    torch.manual_seed(0)
    total = sum(lengths) + padding
    q = torch.randn(total, H, QK)
    k, v = (torch.randn(total, kv_heads, width) for width in (QK, V))
    with torch.no_grad():
        got = attend(q, k, v, 0.3, pack(implementation, lengths, padding))
    assert got.shape == (total, H, V)
    torch.testing.assert_close(
        got, dense_attention(q, k, v, 0.3, lengths, padding), rtol=1e-4, atol=1e-5
    )
    assert (got[sum(lengths) :] == 0).all()


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
def test_gradients_of_documents_equal_dense_attention(kv_heads):
    torch.manual_seed(0)
    shapes = (H, QK), (kv_heads, QK), (kv_heads, V)
    inputs = [torch.randn(24, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    lengths, padding, upstream = [5, 1, 12], 6, torch.randn(24, H, V, dtype=torch.float64)
    got = torch.autograd.grad(
        attend(*inputs, 0.3, pack("sdpa", lengths, padding)), inputs, upstream
    )
    expected = torch.autograd.grad(
        dense_attention(*inputs, 0.3, lengths, padding), inputs, upstream
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("lengths", "padding"),
    [([5, 1, 30], 0), ([7, 20], 9), ([3], 50), ([], 6), ([4, 4], 4), ([20, 2], 1)],
)
@pytest.mark.parametrize("known", [True, False])
def test_varlen_bounds_cover_every_token_with_documents_no_longer_than_the_longest(
    lengths, padding, known
):
    """Rows outside every document would be left uninitialised by the kernel."""
    described = pack("varlen", lengths, padding, max(lengths, default=0) if known else None)
    bounds = described.cu_seqlens
    assert bounds.dtype == torch.int32
    assert bounds[: len(lengths) + 1].tolist() == torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert bounds[-1] == sum(lengths) + padding
    assert (bounds.diff() >= 0).all() and bounds.diff().max() <= described.max_seqlen
    assert described.max_seqlen == (max(lengths) if lengths else padding)


def test_auto_is_varlen_on_cuda_and_sdpa_elsewhere():
    assert choose_implementation("auto", torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert choose_implementation("auto", torch.device("cuda"), torch.bfloat16) == "varlen"
    # flash attention has no fp32
    assert choose_implementation("auto", torch.device("cuda"), torch.float32) == "sdpa"
    with pytest.raises(
        InputError,
        match=r"--model.attention varlen needs bf16 on a CUDA device, "
        r"not bfloat16 on cpu",
    ):
        choose_implementation("varlen", torch.device("cpu"), torch.bfloat16)
    with pytest.raises(InputError, match="not float32 on cuda"):
        choose_implementation("varlen", torch.device("cuda"), torch.float32)
    with pytest.raises(InputError, match=r"--model.attention flex has no backward pass on CPU"):
        choose_implementation("flex", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize(("lengths", "padding"), [([5, 1, 30], 0), ([7, 20], 9), ([], 6)])
def test_varlen_calls_its_kernel_as_torch_defines_it(monkeypatch, lengths, padding, kv_heads):
    """The kernel is CUDA's; here an emulation that takes exactly its arguments and leaves rows of
    no document as nan.
    """
    module = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(module.varlen_attn)
    shares_heads = "enable_gqa" in signature.parameters  # not in torch 2.11

    def emulation(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        assert a["window_size"] == (-1, 0) and a["cu_seq_q"].dtype == torch.int32
        q, k, v = a["query"], a["key"], a["value"]
        # flash attention wants one head width; keys and values are not copied where it can do
        # without
        assert q.shape[::2] == k.shape[::2] and k.shape == v.shape
        assert k.shape[1] == (kv_heads if shares_heads else H)
        assert a.get("enable_gqa", False) == (shares_heads and kv_heads < H)
        bounds = a["cu_seq_q"].tolist()
        assert (
            max(e - s for s, e in itertools.pairwise(bounds)) <= a["max_q"]
            and a["max_q"] == a["max_k"]
        )
        out = torch.full_like(q, float("nan"))
        for start, end in itertools.pairwise(bounds):
            rows = slice(start, end)
            out[rows] = dense_attention(q[rows], k[rows], v[rows], a["scale"], [end - start], 0)
        return out

    emulation.__signature__ = signature
    monkeypatch.setattr(module, "varlen_attn", emulation)
    torch.manual_seed(0)
    total = sum(lengths) + padding
    q = torch.randn(total, H, QK)
    k, v = (torch.randn(total, kv_heads, width) for width in (QK, V))
    got = attend(q, k, v, 0.3, pack("varlen", lengths, padding, max(lengths, default=0)))
    torch.testing.assert_close(got, dense_attention(q, k, v, 0.3, lengths, padding))


def test_shared_key_value_heads_are_not_copied():
    """The kernel of CPUs reads 2 key/value heads for 8 query heads."""
    q, k, v = (torch.randn(32, heads, 16) for heads in (8, 2, 2))
    with torch.no_grad(), Operations() as seen:
        attend(q, k, v, 0.3, pack("sdpa", [32], 0))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen.names
    assert not {"aten::repeat_interleave", "aten::repeat"} & seen.names, seen.names


class Operations(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))
