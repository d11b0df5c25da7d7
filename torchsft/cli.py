"""The command line: options, `--config FILE` and presets become nested dataclasses.

The parser is made of the dataclasses' fields, so a new field is a new option. It is the project's
own because of what users
stumble over elsewhere: an option given twice, a setting that a file and a preset spell differently,
a suggestion that does not help, and seconds until a typo is refused. Nothing slow is imported here.
"""

import ast
import contextlib
import dataclasses
import datetime
import difflib
import inspect
import json
import operator
import os
import re
import shutil
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torchsft.config import Config, InputError

Options = TypeVar("Options")
Values = dict[str, Any]  # of options, by dotted name with underscores: {"train.steps": 5}

# One setting said in two ways: who gives one of them replaces the other of a preset or file below.
LENGTHS = ("train.steps", "train.epochs")

# What `--help` shows; `--help-all` shows everything.
COMMON = (
    "model.path data.train data.eval data.seq_len train.epochs train.steps train.global_batch_size "
    "train.micro_batch_size optim.lr parallel.pp parallel.ep checkpoint.every eval.every"
).split()

# What the same is called in TRL, transformers, axolotl, LLaMA-Factory and torchtitan.
_ELSEWHERE = {
    "checkpoint.every": "save_steps",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint",
    "data.chat_template": "chat_template_path",
    "data.eval": "eval_dataset validation_file",
    "data.mask": "assistant_only_loss completion_only_loss train_on_inputs",
    "data.seq_len": "cutoff_len max_length max_seq_len max_seq_length sequence_len",
    "data.train": "dataset dataset_name train_file",
    "data.workers": "dataloader_num_workers",
    "eval.every": "eval_steps",
    "metrics.tensorboard": "report_to",
    "model.path": "base_model model_name_or_path",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.clip_norm": "max_grad_norm",
    "optim.eps": "adam_epsilon",
    "optim.lr": "learning_rate",
    "optim.schedule": "lr_scheduler lr_scheduler_type",
    "optim.warmup_steps": "warmup_ratio",
    "output": "output_dir",
    "overwrite": "overwrite_output_dir",
    "parallel.cp": "context_parallel_degree",
    "parallel.dp_replicate": "data_parallel_replicate_degree",
    "parallel.dp_shard": "data_parallel_shard_degree",
    "parallel.ep": "expert_parallel_degree",
    "parallel.pp": "pipeline_parallel_degree",
    "parallel.tp": "tensor_parallel_degree",
    "optim.kind": "optim optimizer",
    "optim.offload": "enable_cpu_offload",
    "precision.compute": "bf16 fp8",
    "precision.float8_recipe": "recipe_name",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.deterministic": "full_determinism",
    "train.label_smoothing": "label_smoothing_factor",
    "train.epochs": "num_epochs num_train_epochs",
    "train.global_batch_size": "batch_size gradient_accumulation_steps",
    "train.micro_batch_size": "local_batch_size micro_batch_size per_device_train_batch_size",
    "train.steps": "max_steps",
}
FOREIGN = {name: ours for ours, names in _ELSEWHERE.items() for name in names.split()}


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: dotted, with underscores, such as `optim.warmup_steps`.
        kind: the annotation of its field: str, int, float, bool, a Literal, a union of these with
            None, or tuple[str, ...].
        doc: what it is, for the help.
        default: of its field; MISSING: it has none.
    """

    name: str
    kind: Any
    doc: str
    default: Any

    @property
    def negation(self) -> str:
        """The name by which a switch is turned off, such as `train.no_compile`."""
        section, dot, last = self.name.rpartition(".")
        return f"{section}{dot}no_{last}"

    @property
    def flag(self) -> str:
        """As the user writes it."""
        return flag_of(self.name)

    @property
    def is_list(self) -> bool:
        """Whether it takes any number of values."""
        return typing.get_origin(self.kind) is tuple


def flag_of(name: str) -> str:
    """Return how an option of this name is written."""
    return "--" + name.replace("_", "-")


CONFIG_FILE = Option(
    "config",
    str | None,
    "YAML, TOML or JSON file of these options, such as a run's config.json.",
    default=None,
)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Within it, an InputError is one sentence on stderr, by rank 0 alone, and exit code 2: every
    rank has the same options.
    """
    try:
        yield
    except InputError as error:
        if is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def is_main() -> bool:
    """Whether this process is rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


def parse(
    presets: Mapping[str, Callable[[], Config]],
    choose: Callable[[Values], str],
    argv: Sequence[str],
    doc: str,
    kind: type[Options] = Config,
) -> tuple[str, Options]:
    """Read `[PRESET] [--config FILE] [--option value ...]`: options override the file, and the file
    the preset.

    Args:
        presets: name -> function that builds its configuration.
        choose: names the preset for a command line that does not begin with one, from the values
            that are given.
        argv: without the program's name.
        doc: text above the options in the help.
        kind: `Config`, or a dataclass derived from it, which adds options of a tool.

    Returns:
        The preset's name and the configuration.

    Raises:
        InputError: one sentence about what is not understood.
        SystemExit: the help was asked for and printed.
    """
    options = options_of(kind)
    named = bool(argv) and not argv[0].startswith("-")
    if named and argv[0] not in presets:
        raise InputError(f"preset {argv[0]!r} does not exist; choose one of: {', '.join(presets)}")
    given, wants_help = read_arguments(argv[1:] if named else argv, options)
    file = given.pop("config", None)
    from_file = read_file(file, options) if file else {}
    if from_file.get("overwrite") and "overwrite" not in given:
        raise InputError(
            f"overwrite in {file} is true, but a file does not remove a run by itself; say "
            f"--overwrite to replace the run in --output, or --no-overwrite to continue it"
        )
    name = argv[0] if named else choose(from_file | given)
    preset = presets[name]()
    values = {option: operator.attrgetter(option)(preset) for option in options_of(Config)}
    if wants_help:
        first = {key: inspect.getdoc(build).split("\n\n")[0] for key, build in presets.items()}
        lines = [f"  {key:<10} {' '.join(text.split())}" for key, text in first.items()]
        listing = "Presets (first argument; options override them):\n" + "\n".join(lines)
        show_help(
            f"{doc.strip()}\n\n{listing}\n\nDefaults below are those of {name!r}.",
            options,
            {name: option.default for name, option in options.items()} | values,
            wants_help,
        )
    return name, build(kind, override(override(values, from_file), given))


def parse_tool(kind: type[Options], argv: Sequence[str], doc: str) -> Options:
    """Read the options of a tool, a dataclass that shares fields with `Config`.

    `--config FILE` may be a run's: what it says of options that the tool does not have is passed
    over. Raises: see `parse`.
    """
    options = options_of(kind)
    given, wants_help = read_arguments(argv, options)
    file = given.pop("config", None)
    from_file = read_file(file, options | options_of(Config)) if file else {}
    if wants_help:
        defaults = {name: option.default for name, option in options.items()}
        show_help(doc.strip(), options, defaults, wants_help)
    mine = {name: value for name, value in from_file.items() if name in options}
    return build(kind, override(mine, given))


def override(below: Values, above: Values) -> Values:
    """`below` with the values of `above`; of LENGTHS, what `above` gives replaces the other one."""
    if any(above.get(name) is not None for name in LENGTHS):
        below = below | dict.fromkeys(LENGTHS)
    return below | above


# From and to dataclasses


def options_of(kind: type, prefix: str = "") -> dict[str, Option]:
    """Return the options of a dataclass and those nested in it, by name."""
    found = {}
    hints, docs = typing.get_type_hints(kind), {}
    for each in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        docs |= field_docs(each)
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= options_of(hint, name + ".")
        else:
            found[name] = Option(name, hint, docs.get(field.name, ""), field.default)
    return found


def field_docs(kind: type) -> dict[str, str]:
    """Return the strings behind the fields of a class in its source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    docs = {}
    for statement, behind in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(behind, ast.Expr):
            continue
        if isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str):
            docs[statement.target.id] = " ".join(behind.value.value.split())
    return docs


