"""Mixture of experts: what a router must offer, routed and shared experts, the losses of routing
and the moving correction bias. The routers themselves stand in the files of their families.

Shape suffixes: S tokens on this rank, D width, F expert width, E experts, K choices per token, R =
S * K routed rows, N documents.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchsft.config import InputError
from torchsft.config import Router as RouterOptions
from torchsft.models.attention import Documents
from torchsft.models.decoder import Piece, SwigluMLP, local
from torchsft.ops import plain
from torchsft.ops.out_of_memory import explaining
from torchsft.ops.permute import Order, combine, inverse, permute
from torchsft.ops.repetition import once, repeating
from torchsft.ops.sliced import sliced
from torchsft.ops.swiglu import (
    GROUPED_MM,
    ExpertProducts,
    grouped_swiglu,
    grouped_swiglu_reference,
)
from torchsft.ops.tiles import SIZE

MOST = 2  # times an even load: more rows are computed in slices of half an even load
# Or of all rows over this, if that is more. (In a pass for answers a rank with few tokens may get
# many rows of others.)
MOST_SLICES = 8

# experts([x_TD, weights_R1], order, offs_E, ends) -> y_TD: the sums of what a token's rows get of
# this rank's experts; weights are in the order of tokens and choices; offs_E (int32) and `ends`
# end the rows of each expert, once they are sorted, on the device and on the host (None: it has not
# been told). It empties the list.
ComputeRows = Callable[[list[Tensor], Order, Tensor, list[int] | None], Tensor]
# exchange(x_SD, weights_SK, chosen_SK, experts, meanwhile) -> (routed_SD, shared_SD): the weighted
# sum of what a token's chosen experts return, and the second value of `meanwhile`, which has two:
# one is computed while rows travel to their experts, one while they travel back. Its attribute
# `rows` says how many rows the experts of this rank have.
Exchange = Callable[
    [Tensor, Tensor, Tensor, ComputeRows, Iterator[Tensor | None]],
    tuple[Tensor, Tensor | None],
]


class Routing(NamedTuple):
    """Where tokens go."""

    weights_SK: Tensor  # fp32, factors of the experts' outputs
    experts_SK: Tensor  # int64, the chosen experts
    scores_SE: Tensor  # fp32, at least 0: what the choice followed, for the balance loss
    logits_SE: Tensor  # fp32, from which the scores are made, for the z-loss


class Router(Protocol):
    """What a `MoE` layer asks of its `gate`, which is a module (and, below fp32, computes in fp32
    whatever the model computes in: `parallel/fsdp.py` keeps its parameters so).

    Where it has a buffer `e_score_correction_bias` [E], the choice follows scores plus that bias.
    """

    weight: nn.Parameter  # [E, D]

    def __call__(self, x_SD: Tensor) -> Routing:
        """Choose K of E experts for every token."""


def router_logits(x_SD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Return a router's linear map in fp32, [S, E]."""
    bias_E = None if bias_E is None else local(bias_E).float()
    return F.linear(x_SD.float(), local(weight_ED).float(), bias_E)


