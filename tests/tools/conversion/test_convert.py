# ruff: noqa: E501 (programs in strings)
"""Hugging Face -> DCP -> Hugging Face bit for bit, training checkpoints to Hugging Face,
interruptions, memory, bad input.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

import torchsft
from tests.checkpoint.deepseek_format import dequantised, is_fp8, quantised, write_deepseek
from tests.checkpoint.sources import (
    INDEX,
    change_config,
    change_tensors,
    copy,
    read_tensors,
    same_bits,
    weight_files,
    write_source,
)
from tests.checkpoint.training import checkpoint_and_export
from tests.tiny import write_tiny_model
from tools.conversion import convert
from torchsft.checkpoint.reader import RangeReader
from torchsft.checkpoint.state import Checkpointer
from torchsft.config import InputError, Optim
from torchsft.optim.adamw import build_optimizer

UNKNOWN = {
    "model.extra.counts": torch.arange(7).reshape(7, 1),
    "vision.mask": torch.tensor([True, False]),
    "vision.scalar": torch.tensor(3.5, dtype=torch.float64),
    "vision.empty": torch.zeros(0, 4, dtype=torch.uint8),
}
VARIANTS = {
    "bf16": lambda path: write_source(path, torch.bfloat16, sharded=True, mtp=True),
    "bf16 with unknown tensors": lambda path: _with_unknown(
        write_source(path, torch.bfloat16, sharded=True, mtp=False)
    ),
    "bf16 tied": lambda path: write_source(
        path, torch.bfloat16, sharded=True, mtp=False, tie_word_embeddings=True
    ),
    # the routing bias too
    "bf16 throughout": lambda path: write_tiny_model(
        path, dtype=torch.bfloat16, num_hidden_layers=9
    ),
    "fp32": lambda path: write_source(
        path, torch.float32, sharded=False, mtp=True, q_lora_rank=None
    ),
    "fp8": write_deepseek,
    "fp8 with powers of two": lambda path: write_deepseek(path, power_of_two=True, files=3),
}


def _with_unknown(directory):
    change_tensors(directory, UNKNOWN)
    return directory


def to_dcp(source, out, **options):
    """In this process, in many small parts and files."""
    defaults = {"workers": 1, "part_elements": 700, "file_bytes": 40_000, "progress": False}
    return convert.to_dcp(source, out, **(defaults | options))


def to_hf(source, out, **options):
    defaults = {"workers": 1, "part_elements": 700, "max_shard_bytes": 50_000, "progress": False}
    return convert.to_hf(source, out, **(defaults | options))


def odd(expected, found):
    """Keys whose tensors differ in a bit, and keys of one side alone."""
    assert expected
    differing = {
        key for key in expected.keys() & found.keys() if not same_bits(expected[key], found[key])
    }
    return sorted(differing | (expected.keys() ^ found.keys()))


def save(directory, step, model, path):
    """A training checkpoint of a run that began with the model at `path`."""
    checkpoints = Checkpointer(directory)
    config = {"model": {"path": path and str(path)}}
    checkpoints.save(
        step, model, build_optimizer(model, Optim()), extra={}, config=config, now=True
    )
    assert [report.error for report in checkpoints.reports()] == [None]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """A source, and what became of it on the way to DCP."""
    work = tmp_path_factory.mktemp("variant")
    source = VARIANTS[request.param](work / "source")
    return SimpleNamespace(
        name=request.param, source=source, dcp=work / "dcp", lines=to_dcp(source, work / "dcp")
    )


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("bf16") / "source", torch.bfloat16, sharded=True, mtp=True
    )


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_deepseek(tmp_path_factory.mktemp("fp8") / "source")


# --------------------------------------------------------------------------------------------------
# round trips


def test_there_and_back_every_bit_is_the_same(variant, tmp_path):
    to_hf(variant.dcp, tmp_path / "hf", dtype=variant.name.split()[0])
    before, after = read_tensors(variant.source), read_tensors(tmp_path / "hf")
    assert odd(before, after) == []
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads(
        (variant.source / "config.json").read_text()
    )
    weights = {path.name for path in weight_files(variant.source)} | {INDEX, "config.json"}
    others = {path.name for path in variant.source.iterdir()} - weights
    assert {"tokenizer.json", "chat_template.jinja"} <= others
    for name in others:
        assert (tmp_path / "hf" / name).read_bytes() == (variant.source / name).read_bytes()
    files = weight_files(tmp_path / "hf")
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert written == {*others, *(path.name for path in files), INDEX, "config.json"}
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["weight_map"] == {key: path.name for path in files for key in load_file(path)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert len(files) > 3


def test_parts_and_files_change_nothing(variant, tmp_path):
    """Whole tensors in one file, by way of a DCP directory in one file."""
    to_dcp(variant.source, tmp_path / "dcp", part_elements=1 << 24, file_bytes=1e9)
    assert (
        len(list((tmp_path / "dcp").glob("*.distcp")))
        == 1
        < len(list(variant.dcp.glob("*.distcp")))
    )
    to_hf(
        tmp_path / "dcp",
        tmp_path / "hf",
        dtype=variant.name.split()[0],
        part_elements=1 << 24,
        max_shard_bytes=1e9,
    )
    assert [path.name for path in weight_files(tmp_path / "hf")] == [
        "model-00001-of-00001.safetensors"
    ]
    assert odd(read_tensors(variant.source), read_tensors(tmp_path / "hf")) == []


def test_torch_reads_what_is_written(variant):
    """`dcp.load` of every tensor, experts stacked by hand; fp8 in fp32, and its scales and all that
    is no part of the model.
    """
    before, expected = read_tensors(variant.source), {}
    config = json.loads((variant.source / "config.json").read_text())
    layers = config["num_hidden_layers"]
    for key, tensor in before.items():
        own = (
            re.match(rf"model\.(embed_tokens|norm|layers\.[0-{layers - 1}])\.|lm_head", key)
            is not None
        )
        if own and not key.endswith("_scale_inv"):
            scale = before.get(f"{key}_scale_inv")
            expected[f"model.{key}"] = tensor if scale is None else dequantised(tensor, scale)
        else:
            expected[f"carried.{key}"] = tensor
    for layer in range(config["first_k_dense_replace"], layers):
        prefix, experts = (
            f"model.model.layers.{layer}.mlp.experts.",
            range(config["n_routed_experts"]),
        )
        parts = {
            p: [expected.pop(f"{prefix}{e}.{p}_proj.weight") for e in experts]
            for p in ("gate", "up", "down")
        }
        expected[prefix + "gate_up_proj"] = torch.cat(
            [torch.stack(parts["gate"]), torch.stack(parts["up"])], 1
        )
        expected[prefix + "down_proj"] = torch.stack(parts["down"])
    loaded = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is disabled: fine
        assert (
            dcp.FileSystemReader(variant.dcp).read_metadata().state_dict_metadata.keys()
            == expected.keys()
        )
        dcp.load(loaded, checkpoint_id=variant.dcp)
    assert odd(expected, loaded) == []


def test_a_note_tells_what_is_carried_and_what_is_left_out(bf16, variant, tmp_path):
    noted = [line for line in variant.lines if "does not know" in line]
    assert len(noted) == ("unknown" in variant.name)
    assert all("4 tensors" in line and "vision.mask" in line for line in noted)
    changed = copy(bf16, tmp_path / "source")
    change_tensors(changed, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert any(
        "1 tensors are left out" in line and "inv_freq" in line
        for line in to_dcp(changed, tmp_path / "dcp")
    )
    to_hf(tmp_path / "dcp", tmp_path / "hf")
    assert odd(read_tensors(bf16), read_tensors(tmp_path / "hf")) == []


def test_other_dtypes(fp8, bf16, tmp_path):
    """fp8 to bf16 and fp32: no scales, no quantization_config, MTP layers in that dtype too."""
    to_dcp(fp8, tmp_path / "dcp")
    before = read_tensors(fp8)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        to_hf(tmp_path / "dcp", tmp_path / name, dtype=name)
        after = read_tensors(tmp_path / name)
        assert after.keys() == {key for key in before if not key.endswith("_scale_inv")}
        for key, tensor in after.items():
            if is_fp8(key):
                expected = dequantised(before[key], before[f"{key}_scale_inv"]).to(dtype)
            else:
                mtp = key.startswith("model.layers.3.")
                expected = before[key] if key.endswith("bias") or mtp else before[key].to(dtype)
            assert same_bits(tensor, expected), key
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config and config["torch_dtype"] == str(dtype)[6:]
    # and bf16 to fp8, which its source is not
    to_dcp(bf16, tmp_path / "dcp-bf16")
    to_hf(tmp_path / "dcp-bf16", tmp_path / "fp8", dtype="fp8")
    before, after = read_tensors(bf16), read_tensors(tmp_path / "fp8")
    assert after.keys() == before.keys() | {f"{key}_scale_inv" for key in before if is_fp8(key)}
    for key in filter(is_fp8, before):
        q, scale = quantised(before[key])
        assert same_bits(after[key], q) and same_bits(after[f"{key}_scale_inv"], scale), key
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert (
        config["quantization_config"]["weight_block_size"] == [128, 128]
        and config["dtype"] == "bfloat16"
    )


# --------------------------------------------------------------------------------------------------
# training checkpoints


@pytest.fixture(scope="module")
def trained(ranks, fp8, tmp_path_factory):
    """A checkpoint of two ranks after two updates, what they export themselves, and what the tool
    makes of it, by dtype.
    """
    work = tmp_path_factory.mktemp("trained")
    ranks(2, checkpoint_and_export, source=str(fp8), work=str(work), dtypes=["bf16", "fp32", "fp8"])
    for dtype in ("bf16", "fp32", "fp8"):
        # the base: its config.json names the source
        to_hf(work / "step-00000002", work / f"tool-{dtype}", dtype=dtype)
    return work


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_a_training_checkpoint_becomes_what_the_run_exports(trained, fp8, dtype):
    expected, found = (
        read_tensors(trained / f"export-{dtype}"),
        read_tensors(trained / f"tool-{dtype}"),
    )
    assert odd(expected, found) == []
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (trained / f"export-{dtype}" / name).read_bytes() == (
            trained / f"tool-{dtype}" / name
        ).read_bytes()
    before = read_tensors(fp8)
    assert dtype != "fp8" or before.keys() == found.keys()
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(found[key].float(), before[key].float())  # the updates are there


def test_transformers_loads_it_and_generates(trained):
    with torch.no_grad():
        model = DeepseekV3ForCausalLM.from_pretrained(trained / "tool-fp32")
        ours = torchsft.load_model(trained / "tool-fp32")
        tokens = torch.randint(0, 256, (20,))
        bounds = torch.tensor([0, 20], dtype=torch.int32)
        logits = ours(tokens, positions=torch.arange(20), cu_seqlens=bounds)
        torch.testing.assert_close(model(tokens[None]).logits[0], logits, rtol=0, atol=1e-4)
        half = DeepseekV3ForCausalLM.from_pretrained(trained / "tool-bf16")
        assert half.dtype == torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(trained / "tool-bf16")
        prompt = tokenizer("hello", return_tensors="pt").input_ids
        assert half.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (
            1,
            prompt.shape[1] + 3,
        )


def test_fp8_comes_from_the_fp32_masters(trained):
    masters, rounded, found = (
        read_tensors(trained / f"tool-{dtype}") for dtype in ("fp32", "bf16", "fp8")
    )
    own = [
        key
        for key in found
        if f"{key}_scale_inv" in found and not key.startswith("model.layers.3.")
    ]
    others = 0
    for key in own:
        q, scale = quantised(masters[key])
        assert same_bits(found[key], q) and same_bits(found[f"{key}_scale_inv"], scale), key
        others += not same_bits(quantised(rounded[key])[1], scale)
    assert others > len(own) / 2  # a bf16 copy would have given other scales


def test_what_training_did_not_change_keeps_its_bytes_and_scales(fp8, tmp_path):
    model = torchsft.load_model(fp8)
    # 200 x 160: blocks of 128 and 72 rows, 128 and 32 columns
    key = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(key)[130, 3] += 1
    save(tmp_path, 1, model, fp8)
    to_hf(tmp_path / "step-00000001", tmp_path / "hf", dtype="fp8")
    before, after = read_tensors(fp8), read_tensors(tmp_path / "hf")
    assert odd(before, after) == [key, f"{key}_scale_inv"]
    scales = before[f"{key}_scale_inv"] == after[f"{key}_scale_inv"]
    assert scales.tolist() == [[True, True], [False, True]]
    assert torch.equal(before[key].view(torch.uint8)[:128], after[key].view(torch.uint8)[:128])


def test_a_base_by_hand(bf16, trained, fp8, tmp_path):
    """MTP layers, tokenizer and config.json of --base; a base without weights gives only what it
    has.
    """
    base = copy(fp8, tmp_path / "base")
    change_tensors(base, {"model.layers.3.enorm.weight": torch.full((160,), 0.5).bfloat16()})
    change_config(base, note="mine")
    to_hf(trained / "step-00000002", tmp_path / "hf", base=base, dtype="fp8")
    expected = read_tensors(trained / "tool-fp8") | {
        "model.layers.3.enorm.weight": torch.full((160,), 0.5).bfloat16()
    }
    assert odd(expected, read_tensors(tmp_path / "hf")) == []
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["note"] == "mine"
    for path in weight_files(base):
        path.unlink()
    to_hf(trained / "step-00000002", tmp_path / "bare", base=base, dtype="bf16")
    found = read_tensors(tmp_path / "bare")
    assert (
        odd(
            {k: t for k, t in read_tensors(trained / "tool-bf16").items() if ".layers.3." not in k},
            found,
        )
        == []
    )


def test_a_converted_directory_can_be_trained_and_exported_from(fp8, tmp_path):
    """The whole way: to-dcp, training from it, to-hf with the converted directory as base. Nothing
    changed, so nothing may.
    """
    to_dcp(fp8, tmp_path / "dcp")
    model = torchsft.load_model(tmp_path / "dcp")
    save(tmp_path, 7, model, tmp_path / "dcp")
    to_hf(tmp_path / "step-00000007", tmp_path / "hf", dtype="fp8")
    assert odd(read_tensors(fp8), read_tensors(tmp_path / "hf")) == []


# --------------------------------------------------------------------------------------------------
# interruptions

KILLED = """
import os, signal, sys
from pathlib import Path
from tools.conversion import convert

