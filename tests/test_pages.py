"""The pages for people: commands and options go through the real parsers, quick commands run, and
every file, name, link and picture is there.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.distributed.run import get_args_parser

import torchsft
from recipes import deepseek_v3_sft
from recipes.sft import choose_preset
from tests import same_numbers
from tests.families import RECIPES
from tools import benchmark, convert_checkpoint, draw_pages, fp8_study, inspect_data, plan
from torchsft import cli
from torchsft.config import Config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("recipes", "torchsft", "tools", "tests")
PAGES = [ROOT / "README.md"]
PAGES += [page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("README.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

# A word that stands for something else: N, DIR, PATH:SPLIT, "...".
PLACEHOLDER = re.compile(r"(?<![A-Za-z0-9])[A-Z]+(?![A-Za-z0-9])|\.\.\.")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


options_of = functools.cache(cli.options_of)  # it parses the source of the dataclasses
torchrun_parser = functools.cache(get_args_parser)


# ---------------------------------------------------------------- what a page holds


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for kind, text in FENCED.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text())


def spans(text: str) -> list[str]:
    """What stands between single backticks; in tables a bar is written with a backslash."""
    found = re.findall(r"`([^`]+)`", text)
    return [" ".join(span.replace("\\|", "|").split()) for span in found]


def tables(page: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """The tables of a page: the first cell of the header, and rows of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        lines = table.strip().splitlines()
        rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
        yield rows[0][0].strip(), [[cell.strip() for cell in row] for row in rows[2:]]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell script, as words; those inside of `bash -c` in place of that."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for between, group in itertools.groupby(words, lambda word: word == "&&"):
            command = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), group))
            if between or not command or command[0] == "export":
                continue
            if "-c" in command:
                yield from commands(command[command.index("-c") + 1])
            else:
                yield command


def all_commands(page: Path) -> list[list[str]]:
    """Those of a page's blocks, and those that stand in its text."""
    found = [command for block in blocks(page, "bash") for command in commands(block)]
    for span in spans(prose(page)):
        words = shlex.split(span)
        if words[0] in CHECKS and len(words) > 1:
            found.append(list(itertools.takewhile(lambda word: word != "...", words)))
    return found


# ---------------------------------------------------------------- the real parsers


def check_recipe(recipe: ModuleType, argv: Sequence[str]) -> None:
    cli.parse(recipe.PRESETS, choose_preset, argv, "")


PARSERS: dict[str, Callable[[list[str]], object]] = {
    **{
        f"{recipe.__name__.replace('.', '/')}.py": functools.partial(check_recipe, recipe)
        for recipe in RECIPES
    },
    "tools/inspect_data.py": lambda argv: cli.parse_tool(inspect_data.Options, argv, ""),
    "tools/convert_checkpoint.py": convert_checkpoint.parse,
    "tools/benchmark.py": benchmark.parse,
    "tools/draw_pages.py": draw_pages.parse,
    "tools/fp8_study.py": fp8_study.parse,
    "tools/plan.py": plan.read,
    "tests/same_numbers.py": same_numbers.parse,
}


def check_python(words: list[str]) -> None:
    script, *argv = words
    assert (ROOT / script).is_file(), script
    try:
        PARSERS[script](argv)
    except SystemExit as end:  # of --help too
        assert not end.code, f"{script} refuses {argv}"


def check_torchrun(words: list[str]) -> None:
    if not any(word.endswith(".py") for word in words):  # the text leaves the recipe out
        words = [*words, "recipes/deepseek_v3_sft.py"]
    options = torchrun_parser().parse_args(words)
    check_python([options.training_script, *options.training_script_args])


def check_pip(words: list[str]) -> None:
    assert words[:2] == ["install", "-e"], words
    extras = re.findall(r"[\w-]+", words[2])
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras) <= set(known), words


def check_pytest(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("-k")
    # of pytest-xdist
    parser.add_argument("-n", type=int)
    parser.add_argument("--dist", choices=["load", "loadfile"])
    parser.add_argument("files", nargs="*")
    options = parser.parse_args(words)
    assert all((ROOT / file).exists() for file in options.files), words
    if options.m:
        assert f'markers = ["{options.m}:' in (ROOT / "pyproject.toml").read_text()


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "pytest": check_pytest,
}
ELSEWHERE = {"tensorboard", "head"}  # programs whose options nobody here knows


@every_page
def test_every_command_is_understood_by_its_parser(page):
    for program, *words in all_commands(page):
        if program not in ELSEWHERE:
            CHECKS[program](words)


def test_options_of_a_file_are_understood(tmp_path):
    (block,) = blocks(ROOT / "recipes" / "README.md", "yaml")
    file = tmp_path / "run.yaml"
    file.write_text(block)
    presets = deepseek_v3_sft.PRESETS
    preset, config = cli.parse(presets, choose_preset, ["--config", str(file)], "")
    assert (preset, config.data.seq_len, config.train.epochs) == ("finetune", 8192, 2)


