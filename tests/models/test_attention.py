"""Attention implementations and how documents are described to them."""

import inspect
import itertools

import pytest
import torch

from torchsft.config import InputError
from torchsft.models.attention import attend, choose_implementation, locate_documents

H, QK, V = 3, 12, 8


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
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    return torch.where((document >= 0)[:, None, None], out, 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
@pytest.mark.parametrize(
    ("lengths", "padding"), [([5, 1, 30], 0), ([36], 0), ([7, 20], 9), ([], 6)]
)
def test_documents_attend_causally_to_themselves(implementation, lengths, padding):
    torch.manual_seed(0)
    total = sum(lengths) + padding
    q, k, v = torch.randn(total, H, QK), torch.randn(total, H, QK), torch.randn(total, H, V)
    with torch.no_grad():
        got = attend(q, k, v, 0.3, pack(implementation, lengths, padding))
    assert got.shape == (total, H, V)
    torch.testing.assert_close(
        got, dense_attention(q, k, v, 0.3, lengths, padding), rtol=1e-4, atol=1e-5
    )
    assert (got[sum(lengths) :] == 0).all()


def test_gradients_of_documents_equal_dense_attention():
    torch.manual_seed(0)
    inputs = [
        torch.randn(24, H, dim, dtype=torch.float64, requires_grad=True) for dim in (QK, QK, V)
    ]
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


@pytest.mark.parametrize(("lengths", "padding"), [([5, 1, 30], 0), ([7, 20], 9), ([], 6)])
def test_varlen_calls_its_kernel_as_torch_defines_it(monkeypatch, lengths, padding):
    """The kernel is CUDA's; here an emulation that takes exactly its arguments and leaves rows of
    no document as nan.
    """
    module = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(module.varlen_attn)

    def emulation(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        assert a["window_size"] == (-1, 0) and a["cu_seq_q"].dtype == torch.int32
        q, k, v = a["query"], a["key"], a["value"]
        assert q.shape == k.shape == v.shape  # flash attention wants one head width
        bounds = a["cu_seq_q"].tolist()
        assert (
            max(e - s for s, e in itertools.pairwise(bounds)) <= a["max_q"]
            and a["max_q"] == a["max_k"]
        )
        out = torch.full_like(v, float("nan"))
        for start, end in itertools.pairwise(bounds):
            rows = slice(start, end)
            out[rows] = dense_attention(q[rows], k[rows], v[rows], a["scale"], [end - start], 0)
        return out

    monkeypatch.setattr(module, "varlen_attn", emulation)
    torch.manual_seed(0)
    total = sum(lengths) + padding
    q, k, v = torch.randn(total, H, QK), torch.randn(total, H, QK), torch.randn(total, H, V)
    got = attend(q, k, v, 0.3, pack("varlen", lengths, padding, max(lengths, default=0)))
    torch.testing.assert_close(got, dense_attention(q, k, v, 0.3, lengths, padding))