class DcpWorker(convert.DcpWorker):
    def work(self, task, progress):
        if task.file == "__3_0.distcp":
            marker = Path(sys.argv[3])
            while len((Path(sys.argv[2]) / ".dcp.incomplete" / ".journal").read_text().splitlines()) < 3:
                pass  # until two files are done
            Path(sys.argv[2], ".dcp.incomplete", task.file).write_bytes(b"half a file")
            os.kill({"worker": os.getpid(), "tool": int(marker.read_text())}[sys.argv[4]], signal.SIGKILL)
            signal.pause()
        return super().work(task, progress)

convert.DcpWorker = DcpWorker
if __name__ == "__main__":
    Path(sys.argv[3]).write_text(str(os.getpid()))
    out = Path(sys.argv[2]) / "dcp"
    try:
        convert.to_dcp(sys.argv[1], out, workers=int(sys.argv[5]), part_elements=700, file_bytes=40_000, progress=False)
    except convert.InputError as error:
        sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize(("victim", "workers"), [("tool", 1), ("worker", 2), ("tool", 2)])
def test_a_killed_conversion_continues(bf16, tmp_path, victim, workers):
    script, staging = tmp_path / "script.py", tmp_path / ".dcp.incomplete"
    script.write_text(KILLED)
    command = [sys.executable, script, bf16, tmp_path, tmp_path / "pid", victim, str(workers)]
    root = str(Path(__file__).parents[3])
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": root}
    )
    if victim == "worker":
        assert ended.returncode == 1 and re.fullmatch(
            r"error: a worker process was killed.*\n", ended.stderr
        ), ended.stderr
    else:
        assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "dcp").exists() and staging.is_dir()
    journal = [json.loads(line) for line in (staging / ".journal").read_text().splitlines()[1:]]
    assert len(journal) >= 2 and "__3_0.distcp" not in [record["file"] for record in journal]
    before = {record["file"]: (staging / record["file"]).stat() for record in journal}
    lines = to_dcp(bf16, tmp_path / "dcp")
    assert lines[0].startswith(f"{len(journal)} of ")
    for file, stat in before.items():
        kept = (tmp_path / "dcp" / file).stat()
        assert (kept.st_ino, kept.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert not staging.exists() and not (tmp_path / "dcp" / ".journal").exists()
    to_hf(tmp_path / "dcp", tmp_path / "hf")
    assert odd(read_tensors(bf16), read_tensors(tmp_path / "hf")) == []


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, kind, after):
    """The next conversion ends after so many files."""
    original, count = kind.work, iter(range(after))

    def work(self, task, progress):
        if next(count, None) is None:
            raise Interrupted
        return original(self, task, progress)

    monkeypatch.setattr(kind, "work", work)


