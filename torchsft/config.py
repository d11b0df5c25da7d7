"""Every option of a run, as nested dataclasses.

A recipe fills these in (a preset), the command line overrides any field (`--optim.lr 1e-5`, read by
`cli.py`; the string behind a field is its help), and the resolved result is written to
`OUTPUT/config.json` and into every checkpoint. Each class checks its own fields; what needs the
world size is checked in `parallel/world.py`, what needs the model's `config.json` in `models/`.
"""

import dataclasses
import datetime
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal


class InputError(ValueError):
    """Something that the user gave cannot be used: one sentence that names the thing, the numbers
    and the remedy.
    """


def _at_least(options: Any, **least: float) -> None:
    """Refuse a field of `options` that is set and less than `least` says, or not finite."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not bound <= value < math.inf:  # also catches nan
            option = f"--{type(options).__name__.lower()}.{name.replace('_', '-')}"
            kind = "a finite number of " if value == math.inf else ""
            raise InputError(f"{option} is {value}, but it must be {kind}at least {bound}")


@dataclass(kw_only=True)
class Model:
    """Which model is trained and which implementation computes it."""

    path: str | None = None
    """Hugging Face directory: config.json, tokenizer and safetensors weights. Absent: the preset's
    random tiny model.
    """
    random_init: bool = False
    """Initialise weights from the seed instead of loading them (config.json and tokenizer still
    come from path).
    """
    attention: Literal["auto", "sdpa", "varlen", "flex"] = "auto"
    """auto: varlen on CUDA below fp32, sdpa (one call per document, the reference) elsewhere."""
    experts: Literal["grouped_mm", "loop"] = "grouped_mm"
    """loop is the plain reference: one matrix product per expert."""
    ops: Literal["fast", "plain"] = "fast"
    """plain computes norms, SwiGLU, rotation, token permutation and the loss with ordinary PyTorch:
    slow, for comparing.
    """
    loss_chunk: int | None = None
    """Tokens whose logits exist at the same time in the vocabulary loss; absent: all where that
    takes no more memory than chunks of 2^26 logits, else such chunks.
    """
    mtp: Literal["keep", "train", "drop"] = "keep"
    """What becomes of multi-token-prediction layers: exported as they were (a server that drafts
    tokens with them is slower the more the model has changed), trained too, or left out.
    """
    mtp_weight: float = 0.1
    """Factor of the loss of --model.mtp train (DeepSeek-V3 pre-trained with 0.3, later 0.1)."""

    def __post_init__(self) -> None:
        _at_least(self, loss_chunk=1, mtp_weight=0)
        if self.mtp != "train" and self.mtp_weight != type(self).mtp_weight:
            raise InputError(
                f"--model.mtp-weight is {self.mtp_weight}, but --model.mtp is {self.mtp}; set "
                "--model.mtp train or leave it out"
            )


# What rendering itself gives to a chat template.
RESERVED = set("messages conversations tools documents chat_template add_generation_prompt".split())

# What --data.map can make of a column: a turn, the key of a format, or nothing.
MAP_TARGETS = tuple(
    "system user assistant messages conversations prompt completion text instruction input output "
    "history tools weight input_ids labels ignore".split()
)


@dataclass(kw_only=True)
class Data:
    """What is trained on."""

    train: tuple[str, ...] = ()
    """JSONL (.gz, .zst), JSON, Parquet, datasets directories or hub names (NAME:SPLIT); PATH:2.0
    takes each sample twice.
    """
    eval: tuple[str, ...] = ()
    """Held-out sources as NAME=PATH (without a name: the file's), each evaluated over every row."""
    map: str = ""
    """Columns of other names: question=user,answer=assistant makes messages (also system, a
    format's key, or ignore).
    """
    system: str = ""
    """System turn for rows that have none: a text, or a file that holds it."""
    seq_len: int = 4096
    """Tokens in a packed row."""
    mask: Literal["assistant", "last-turn", "all"] = "assistant"
    """Which tokens are trained: every assistant turn, the last one, or everything."""
    reasoning: Literal["train", "mask"] = "train"
    """Whether reasoning (reasoning_content, <think>) is trained, or only read by the answer behind
    it.
    """
    template_kwargs: str = ""
    """JSON object of further variables of the chat template, such as {"thinking": true}."""
    chat_template: str | None = None
    """File with a chat template in place of the model directory's; the export carries it."""
    template_date: str | None = None
    """Day (YYYY-MM-DD) for templates that ask for the date; absent: that of the run's first
    start.
    """
    on_lost_context: Literal["refuse", "keep"] = "refuse"
    """When the template leaves out context (system, tools, results): the row cannot be used, or is
    kept, counted, listed.
    """
    truncation: Literal["drop", "left", "right", "split", "raise"] = "drop"
    """A sample longer than seq_len is left out, cut at its beginning or end, cut into pieces (all
    counted), or an error.
    """
    packing: Literal["best-fit", "first-fit", "none"] = "best-fit"
    """How samples share rows: best-fit decreasing, first-fit in the given order, or one sample a
    row.
    """
    packing_buffer: int = 8192
    """Samples that are packed together."""
    balance: Literal["none", "attention"] = "none"
    """attention deals the rows of a step so that ranks do equal work, counting what long documents
    cost in the attention.
    """
    on_error: Literal["raise", "skip"] = "raise"
    """A row that cannot be used ends the run, or is left out, counted and listed."""
    streaming: bool = False
    """Tokenise while training instead of once before it (no cache, order of the file); needs
    --train.steps.
    """
    cache: str | None = None
    """Directory of tokenised samples; absent: $TORCHSFT_CACHE, else ~/.cache/torchsft."""
    workers: int = 1
    """Threads of each rank that prepare the next steps beside training; 0: none, training waits."""

    def __post_init__(self) -> None:
        _at_least(self, seq_len=2, packing_buffer=1, workers=0)
        self.template_variables()
        self.columns()
        try:
            datetime.date.fromisoformat(self.template_date or "2000-01-01")
        except ValueError:
            raise InputError(
                f"--data.template-date is {self.template_date!r}, but it must be a day such as "
                "2026-01-31"
            ) from None

    def columns(self) -> tuple[tuple[str, str], ...]:
        """`map` as pairs (column, what it becomes): a role, a key of a format, or `ignore`."""
        pairs = []
        for pair in filter(None, self.map.split(",")):
            column, _, target = (each.strip() for each in pair.partition("="))
            if not column or target not in MAP_TARGETS:
                raise InputError(
                    f"--data.map is {self.map!r}, but it must be COLUMN=TARGET pairs such as "
                    f"question=user,answer=assistant; targets are {', '.join(MAP_TARGETS)}"
                )
            pairs.append((column, target))
        columns = [column for column, _ in pairs]
        for column in columns:
            if columns.count(column) > 1:
                raise InputError(
                    f"--data.map names the column {column!r} twice; give it one target"
                )
        return tuple(pairs)

    def system_text(self) -> str:
        """`system`, or what the file of that name holds, without the white space around it."""
        if not os.path.isfile(self.system):
            return self.system
        try:
            with open(self.system, encoding="utf-8") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--data.system {self.system} cannot be read ({error}); give a text file in UTF-8"
            ) from None

    def template_variables(self) -> dict[str, Any]:
        """`template_kwargs` as a dictionary."""
        try:
            found = json.loads(self.template_kwargs or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.keys() & RESERVED:
            needed = "a JSON object of the template's own variables, such as '{\"thinking\": true}'"
            raise InputError(
                f"--data.template-kwargs is {self.template_kwargs!r}, but it must be {needed}"
            )
        return found


@dataclass(kw_only=True)
class Train:
    """How long and in which portions."""

    steps: int | None = None
    """Optimizer steps. Give this or epochs."""
    epochs: int | float | None = None
    """Passes over the training data; 0.5: the steps that see the first half of an epoch's samples.
    Neither given: 1 epoch.
    """
    global_batch_size: int = 8
    """Rows per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Rows per forward and backward pass of one rank."""
    seed: int = 0
    """Seed of weights (where random) and of the data order."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: router, embeddings (the input's), experts (routed ones),
    layers, layers.N, layers.A-B, or patterns of names in the checkpoint with * and ?, whole or up
    to a dot: '*.mlp.shared_experts', lm_head. The experts of a layer are two parameters,
    experts.gate_up_proj and experts.down_proj.
    """
    activation_checkpointing: Literal["none", "selective", "full", "stream"] = "none"
    """full keeps only each layer's input and where its tokens are routed, and computes the layer
    again in the backward pass: less memory, a third more time. selective keeps what attention
    returns too, so that attention is not computed again. stream is for the longest rows: it keeps
    what full keeps, and computes a layer piece by piece.
    """
    stream_pieces: int = 8
    """With stream, how many pieces, of tokens and of heads, a layer is computed in: at most as many
    as there are. Attention that is not latent (MLA) is computed whole.
    """
    activation_checkpointing_every: int = 1
    """Every how many layers one is checkpointed; the others keep all."""
    selective_products: bool = False
    """With selective, keep the product of experts' rows with gate|up too."""
    activation_offload: bool = False
    """Keep what checkpointed layers keep, from 1 MiB a tensor, in pinned memory of the host."""
    deterministic: bool = False
    """Compute the same bits in each run on the same layout and machine, on GPUs too, where that is
    slower (attention's backward pass adds in any order otherwise).
    """
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary, as F.cross_entropy does (the
    label_smoothing_factor of transformers and TRL); 0: none. The reported loss stays without it.
    """
    z_loss: float = 0.0
    """Factor of the mean over supervised tokens of logsumexp(logits)^2, which keeps these near 0
    (PaLM: 1e-4); 0: none. The reported loss stays without it.
    """
    max_nonfinite_steps: int = 3
    """Steps in a row whose gradient norm may be inf or nan, or that supervise nothing (each is
    skipped whole), before the run stops.
    """

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise InputError(
                f"--train.steps ({self.steps}) and --train.epochs ({self.epochs}) are both set; "
                "give one of them (the other: None)"
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"--train.epochs is {self.epochs}, but it must be above 0")
        _at_least(
            self,
            steps=1,
            global_batch_size=1,
            micro_batch_size=1,
            seed=0,
            max_nonfinite_steps=1,
            activation_checkpointing_every=1,
            stream_pieces=1,
            label_smoothing=0,
            z_loss=0,
        )
        every, pieces = self.activation_checkpointing_every, self.stream_pieces
        mode, checkpointed = self.activation_checkpointing, ("full", "selective", "stream")
        # what is given of options that belong to some modes alone, and these modes
        given = {
            f"activation-checkpointing-every {every}": every > 1 and checkpointed,
            "activation-offload": self.activation_offload and checkpointed,
            "selective-products": self.selective_products and ("selective",),
            f"stream-pieces {pieces}": pieces != type(self).stream_pieces and ("stream",),
        }
        for option, modes in given.items():
            if modes and mode not in modes:
                raise InputError(
                    f"--train.{option} is for --train.activation-checkpointing "
                    f"{' or '.join(modes)}, not {mode}; leave it out, or set {modes[0]}"
                )
        if self.label_smoothing >= 1:
            smoothing = self.label_smoothing
            raise InputError(f"--train.label-smoothing is {smoothing}, but it must be below 1")
        if self.seed >= 2**64:
            raise InputError(f"--train.seed is {self.seed}, but it must be less than 2**64")


@dataclass(kw_only=True)
class Router:
    """How the routing of tokens to experts is trained; the same for all families."""

    train: bool = True
    """False freezes every router: its weight, and its bias where it has one."""
    bias_update_rate: float = 0.0
    """After each step the correction bias of experts that got more tokens than the mean falls by
    this, that of the others rises (DeepSeek-V3 pre-trained with 1e-3, at its end with 0); 0: it
    stays.
    """
    aux_loss: float = 0.0
    """Factor of the sequence-wise balance loss of expert routing (DeepSeek-V3 pre-trained with
    1e-4); 0: none.
    """
    z_loss: float = 0.0
    """Factor of the mean over tokens and layers of logsumexp(router logits)^2, which keeps these
    small (ST-MoE: 1e-3); 0: none.
    """

    def __post_init__(self) -> None:
        _at_least(self, bias_update_rate=0, aux_loss=0, z_loss=0)


LONGEST_TIMEOUT = 1e9  # seconds, 32 years


@dataclass(kw_only=True)
class Parallel:
    """Mesh sizes: pp x dp_replicate x dp_shard x cp x tp ranks; experts see pp x dp_replicate x edp
    x ep.
    """

    pp: int = 1
    """Pipeline ranks: each holds some of the layers."""
    pp_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = "Interleaved1F1B"
    """How the microbatches of a step pass through the stages. GPipe and 1F1B have one stage a rank,
    the others two or more.
    """
    pp_layers: tuple[int, ...] = ()
    """Layers of each stage, first to last; as many as there are stages. Empty: balanced by cost."""
    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP)."""
    dp_shard: int = -1
    """Ranks that share one copy of the parameters (FSDP2); -1 takes what the other axes leave."""
    cp: int = 1
    """Context parallel ranks: they share the tokens of a row."""
    tp: int = 1
    """Tensor parallel ranks: they share matrices, and between these the tokens (sequence
    parallelism).
    """
    ep: int = 1
    """Ranks over which the experts of a layer are spread; divides dp_shard * cp * tp."""
    timeout_seconds: float = 600.0
    """A collective that waits longer than this ends the job."""

    def __post_init__(self) -> None:
        _at_least(self, pp=1, dp_replicate=1, cp=1, tp=1, ep=1)
        if self.dp_shard != -1:
            _at_least(self, dp_shard=1)
        if self.pp_layers and min(self.pp_layers) < 0:
            raise InputError(
                f"--parallel.pp-layers is {self.pp_layers}, but a stage cannot have "
                f"fewer than 0 layers"
            )
        if not 0 < self.timeout_seconds <= LONGEST_TIMEOUT:
            raise InputError(
                f"--parallel.timeout-seconds is {self.timeout_seconds}, but it must be above 0 and "
                f"at most {LONGEST_TIMEOUT:g}"
            )


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with optimizer options of their own, as --optim.groups says them; None: as all
    others.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None


BLOCK = 128  # entries of a row whose moments share a scale, with --optim.moments int8


@dataclass(kw_only=True)
class Optim:
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: momentum (0.95), orthogonalised, for every matrix of the layers as the files hold it
    (of each expert gate, up and down; attention, shared experts and routers), AdamW for embeddings,
    head, norms and biases. An update has the size of AdamW's, whose learning rate so carries over;
    best for models that Muon has pre-trained (Moonlight, Kimi-K2).
    """
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """Both moments of AdamW: 8, 4 or 2.06 bytes a parameter. What is not fp32 is rounded at random,
    so that the second one decays with any beta2; int8 has a scale for 128 entries of a row.
    """
    masters: Literal["fp32", "bf16"] = "fp32"
    """bf16: parameters and their gradients have 2 bytes, in place of 4; updates are rounded at
    random, so that small learning rates count in the mean, gradients to the nearest behind each
    microbatch (with pp behind the last). Routers stay fp32.
    """
    offload: bool = False
    """Keep fp32 parameters, gradients and moments in host memory (16 bytes a parameter), and on the
    device only what it computes with: 2 bytes. AdamW runs on the CPU, layer by layer, beside the
    next forward pass; the numbers are those of a run that keeps all on its CPU.
    """
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd: stable, then decay at the end."""
    warmup_steps: int | float = 0
    """Steps of linear warm-up; below 1: their share of the run's steps, rounded up."""
    decay_steps: int | float | None = None
    """Steps at the end over which wsd decays; below 1: their share of the run's steps, rounded up.
    Absent: 0.1.
    """
    decay_shape: Literal["linear", "cosine", "1-sqrt"] | None = None
    """How wsd decays; absent: linear."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay (the floor of cosine, linear and wsd), as a share of
    the peak.
    """
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; applied to matrices only (parameters of two or more dims), not to norms and
    biases.
    """
    clip_norm: float | None = 1.0
    """Largest global gradient norm (over what is trained); None leaves gradients as they are."""
    groups: tuple[str, ...] = ()
    """PATTERN:lr=1e-6,weight_decay=0 (or one of the two): another peak learning rate, on the same
    schedule, or weight decay for some parameters. Patterns as for --train.freeze; the first one
    that matches a parameter decides.
    """

    def __post_init__(self) -> None:
        for name, plain in {"kind": "adamw", "moments": "fp32", "masters": "fp32"}.items():
            given = getattr(self, name)
            if given == plain:
                continue
            if self.offload:
                raise InputError(
                    "--optim.offload keeps fp32 masters and moments of AdamW on the host, but "
                    f"--optim.{name} is {given}; leave one of the two out"
                )
            if self.kind == "muon" and name != "kind":
                raise InputError(
                    f"--optim.{name} is {given}, but --optim.kind muon has fp32; leave one of the "
                    "two out"
                )
        _at_least(self, lr=0, min_lr_ratio=0, eps=0, weight_decay=0, warmup_steps=0, decay_steps=0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"--optim.{name} is {getattr(self, name)}, but it must be in [0, 1)"
                )
        if not self.min_lr_ratio <= 1:
            raise InputError(
                f"--optim.min-lr-ratio is {self.min_lr_ratio}, but it must be at most 1"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(
                f"--optim.clip-norm is {self.clip_norm}, but it must be above 0 (or "
                f"None for no clipping)"
            )
        for name in ("warmup_steps", "decay_steps"):
            number = getattr(self, name)
            if number is not None and number >= 1 and number != int(min(number, 1e18)):
                raise InputError(
                    f"--optim.{name.replace('_', '-')} is {number}, but from 1 on it must be a "
                    "whole number of steps"
                )
        for name in ("decay_steps", "decay_shape"):
            if getattr(self, name) is not None and self.schedule != "wsd":
                raise InputError(
                    f"--optim.{name.replace('_', '-')} is {getattr(self, name)}, but "
                    f"--optim.schedule {self.schedule} has no decay of its own; set "
                    "--optim.schedule wsd or leave it out"
                )
        self.parameter_groups()

    def parameter_groups(self) -> list[ParameterGroup]:
        """`groups`, parsed.

        Raises:
            InputError: one is not understood.
        """
        return [_parameter_group(text) for text in self.groups]


def _parameter_group(text: str) -> ParameterGroup:
    """Read `PATTERN:lr=...,weight_decay=...`."""
    known = ("lr", "weight_decay")
    refused = f"--optim.groups has {text!r}, "
    pattern, _, said = text.rpartition(":")
    if not pattern or not said:
        raise InputError(
            f"{refused}but it must be PATTERN:lr=NUMBER,weight_decay=NUMBER (or one of the two)"
        )
    values: dict[str, float] = {}
    for part in said.split(","):
        key, _, number = part.partition("=")
        name = key.strip().replace("-", "_")
        if name not in known:
            raise InputError(
                f"{refused}but a group has no {key.strip()!r}; it can have {' and '.join(known)}"
            )
        if name in values:
            raise InputError(f"{refused}which gives {name} twice; give it once")
        try:
            values[name] = float(number)
        except ValueError:
            raise InputError(f"{refused}but {name} = {number!r} is not a number") from None
        if not 0 <= values[name] < math.inf:
            raise InputError(
                f"{refused}but {name} is {values[name]}; it must be a finite number of at least 0"
            )
    return ParameterGroup(pattern.strip(), **values)


@dataclass(kw_only=True)
class Precision:
    """Number formats of the computation; --optim has those of parameters and moments."""

    compute: Literal["auto", "bf16", "fp32", "blockwise", "float8"] = "auto"
    """Forward and backward passes; auto: bf16 on CUDA, fp32 on CPU (bf16 products are very slow
    there). blockwise: as auto, with DeepSeek's block-wise fp8 in the matrix products of attention
    and feed-forward networks. float8: as auto, with torchao's float8 in those of attention, dense
    networks and shared experts.
    """
    float8_recipe: Literal["rowwise", "tensorwise", "rowwise_with_gw_hp"] = "rowwise"
    """Scales of float8, as torchao names them: one for each row of a factor; one for a tensor; or
    rowwise with the gradients of weights not in fp8, the most exact.
    """
    power_of_two_scales: bool = False
    """Round the scales of blockwise up to powers of two."""
    experts: Literal["same", "float8", "mxfp8"] = "same"
    """Grouped products of routed experts. same: in fp8 if compute is blockwise, else not. float8:
    by torchao, a scale for each row of a factor (H100). mxfp8: one for each 32 entries of it
    (B200).
    """

    def __post_init__(self) -> None:
        for name, owner in {"power_of_two_scales": "blockwise", "float8_recipe": "float8"}.items():
            given = getattr(self, name)
            if given != getattr(type(self), name) and self.compute != owner:
                raise InputError(
                    f"--precision.{name.replace('_', '-')} {given} is for --precision.compute "
                    f"{owner}, not {self.compute}; leave it out, or set --precision.compute {owner}"
                )
        if self.experts != "same" and self.compute == "blockwise":
            raise InputError(
                f"--precision.compute blockwise has the experts in fp8 already, and "
                f"--precision.experts is {self.experts}; leave one of the two out"
            )


@dataclass(kw_only=True)
class Checkpoint:
    """Training checkpoints (DCP) and the final Hugging Face export."""

    every: int = 500
    """Steps between checkpoints; one more is written at the end. 0: only at the end."""
    resume: str = "auto"
    """auto: newest complete checkpoint of this run; never; or a checkpoint (directory or URL), of
    another --output too.
    """
    mode: Literal["async", "sync"] = "async"
    """async: training waits for a copy to host memory only, and the file system is written beside
    it.
    """
    if_busy: Literal["wait", "skip"] = "wait"
    """When a checkpoint is due while the one before is still being written: wait for that, or leave
    this one out.
    """
    keep: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept beside them (1000: steps 1000, 2000, ...); 0:
    none.
    """
    keep_best: int = 0
    """So many checkpoints with the lowest eval_loss are kept beside them; one saved without an
    evaluation has none.
    """
    on_error: Literal["stop", "continue"] = "stop"
    """When the output cannot be written (full disk, vanished directory): end with an error, or say
    so and train on.
    """
    remote: str | None = None
    """URL, such as s3://bucket/run, that receives checkpoints/ and exports in place of --output
    (any fsspec file system).
    """
    export: Literal["bf16", "fp32", "fp8", "int4", "mxfp4", "none"] = "bf16"
    """Format of the weights written to hf/ at the end; fp8: DeepSeek's blocks of 128 x 128; int4
    and mxfp4: of models that are released so. All are quantised from the masters, and what
    training did not change keeps its bytes.
    """
    export_every: int = 0
    """Steps between further exports, to hf-step-00000100/ and so on, all of which are kept. 0: only
    hf/, at the end.
    """

    def __post_init__(self) -> None:
        _at_least(self, every=0, keep=0, keep_every=0, keep_best=0, export_every=0)
        if self.export_every and self.export == "none":
            raise InputError(
                f"--checkpoint.export-every is {self.export_every}, but --checkpoint.export is "
                "none; choose bf16, fp32 or fp8"
            )
        if self.remote is not None and "://" not in self.remote:
            raise InputError(
                f"--checkpoint.remote is {self.remote!r}, but it must be a URL such as "
                "s3://bucket/run; a local directory is --output's"
            )


@dataclass(kw_only=True)
class Eval:
    """Evaluation on --data.eval."""

    every: int = 0
    """Steps between evaluations; one is always made at the end. 0: only at the end."""
    answers: int = 0
    """Held-out conversations whose assistant turns are generated greedily before and after training
    (exact match).
    """
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""

    def __post_init__(self) -> None:
        _at_least(self, every=0, answers=0, max_new_tokens=1)


@dataclass(kw_only=True)
class Metrics:
    """What is shown and written while training."""

    tensorboard: bool = True
    progress: bool = True
    """Progress bar on the console."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for the MFU; absent: known for common NVIDIA devices, else no
    MFU.
    """

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise InputError(
                f"--metrics.peak-tflops is {self.peak_tflops}, but it must be above 0 and finite"
            )


@dataclass(kw_only=True)
class Config:
    """One run of torchsft."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    router: Router = field(default_factory=Router)
    parallel: Parallel = field(default_factory=Parallel)
    optim: Optim = field(default_factory=Optim)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    metrics: Metrics = field(default_factory=Metrics)
    output: str = "outputs/run"
    """Directory that receives config.json, metrics.jsonl, tensorboard/, checkpoints/ and hf/."""
    overwrite: bool = False
    """Replace the run that --output holds, its checkpoints included. Given again with the same
    options (as a restarted job does) it continues what it has started.
    """
    print_config: bool = False
    """Print the resolved configuration as JSON and exit."""

    def __post_init__(self) -> None:
        if not self.output:
            raise InputError("--output is empty; name a directory")
        compute, experts = self.precision.compute, self.precision.experts
        in_fp8 = compute in ("float8", "blockwise") or experts != "same"
        if in_fp8 and self.train.activation_checkpointing == "stream":
            raise InputError(
                "--train.activation-checkpointing stream multiplies parts of what has one fp8 "
                f"scale with --precision.compute {compute} and --precision.experts {experts}; "
                "set --train.activation-checkpointing full, or leave fp8 out"
            )


def to_dict(config: Config) -> dict[str, Any]:
    """Return the whole configuration as JSON-able nested dictionaries."""
    # tuples become lists, as they do in config.json
    return json.loads(json.dumps(dataclasses.asdict(config)))