class Experts(nn.Module):
    """The SwiGLU networks of this rank's experts, stacked."""

    # what gate|up and down are multiplied with
    products: ExpertProducts = GROUPED_MM
    # Gives this rank's part of a parameter, in the dtype of the rows.
    read: Callable[[nn.Parameter], Tensor] = staticmethod(local)
    # How many rows each rank would have under an even load.
    even_rows = sys.maxsize
    # Whether Hugging Face checkpoints hold each expert by itself, or the parameters as they are.
    stored_singly: ClassVar[bool] = True

    def __init__(
        self,
        experts: int,
        width: int,
        expert_width: int,
        implementation: Literal["grouped_mm", "loop"],
    ) -> None:
        super().__init__()
        if implementation == "grouped_mm" and (width % 8 or expert_width % 8):
            raise InputError(
                f"grouped_mm needs hidden_size ({width}) and moe_intermediate_size "
                f"({expert_width}) to be multiples of 8 (16 bytes of bf16); use --model.experts "
                "loop"
            )
        self.is_grouped = implementation == "grouped_mm"
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))

    def forward(
        self,
        x_RD: Tensor,
        weights_R1: Tensor,
        offs: Tensor,
        ends: Sequence[int] | None = None,
        order: Order | None = None,
    ) -> Tensor:
        """Compute rows sorted by local expert, or tokens.

        Args:
            x_RD: the rows; with an order, the tokens.
            weights_R1: fp32, factors of the rows' outputs.
            offs: int32, offs[e] ends the rows of local expert e, offs[-1] = R.
            ends: the same; without it rows are not computed in slices.
            order: how tokens are sorted, if `sorts` says that they may come.

        Returns:
            y_RD; with an order, the sums of tokens' rows.
        """
        parameters = [self.read(parameter) for parameter in self.stacked()]
        if not self.is_sliced(ends):
            return self.network(x_RD, weights_R1, offs, *parameters, order=order)
        size = max(self.even_rows // 2, -(-ends[-1] // MOST_SLICES))
        size += -size % SIZE  # whole tiles of fp8
        order_R = None if order is None else order.order_R
        return sliced(self.network, size, ends, order_R, x_RD, weights_R1, offs, *parameters)

    def stacked(self) -> list[nn.Parameter]:
        """Return the parameters, as `network` takes them."""
        return [self.gate_up_proj, self.down_proj]

    def network(
        self,
        x_RD: Tensor,
        weights_R1: Tensor,
        offs: Tensor,
        gate_up: Tensor,
        down: Tensor,
        order: Order | None = None,
    ) -> Tensor:
        """Return what `forward` does, of parameters in the dtype of the rows."""
        of_both, of_down = self.products
        if order is not None:
            of_both, of_down = (
                replace(of_both, input_order=order),
                replace(of_down, output_order=order),
            )
        compute = grouped_swiglu if self.is_grouped else grouped_swiglu_reference
        return compute(x_RD, gate_up, down, weights_R1, offs, (of_both, of_down))

    def is_sliced(self, ends: Sequence[int] | None) -> bool:
        """Whether rows of experts that end there are computed in slices."""
        return self.is_grouped and ends is not None and ends[-1] > MOST * self.even_rows

    def sorts(self, order: Order, ends: Sequence[int] | None) -> bool:
        """Whether `forward` may have tokens: each slice of rows is copied when it is computed, and
        some products quantise tokens without sorting them before.
        """
        if self.is_sliced(ends):
            return order.is_one_to_one()
        return self.is_grouped and not plain() and all(each.sorts for each in self.products)


def expert_pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Return the Hugging Face tensors that make up a stacked parameter of `Experts`: each expert's
    own.

    Args:
        name: of the parameter in the model, such as model.layers.3.mlp.experts.down_proj.
        shape: of the whole parameter, [E, 2F, D] or [E, D, F].
    """
    prefix, _, parameter = name.rpartition(".")
    experts, rows, columns = shape
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
    part_rows = rows // len(parts)
    return [
        Piece(
            key=f"{prefix}.{expert}.{part}.weight",
            hf_shape=(part_rows, columns),
            start=(expert, number * part_rows, 0),
        )
        for expert in range(experts)
        for number, part in enumerate(parts)
    ]


def sort_by_expert(chosen_SK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows by their expert.

    Returns:
        The rows of each expert, int64 [E], and `order_R` and `row_SK` of `ops.permute`.
    """
    chosen_R = chosen_SK.flatten()
    # Counted by scatter: bincount asks the device for its largest value.
    counts_E = chosen_R.new_zeros(experts).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))
    order_R = chosen_R.argsort(stable=True)
    return counts_E, order_R, inverse(order_R).view_as(chosen_SK)


