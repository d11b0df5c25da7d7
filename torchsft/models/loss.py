"""The vocabulary loss: the last matrix product and the cross entropy together, a chunk of tokens at
a time.

Full logits ([T, V]: 15.8 GiB in fp32 for one row of 32k tokens at V = 129,280) never exist: the
gradients with respect to the hidden states and the weight are computed in the forward pass, chunk
by chunk, and only scaled in the backward.

Shape suffixes: T tokens (the caller's C), D width, V vocabulary (this rank's part of it), C tokens
of a chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.models.decoder import VocabularyPart
from torchsft.ops import gradients_asked_for, plain

IGNORE = -100  # label of a position that predicts nothing


def vocabulary_loss(
    hidden_TD: Tensor,  # output of the last norm, model dtype
    # output (or tied) embedding, model dtype; logits are computed in it, everything after in fp32
    weight_VD: Tensor,
    labels_T: Tensor,  # int64 target ids, IGNORE where there is none
    loss_weights_T: Tensor | None,  # fp32; None means 1 everywhere
    chunk: int,  # tokens whose logits exist at the same time
    # which part of it the rows of `weight_VD` are; None: all of it
    vocabulary: VocabularyPart | None = None,
) -> Tensor:
    """Sum over tokens of loss weight times negative log-likelihood, fp32 scalar; tokens of weight 0
    contribute exactly nothing.

    With a part of the vocabulary every rank returns the loss over all of it, and its part of the
    sum that is the gradient of `hidden_TD`. The graph can be traversed once for each of the two
    gradients: the backward pass scales what was kept.
    """
    if plain() and vocabulary is None:
        return vocabulary_loss_reference(hidden_TD, weight_VD, labels_T, loss_weights_T)
    weights_T = _effective_weights(labels_T, loss_weights_T)
    differentiable = hidden_TD.requires_grad or weight_VD.requires_grad
    gradients = torch.is_grad_enabled() and differentiable
    return _VocabularyLoss.apply(
        hidden_TD, weight_VD, labels_T, weights_T, chunk, gradients, vocabulary
    )


def vocabulary_loss_reference(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, loss_weights_T: Tensor | None
) -> Tensor:
    """`vocabulary_loss` in plain PyTorch, with full logits."""
    weights_T = _effective_weights(labels_T, loss_weights_T)
    logits_TV = F.linear(hidden_TD, weight_VD)
    if logits_TV.dtype.itemsize < 4:
        logits_TV = logits_TV.float()
    nll_T = F.cross_entropy(logits_TV, labels_T, reduction="none", ignore_index=IGNORE)
    return (nll_T * weights_T).sum()


@torch.no_grad()
def best_tokens(
    hidden_TD: Tensor, weight_VD: Tensor, chunk: int, vocabulary: VocabularyPart | None = None
) -> Tensor:
    """Return the token with the largest logit at each position, int64 [T]; the arguments are those
    of `vocabulary_loss`.
    """
    best = []
    for hidden_CD in hidden_TD.split(chunk):
        logit_C, token_C = F.linear(hidden_CD, weight_VD).max(-1)
        if vocabulary is not None:
            beaten_C = logit_C < vocabulary.max(logit_C)
            first_C = (token_C + vocabulary.first).masked_fill(
                beaten_C, torch.iinfo(torch.int64).max
            )
            token_C = -vocabulary.max(-first_C)
        best.append(token_C)
    return torch.cat(best)


def _effective_weights(labels_T: Tensor, loss_weights_T: Tensor | None) -> Tensor:
    supervised_T = labels_T != IGNORE
    return supervised_T.float() if loss_weights_T is None else loss_weights_T * supervised_T


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        chunk: int,
        gradients: bool,
        vocabulary: VocabularyPart | None,
    ) -> Tensor:
        # fp32 also for a bf16 weight: chunks add up in it.
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_hidden = grad_weight = None
        if gradients and hidden_TD.requires_grad:
            grad_hidden = torch.zeros_like(hidden_TD)
        if gradients and weight_VD.requires_grad:
            grad_weight = torch.zeros_like(weight_VD, dtype=wide)
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD, weights_C = hidden_TD[rows], weights_T[rows]
            if weights_C.device.type == "cpu" and not weights_C.any():
                continue  # free to know on CPU; on CUDA it would stop the host
            logits_CV = F.linear(hidden_CD, weight_VD)
            found = _log_softmax(logits_CV, labels_T[rows].clamp(min=0), wide, vocabulary)
            weighs_C = weights_C != 0  # selected, not only multiplied: 0 times inf is nan
            weighted_C = found.target_C1.squeeze(-1) * weights_C
            total -= torch.where(weighs_C, weighted_C, 0).sum()
            if not gradients:
                continue
            grad_CV = _gradient_of_logits(found, weights_C, weighs_C).to(weight_VD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[rows])
            if grad_weight is None:
                continue
            if grad_weight.dtype == grad_CV.dtype:
                grad_weight.addmm_(grad_CV.T, hidden_CD)
            else:
                grad_weight += grad_CV.T @ hidden_CD
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        ctx.gradients = [grad_hidden, grad_weight]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None, None]
        for i, want in enumerate(gradients_asked_for(ctx)[:2]):
            if not want:
                continue
            kept = ctx.gradients[i]
            ctx.gradients[i] = None
            if kept is None:
                raise RuntimeError(
                    "the vocabulary loss was traversed backward twice; it keeps "
                    "its gradients for once only"
                )
            gradients[i] = kept.mul_(grad)
        return *gradients, None, None, None, None, None


class _LogProbabilities(NamedTuple):
    """Of the tokens of a chunk."""

    log_probs_CV: Tensor
    column_C1: Tensor  # of the target in log_probs_CV; 0 where it is not among them
    here_C1: Tensor  # whether it is among them
    target_C1: Tensor  # the target's log-probability, wherever it is


def _log_softmax(
    logits_CV: Tensor, targets_C: Tensor, wide: torch.dtype, part: VocabularyPart | None
) -> _LogProbabilities:
    """Log-probabilities, in the dtype `wide`; with a part of the vocabulary, of its tokens."""
    targets_C1 = targets_C.unsqueeze(-1)
    if part is not None:
        return _partial_log_softmax(logits_CV.to(wide), targets_C1, part)
    log_probs_CV = torch.log_softmax(logits_CV, dim=-1, dtype=wide)
    target_C1 = log_probs_CV.gather(1, targets_C1)
    return _LogProbabilities(log_probs_CV, targets_C1, torch.ones_like(targets_C1), target_C1)


def _partial_log_softmax(
    logits_CV: Tensor, targets_C1: Tensor, part: VocabularyPart
) -> _LogProbabilities:
    """Log-probabilities of this part's tokens. Two collectives."""
    column_C1 = targets_C1 - part.first
    here_C1 = (column_C1 >= 0) & (column_C1 < logits_CV.shape[1])
    column_C1 = torch.where(here_C1, column_C1, 0)
    logits_CV = logits_CV - part.max(logits_CV.amax(-1, keepdim=True))
    target_C1 = torch.where(here_C1, logits_CV.gather(1, column_C1), 0)
    exp_sum_C1 = logits_CV.exp().sum(-1, keepdim=True)
    sums_C2 = part.sum(torch.cat([exp_sum_C1, target_C1], dim=-1))
    log_sum_C1, target_C1 = sums_C2[:, :1].log(), sums_C2[:, 1:]
    log_probs_CV = logits_CV.sub_(log_sum_C1)
    return _LogProbabilities(log_probs_CV, column_C1, here_C1, target_C1 - log_sum_C1)


def _gradient_of_logits(found: _LogProbabilities, weights_C: Tensor, weighs_C: Tensor) -> Tensor:
    """Return the gradient of the loss, softmax - one_hot for each token, weighted; in the place of
    the log-probabilities.
    """
    grad_CV = found.log_probs_CV.exp_()
    grad_CV.scatter_add_(1, found.column_C1, -found.here_C1.to(grad_CV.dtype))
    return grad_CV.mul_(weights_C.unsqueeze(-1)).masked_fill_(~weighs_C.unsqueeze(-1), 0)
