"""The lines that a run begins and ends with."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torchsft.config import Config
from torchsft.models.attention import choose_implementation, flash_kernel
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.apply import compute_dtype
from torchsft.parallel.collectives import gather_objects
from torchsft.parallel.stages import ZERO_BUBBLE, StagePlan
from torchsft.parallel.torch_pipelining import weight_pass_possible
from torchsft.parallel.world import World


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has."""

    all: int
    frozen: int
    tied_head_is_frozen: bool  # the output embedding, by freezing the embeddings it is tied to
    untrained: tuple[str, ...]  # patterns of those that the family never trains


def describe_run(
    config: Config,
    world: World,
    parameters: ParameterCounts,
    plan: StagePlan,
    steps: str,
    part: LanguageModel,
) -> str:
    """Say what is about to be trained, and how, in one line; collective. `part` is this rank's."""
    model = f"{parameters.all / 1e6:,.2f} M parameters"
    if parameters.frozen:
        trained = (parameters.all - parameters.frozen) / 1e6
        model += f", of which {trained:,.2f} M are trained"
    if parameters.untrained:
        model += f" ({', '.join(parameters.untrained)} is never trained)"
    if parameters.tied_head_is_frozen:
        model += " (frozen with the embeddings: the output embedding, which is tied to them)"
    layout = ", ".join([*_axes(world), *_pipeline(config, plan)])
    ranks = f"{world.size} x {world.device.type}"
    compute = f"{config.precision.compute} compute"
    dtype = compute_dtype(config.precision.compute, world.device)
    if choose_implementation(config.model.attention, world.device, dtype) == "varlen":
        compute += f", attention by {flash_kernel(world.device)}"
    experts = config.precision.experts
    if config.precision.compute in ("blockwise", "float8") or experts != "same":
        compute += f" (not in fp8: {', '.join(not_in_fp8(part))})"
    if experts != "same":
        compute += f", routed experts in {experts}"
    return f"{model}, {compute}, on {ranks}: {layout}; {steps}"


def not_in_fp8(part: LanguageModel) -> list[str]:
    """Return the modules whose matrices no other number format multiplies, of all ranks' parts of a
    model, without the numbers of layers.
    """
    kept = []
    for name, parameter in part.named_parameters():
        owner = name.rpartition(".")[0]
        if (
            parameter.ndim > 1
            and not {"product", "products"} & vars(part.get_submodule(owner)).keys()
        ):
            kept.append(re.sub(r"model\.(layers\.\d+\.)?", "", owner))
    return list(dict.fromkeys(itertools.chain(*gather_objects(kept))))


def _axes(world: World) -> list[str]:
    """Name the mesh axes that have more than one rank, and dp_shard."""
    sizes = {axis: world.dense[axis].size() for axis in world.dense.mesh_dim_names or ()}
    sizes |= {axis: world.expert[axis].size() for axis in ("ep", "edp")}
    return [f"{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "dp_shard"]


def _pipeline(config: Config, plan: StagePlan) -> list[str]:
    """Describe the schedule and its stages; nothing without a pipeline."""
    schedule = config.parallel.pp_schedule
    if config.parallel.pp == 1:
        return []
    layers = "+".join(str(len(layers)) for layers in plan.layers)
    described = [f"{schedule} over stages of {layers} layers"]
    checkpointing = config.train.activation_checkpointing != "none"
    if schedule in ZERO_BUBBLE and (checkpointing or not weight_pass_possible()):
        reason = "activation checkpointing" if checkpointing else f"torch {torch.__version__}"
        described.append(
            f"with whole backward passes ({reason}) and the bubbles that this schedule else fills"
        )
    return described


@dataclass(frozen=True)
class Answers:
    """How the answers to held-out conversations came out."""

    right: int  # equal to the reference
    ended: int  # ended by themselves
    count: int


@dataclass(frozen=True)
class Speed:
    """What the training steps of this process did."""

    tokens: float  # padding not counted
    seconds: float


def summarise_run(
    *,
    steps: str,
    losses: str,
    evaluation: Mapping[str, float],
    answers: Answers | None,
    output_faults: int,
    speed: Speed,
    time: str,
    output: Path,
    tensorboard: bool,
) -> str:
    """Say what a run has done, in a row for each number."""
    rows = {"steps": steps, "loss": losses, **_evaluation_rows(evaluation)}
    if answers:
        share = f"{100 * answers.right / answers.count:.1f} %"
        right = f"{answers.right} of {answers.count} ({share})"
        rows["exact answers"] = f"{right}; {answers.ended} of {answers.count} ended by themselves"
    if output_faults:
        rows["output faults"] = f"{output_faults}: see the warnings above"
    if speed.tokens:
        per_second = f"{speed.tokens / speed.seconds:,.0f}"
        rows["tokens/s"] = (
            f"{per_second} in {speed.seconds:.0f} s of training steps (padding not counted)"
        )
    rows["time"] = time
    rows["outputs"] = f"{output}: {', '.join(_written(output))}"
    if tensorboard:
        rows["TensorBoard"] = f"tensorboard --logdir {output / 'tensorboard'}"
    width = max(17, 2 + max(len(name) for name in rows))
    return "".join(f"\n{name:<{width}}{text}" for name, text in rows.items())


def _evaluation_rows(evaluation: Mapping[str, float]) -> dict[str, str]:
    """Make a row of the loss over all evaluation sets together, and of each of several."""
    rows = {}
    for key, loss in evaluation.items():
        if key.startswith("eval_loss"):
            perplexity = evaluation[key.replace("loss", "perplexity", 1)]
            name = key if "/" in key else "eval loss"
            rows[name] = f"{loss:.4f} (perplexity {perplexity:.3f})"
    return rows


def _written(output: Path) -> Sequence[str]:
    """List what is in a run's directory."""
    names = ["config.json", "metrics.jsonl", "tensorboard", "checkpoints", "hf"]
    names += sorted(path.name for path in output.glob("hf-step-*"))
    return [name for name in names if (output / name).exists()]
