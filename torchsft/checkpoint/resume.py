"""How a run starts: anew, from its newest checkpoint or from another run's; and what is in its
output directory before.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchsft.checkpoint import state
from torchsft.checkpoint.overwrite import refuse_to_delete_inputs
from torchsft.checkpoint.storage import Folder, root_of
from torchsft.checkpoint.weight_files import read_json_object
from torchsft.config import Config, InputError, to_dict

# What may differ between a run and its continuation: it changes neither the steps' mathematics nor
# their data.
FREE_TO_CHANGE = (
    "output overwrite print_config dry_run metrics eval checkpoint parallel data.eval data.balance "
    "data.cache data.workers optim.offload train.micro_batch_size train.activation_checkpointing "
    "train.max_nonfinite_steps train.activation_checkpointing_every train.selective_products "
    "train.stream_pieces train.activation_offload train.deterministic train.collect_garbage_every "
    "model.loss_chunk model.attention model.experts model.ops model.compile"
).split()
LENGTH = ("train.steps:", "train.epochs:")  # of a run: may change when it is continued


@dataclass(frozen=True)
class Start:
    """What a run starts from; the same on every rank."""

    checkpoint: str | None  # to continue from
    replaces: str = ""  # why the files of an earlier run in the output make way; empty: they stay
    # how the length of the run differs from what it was when the checkpoint was written; empty: not
    longer: str = ""


def find_start(config: Config, announce: bool) -> Start:
    """Return what the run starts from; to be called by every rank before one writes to the output
    directory.

    Args:
        config: resolved, as it is compared with the configurations found.
        announce: whether to print (on stderr) that a checkpoint is passed over, or an option not
            followed.

    Raises:
        InputError: what is found is damaged, of another run, or later than what shall be continued.
    """
    output, options = Path(config.output), config.checkpoint
    found = _found_config(output, config)
    root = root_of(output, options.remote)
    where = f"{root}/checkpoints"
    changes = _changes(found, config) if found else []
    if config.overwrite and (found or Folder(where).names()):  # else there is nothing to overwrite
        if found is None or changes or not found.get("overwrite"):
            refuse_to_delete_inputs(config)
            return _anew(config, f"--overwrite: the earlier run in {output} is replaced")
        if announce:
            said = (
                f"{output} holds this same run, which --overwrite has started: it is continued, "
                f"not replaced"
            )
            print(f"{said} (to start it anew, delete {output})", file=sys.stderr, flush=True)
    earlier_root = root_of(output, found["checkpoint"].get("remote")) if found else root
    if changes and not _got_somewhere(output, {earlier_root, root}):
        replaces = (
            f"the earlier run in {output} left no checkpoint, so it starts anew "
            f"({'; '.join(changes)})"
        )
        return _anew(config, replaces)
    if different := [change for change in changes if not change.startswith(LENGTH)]:
        raise InputError(
            f"{output} holds another run, which differs in {'; '.join(different)}; choose another "
            "--output, or give --overwrite to replace that run"
        )
    latest, passed_over = state.find_latest(where)
    for sentence in passed_over if announce else ():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
    if options.resume == "never":
        if latest is None:
            return Start(None)
        raise InputError(
            f"{where} already holds checkpoints, but --checkpoint.resume is never; choose another "
            "--output, --overwrite to replace that run, or --checkpoint.resume auto to continue it"
        )
    if options.resume != "auto":
        return _named_start(config, where, latest, found, changes)
    if latest is not None:
        return Start(latest, longer="; ".join(changes))
    before = f"{earlier_root}/checkpoints"
    if before != where and (elsewhere := state.find_latest(before)[0]):
        # a run must not begin anew, unasked, since --checkpoint.remote changed
        raise InputError(
            f"this run has checkpoints in {before}, but none in {where}, where "
            "--checkpoint.remote puts them now; continue with --checkpoint.resume "
            f"{elsewhere}, or choose another --output"
        )
    return Start(None)


def _named_start(
    config: Config,
    where: str,
    latest: str | None,
    found: Mapping[str, Any] | None,
    changes: Sequence[str],
) -> Start:
    """Return the start from the checkpoint that --checkpoint.resume names.

    Args:
        config: of the new run.
        where: its checkpoints are kept.
        latest: the newest one there.
        found: configuration of the run in the output directory.
        changes: what makes the new run another one than that.

    Raises:
        InputError: the checkpoint is of another run, or there is a later one.
    """
    options, longer = config.checkpoint, _other_run(config)
    if latest and state.saved_step(latest) > state.saved_step(options.resume):
        own = options.resume.startswith(f"{where}/")
        # that run, started again
        if found and not own and found["checkpoint"].get("resume") == options.resume:
            return Start(latest, longer="; ".join(changes))
        raise InputError(
            f"{where} holds a later checkpoint ({latest.rsplit('/', 1)[-1]}) than "
            f"{options.resume}; choose another --output, or give --checkpoint.resume auto to "
            "continue that one"
        )
    return Start(options.resume, longer=longer)


def _found_config(output: Path, config: Config) -> dict[str, Any] | None:
    """Return the configuration of the run in `output`, if there is one."""
    saved = output / "config.json"
    if not saved.exists():
        return None
    try:
        found = read_json_object(saved)
    except InputError as error:
        if config.overwrite:
            return None
        raise InputError(
            f"{saved} is damaged; delete it (each checkpoint has a copy), choose another --output "
            "or give --overwrite"
        ) from error
    if not isinstance(found.get("checkpoint"), dict) or not isinstance(found.get("train"), dict):
        raise InputError(
            f"{saved} is not the configuration of a run of torchsft (a model's?); "
            f"choose another --output"
        )
    return found


def _changes(found: Mapping[str, Any], config: Config) -> list[str]:
    """Return what makes the run with `config` another one than that with `found`; the inputs that a
    preset generated in the output directory are the same in any directory.
    """
    old, new = (_elsewhere(options) for options in (found, to_dict(config)))
    return differences(old, new)


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    prefix: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Options that make `new` another run than `old` (both from `to_dict`), each as 'train.seed: 0
    -> 1'.

    An option that `old` lacks, as the version that wrote it had none, had its default there
    (`defaults`, of this level); one that `new` lacks any more counts where it asked for something.
    """
    defaults = to_dict(Config()) if defaults is None else defaults
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, a = prefix + key, old.get(key, defaults.get(key))
        b = new.get(key) if key in new or a else a
        if name in FREE_TO_CHANGE or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, name + ".", defaults.get(key, {}))
        else:
            found.append(f"{name}: {a!r} -> {b!r}")
    return found


