"""Which parameters are trained, and with which options: what --train.freeze and --optim.groups mean
for a model.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate

from torch import nn

from torchsft.config import InputError
from torchsft.config.optim_options import ParameterGroup


@dataclass(frozen=True)
class Selection:
    """Decided for every parameter of the whole model, by name.

    Attributes:
        frozen: names that are not trained.
        groups: trained name -> what --optim.groups says of it; names without a group are absent.
    """

    frozen: frozenset[str]
    groups: Mapping[str, ParameterGroup]

    def apply(self, model: nn.Module) -> None:
        """Freeze what is to be frozen of `model`, all of the model or a part of it, before it is
        sharded.
        """
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)


def select(
    shapes: Mapping[str, Sequence[int]],  # name of every parameter of the whole model -> its shape
    freeze: Iterable[str],  # patterns of --train.freeze
    groups: Iterable[ParameterGroup],  # of --optim.groups
    words: Mapping[str, str],  # what the model's family calls a part of the model -> its pattern
) -> Selection:
    """Decide by patterns; of several groups that match a parameter the first one counts.

    Raises:
        InputError: a pattern matches no parameter, nothing is left to train, or a group can change
            nothing.
    """
    frozen: set[str] = set()
    for pattern in freeze:
        frozen |= matching(pattern, shapes, words, "--train.freeze")
    if shapes.keys() <= frozen:
        raise InputError("--train.freeze leaves no parameter to train; leave at least one out")
    chosen: dict[str, ParameterGroup] = {}
    for group in groups:
        option = f"--optim.groups {group.pattern!r}"
        matched = matching(group.pattern, shapes, words, "--optim.groups")
        trained = matched - frozen
        if not trained:
            raise InputError(
                f"{option} matches only parameters that are not trained (--train.freeze, "
                "--router.train False, or never in this family); leave the group out"
            )
        free = trained - chosen.keys()
        if not free:
            raise InputError(
                f"{option} matches only parameters that groups before it have taken; the first "
                "group that matches decides: put it before them or leave it out"
            )
        if group.weight_decay and all(len(shapes[name]) < 2 for name in free):
            raise InputError(
                f"{option} sets weight_decay, but matches only norms and biases, which have none "
                "(it is for matrices); leave it out"
            )
        chosen |= dict.fromkeys(free, group)
    return Selection(frozenset(frozen), chosen)


def matching(
    pattern: str, names: Collection[str], words: Mapping[str, str], option: str
) -> set[str]:
    """Return names that a pattern means: a word, layers.N, layers.A-B, or a pattern with * and ? of
    names or their beginnings.

    Raises:
        InputError: there are none, or not for each of the layers; `option` gave the pattern.
    """
    found: set[str] = set()
    layers = re.fullmatch(r"layers\.(\d+)(?:-(\d+))?", pattern)
    if layers is None:
        found = _matching(words.get(pattern, pattern), names)
        if not found:
            raise InputError(
                f"{option} {pattern!r} matches no parameter; {_near(pattern, names, words)}"
            )
        return found
    first, last = int(layers[1]), int(layers[2] or layers[1])
    if last < first:
        raise InputError(f"{option} {pattern!r} ends before it begins; write layers.{last}-{first}")
    for layer in range(first, last + 1):
        of_layer = _matching(f"{words['layers']}.{layer}", names)
        if not of_layer:
            begin = words["layers"].count(".") + 1
            numbers = [int(name.split(".")[begin]) for name in _matching(words["layers"], names)]
            raise InputError(
                f"{option} {pattern!r} names layer {layer}, but the model's are 0 to {max(numbers)}"
            )
        found |= of_layer
    return found


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Return names that match as a whole, or up to a dot (a module and all that is in it)."""
    match = re.compile(f"{translate(pattern)}|{translate(pattern + '.*')}").match
    return {name for name in names if match(name)}


def _near(pattern: str, names: Iterable[str], words: Mapping[str, str]) -> str:
    known = ", ".join(words)
    if re.search(r"\.experts\.\d", pattern):
        stacked = " and ".join(sorted(_matching(words["experts"], names))[:2])
        return f"the experts of a layer are stacked in parameters such as {stacked}"
    near = get_close_matches(pattern, [*words, *names], n=3, cutoff=0.4)
    similar = (
        f"similar names: {', '.join(near)}" if near else f"a name is such as {next(iter(names))}"
    )
    return f"{similar}; words: {known}, layers.N, layers.A-B"
