"""Token permutation against its plain twin, in float64."""

import pytest
import torch

from tests.ops.passes import Operations
from torchsft import ops
from torchsft.ops.permute import (
    Rows,
    combine,
    combine_reference,
    copy_rows,
    permute,
    permute_reference,
    sum_rows,
)

T, D, K, E = 13, 6, 3, 5


def routing(seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts_TK = torch.rand(T, E, generator=generator).topk(K, dim=-1).indices
    order_R = experts_TK.flatten().argsort(stable=True)
    row_TK = order_R.argsort().view(T, K)
    return experts_TK, order_R, row_TK


def test_rows_come_out_sorted_by_expert():
    experts_TK, order_R, row_TK = routing()
    x_TD = torch.arange(T, dtype=torch.float64)[:, None].expand(T, D)
    rows = permute(x_TD, order_R, row_TK)
    expected = sorted((experts_TK[t, k].item(), t * K + k) for t in range(T) for k in range(K))
    assert rows[:, 0].tolist() == [index // K for _, index in expected]


def test_permute_equals_its_reference():
    _, order_R, row_TK = routing()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permute(x, order_R, row_TK), permute_reference(x, order_R, row_TK))
    assert torch.autograd.gradcheck(lambda x: permute(x, order_R, row_TK), (x,))


def test_combine_equals_its_reference():
    _, order_R, row_TK = routing(1)
    y = torch.randn(T * K, D, dtype=torch.float64, requires_grad=True)
    got, expected = combine(y, order_R, row_TK), combine_reference(y, order_R, row_TK)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda y: combine(y, order_R, row_TK), (y,))


def test_tokens_with_any_number_of_rows_equal_the_plain_twins(monkeypatch):
    """Sums by hand too, and no rows and no tokens at all."""
    rows = Rows(*map(torch.tensor, ([1, 0, 1, 2, 1], [1, 0, 2, 4, 3], [0, 1, 4])))
    nothing = Rows(*(torch.empty(0, dtype=torch.int64) for _ in range(3)))
    found = []
    for plain in (False, True):
        monkeypatch.setattr(ops, "_plain", plain)
        for some, tokens in ((rows, 3), (nothing, 0)):
            x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
            y = torch.randn(len(some.token_R), D, dtype=torch.float64, requires_grad=True)
            assert torch.equal(copy_rows(x, some), x[some.token_R])
            assert torch.autograd.gradcheck(lambda x, some=some: copy_rows(x, some), (x,))
            assert torch.autograd.gradcheck(lambda y, some=some: sum_rows(y, some), (y,))
        ones = torch.arange(5, dtype=torch.float64)[:, None].expand(5, D).contiguous()
        found.append(sum_rows(ones, rows)[:, 0].tolist())
    assert found == [[1.0, 0.0 + 2.0 + 4.0, 3.0]] * 2


@pytest.mark.parametrize("rows", [0, 7])
def test_one_choice_per_token_is_a_permutation_also_of_nothing(rows):
    """Expert parallelism reorders received rows with K = 1, and a rank may receive none."""
    order = torch.randperm(rows)
    x, upstream = torch.randn(2, rows, D)
    x.requires_grad_()
    inverse = order.argsort().unsqueeze(1)
    with Operations() as operations:
        y, back = permute(x, order, inverse), combine(x[order], order, inverse)
        (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(y, x[order]) and torch.equal(back, x)
    assert torch.equal(gradient, upstream[inverse.flatten()])
    assert operations.count["aten::_embedding_bag"] == 0  # there is nothing to sum


def test_bf16_sums_are_accumulated_in_fp32():
    """256 + 1 + 1 = 258 is a bf16 number, but 256 + 1 rounds back to 256 in bf16."""
    order_R = torch.arange(3)
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    got = combine(y, order_R, order_R.view(1, 3))
    rows = Rows(torch.zeros(3, dtype=torch.int64), order_R, torch.tensor([0]))
    assert torch.equal(sum_rows(y, rows), got)
    assert got.item() == 258 and got.dtype == torch.bfloat16
