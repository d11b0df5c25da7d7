"""Which checkpoint a run continues from, and whether its output directory and that checkpoint are its own."""

import sys
from pathlib import Path

from torchsft.checkpoint import state
from torchsft.checkpoint.weight_files import read_json_object
from torchsft.config import Config, InputError, differences, to_dict


def checkpoints_of(output: str | Path, remote: str | None) -> str:
    """Where a run with these options keeps its checkpoints: a directory or URL."""
    return f"{remote.rstrip('/')}/checkpoints" if remote else str(Path(output) / "checkpoints")


def checkpoint_to_continue(config: Config, tell: bool) -> str | None:
    """The checkpoint to continue from, if there is one; to be called by every rank before one writes to the output directory.
    `config`: resolved, as it is compared with the configurations found; `tell`: whether to print (on stderr) that a checkpoint
    is passed over. An InputError: what is found is damaged, of another run, or later than what shall be continued."""
    output, options, asked = Path(config.output), config.checkpoint, to_dict(config)
    saved = output / "config.json"
    try:
        found = read_json_object(saved) if saved.exists() else asked
    except InputError as error:
        raise InputError(f"{saved} is damaged; delete it (each checkpoint has a copy) or choose another --output") from error
    if different := differences(found, asked):
        fault = f"{output} holds another run, which differs in {'; '.join(different)}"
        raise InputError(f"{fault}; choose another --output or delete it")
    where = checkpoints_of(output, options.remote)
    latest, passed_over = state.find_latest(where)
    for sentence in passed_over if tell else ():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
    if options.resume == "auto":
        if latest is None:  # a run must not begin anew, unasked, since --checkpoint.remote changed
            before = checkpoints_of(output, found["checkpoint"].get("remote"))
            if before != where and (elsewhere := state.find_latest(before)[0]):
                fault = f"this run has checkpoints in {before}, but none in {where}, where --checkpoint.remote puts them now"
                raise InputError(f"{fault}; continue with --checkpoint.resume {elsewhere}, or choose another --output")
        return latest
    if options.resume == "never":
        if latest is None:
            return None
        remedy = "choose another --output, or --checkpoint.resume auto to continue that run"
        raise InputError(f"{where} already holds checkpoints, but --checkpoint.resume is never; {remedy}")
    if different := differences(state.saved_config(options.resume), asked):
        fault = f"checkpoint {options.resume} is of another run, which differs in {'; '.join(different)}"
        raise InputError(f"{fault}; give the options of that run, or train from its exported weights with --model.path")
    if latest and state.saved_step(latest) > state.saved_step(options.resume):
        fault = f"{where} holds a later checkpoint ({latest.rsplit('/', 1)[-1]}) than {options.resume}"
        raise InputError(f"{fault}; choose another --output or delete it")
    return options.resume