class LocalExchange:
    """A MoE layer's `exchange` where all experts are on this rank."""

    def __init__(self, experts: int) -> None:
        self.experts, self.rows = experts, 0

    def __call__(
        self,
        x_SD: Tensor,
        weights_SK: Tensor,
        chosen_SK: Tensor,
        experts: ComputeRows,
        meanwhile: Iterator[Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """See `Exchange`."""
        self.rows = chosen_SK.numel()
        _, shared_SD = meanwhile  # first: a repetition of the layer ends within the experts
        counts_E, *order = once("exchange", lambda: sort_by_expert(chosen_SK, self.experts))
        given = [x_SD, weights_SK.view(-1, 1)]
        offs_E, ends = counts_E.cumsum(0).to(torch.int32), self.ends(self.rows)
        return experts(given, Order(*order), offs_E, ends), shared_SD

    def ends(self, rows: int) -> list[int] | None:
        """Return where each expert's rows end, if the host knows."""
        return None


class AddLoss(torch.autograd.Function):
    """Passes x on and makes `loss` part of what is minimised: its gradient is 1 whatever x's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


class MoE(nn.Module):
    """Router, routed experts and, in some families, shared experts, which every token goes
    through.
    """

    regions = ("add",)  # see models/decoder.py
    layer = "?"  # its number, for messages
    # All since they were last zeroed, over real tokens; not saved.
    expert_load: Tensor  # int64 [E]: tokens routed to each expert in training mode
    balance_loss: Tensor  # fp32 scalar: sum of the balance loss
    z_loss: Tensor  # fp32 scalar: sum of the z-loss
    # What the two are multiplied with in the gradient: their factors over what they are averaged
    # over, set before each step; 0 leaves one out.
    balance_scale = 0.0
    z_scale = 0.0
    # Router and experts as functions, where another call of these modules is under way, of which
    # this one is a piece; None: the modules themselves are called.
    parts: tuple[Callable[[Tensor], Routing], Callable[..., Tensor]] | None = None
    # Called with the experts that tokens choose, int64 [S, K]; of pieces one after the other.
    observe: Callable[[Tensor], None] = staticmethod(lambda experts_SK: None)

    def __init__(
        self, gate: Router, experts: Experts, shared_experts: SwigluMLP | None = None
    ) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        load = torch.zeros(gate.weight.shape[0], dtype=torch.int64)
        # expert parallelism puts its all-to-all here
        self.exchange: Exchange = LocalExchange(len(load))
        self.register_buffer("expert_load", load, persistent=False)
        for name in ("balance_loss", "z_loss"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32), persistent=False)

    @property
    def counters(self) -> tuple[Tensor, Tensor, Tensor]:
        """What counts since it was last zeroed: the load of experts, and both losses."""
        return self.expert_load, self.balance_loss, self.z_loss

    def init_buffers(self) -> None:
        """Zero the counters."""
        for counter in self.counters:
            counter.zero_()

    @property
    def correction_bias(self) -> Tensor | None:
        """What the router adds to scores before it chooses, fp32 [E]; None: nothing."""
        return getattr(self.gate, "e_score_correction_bias", None)

    @torch.no_grad()
    def move_bias(self, load_E: Tensor, rate: float | Tensor) -> None:
        """Let the correction bias fall by `rate` where more tokens than the mean were routed, and
        rise where fewer were (arXiv:2412.19437, section 2.1.2).
        """
        bias = self.correction_bias
        bias += rate * (load_E.mean() - load_E).sign().to(bias)

    def forward(
        self, x_SD: Tensor, documents: Documents, before_SD: Tensor | None = None
    ) -> Tensor:
        """x_SD to y_SD, to which `before_SD` is added. Padding tokens are assigned to experts in
        turn, so that none is overloaded, weigh 0 and are not counted.
        """
        gate, experts = self.parts or (self.gate, self.experts)
        weights_SK, experts_SK, scores_SE, logits_SE = gate(x_SD)
        self.observe(experts_SK)
        valid_S1 = documents.valid_S.unsqueeze(1)
        if self.is_balanced():
            weights_SK = self.add_balance_loss(weights_SK, experts_SK, scores_SE, documents)
        if self.training and self.z_scale:
            # arXiv:2202.08906, eq. 5
            loss_S = logits_SE.logsumexp(-1).square()
            weights_SK = self._minimise(loss_S, documents, self.z_loss, self.z_scale, weights_SK)
        weights_SK = torch.where(valid_S1, weights_SK, 0)
        if self.training and not repeating():
            real_SK = valid_S1.expand_as(experts_SK)
            self.expert_load.scatter_add_(0, experts_SK.flatten(), real_SK.flatten().long())
        chosen_SK = self.deal(experts_SK, valid_S1)
        self.experts.even_rows = chosen_SK.numel()
        with explaining(self.load):
            routed_SD, shared_SD = self.exchange(
                x_SD, weights_SK, chosen_SK, partial(self.run, experts), self.shared(x_SD)
            )
        return self.add(routed_SD, shared_SD, before_SD)

    def run(
        self,
        experts: Callable[..., Tensor],
        given: list[Tensor],
        order: Order,
        offs_E: Tensor,
        ends: Sequence[int] | None,
    ) -> Tensor:
        """See `ComputeRows`: sort rows, where `experts` do not.

        The list is emptied, so that tokens, if nobody else has them, are free once they are sorted.
        """
        order_R, row_TK = order
        weights_R1 = permute(given.pop(), order_R, row_TK.view(-1, 1))
        if self.experts.sorts(order, ends):
            return experts(given.pop(), weights_R1, offs_E, ends, order)
        y_RD = experts(permute(given.pop(), order_R, row_TK), weights_R1, offs_E, ends)
        return combine(y_RD, order_R, row_TK)

    def add(self, y_SD: Tensor, *others: Tensor | None) -> Tensor:
        """Return the sum of what is there."""
        return sum((other for other in others if other is not None), y_SD)

    def load(self) -> str:
        """Say how many rows the experts of this rank have."""
        return (
            f"this was in the experts of layer {self.layer}: {self.exchange.rows} rows have come "
            f"to this rank, {self.experts.even_rows} would under an even load; lower "
            "--train.micro-batch-size or --data.seq-len, or raise --parallel.ep"
        )

    def deal(self, experts_SK: Tensor, valid_S1: Tensor) -> Tensor:
        """Return the experts of each token, for padding in turn."""
        number_R = torch.arange(experts_SK.numel(), device=experts_SK.device)
        in_turn_SK = number_R.view_as(experts_SK) % len(self.expert_load)
        return torch.where(valid_S1, experts_SK, in_turn_SK)

    def shared(self, x_SD: Tensor) -> Iterator[Tensor | None]:
        """Compute the shared experts in two steps, of which the second gives their output; None
        where there are none.
        """
        experts = self.shared_experts
        hidden_SF = None if experts is None else experts.hidden(x_SD)
        yield hidden_SF
        yield None if experts is None else experts.down_proj(hidden_SF)

    def add_balance_loss(
        self, weights_SK: Tensor, experts_SK: Tensor, scores_SE: Tensor, documents: Documents
    ) -> Tensor:
        """`weights_SK` as they are, carrying the gradient of the sequence-wise balance loss
        (arXiv:2412.19437, eq. 17 to 20).

        Of a document of L tokens: the sum over experts of f_e * P_e, with f_e = E / (K L) * (times
        e was chosen) and P_e the mean of its scores, normalised per token. A document counts L
        times, so that the mean over tokens is 1 where all experts are used alike, and how documents
        are packed, split over ranks and accumulated changes nothing. Chosen means routed to (the
        paper's formula leaves out DeepSeek's correction bias there).
        """
        frequency_NE = once("frequency", lambda: self.frequency(experts_SK, documents))
        share_SE = scores_SE / scores_SE.sum(-1, keepdim=True)
        loss_S = (frequency_NE[documents.document_S] * share_SE).sum(-1)
        scale = self.balance_scale
        return self._minimise(loss_S, documents, self.balance_loss, scale, weights_SK)

    def frequency(self, experts_SK: Tensor, documents: Documents) -> Tensor:
        """Return f_e of every document, fp32 [N + 1, E] (the last row: of padding), by the choices
        of all of this rank's tokens.
        """
        count, experts = len(documents.length_N1), len(self.expert_load)
        index_R = (documents.document_S.unsqueeze(1) * experts + experts_SK).flatten()
        counts = torch.zeros(count * experts, device=experts_SK.device)
        counts.index_add_(0, index_R, torch.ones_like(index_R).float())
        counts_NE = documents.layout.sum(counts).view(count, experts)
        length_N1 = documents.length_N1.clamp(min=1).unsqueeze(1)
        return counts_NE * (experts / experts_SK.shape[1]) / length_N1

    def is_balanced(self) -> bool:
        """Whether the balance loss is part of what is minimised."""
        return self.training and self.balance_scale != 0

    def _minimise(
        self, loss_S: Tensor, documents: Documents, total: Tensor, scale: float, weights_SK: Tensor
    ) -> Tensor:
        """Add a loss of real tokens to its `total`; `weights_SK`, carrying its gradient."""
        loss = torch.where(documents.valid_S, loss_S, 0).sum()
        if not repeating():
            total += loss.detach()
        return AddLoss.apply(weights_SK, loss * scale)


def frozen_by_router(options: RouterOptions, moes: Collection[MoE]) -> list[str]:
    """Return the patterns that --router.train freezes.

    Args:
        options: of --router.
        moes: the mixture-of-experts blocks of the whole model.

    Raises:
        InputError: this model has nothing that an option of --router could change.
    """
    given = [
        f"--router.{name.replace('_', '-')} {value}"
        for name, value in vars(options).items()
        if value != getattr(RouterOptions, name)
    ]
    if given and not moes:
        raise InputError(f"this model has no experts, but {', '.join(given)} is set; leave it out")
    rate = options.bias_update_rate
    if rate and any(moe.correction_bias is None for moe in moes):
        raise InputError(
            f"--router.bias-update-rate is {rate}, but this model's routers have no correction "
            "bias; leave it out, or balance by --router.aux-loss"
        )
    return [] if options.train else ["router"]
