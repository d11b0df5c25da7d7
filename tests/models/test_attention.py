"""Attention implementations and how documents are described to them."""

import inspect
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchsft.config import InputError
from torchsft.models import attention
from torchsft.models.attention import attend, choose_implementation, locate_documents
from torchsft.ops import sinks as sinks_module

H, QK, V = 4, 12, 8


def pack(implementation, lengths, padding, max_seqlen=None, window=None):
    total = sum(lengths) + padding
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    factors = torch.ones(total, 2)
    known = None if max_seqlen is None else padding
    return locate_documents(
        implementation, factors, factors, cu_seqlens, max_seqlen, None, (window,), known
    )


def dense_attention(q, k, v, scale, lengths, padding, window=None, sinks=None, lse=False):
    """Full scores, masked: softmax over earlier tokens of one's own document, and over the sink."""
    document = torch.cat(
        [torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)]
    )
    index = torch.arange(len(document))
    visible = (document[:, None] == document) & (index[:, None] >= index)
    if window is not None:
        visible &= index[:, None] < index + window
    copies = q.shape[1] // k.shape[1]  # neighbouring query heads share a key/value head
    k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(k)]
    out = torch.einsum("hqk,khd->qhd", weights, v)
    out = torch.where((document >= 0)[:, None, None], out, 0)
    return (out, scores.logsumexp(-1)) if lse else out


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


# Windows shorter and longer than documents, dividing the tokens and not; with sinks and without.
SPECIAL = [(1, False), (4, True), (5, True), (7, False), (30, True), (50, True), (None, True)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
@pytest.mark.parametrize(("window", "has_sinks"), SPECIAL)
def test_windows_and_sinks_are_those_of_dense_attention(implementation, window, has_sinks):
    torch.manual_seed(0)
    for lengths, padding, kv_heads in (([5, 1, 30], 0, H), ([7, 20], 9, 2), ([], 6, 1)):
        q = torch.randn(sum(lengths) + padding, H, QK)
        k, v = (torch.randn(len(q), kv_heads, width) for width in (QK, V))
        sinks = torch.randn(H) if has_sinks else None
        where = pack(implementation, lengths, padding, window=window)
        with torch.no_grad():
            got = attend(q, k, v, 0.3, where, window, sinks)
        expected = dense_attention(q, k, v, 0.3, lengths, padding, window, sinks)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert (got[sum(lengths) :] == 0).all()


@pytest.mark.parametrize(("window", "has_sinks"), SPECIAL)
def test_gradients_through_windows_and_sinks_equal_dense_attention(window, has_sinks):
    torch.manual_seed(0)
    for lengths, padding in (([5, 1, 12], 6), ([], 4)):
        shapes = [(sum(lengths) + padding, *shape) for shape in ((H, QK), (2, QK), (2, V))]
        shapes += [(H,)] * has_sinks
        inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        q, k, v, sinks = inputs if has_sinks else [*inputs, None]
        where = pack("sdpa", lengths, padding, window=window)
        got = attend(q, k, v, 0.3, where, window, sinks)
        expected = dense_attention(q, k, v, 0.3, lengths, padding, window, sinks)
        upstream = torch.randn_like(got)
        gradients = [torch.autograd.grad(out, inputs, upstream) for out in (got, expected)]
        torch.testing.assert_close(*gradients)


def test_a_window_needs_memory_for_its_own_length_not_the_documents():
    """The largest tensor of a document of 4096 tokens seen through 64: its queries, 4096 x 4 x 12,
    padded, and keys of two blocks; scores would be 4096 x 4096 x 4.
    """
    q, k, v = (torch.randn(4096, heads, 12) for heads in (H, 2, 2))
    with torch.no_grad(), Operations() as seen:
        attend(q, k, v, 0.3, pack("sdpa", [4096], 0, window=64), 64, torch.randn(H))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen.names
    assert seen.largest <= 4096 * 130  # the mask: 64 blocks of 64 x 129


@pytest.mark.parametrize(
    ("lengths", "padding"),
    [([5, 1, 30], 0), ([7, 20], 9), ([3], 50), ([], 6), ([4, 4], 4), ([20, 2], 1)],
)
@pytest.mark.parametrize("known", [True, False])
def test_varlen_bounds_cover_every_token_with_documents_no_longer_than_the_longest(
    lengths, padding, known
):
    """Rows outside every document would be left uninitialised by the kernel; where the padding is
    known there is no empty document, for which its backward pass would allocate memory.
    """
    described = pack("varlen", lengths, padding, max(lengths, default=0) if known else None)
    bounds = described.cu_seqlens
    assert bounds.dtype == torch.int32
    assert bounds[: len(lengths) + 1].tolist() == torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert bounds[-1] == sum(lengths) + padding
    assert bounds.diff().min() >= known and bounds.diff().max() <= described.max_seqlen
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
@pytest.mark.parametrize(("window", "has_sinks"), [(None, False), (4, False), (4, True)])
def test_varlen_calls_its_kernel_as_torch_defines_it(
    monkeypatch, lengths, padding, kv_heads, window, has_sinks
):
    """The kernel is CUDA's; here an emulation that takes exactly its arguments and leaves rows of
    no document as nan. Its backward pass is emulated with the formulas of flash attention.
    """
    module = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(module.varlen_attn)
    shares_heads = "enable_gqa" in signature.parameters  # not in torch 2.11

    def emulation(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        a = given.arguments
        assert a["window_size"] == (-1 if window is None else window - 1, 0)
        assert a["cu_seq_q"].dtype == torch.int32
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
        out, lse = torch.full_like(q, float("nan")), torch.zeros(H, len(q))
        for start, end in itertools.pairwise(bounds):
            rows = slice(start, end)
            out[rows], lse[:, rows] = dense_attention(
                q[rows], k[rows], v[rows], a["scale"], [end - start], 0, window, lse=True
            )
        return (out, lse) if a["return_aux"] else out

    emulation.__signature__ = signature
    monkeypatch.setattr(module, "varlen_attn", emulation)
    monkeypatch.setattr(sinks_module, "flash_backward", flash_backward)
    torch.manual_seed(0)
    total = sum(lengths) + padding
    shapes = [(total, H, QK), (total, kv_heads, QK), (total, kv_heads, V), *[(H,)] * has_sinks]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    q, k, v, sinks = inputs if has_sinks else [*inputs, None]
    where = pack("varlen", lengths, padding, max(lengths, default=0), window)
    got = attend(q, k, v, 0.3, where, window, sinks)
    expected = dense_attention(q, k, v, 0.3, lengths, padding, window, sinks)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kernel", "width"), [("FA2", 136), ("FA3", 104)])
def test_fa3_takes_the_values_of_latent_attention_as_they_are(monkeypatch, kernel, width):
    """Widths that FA3 has kernels for, of keys 129 to 192 and of values 97 to 128; other values are
    padded for it too.
    """
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(attention, "flash_kernel", lambda _: kernel)
    widths = []
    monkeypatch.setattr(module, "varlen_attn", lambda q, k, v, *_, **__: widths.append(v) or v)
    for v_dim in (104, 80):
        q, k, v = (torch.randn(4, H, entries) for entries in (136, 136, v_dim))
        attend(q, k, v, 0.3, pack("varlen", [4], 0, 4))
    assert [v.shape[-1] for v in widths] == [width, 136]


@pytest.mark.parametrize(
    ("capability", "installed", "kernel"),
    [((9, 0), True, "FA3"), ((9, 0), False, "FA2"), ((8, 0), True, "FA2"), ((10, 0), True, "FA2")],
)
def test_fa3_is_activated_on_hopper_where_it_is_installed(
    monkeypatch, capability, installed, kernel
):
    active = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: installed or None)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: next(iter(active), None))
    assert attention.flash_kernel.__wrapped__(torch.device("cuda")) == kernel
    assert active == ["FA3"] * (kernel == "FA3")
    assert "FA3" in attention.list_flash_attention_impls()  # torch has it under this name