def _elsewhere(config: Mapping[str, Any]) -> dict[str, Any]:
    generated = json.dumps(str(Path(config["output"]) / "generated"))[1:-1]
    return json.loads(json.dumps(config).replace(generated, "generated"))


def _got_somewhere(output: Path, roots: set[str]) -> bool:
    """Whether an earlier run has left a complete checkpoint or an export.

    Raises:
        InputError: a checkpoint is damaged.
    """
    names = [name for root in {str(output), *roots} for name in Folder(root).names()]
    exported = any(name == "hf" or name.startswith("hf-step-") for name in names)
    return exported or any(state.find_latest(f"{root}/checkpoints")[0] for root in sorted(roots))


def _anew(config: Config, replaces: str) -> Start:
    """Return the start of a run that replaces the earlier one in its output directory."""
    if config.checkpoint.resume in ("auto", "never"):
        return Start(None, replaces)
    return Start(config.checkpoint.resume, replaces, _other_run(config))


def _other_run(config: Config) -> str:
    """Return how the length of the run whose checkpoint --checkpoint.resume names differs.

    Raises:
        InputError: other things do.
    """
    place = config.checkpoint.resume
    changes = _changes(state.saved_config(place), config)
    if different := [change for change in changes if not change.startswith(LENGTH)]:
        raise InputError(
            f"checkpoint {place} is of another run, which differs in {'; '.join(different)}; give "
            "the options of that run, or train from its exported weights with --model.path"
        )
    return "; ".join(changes)