def test_to_hf_continues_too_and_starts_anew_where_something_has_changed(
    bf16, tmp_path, monkeypatch
):
    source = copy(bf16, tmp_path / "source")
    to_dcp(source, tmp_path / "dcp")

    def attempt(after=None, **options):
        """Files that are kept from before."""
        with monkeypatch.context() as patch:
            if after is None:
                lines = to_hf(tmp_path / "dcp", tmp_path / "hf", **options)
                return int(lines[0].split()[0]) if "interrupted" in lines[0] else 0
            interrupt(patch, convert.HfWorker, after)
            with pytest.raises(Interrupted):
                to_hf(tmp_path / "dcp", tmp_path / "hf", **options)
            assert not (tmp_path / "hf").exists()

    attempt(after=2)
    attempt(after=1)  # two are kept, a third is added
    staging = tmp_path / ".hf.incomplete"
    assert len(weight_files(staging)) == 3
    (staging / "model-99999.safetensors").write_bytes(b"from nowhere")
    # cut while writing
    (staging / ".journal").write_text((staging / ".journal").read_text() + '{"file": "model-0000')
    assert attempt() == 3
    assert odd(read_tensors(bf16), read_tensors(tmp_path / "hf")) == []

    for change in (
        lambda: {"dtype": "fp32"},
        lambda: {"max_shard_bytes": 60_000},
        lambda: os.utime(tmp_path / "dcp" / "__0_0.distcp") or {},
        lambda: change_config(tmp_path / "dcp", rms_norm_eps=3.0) or {},
    ):
        convert.shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        attempt(after=2)
        options = change()
        if "config.json" in str(options) or ((staging / ".journal").exists() and options == {}):
            manifest = tmp_path / "dcp" / "checkpoint.json"  # config.json belongs to it
            known = json.loads(manifest.read_text())
            known["files"]["config.json"]["bytes"] = (
                (tmp_path / "dcp" / "config.json").stat().st_size
            )
            manifest.write_text(json.dumps(known))
        assert attempt(**options) == 0, options
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rms_norm_eps"] == 3.0