def build(kind: type[Options], values: Values, prefix: str = "") -> Options:
    """Return the dataclass of these values, with defaults for the others.

    Raises:
        InputError: one is missing, or is refused.
    """
    arguments = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = build(hint, values, name + ".")
        elif name in values:
            arguments[field.name] = values[name]
        elif field.default is dataclasses.MISSING:
            doc = field_docs(kind).get(field.name, "")
            raise InputError(f"{flag_of(name)} is missing; give it: {doc}")
    return kind(**arguments)


# Values


def members_of(kind: Any) -> tuple[Any, ...]:
    """Return what a union allows; another kind alone."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def read_value(kind: Any, value: Any) -> Any:
    """`value`, a word of the command line or a value of a file, as `kind`. Raises ValueError: it is
    none.
    """
    for member in sorted(members_of(kind), key=lambda member: member is not types.NoneType):
        with contextlib.suppress(ValueError):
            return _read_member(member, value)
    raise ValueError


def _read_member(kind: Any, value: Any) -> Any:
    if kind is types.NoneType and value in (None, "None"):
        return None
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    if kind is bool:
        word = str(value).lower()
        if word in ("true", "false") and isinstance(value, bool | str):
            return word == "true"
    if kind is str and isinstance(value, str):
        return value
    if kind is str and isinstance(value, datetime.date):  # what YAML and TOML make of 2026-01-31
        return value.isoformat()
    if kind is int and (isinstance(value, str) or type(value) is int):
        return int(value)
    if kind is float and (isinstance(value, str) or type(value) in (int, float)):
        return float(value)
    raise ValueError


def allowed(kind: Any) -> str:
    """Return what `kind` allows, in words."""
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        types.NoneType: "None",
    }
    members = members_of(kind)
    return " or ".join(
        words.get(member) or "one of " + ", ".join(typing.get_args(member))
        for member in members
        if member is not int or float not in members
    )


def read_option(option: Option, value: Any, said: str) -> Any:
    """Return the value of an option; `value`: a list for one that takes a list. Raises InputError,
    which names it as `said`.
    """
    items = value if option.is_list and isinstance(value, list | tuple) else [value]
    kind = typing.get_args(option.kind)[0] if option.is_list else option.kind
    read = []
    for item in items:
        try:
            read.append(read_value(kind, item))
        except ValueError:
            raise InputError(
                f"{said} is {_shown(item)}, but it must be {allowed(kind)}{_meant(kind, item)}"
            ) from None
    return tuple(read) if option.is_list else read[0]


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _meant(kind: Any, value: Any) -> str:
    """Return the nearest allowed word, as the end of a sentence."""
    words = [word for word in typing.get_args(kind) if isinstance(word, str)]
    found = difflib.get_close_matches(str(value), words, 1)
    return f"; did you mean {found[0]}?" if found else ""


# The command line


def read_arguments(argv: Sequence[str], options: Mapping[str, Option]) -> tuple[Values, str]:
    """Return the values of a command line, and "help" or "help_all" where that is asked for, else
    "". Raises InputError.
    """
    known = {**options, CONFIG_FILE.name: CONFIG_FILE}
    switches = {option.negation: option for option in known.values() if option.kind is bool}
    given = {}
    first = {}  # how an option was given before
    wants_help = ""
    for flag, words in _grouped(argv):
        name, written = flag.lstrip("-").replace("-", "_"), " ".join([flag, *words])
        if flag == "-h" or name in ("help", "help_all"):
            wants_help = "help" if flag == "-h" else name
            continue
        negated = name not in known
        option = known.get(name) or switches.get(name)
        if option is None or not flag.startswith("--"):
            raise InputError(f"there is no option {flag}; {suggestion(name, known)}")
        if option.name in given and not option.is_list:
            raise InputError(
                f"{first[option.name]} and {written} are one option given twice; give it once"
            )
        first[option.name] = written
        if option.is_list:
            given[option.name] = given.get(option.name, ()) + read_option(
                option, words, option.flag
            )
        elif option.kind is bool and not words:
            given[option.name] = not negated
        elif negated or len(words) != 1:
            takes = "no value" if negated else f"one value ({allowed(option.kind)})"
            raise InputError(
                f"{flag} takes {takes}, but is given "
                f"{len(words)}{': ' if words else ''}{' '.join(words)}"
            )
        else:
            given[option.name] = read_option(option, words[0], option.flag)
    return given, wants_help


def _grouped(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each option as it is written, with the words that follow it."""
    groups = []
    for word in argv:
        number = re.fullmatch(r"-(\d|\.\d|inf).*", word)
        if word.startswith("-") and word != "-" and not number:
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise InputError(
                f"{word!r} belongs to no option; options are written --name value (see --help)"
            )
    return groups


