"""Every option of a run, as nested dataclasses.

A recipe fills these in (a preset), the command line overrides any field (`--optim.lr 1e-5`, read by
`cli.py`; the string behind a field is its help), and the resolved result is written to
`OUTPUT/config.json` and into every checkpoint. Each class checks its own fields; what needs the
world size is checked in `parallel/world.py`, what needs the model's `config.json` in `models/`.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torchsft.config.data_options import Data
from torchsft.config.errors import InputError, at_least
from torchsft.config.optim_options import Optim


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
    compile: bool = False
    """Compile what lies between collectives (projections, norms, rotation, router, dense networks)
    by torch.compile: fewer and larger kernels; the first step takes about a minute longer.
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
        at_least(self, loss_chunk=1, mtp_weight=0)
        if self.mtp != "train" and self.mtp_weight != type(self).mtp_weight:
            raise InputError(
                f"--model.mtp-weight is {self.mtp_weight}, but --model.mtp is {self.mtp}; set "
                "--model.mtp train or leave it out"
            )


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
    collect_garbage_every: int = 50
    """Steps between two runs of Python's garbage collector, the same ones on all ranks; where
    training pauses (evaluations, checkpoints) it runs too. 0: when Python likes, while other ranks
    wait.
    """

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise InputError(
                f"--train.steps ({self.steps}) and --train.epochs ({self.epochs}) are both set; "
                "give one of them (the other: None)"
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"--train.epochs is {self.epochs}, but it must be above 0")
        at_least(
            self,
            steps=1,
            global_batch_size=1,
            micro_batch_size=1,
            seed=0,
            max_nonfinite_steps=1,
            collect_garbage_every=0,
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
        at_least(self, bias_update_rate=0, aux_loss=0, z_loss=0)


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
    ep_exchange: Literal["auto", "flat", "two-level"] = "auto"
    """How tokens get to experts on other ranks. flat: once for each expert. two-level: once to each
    node that holds some of a token's experts, and on from there within the node. auto: two-level
    where the ranks of ep fill several nodes of several ranks each.
    """
    timeout_seconds: float = 600.0
    """A collective of a step that waits longer than this ends the job."""
    flight_recorder: int = 0
    """Collectives of each rank that torch keeps, to write the last ones to
    OUTPUT/flight-recorder/rank_N when one waits too long; 0: none. 2000 are some 2 MB a rank.
    """

    def __post_init__(self) -> None:
        at_least(self, pp=1, dp_replicate=1, cp=1, tp=1, ep=1, flight_recorder=0)
        if self.dp_shard != -1:
            at_least(self, dp_shard=1)
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
        at_least(self, every=0, keep=0, keep_every=0, keep_best=0, export_every=0)
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
        at_least(self, every=0, answers=0, max_new_tokens=1)


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
    dry_run: bool = False
    """Print what memory these options need, from the model's config.json, and exit (1: more than
    the GPU that is there). Planned are torchrun's ranks, or in one process those of the layout (as
    many as WORLD_SIZE says, if it is set), of each kind of pipeline rank one.
    """

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