def test_a_finished_file_that_has_vanished_is_written_again(bf16, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, convert.DcpWorker, 3)
        with pytest.raises(Interrupted):
            to_dcp(bf16, tmp_path / "dcp")
    staging = tmp_path / ".dcp.incomplete"
    (staging / "__0_0.distcp").unlink()
    (staging / "__1_0.distcp").write_bytes(b"short")
    assert to_dcp(bf16, tmp_path / "dcp")[0].startswith("1 of ")
    to_hf(tmp_path / "dcp", tmp_path / "hf")
    assert odd(read_tensors(bf16), read_tensors(tmp_path / "hf")) == []


def test_one_output_has_one_writer(bf16, tmp_path):
    import fcntl

    (tmp_path / ".dcp.incomplete").mkdir()
    with open(tmp_path / ".dcp.incomplete" / ".journal", "w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing"):
            to_dcp(bf16, tmp_path / "dcp")


# --------------------------------------------------------------------------------------------------
# bad input


def refusal(convert_, *arguments, **options):
    """The sentence of a conversion that must not leave anything."""
    out = arguments[1]
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError) as error:
        convert_(*arguments, **options)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def truncated(directory):
    path = weight_files(directory)[1]
    path.write_bytes(path.read_bytes()[:-7])


def shard_missing(directory):
    weight_files(directory)[1].unlink()