# Command lines of the tools, to which an option can be added.
TOOLS = [("tools/convert_checkpoint.py", line) for line in (["to-dcp", "a", "b"], ["info", "a"])]
TOOLS += [("tools/convert_checkpoint.py", line) for line in (["to-hf", "a", "b"], ["verify", "a"])]
TOOLS += [("tools/benchmark.py", [command]) for command in ("step", "gpu", "data")]
TOOLS += [("tools/fp8_study.py", ["a"])]
SECTIONS = ("--model", "--data", "--train")  # the text names all options of one so
TORCH_2_13 = ("--shutdown-timeout",)  # options of torchrun that older versions lack


def is_option(flag: str, values: list[str]) -> bool:
    """Whether a recipe, a tool or torchrun has this option, and takes these values."""
    name = flag.removeprefix("--").replace("-", "_")
    positive = re.sub(r"(^|\.)no_", r"\1", name)  # of a switch
    for kind in (Config, inspect_data.Options, plan.Options):
        options = options_of(kind)
        if {name, positive} & options.keys() or flag in ("--config", "--help", "--help-all"):
            if values:
                cli.read_arguments([flag, *values], options)
            return True
    tried = [values] if values else [[], ["1"]]
    for (script, line), words in itertools.product(TOOLS, tried):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            PARSERS[script]([*line, flag, *words])
            return True
    torchrun = {name for action in torchrun_parser()._actions for name in action.option_strings}
    return flag in torchrun or (flag in TORCH_2_13 and torch.__version__ < "2.13")


@every_page
def test_every_option_that_the_text_names_exists_and_takes_the_values_it_is_shown_with(page):
    for span in spans(prose(page)):
        flag, *words = shlex.split(span) if span.startswith("--") else SECTIONS
        if flag in SECTIONS:
            continue
        if any(PLACEHOLDER.search(word) for word in words):
            words = []
        for values in itertools.product(*(word.split("|") for word in words)):
            assert is_option(flag, list(values)), span


@every_page
def test_a_row_about_an_option_names_all_of_its_choices(page):
    options = options_of(Config)
    for _, rows in tables(page):
        for first, *others in rows:
            for span in spans(first):
                name = span.removeprefix("--").replace("-", "_")
                if span.startswith("--") and name in options:
                    kind = str(options[name].kind)
                    choices = re.findall(r"'([^']+)'", kind) if "Literal" in kind else []
                    missing = set(choices) - set(spans(" ".join(others)))
                    assert not missing, f"{span} can also be {missing}"


def test_every_option_of_a_run_is_explained_on_some_page():
    named = {
        shlex.split(span)[0]
        for page in PAGES
        for span in spans(prose(page))
        if span.startswith("--")
    }
    options = options_of(Config).values()
    assert not [option.flag for option in options if option.flag not in named]


@every_page
def test_names_of_options_are_right(page):
    options = options_of(Config)
    sections = {name.partition(".")[0] for name in options if "." in name}
    for span in spans(prose(page)):
        section, dot, last = span.partition(".")
        if (
            dot
            and section in sections
            and re.fullmatch(r"[a-z_]+", last)
            and not last.startswith("json")
        ):
            assert span in options, span


def test_every_preset_has_a_row():
    rows = {
        span
        for header, rows in tables(ROOT / "recipes" / "README.md")
        if header == "preset"
        for first, *_ in rows
        for span in spans(first)
    }
    recipes = [path.stem for path in (ROOT / "recipes").glob("*_sft.py")]
    presets = [importlib.import_module(f"recipes.{name}").PRESETS for name in recipes]
    assert rows == set(itertools.chain.from_iterable(presets))


# ---------------------------------------------------------------- files, names, links


def base_of(page: Path, header: str) -> Path:
    """The folder whose files a table lists: that of the page, or the one that its header names."""
    folders = re.findall(r"^file in `([^`]+)/`$", header)
    return page.parent / folders[0] if folders else page.parent


def listed_files(page: Path) -> list[Path]:
    """The files that have a sentence in a table of a page."""
    return [
        base_of(page, header) / span
        for header, rows in tables(page)
        if header.startswith("file")
        for first, *_ in rows
        for span in spans(first)
    ]


def test_every_file_has_its_sentence_on_one_page():
    listed = Counter(itertools.chain.from_iterable(map(listed_files, PAGES)))
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    files += (ROOT / "tools").rglob("*.html")
    needed = {
        file
        for file in files
        if file.name != "__init__.py"
        # of tests, what they share; a test says itself what it claims
        and not file.name.startswith("test_")
    }
    needed |= {ROOT / "torchsft" / folder / "__init__.py" for folder in ("ops", "config")}
    assert sorted(needed - listed.keys()) == [], "files without a sentence"
    assert sorted(listed.keys() - needed) == [], "sentences about files that are not there"
    assert [file for file, times in listed.items() if times > 1] == []


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda f: f.stem)
def test_every_test_file_says_what_it_claims(file):
    assert ast.get_docstring(ast.parse(file.read_text()))


