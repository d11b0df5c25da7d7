"""Attention with sinks, from the output of attention without them.

A sink is a score that takes part in a head's softmax and brings no value, so that the weights of a
token's keys sum to less than 1. With `lse` the logarithm of the sum of the exponentiated scores,
all weights, and so the output, are multiplied by exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse -
sink).

    with_sinks           plain PyTorch, for attention whose lse has a gradient
    varlen_with_sinks    `torch.nn.attention.varlen`, whose lse has none

Shape suffixes: T tokens, H query heads, G key/value heads, d entries of a head.
"""

from typing import Any

import torch
from torch import Tensor

from torchsft.ops import gradients_asked_for


def with_sinks(out_THd: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> Tensor:
    """Return the attention's output with sinks; lse in fp32 or more, which the factor has too."""
    factor_TH = (lse_TH - sinks_H.to(lse_TH.dtype)).sigmoid()
    return (out_THd * factor_TH.unsqueeze(-1)).to(out_THd.dtype)


def varlen_with_sinks(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,  # as wide as queries
    sinks_H: Tensor,
    bounds: Tensor,  # int32 [N + 1], of the documents, which cover all tokens
    longest: int,  # at least the length of the longest document
    options: dict[str, Any],  # keyword arguments of `varlen_attn`: scale, window_size, enable_gqa
) -> Tensor:
    """Return `varlen_attn` of documents, with sinks: [T, H, d]."""
    return _VarlenWithSinks.apply(q_THd, k_TGd, v_TGd, sinks_H, bounds, longest, options)


def flash_backward(
    grad_THd: Tensor,
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    out_THd: Tensor,
    lse_HT: Tensor,
    bounds: Tensor,
    longest: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Call flash attention's backward pass, as `varlen_attn` does: gradients of q, k and v.

    The operator is torch-private (2.11 to 2.13 have it alike).
    """
    left, right = options["window_size"]
    return torch.ops.aten._flash_attention_backward(
        grad_THd,
        q_THd,
        k_TGd,
        v_TGd,
        out_THd,
        lse_HT,
        bounds,
        bounds,
        longest,
        longest,
        0.0,  # dropout
        (left, right) == (-1, 0),  # is_causal
        torch.zeros(2, dtype=torch.uint64, device=q_THd.device),  # state of dropout's generator
        torch.empty(0, device=q_THd.device),
        scale=options["scale"],
        window_size_left=left,
        window_size_right=right,
    )


class _VarlenWithSinks(torch.autograd.Function):
    """Flash attention's backward pass takes output and lse as they are: it computes weights as
    exp(score - lse), and gradients of scores as weight * (gradient of weight - sum(gradient *
    output)). Given both with sinks, it computes the gradients of attention with sinks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        sinks_H: Tensor,
        bounds: Tensor,
        longest: int,
        options: dict[str, Any],
    ) -> Tensor:
        from torch.nn.attention import varlen  # registers CUDA operators on import

        out_THd, lse_HT = varlen.varlen_attn(
            q_THd,
            k_TGd,
            v_TGd,
            bounds,
            bounds,
            longest,
            longest,
            return_aux=varlen.AuxRequest(lse=True),
            **options,
        )
        out_THd = with_sinks(out_THd, lse_HT.T, sinks_H)
        lse_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype).unsqueeze(1))
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, sinks_H, out_THd, lse_HT, bounds)
        ctx.longest, ctx.options = longest, options
        return out_THd

    @staticmethod
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd, sinks_H, out_THd, lse_HT, bounds = ctx.saved_tensors
        *inputs, want_sinks = gradients_asked_for(ctx)[:4]
        grads: tuple[Tensor | None, ...] = (None, None, None)
        grad_sinks_H = None
        if any(inputs):
            grads = flash_backward(
                grad_THd.contiguous(),
                q_THd,
                k_TGd,
                v_TGd,
                out_THd,
                lse_HT,
                bounds,
                ctx.longest,
                ctx.options,
            )
        if want_sinks:
            weight_HT = (sinks_H.to(lse_HT.dtype).unsqueeze(1) - lse_HT).exp()
            product_TH = (grad_THd.to(lse_HT.dtype) * out_THd).sum(-1)
            grad_sinks_H = -(weight_HT * product_TH.T).sum(1).to(sinks_H.dtype)
        return *grads, grad_sinks_H, None, None, None