def suggestion(name: str, known: Mapping[str, Option], flags: bool = True) -> str:
    """Say what may have been meant by an unknown name, as the end of a sentence; `flags`: whether
    options have flags, and do not stand in files alone.
    """
    switch = known.get(name.removeprefix("no_"))
    if switch is not None and switch.kind is bool:
        return f"did you mean {flag_of(switch.negation)}?"
    last = name.rpartition(".")[2]
    lasts = {}
    for other in known:
        lasts.setdefault(other.rpartition(".")[2], []).append(other)
    found = [FOREIGN.get(last), *lasts.get(last, ())]
    found += difflib.get_close_matches(name, known, 3, 0.75)
    for near in difflib.get_close_matches(last, lasts, 2, 0.75):
        found += lasts[near]
    nearest = [other for other in dict.fromkeys(found) if other in known][:3]
    if nearest:
        words = [known[other].flag if flags else other for other in nearest]
        return f"did you mean {' or '.join(words)}?"
    return "--help-all lists all options" if flags else f"those there are: {', '.join(known)}"


# Files


def read_file(path: str, options: Mapping[str, Option], flag: str = CONFIG_FILE.flag) -> Values:
    """Return the values in a YAML, TOML or JSON file of these options, which was given as `flag`.

    Raises:
        InputError: it is none, or says what cannot be.
    """
    content = _load(Path(path), flag)
    if not isinstance(content, dict):
        raise InputError(
            f"{flag} {path} does not hold options, but {_shown(content)[:60]}; write them as in "
            f"a run's config.json"
        )
    values = {}
    for name, value in _flat(content, options, path):
        said = f"{name} in {path}"
        if name not in options:
            near = suggestion(name, options, flags=flag == CONFIG_FILE.flag)
            raise InputError(f"there is no option {said}; {near}")
        read = read_option(options[name], value, said)
        if values.get(name, read) != read:
            raise InputError(
                f"{said} is given twice, as {_shown(values[name])} and as "
                f"{_shown(read)}; give it once"
            )
        values[name] = read
    return values