def duplicate(directory):
    first, last = weight_files(directory)[0], weight_files(directory)[-1]
    key = next(iter(load_file(first)))
    save_file(load_file(last) | {key: torch.zeros(1)}, last)


def no_scales(directory):
    tensors = read_tensors(directory)
    change_tensors(
        directory,
        {key: None for key in tensors if key.endswith("layers.0.mlp.up_proj.weight_scale_inv")},
    )


def other_shape(directory):
    change_tensors(directory, {"model.norm.weight": torch.zeros(31, dtype=torch.bfloat16)})


def other_dtype(directory):
    change_tensors(directory, {"model.norm.weight": torch.zeros(32, dtype=torch.int32)})


def lacks_weight(directory):
    change_tensors(directory, {"model.norm.weight": None})


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (truncated, r"model-00002-of-\d+.safetensors cannot be read as safetensors"),
        (shard_missing, r"names 1 absent files \(model-00002"),
        (duplicate, "is both in model-00001-of-.* and in model-"),
        (other_shape, r"model.norm.weight \(\(31,\) instead of \(32,\)\)"),
        (other_dtype, r"model.norm.weight \(I32\)"),
        (lacks_weight, "1 missing: model.norm.weight"),
        (
            lambda path: change_config(path, num_hidden_layers=2),
            "holds 4 layers, .* 2 num_hidden_layers and 1 MTP layers",
        ),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (
            lambda path: change_config(path, architectures=["MambaForCausalLM"]),
            "describes MambaForCausalLM, but only .*DeepseekV3ForCausalLM, .* are supported",
        ),
    ],
)
def test_sources_that_cannot_be_converted(bf16, tmp_path, fault, sentence):
    source = copy(bf16, tmp_path / "source")
    fault(source)
    assert re.search(sentence, refusal(to_dcp, source, tmp_path / "dcp"))


