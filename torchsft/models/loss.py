"""The vocabulary loss: the last matrix product and the cross entropy together, a chunk of tokens at
a time where all at once would need more memory.

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
LOGITS_AT_ONCE = 2**26  # of a chunk; each takes up to 6 bytes
# Of these, on a CPU, those that go through the softmax and its gradient at a time, in its cache.
LOGITS_IN_CACHE = 2**19


class Objective(NamedTuple):
    """What is minimised, where that is not the negative log-likelihood alone."""

    # share of the target that is spread evenly over the vocabulary, as F.cross_entropy's
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # factor of logsumexp(logits)^2 (PaLM, arXiv:2204.02311, section 5)


PLAIN = Objective()


def vocabulary_loss(
    hidden_TD: Tensor,  # output of the last norm, model dtype
    # output (or tied) embedding, model dtype; logits are computed in it, everything after in fp32
    weight_VD: Tensor,
    labels_T: Tensor,  # int64 target ids, IGNORE where there is none
    loss_weights_T: Tensor | None,  # fp32; None means 1 everywhere
    # tokens whose logits exist at the same time; None: `chunk_size`
    chunk: int | None = None,
    # which part of it the rows of `weight_VD` are; None: all of it
    vocabulary: VocabularyPart | None = None,
    objective: Objective = PLAIN,
    # fp32 [2], to which the sums over tokens of loss weight times smoothed loss, and times
    # logsumexp^2, are added
    sums: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of loss weight times negative log-likelihood, fp32 scalar; tokens of weight 0
    contribute exactly nothing. Its gradient is that of the objective's sum.

    With a part of the vocabulary every rank returns the loss over all of it, and its part of the
    sum that is the gradient of `hidden_TD`. The graph can be traversed once for each of the two
    gradients: the backward pass scales what was kept.
    """
    if plain() and vocabulary is None:
        arguments = hidden_TD, weight_VD, labels_T, loss_weights_T
        return vocabulary_loss_reference(*arguments, objective, sums)
    weights_T = _effective_weights(labels_T, loss_weights_T)
    differentiable = hidden_TD.requires_grad or weight_VD.requires_grad
    gradients = torch.is_grad_enabled() and differentiable
    trained = gradients and weight_VD.requires_grad
    chunk = chunk or chunk_size(len(hidden_TD), weight_VD, trained)
    return _VocabularyLoss.apply(
        hidden_TD, weight_VD, labels_T, weights_T, chunk, gradients, vocabulary, objective, sums
    )


def chunk_size(tokens: int, weight_VD: Tensor, trained: bool = False) -> int:
    """Return how many tokens' logits may exist at the same time: those of `LOGITS_AT_ONCE`, or all
    where that takes no more memory, since several chunks add up the gradient of a trained weight
    in fp32.
    """
    vocabulary, width = weight_VD.shape
    several = max(1, LOGITS_AT_ONCE // vocabulary)
    instead_of_sum = 4 * width // 6 if trained and weight_VD.dtype.itemsize < 4 else 0
    return tokens if tokens <= several + instead_of_sum else several


def vocabulary_loss_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    loss_weights_T: Tensor | None,
    objective: Objective = PLAIN,
    sums: Tensor | None = None,
) -> Tensor:
    """`vocabulary_loss` in plain PyTorch, with full logits."""
    weights_T = _effective_weights(labels_T, loss_weights_T)
    logits_TV = F.linear(hidden_TD, weight_VD)
    if logits_TV.dtype.itemsize < 4:
        logits_TV = logits_TV.float()

    def total(label_smoothing: float) -> Tensor:
        nll_T = F.cross_entropy(
            logits_TV,
            labels_T,
            reduction="none",
            ignore_index=IGNORE,
            label_smoothing=label_smoothing,
        )
        return (nll_T * weights_T).sum()

    nll = total(0.0)
    if objective == PLAIN:
        return nll
    smoothed = total(objective.label_smoothing)
    squares = (logits_TV.logsumexp(-1).square() * weights_T).sum()
    if sums is not None:
        sums += torch.stack([smoothed, squares]).detach()
    minimised = smoothed + objective.z_loss * squares
    return nll.detach() + minimised - minimised.detach()


@torch.no_grad()
def best_tokens(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    chunk: int | None = None,
    vocabulary: VocabularyPart | None = None,
) -> Tensor:
    """Return the token with the largest logit at each position, int64 [T]; the arguments are those
    of `vocabulary_loss`.
    """
    best = []
    for hidden_CD in hidden_TD.split(chunk or chunk_size(len(hidden_TD), weight_VD)):
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
        objective: Objective,
        sums: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        several = len(hidden_TD) > chunk
        smoothing = objective.label_smoothing
        grad_hidden = grad_weight = None
        if gradients and hidden_TD.requires_grad:
            grad_hidden = torch.zeros_like(hidden_TD)
        if gradients and weight_VD.requires_grad:
            # fp32 also for a bf16 weight: chunks add up in it.
            grad_weight = torch.zeros_like(weight_VD, dtype=wide if several else None)
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD, weights_C = hidden_TD[rows], weights_T[rows]
            if weights_C.device.type == "cpu" and not weights_C.any():
                continue  # free to know on CPU; on CUDA it would stop the host
            logits_CV = _logits(hidden_CD, weight_VD, wide)
            at_once = _rows_at_once(logits_CV, vocabulary)
            parts = (x.split(at_once) for x in (logits_CV, labels_T[rows], weights_C))
            for logits, labels, weights in zip(*parts, strict=True):
                found = _softmax(logits, labels.clamp(min=0), vocabulary, with_mean=smoothing > 0)
                total -= _weighted_sum(found.target_C1, weights)
                if sums is not None and objective != PLAIN:
                    smoothed_C1 = found.target_C1
                    if found.mean_C1 is not None:
                        smoothed_C1 = smoothed_C1.lerp(found.mean_C1, smoothing)
                    smoothed = _weighted_sum(smoothed_C1, weights)
                    squares = _weighted_sum(found.log_sum_C1.square(), weights)
                    sums += torch.stack([-smoothed, squares])
                if gradients:
                    _gradient_of_logits(found, weights, objective)
            if not gradients:
                continue
            grad_CV = logits_CV.to(weight_VD.dtype)
            del logits_CV, logits, found
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_CV.T, hidden_CD)
            del grad_CV
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
        return *gradients, *[None] * 7