def _flat(
    content: Mapping[Any, Any], options: Mapping[str, Option], path: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested tables."""
    for key, value in content.items():
        name = prefix + str(key).replace("-", "_")
        is_section = any(option.startswith(name + ".") for option in options)
        if is_section and not isinstance(value, dict | None):
            raise InputError(
                f"{name} in {path} is {_shown(value)}, but it must be a table of its options"
            )
        if is_section:
            yield from _flat(value or {}, options, path, name + ".")
        else:
            yield name, value


def _load(path: Path, flag: str) -> Any:
    """Return the value that a file holds.

    Raises:
        InputError: it cannot be read.
    """
    if not path.is_file():
        inside = path / "config.json"
        remedy = (
            f"give the file, {inside}" if inside.is_file() else "name a YAML, TOML or JSON file"
        )
        raise InputError(
            f"{flag} {path} {'is a directory' if path.is_dir() else 'does not exist'}; {remedy}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix in (".yaml", ".yml"):
            return _load_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{flag} {path} cannot be read ({' '.join(str(error).split())}); mend or rename it"
        ) from None
    raise InputError(
        f"{flag} {path} has none of the endings .json, .yaml, .yml and .toml; rename it"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError: one key is there twice, of which JSON and YAML would
    keep the last without a word, or is a list or table.
    """
    found = {}
    for key, value in pairs:
        if not isinstance(key, Hashable):  # YAML's [a]: b
            raise ValueError(f"key {_shown(key)} is no name")
        if key in found:
            raise ValueError(
                f"key {key!r} is given twice, as {_shown(found[key])} and as {_shown(value)}"
            )
        found[key] = value
    return found


def _load_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            return _unique(
                [
                    (self.construct_object(key, True), self.construct_object(value, True))
                    for key, value in node.value
                ]
            )

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_mapping)
    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


# Help


def show_help(
    doc: str, options: Mapping[str, Option], values: Values, which: str
) -> typing.NoReturn:
    """Print the help on rank 0 and end the program; `which`: "help" for the options that most
    people use, or "help_all".
    """
    shown = [
        option
        for option in options.values()
        if which == "help_all" or option.name in COMMON or "." not in option.name
    ]
    width = min(shutil.get_terminal_size().columns or 100, 110)
    most_used = "Options that most people use (--help-all lists all):"
    lines = [doc, "", "Options:" if which == "help_all" else most_used]
    for option in [*shown, CONFIG_FILE]:
        lines.append(f"  {option.flag} {_metavar(option)}".rstrip())
        value = values.get(option.name, dataclasses.MISSING)
        default = "" if value is dataclasses.MISSING else f" (default: {_default(value)})"
        text = f"{option.doc}{default}".strip()
        lines.append(textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if is_main():
        print("\n".join(lines))
    raise SystemExit(0)


def _metavar(option: Option) -> str:
    """Return what stands for the value in the help."""
    if option.is_list:
        return "[VALUE ...]"
    if typing.get_origin(option.kind) is Literal:
        return "{" + ",".join(typing.get_args(option.kind)) + "}"
    if option.kind is bool:
        return f"| {flag_of(option.negation)}"
    members = members_of(option.kind)
    return "NUMBER" if float in members else "N" if int in members else "TEXT"


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value) if value != "" else "empty"