def flash_backward(grad, q, k, v, out, lse, bounds, longest, options):
    """What flash attention's backward kernel computes from output and lse, as they are given."""
    document = torch.searchsorted(bounds[1:].contiguous(), torch.arange(len(q)), right=True)
    index, (left, _) = torch.arange(len(q)), options["window_size"]
    visible = (document[:, None] == document) & (index[:, None] >= index)
    if left >= 0:
        visible &= index[:, None] <= index + left
    copies = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * options["scale"]
    weights = torch.where(visible, (scores - lse.unsqueeze(-1)).exp(), 0)
    of_weights = torch.einsum("qhd,khd->hqk", grad, values)
    of_scores = weights * (of_weights - (grad * out).sum(-1).T.unsqueeze(-1)) * options["scale"]
    of_keys = torch.einsum("hqk,qhd->khd", of_scores, q)
    of_values = torch.einsum("hqk,qhd->khd", weights, grad)
    shared = [x.unflatten(1, (-1, copies)).sum(2) for x in (of_keys, of_values)]
    return torch.einsum("hqk,khd->qhd", of_scores, keys), *shared


def test_the_private_operator_of_sinks_is_as_torch_defines_it():
    """`ops/sinks.py` calls it with these arguments; what varlen_attn itself calls."""
    schema = torch.ops.aten._flash_attention_backward.default._schema
    names = ["grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k"]
    names += ["max_q", "max_k", "dropout_p", "is_causal", "rng_state", "unused"]
    assert [a.name for a in schema.arguments if not a.kwarg_only] == names
    assert [a.name for a in schema.arguments if a.kwarg_only] == [
        *("scale", "window_size_left", "window_size_right")
    ]
    source = inspect.getsource(pytest.importorskip("torch.nn.attention.varlen"))
    assert "torch.ops.aten._flash_attention_backward(" in source


def test_shared_key_value_heads_are_not_copied():
    """The kernel of CPUs reads 2 key/value heads for 8 query heads."""
    q, k, v = (torch.randn(32, heads, 16) for heads in (8, 2, 2))
    with torch.no_grad(), Operations() as seen:
        attend(q, k, v, 0.3, pack("sdpa", [32], 0))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen.names
    assert not {"aten::repeat_interleave", "aten::repeat"} & seen.names, seen.names


class Operations(TorchDispatchMode):
    """Names of the operations that are called, and elements of the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result
