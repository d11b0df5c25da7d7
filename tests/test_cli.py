"""The command line as users write it: repeated options, files, presets, help, suggestions, and what
is told before torch.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recipes.deepseek_v3_sft import PRESETS
from recipes.sft import choose_preset
from tests.families import RECIPES
from torchsft import cli, launch
from torchsft.config import Config, Data, InputError, to_dict

ROOT = Path(__file__).resolve().parents[1]
RECIPE, INSPECTOR = ROOT / "recipes" / "deepseek_v3_sft.py", ROOT / "tools" / "inspect_data.py"


def options(*argv, presets=PRESETS):
    return cli.parse(presets, choose_preset, list(map(str, argv)), "About.")[1]


def refusal(*argv):
    with pytest.raises(InputError) as error:
        options(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# One name, one meaning


def test_an_option_that_takes_a_list_appends():
    assert options("--data.train", "a", "b", "--data.eval=e", "--data.train", "c").data.train == (
        "a",
        "b",
        "c",
    )
    assert options("--data.train=a", "b").data.train == ("a", "b")
    assert options("--parallel.pp-layers", 1, 2, "--parallel.pp_layers=3").parallel.pp_layers == (
        1,
        2,
        3,
    )


@pytest.mark.parametrize(
    ("argv", "both"),
    [
        (["--optim.lr", "1", "--optim.lr", "2"], ["--optim.lr 1", "--optim.lr 2"]),
        (["--optim.lr=1", "--optim.lr", "1"], ["--optim.lr 1"]),
        (["--data.seq-len", "8", "--data.seq_len=9"], ["--data.seq-len 8", "--data.seq_len 9"]),
        (
            ["--metrics.progress", "--metrics.no-progress"],
            ["--metrics.progress", "--metrics.no-progress"],
        ),
        (
            ["--model.random-init", "--model.random_init", "False"],
            ["--model.random-init", "--model.random_init False"],
        ),
        (["--config", "a", "--config=b"], ["--config a", "--config b"]),
    ],
)
def test_any_other_option_given_twice_is_refused_with_both(argv, both):
    said = refusal(*argv)
    assert "given twice" in said and all(part in said for part in both)


# Values


def test_values_of_every_kind_are_read():
    config = options(
        *(
            "--optim.lr",
            "1e-5",
            "--parallel.dp-shard",
            "-1",
            "--optim.clip-norm",
            "None",
            "--model.path=a=b",
        ),
        *(
            "--metrics.no-progress",
            "--metrics.tensorboard",
            "false",
            "--data.template-kwargs",
            '{"a": "--b"}',
            "--data.eval",
        ),
    )
    assert (
        config.optim.lr,
        config.parallel.dp_shard,
        config.optim.clip_norm,
        config.model.path,
    ) == (1e-5, -1, None, "a=b")
    assert (config.metrics.progress, config.metrics.tensorboard, config.data.eval) == (
        False,
        False,
        (),
    )
    assert config.data.template_kwargs == '{"a": "--b"}'


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lr", "fast"], ["--optim.lr is 'fast'", "a number"]),
        (["--train.steps", "2.5"], ["--train.steps is '2.5'", "a whole number"]),
        (
            ["--data.mask", "asistant"],
            ["--data.mask is 'asistant'", "assistant, last-turn, all", "did you mean assistant?"],
        ),
        (["--metrics.progress", "maybe"], ["--metrics.progress is 'maybe'", "True or False"]),
        (["--optim.lr"], ["--optim.lr takes one value"]),
        (["--optim.lr", "1", "2"], ["--optim.lr takes one value", "1 2"]),
        (["--metrics.no-progress", "True"], ["--metrics.no-progress takes no value"]),
        (["debug", "moonlight"], ["'moonlight' belongs to no option"]),
        (["--parallel.pp-layers", "1", "x"], ["--parallel.pp-layers is 'x'"]),
        (["-lr", "1"], ["no option -lr", "--optim.lr"]),
    ],
)
def test_a_wrong_value_is_told_with_its_option_and_what_is_allowed(argv, words):
    said = refusal(*argv)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--optim.learning-rate", "--optim.lr"),
        ("--learning_rate", "--optim.lr"),
        ("--lr", "--optim.lr"),
        ("--per_device_train_batch_size", "--train.micro-batch-size"),
        ("--num_train_epochs", "--train.epochs"),
        ("--gradient_accumulation_steps", "--train.global-batch-size"),
        ("--max_length", "--data.seq-len"),
        ("--output_dir", "--output"),
        ("--fp8", "--precision.compute"),
        ("--optim", "--optim.kind"),
        ("--full_determinism", "--train.deterministic"),
        ("--training.enable_cpu_offload", "--optim.offload"),
        ("--optim.warmup", "--optim.warmup-steps"),
        ("--trian.steps", "--train.steps"),
        ("--data.seqlen", "--data.seq-len"),
        ("--outptu", "--output"),
        ("--no-metrics.progress", "--metrics.no-progress?"),
    ],
)
def test_an_unknown_option_gets_the_nearest(flag, ours):
    said = refusal(flag, "1")
    assert f"no option {flag};" in said and f"did you mean {ours}" in said


def test_what_resembles_nothing_is_sent_to_the_whole_list():
    assert "--help-all" in refusal("--zzz", "1")


def test_every_foreign_name_leads_to_an_option_or_to_one_that_is_planned():
    known = cli.options_of(Config).keys()
    assert set(cli.FOREIGN.values()) - known <= {"data.chat_template", "overwrite"}
    assert not cli.FOREIGN.keys() & known


# Presets


@pytest.mark.parametrize(
    ("preset", "argv", "steps", "epochs"),
    [
        ("v3_256", ["--train.steps", "5"], 5, None),
        ("debug", ["--train.epochs", "2"], None, 2),
        ("v3_256", ["--train.steps", "5", "--train.epochs", "None"], 5, None),
        ("v3_256", ["--train.seed", "5"], None, 1),
        ("debug", ["--train.steps", "None"], None, None),
    ],
)
def test_an_explicit_option_replaces_the_alternative_of_a_preset(preset, argv, steps, epochs):
    train = options(preset, *argv).train
    assert (train.steps, train.epochs) == (steps, epochs)


def test_two_explicit_alternatives_stay_refused(tmp_path):
    assert "both set" in refusal("v3_256", "--train.steps", 5, "--train.epochs", 1)
    (tmp_path / "a.yaml").write_text("train: {steps: 5, epochs: 1}")
    assert "both set" in refusal("--config", tmp_path / "a.yaml")


# Files


FILES = {
    "a.yaml": "data: {train: [a, b], seq-len: 64}\noptim: {lr: 1e-5, clip_norm: null}\ntrain: "
    "{steps: 7}\nmodel: {path: m}\n",
    "a.json": '{"data": {"train": ["a", "b"], "seq_len": 64}, "optim": {"lr": 1e-5, "clip_norm": '
    "null},"
    ' "train.steps": 7, "model": {"path": "m"}}',
    "a.toml": 'model.path = "m"\ntrain.steps = 7\n[data]\ntrain = ["a", "b"]\nseq_len = 64\n'
    '[optim]\nlr = 1e-5\nclip_norm = "None"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_lies_between_preset_and_options(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    config = options("v3_256", "--config", tmp_path / name, "--data.train", "c", "--optim.lr", "2")
    preset = PRESETS["v3_256"]()
    assert (config.data.train, config.data.seq_len, config.optim.lr, config.optim.clip_norm) == (
        ("c",),
        64,
        2.0,
        None,
    )
    assert (config.train.steps, config.train.epochs) == (7, None)
    assert config.parallel == preset.parallel and config.output == preset.output
    plain = options("--config", tmp_path / name)  # model.path is given: the preset is finetune
    assert plain.optim.lr == 1e-5 and plain.output == PRESETS["finetune"]().output
    assert options("--config", tmp_path / name, "--train.epochs", 3).train.steps is None


@pytest.mark.parametrize(
    ("presets", "preset"),
    [(recipe.PRESETS, name) for recipe in RECIPES for name in recipe.PRESETS],
)
def test_a_written_configuration_is_a_config_file(presets, preset, tmp_path):
    config = options(
        preset,
        "--data.eval",
        "x=a",
        "--optim.clip-norm",
        "None",
        "--output",
        tmp_path,
        presets=presets,
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert options(preset, "--config", tmp_path / "config.json", presets=presets) == config
    # it says everything
    assert options("moonlight", "--config", tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "train: {step: 5}", ["train.step in", "did you mean --train.steps"]),
        ("a.yaml", "learning_rate: 1e-5", ["learning_rate in", "--optim.lr"]),
        ("a.yaml", "train: {steps: 2.5}", ["train.steps in", "is 2.5", "a whole number"]),
        ("a.yaml", "train: {steps: true}", ["is true", "a whole number"]),
        ("a.yaml", "output: 2024", ["output in", "is 2024", "text"]),
        ("a.yaml", "optim: {lr: null}", ["optim.lr in", "is null"]),
        ("a.yaml", "data: {mask: al}", ["is 'al'", "assistant, last-turn, all"]),
        ("a.yaml", "data: chats.jsonl", ["data in", "must be a table"]),
        ("a.yaml", "data: {train: [a, [b]]}", ["data.train in", '["b"]']),
        ("a.yaml", "data: {seq_len: 1, seq-len: 2}", ["data.seq_len in", "twice", "1 and as 2"]),
        ("a.yaml", "output: a\noutput: b", ["'output' is given twice", "'a' and as 'b'"]),
        ("a.yaml", "a: [", ["cannot be read"]),
        ("a.yaml", "? [output]\n: b", ["cannot be read", 'key ["output"] is no name']),
        ("a.yaml", "- a", ["does not hold options"]),
        ("a.yaml", "train: {steps: 0}", ["--train.steps is 0"]),
        ("a.json", '{"output": "a", "output": "b"}', ["'output' is given twice"]),
        ("a.json", "{", ["cannot be read"]),
        ("a.txt", "{}", [".json, .yaml, .yml and .toml"]),
        ("a.yaml", "config: b.yaml", ["no option config in"]),
    ],
)
def test_a_faulty_file_is_refused_with_file_key_and_remedy(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    said = refusal("--config", tmp_path / name)
    assert all(word in said for word in words), said


def test_a_file_that_is_not_there_is_told(tmp_path):
    assert "does not exist" in refusal("--config", tmp_path / "a.yaml")
    (tmp_path / "config.json").write_text("{}")
    assert f"give the file, {tmp_path / 'config.json'}" in refusal("--config", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "a.yaml"])
def test_a_file_does_not_overwrite_a_run_by_itself(name, tmp_path):
    (tmp_path / name).write_text('{"overwrite": true, "output": "runs/first"}')
    said = refusal("--config", tmp_path / name, "--output", "runs/other")
    assert all(word in said for word in (name, "--overwrite", "--no-overwrite")), said
    assert options("--config", tmp_path / name, "--overwrite").overwrite
    assert not options("--config", tmp_path / name, "--no-overwrite").overwrite
    (tmp_path / name).write_text('{"overwrite": false, "output": "runs/first"}')
    assert not options("--config", tmp_path / name).overwrite


def test_dates_of_yaml_are_text():
    assert cli.read_value(str | None, datetime.date(2026, 1, 31)) == "2026-01-31"


@dataclass(kw_only=True)
class Inner:
    """For a tool."""

    path: str
    """Where it is."""


@dataclass(kw_only=True)
class Tool:
    """A tool that shares some options with training."""

    model: Inner
    data: Data = field(default_factory=Data)
    html: str | None = None


def test_a_tool_takes_the_configuration_of_a_run_and_passes_over_what_it_does_not_have(tmp_path):
    saved = dataclasses.replace(
        options("v3_256", "--model.path", "m", "--data.train", "a"), output="x"
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(saved)))
    tool = cli.parse_tool(Tool, ["--config", str(tmp_path / "config.json"), "--html", "h"], "")
    assert (tool.model.path, tool.data, tool.html) == ("m", saved.data, "h")
    with pytest.raises(InputError, match=r"--model.path is missing; give it: Where it is\."):
        cli.parse_tool(Tool, [], "")


# Help


def test_help_is_short_and_help_all_is_whole(capsys):
    shown = {}
    for which in ("--help", "--help-all", "-h"):
        with pytest.raises(SystemExit) as end:
            options("v3_256", which)
        assert end.value.code == 0
        shown[which] = capsys.readouterr().out
    assert shown["-h"] == shown["--help"] and "--help-all" in shown["--help"]
    flags = [option.flag for option in cli.options_of(Config).values()]
    assert all(f"  {flag} " in shown["--help-all"] for flag in flags)
    assert sum(f"  {flag} " in shown["--help"] for flag in flags) < 20 and all(
        name in shown["--help"] for name in PRESETS
    )
    assert "(default: 512)" in shown["--help"]  # of the preset


def test_help_says_all_of_a_presets_first_sentence(capsys):
    with pytest.raises(SystemExit):
        options("--help")
    lines = capsys.readouterr().out.splitlines()
    for name in PRESETS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith("."), line
    assert any(line.endswith(" 16 experts of each layer on a GPU.") for line in lines)


def test_every_option_says_what_it_is():
    silent = [name for name, option in cli.options_of(Config).items() if not option.doc]
    assert silent == ["optim.beta1", "optim.beta2", "optim.eps", "metrics.tensorboard"]


# Who tells


@pytest.mark.parametrize(("rank", "said"), [("0", "error: no\n"), ("3", "")])
def test_option_errors_are_told_by_rank_0_alone(rank, said, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end, cli.refusals():
        raise InputError("no")
    assert end.value.code == 2 and capsys.readouterr().err == said


# What is looked at before torch is there


def test_all_missing_sources_stand_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    write(tmp_path / "directory", "b.jsonl")
    write(tmp_path / "other", "README.md")
    found = ("a.jsonl", "a.jsonl:2", "*.jsonl", "org/name:train", "org/name:train:0.5", "directory")
    launch.check_data(Data(train=found, eval=("x=a.jsonl", "a.jsonl")))
    with pytest.raises(InputError) as error:
        launch.check_data(Data(train=(*found, "b.jsonl:2", "*.json", "other"), eval=("x=c.jsonl",)))
    said = str(error.value)
    assert (
        "--data.train b.jsonl:2 does not exist" in said
        and "--data.eval c.jsonl does not exist" in said
    )
    assert "--data.train other holds no file of rows" in said and "it has README.md" in said
    assert "--data.train *.json holds no file of rows" in said and "a.jsonl" not in said.replace(
        "c.jsonl", ""
    )


def write(directory, *names):
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json", "tokenizer.json"], "lacks safetensors weights;"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "it has pytorch_model.bin"),
        (["config.json", "model.safetensors"], "lacks tokenizer.json;"),
        (["tokenizer.json", "model.safetensors"], "lacks config.json;"),
        ([], "lacks config.json, tokenizer.json, safetensors weights"),
    ],
)
def test_a_model_directory_that_lacks_something_is_told(names, words, tmp_path):
    write(tmp_path, *names)
    with pytest.raises(InputError, match=words):
        launch.check_model(str(tmp_path))


def test_what_an_index_names_must_be_there(tmp_path):
    write(tmp_path, "config.json", "tokenizer.json", "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"1 of 2 weight files \(2.safetensors\)"):
        launch.check_model(str(tmp_path))
    launch.check_model(str(tmp_path), weights=False)
    write(tmp_path, "2.safetensors")
    launch.check_model(str(tmp_path))


def test_an_output_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").touch()
    launch.check_output(str(tmp_path / "new" / "run"))
    with pytest.raises(InputError, match="file is a file"):
        launch.check_output(str(tmp_path / "file" / "run"))


def test_a_name_of_the_hub_is_taken_from_the_cache_or_told_how_to_get(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="hf download org/name --local-dir name"):
        launch.model_directory("org/name")
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    write(snapshot, "config.json")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("a" * 40)
    assert launch.model_directory("org/name") == str(snapshot)
    assert "taken from the local cache" in capsys.readouterr().err
    assert launch.model_directory("a/b/c") == "a/b/c" and launch.model_directory(
        str(tmp_path)
    ) == str(tmp_path)


REPORT = """
import os, sys
from torchsft.launch import set_threads
print(set_threads(2), os.environ["OMP_NUM_THREADS"], "torch" in sys.modules)
"""


@pytest.mark.parametrize("by_user", [True, False])
def test_threads_are_shared_out_only_where_torchrun_chose_1(by_user):
    """A parent as torchrun is one: it sets the variable for its children in its own environment."""
    parent = (
        "import os, subprocess, sys; os.environ.update(OMP_NUM_THREADS='1', "
        "TORCHELASTIC_RUN_ID='x', PYTHONPATH=sys.argv[2]);"
    )
    parent += "sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": "1"} if by_user else {}
    command = [sys.executable, "-c", parent, REPORT, str(ROOT)]
    shown = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    share = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert shown == ("None 1 False\n" if by_user else f"{share} {share} False\n")


FAULTS = """
import resource
from torchsft.launch import keep_freed_memory
import torch
kept = keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    before = faults()
    torch.ones(16 << 20)