def test_fp8_without_scales(fp8, tmp_path):
    source = copy(fp8, tmp_path / "source")
    no_scales(source)
    assert "layers.0.mlp.up_proj.weight" in refusal(to_dcp, source, tmp_path / "dcp")


def test_dcp_directories_that_cannot_be_converted(bf16, variant, tmp_path):
    good = tmp_path / "good"
    to_dcp(bf16, good)
    assert "DCP directory already" in refusal(to_dcp, good, tmp_path / "again")
    assert "has no .metadata" in refusal(to_hf, bf16, tmp_path / "hf")
    assert "has no .metadata" in refusal(to_hf, tmp_path / "nowhere", tmp_path / "hf")

    other = write_source(
        tmp_path / "other", torch.bfloat16, sharded=False, mtp=False, n_routed_experts=12
    )
    text = refusal(to_hf, good, tmp_path / "hf", base=other)
    assert "holds another model" in text and "(8, 32, 32) instead of (12, 32, 32)" in text

    short = copy(good, tmp_path / "short")
    (short / "__1_0.distcp").write_bytes((short / "__1_0.distcp").read_bytes()[:-1])
    text = refusal(to_hf, short, tmp_path / "hf")
    assert re.search(r"not a complete checkpoint: __1_0.distcp has \d+ bytes instead of", text)

    damaged = copy(good, tmp_path / "damaged")
    (damaged / ".metadata").write_bytes(b"\x80" * (damaged / ".metadata").stat().st_size)
    assert "unreadable .metadata" in refusal(to_hf, damaged, tmp_path / "hf")