def _weighted_sum(x_C1: Tensor, weights_C: Tensor) -> Tensor:
    """Return the sum of values times weights; what weighs 0 is left out, as 0 times inf is nan."""
    return torch.where(weights_C != 0, x_C1.squeeze(-1) * weights_C, 0).sum()


def _fp32_products(x: Tensor) -> bool:
    """Whether matrix products of x's dtype can be returned, and added up, in fp32 as they are
    accumulated; torch's CPU has no such product.
    """
    return x.dtype.itemsize < 4 and x.device.type != "cpu"


def _logits(hidden_CD: Tensor, weight_VD: Tensor, wide: torch.dtype) -> Tensor:
    """Return logits in the dtype `wide`; on a CPU rounded to that of the weight."""
    if _fp32_products(weight_VD):
        return torch.mm(hidden_CD, weight_VD.T, out_dtype=wide)
    return F.linear(hidden_CD, weight_VD).to(wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which has their dtype or fp32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _fp32_products(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _rows_at_once(logits_CV: Tensor, part: VocabularyPart | None) -> int:
    """Return how many tokens' logits go through the softmax together: with a part of the vocabulary
    all, since the ranks talk each time, and on a GPU, where each time costs launches.
    """
    if part is not None or logits_CV.device.type != "cpu":
        return len(logits_CV)
    return max(1, LOGITS_IN_CACHE // logits_CV.shape[1])


class _Softmax(NamedTuple):
    """Of the tokens of a chunk."""

    # exp(logit - the token's largest one), of this rank's part of the vocabulary
    exp_CV: Tensor
    exp_sum_C1: Tensor  # sum of these over the whole vocabulary
    column_C1: Tensor  # of the target in exp_CV; 0 where it is not among them
    here_C1: Tensor  # whether it is among them
    target_C1: Tensor  # the target's log-probability, wherever it is
    mean_C1: Tensor | None  # mean log-probability of the whole vocabulary; None: not asked for
    log_sum_C1: Tensor  # log of the sum of exponentiated logits of the whole vocabulary
    size: int  # of the whole vocabulary


def _softmax(
    logits_CV: Tensor, targets_C: Tensor, part: VocabularyPart | None, *, with_mean: bool
) -> _Softmax:
    """Exponentiate logits in their place, each once; with a part of the vocabulary, of its tokens,
    with two collectives.
    """
    column_C1, here_size = targets_C.unsqueeze(-1), logits_CV.shape[1]
    here_C1 = torch.ones_like(column_C1, dtype=torch.bool)
    largest_C1 = logits_CV.amax(-1, keepdim=True)
    if part is not None:
        column_C1 = column_C1 - part.first
        here_C1 = (column_C1 >= 0) & (column_C1 < here_size)
        column_C1 = torch.where(here_C1, column_C1, 0)
        largest_C1 = part.max(largest_C1)
    logits_CV -= largest_C1
    terms = [torch.where(here_C1, logits_CV.gather(1, column_C1), 0)]
    if with_mean:
        terms.append(logits_CV.sum(-1, keepdim=True))
    exp_CV = logits_CV.exp_()
    terms.append(exp_CV.sum(-1, keepdim=True))
    if part is not None:
        terms = part.sum(torch.cat(terms, dim=-1)).split(1, dim=-1)
    target_C1, *sum_C1, exp_sum_C1 = terms
    log_sum_C1 = exp_sum_C1.log()
    size = here_size if part is None else part.size
    return _Softmax(
        exp_CV,
        exp_sum_C1,
        column_C1,
        here_C1,
        target_C1 - log_sum_C1,
        sum_C1[0] / size - log_sum_C1 if with_mean else None,
        largest_C1 + log_sum_C1,
        size,
    )


def _gradient_of_logits(found: _Softmax, weights_C: Tensor, objective: Objective) -> None:
    """Put the gradient of the objective, weighted, in the place of the exponentials: softmax -
    target of each token, and of z * logsumexp^2 2 z logsumexp * softmax.
    """
    smoothing, z = objective
    weights_C1 = weights_C.unsqueeze(-1).to(found.exp_CV.dtype)
    of_softmax_C1 = weights_C1 / found.exp_sum_C1
    if z:
        of_softmax_C1 *= 1 + 2 * z * found.log_sum_C1
    grad_CV = found.exp_CV.mul_(of_softmax_C1)
    if smoothing:
        grad_CV.sub_(weights_C1 * (smoothing / found.size))
    target_C1 = found.here_C1 * weights_C1 * (1 - smoothing)
    grad_CV.scatter_add_(1, found.column_C1, -target_C1)
    unweighted_C1 = weights_C1 == 0
    # 0 times inf is nan. That there is no such token is free to know on CPU.
    if unweighted_C1.device.type != "cpu" or unweighted_C1.any():
        grad_CV.masked_fill_(unweighted_C1, 0)