print(kept, faults() - before > 1000)
"""


@pytest.mark.parametrize("by_user", [True, False])
def test_freed_memory_is_kept_unless_the_environment_says_how_to_allocate(by_user):
    """In the end a block of 64 MiB, 16,384 pages, takes the place of one before it. (glibc 2.36
    needs some of them first: what remains in front of an aligned block is taken by others.)
    """
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    environment |= {"MALLOC_ARENA_MAX": "4"} if by_user else {}
    command = [sys.executable, "-c", FAULTS]
    shown = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert shown == ("False True\n" if by_user else "True False\n")


def refused(program, *argv):
    """Exit code and stderr of a process in which importing torch, transformers or datasets
    fails.
    """
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'datasets', "
        "'numpy']));"
    )
    run = (
        f"{blocked} import runpy; sys.argv = {[str(program), *argv]!r}; "
        f"runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    # as Python itself does with a script's directory
    paths = os.pathsep.join([str(Path(program).parent), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths}
    ended = subprocess.run(
        [sys.executable, "-c", run], env=environment, capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("program", "argv", "code", "words"),
    [
        (
            RECIPE,
            ["--optim.learning-rate", "1"],
            2,
            "error: there is no option --optim.learning-rate; did you mean --optim.lr?\n",
        ),
        (
            RECIPE,
            ["--data.train", "/nowhere.jsonl"],
            1,
            "error: --data.train /nowhere.jsonl does not exist;",
        ),
        (
            RECIPE,
            ["--model.path", "/nowhere", "--data.train", "x"],
            1,
            "error: --model.path /nowhere does not exist;",
        ),
        (
            ROOT / "recipes" / "qwen3_sft.py",
            ["debgu"],
            2,
            "error: preset 'debgu' does not exist; choose one of: debug, finetune, qwen3_30b, "
            "qwen3_235b",
        ),
        (
            INSPECTOR,
            ["--model.path", "m", "--data.trian", "x"],
            2,
            "no option --data.trian; did you mean --data.train ",
        ),
        (
            INSPECTOR,
            ["--model.path", "/nowhere", "--data.train", "x"],
            1,
            "error: --model.path /nowhere does not exist;",
        ),
    ],
)
def test_programs_refuse_before_anything_slow_is_imported(program, argv, code, words):
    ended, said = refused(program, *argv)
    assert ended == code and words in said and said.count("\n") == 1, said