def test_a_run_whose_model_is_not_known_needs_a_base(bf16, tmp_path):
    model = torchsft.load_model(bf16)
    for path in (None, tmp_path / "moved"):
        save(tmp_path / "run", 1, model, path)
        assert "name it with --base" in refusal(
            to_hf, tmp_path / "run" / "step-00000001", tmp_path / "hf"
        )
    to_hf(tmp_path / "run" / "step-00000001", tmp_path / "hf", base=bf16)
    assert odd(read_tensors(bf16), read_tensors(tmp_path / "hf")) == []


def test_outputs_that_cannot_be_written(bf16, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert "exists already" in refusal(to_dcp, bf16, tmp_path / "mine")
    assert "exists already" in refusal(to_dcp, bf16, bf16)
    source = copy(bf16, tmp_path / "source")
    assert "lies in" in refusal(to_dcp, source, source / "dcp")
    usage = SimpleNamespace(free=100_000)
    monkeypatch.setattr("tools.conversion.convert.shutil.disk_usage", lambda _: usage)
    assert "0.0 GB free" in refusal(to_dcp, bf16, tmp_path / "dcp")
    needed = sum(stored.nbytes for stored in read_tensors(bf16).values())
    usage.free = needed
    to_dcp(bf16, tmp_path / "dcp")


def test_nan_cannot_be_quantised(bf16, tmp_path):
    source = copy(bf16, tmp_path / "source")
    key = "model.layers.2.mlp.experts.7.down_proj.weight"
    weight = read_tensors(source)[key].clone()
    weight[3, 3] = torch.nan
    change_tensors(source, {key: None})
    change_tensors(source, {key: weight})
    to_dcp(source, tmp_path / "dcp")
    with pytest.raises(InputError, match=f"{key} holds nan or inf"):
        to_hf(tmp_path / "dcp", tmp_path / "hf", dtype="fp8")
    assert not (tmp_path / "hf").exists()
    to_hf(tmp_path / "dcp", tmp_path / "hf", dtype="bf16")
    assert read_tensors(tmp_path / "hf")[key].isnan().sum() == 1


def test_what_the_source_mixes_is_kept_in_fp32(bf16, tmp_path):
    """An expert in fp16 among bf16 ones: a stacked tensor has one dtype, and fp32 holds both
    exactly.
    """
    source = copy(bf16, tmp_path / "source")
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    half = torch.randn(16, 32).half()
    change_tensors(source, {key: half})
    to_dcp(source, tmp_path / "dcp")
    to_hf(tmp_path / "dcp", tmp_path / "hf", dtype="fp32")
    after = read_tensors(tmp_path / "hf")
    assert same_bits(after[key], half.float())
    stored = RangeReader(tmp_path / "dcp").tensors
    experts = "model.model.layers.1.mlp.experts"
    assert stored[f"{experts}.gate_up_proj"].properties.dtype == torch.float32
    assert stored[f"{experts}.down_proj"].properties.dtype == torch.bfloat16