def defined(file: Path) -> set[str]:
    """Names of a module: NAME, and CLASS.METHOD."""

    def names(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            yield from (target.id for target in targets if isinstance(target, ast.Name))
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in names(node.body))

    return set(names(ast.parse(file.read_text()).body))


@every_page
def test_every_path_and_name_that_a_page_names_exists(page):
    drawn = {name.split("/")[-1] for name in drawn_run()}
    bases = [page.parent, ROOT, ROOT / "torchsft"]
    bases += [base_of(page, header) for header, _ in tables(page)]
    for span in spans(prose(page)):
        match = re.fullmatch(r"([\w./-]+(?:\.(?:py|md|svg|html|toml)|/))(?:::([\w.]+))?", span)
        if not match or PLACEHOLDER.search(span):
            continue
        path, name = match.groups()
        of_a_run = path.rstrip("/") in drawn or re.fullmatch(r"hf-step-\d+/", path)
        found = [base / path for base in bases if (base / path).exists()]
        assert found or of_a_run, span
        if name:
            assert name in defined(found[0]), span
    for name in re.findall(r"`torchsft\.(\w+)", prose(page)):
        assert hasattr(torchsft, name), name


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in addresses."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("name", draw_pages.PICTURES)
def test_pictures_are_those_that_the_script_draws(name):
    assert (ROOT / name).read_text(encoding="utf-8") == draw_pages.PICTURES[name]()


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "## Status" in text.splitlines()[:25]
    paragraphs = re.split(r"\n\s*\n", prose(ROOT / "README.md"))
    long = [text for text in paragraphs if "|" not in text and len(text.splitlines()) > 5]
    assert [text for text in long if not text.startswith("- ")] == []


# ---------------------------------------------------------------- commands that run


def drawn_run() -> set[str]:
    """The files and folders in the drawing of what a run leaves, folders with a slash, relative to
    its directory.
    """
    drawing = next(b for b in blocks(ROOT / "recipes" / "README.md", "") if "├──" in b)
    found, above = set(), []
    for line in drawing.splitlines()[1:]:
        indent, name = re.match(r"([│ ]*)[├└]── (\S+)", line).groups()
        above[len(indent) // 4 :] = [name.rstrip("/")]
        found.add("/".join(above))
    return found


def general(path: str) -> str:
    """A path of a run without what differs from run to run."""
    path = re.sub(r"events\.out\.tfevents.*", "events", path)
    path = re.sub(r"step-\d+", "step", path)
    return re.sub(r"model-\d+-of-\d+", "model", path)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A directory in which the commands of the pages find what they name: a finished run of the
    debug preset (two steps), its export as a model, and its data.
    """
    directory = tmp_path_factory.mktemp("pages")
    run = directory / "outputs" / "deepseek_v3_debug"
    options = "debug --train.steps 2 --checkpoint.every 0 --eval.answers 2 --eval.max-new-tokens 2"
    subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "deepseek_v3_sft.py"), *options.split()],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    shutil.copytree(run / "hf", directory / "models" / "my-deepseek")
    shutil.copytree(run / "hf", directory / "models" / "DeepSeek-V3")
    checkpoint = directory / "runs" / "first" / "checkpoints" / "step-00000500"
    shutil.copytree(run / "checkpoints" / "step-00000002", checkpoint)
    shutil.copy(run / "generated" / "eval.jsonl", directory / "chats.jsonl")
    return directory


def test_a_run_leaves_what_is_drawn(sandbox):
    run = sandbox / "outputs" / "deepseek_v3_debug"
    found = {str(path.relative_to(run)) for path in run.rglob("*")}
    found = {general(path) for path in found if not path.startswith("generated/")}
    assert found == {general(path) for path in drawn_run()}


def test_the_example_of_a_model_alone_runs(sandbox):
    (block,) = blocks(ROOT / "torchsft" / "README.md", "python")
    names: dict[str, object] = {}
    exec(block.replace("/models/", f"{sandbox}/models/"), names)
    model, logits = names["model"], names["logits"]
    assert logits.shape == (3, model.config.vocab_size)


def quick_commands() -> list[str]:
    """The commands of all pages, each once, that read or convert a small model, or only answer a
    question.
    """
    told = {"--help", "--help-all", "--print-config"}
    told |= {"tools/inspect_data.py", "tools/convert_checkpoint.py"}
    scripts = itertools.chain.from_iterable(blocks(page, "bash") for page in PAGES)
    found = itertools.chain.from_iterable(map(commands, scripts))
    chosen = [words for words in found if words[0] == "python" and told & set(words)]
    return list(dict.fromkeys(map(shlex.join, chosen)))


@pytest.mark.parametrize("command", quick_commands())
def test_quick_commands_run(command, sandbox, monkeypatch, capsys):
    monkeypatch.chdir(sandbox)
    words = [word.replace("/models/", f"{sandbox}/models/") for word in shlex.split(command)]
    module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", words[1:])
    try:
        assert not module.main()
    except SystemExit as end:  # of --help
        assert not end.code
    assert capsys.readouterr().out
