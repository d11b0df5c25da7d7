"""`tools/benchmark.py checkpoint`: conversion, loading and saving, against `cp -r` and the obvious
script.

The checkpoint is synthetic: DeepSeek-V3's own widths, vocabulary and 256 experts, but one dense and
two MoE layers and
experts of width 128: 8.5 GB in bf16. Memory is that of a command's processes together, libraries
included, sampled. Speeds are in MB/s of what is read. `cp -r` is timed with and without flushing to
the disk, which the tool always does; each ratio is to the plain copy. State is saved on two ranks,
while they compute.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tools.benchmark_pipeline import on_ranks
from torchsft.checkpoint import huggingface, state
from torchsft.config import Optim, Parallel
from torchsft.models.families import build_model, read_model_config
from torchsft.models.language_model import LanguageModel
from torchsft.optim.adamw import build_optimizer
from torchsft.parallel.apply import parallelize
from torchsft.parallel.pipeline import reshard_after_forward, split
from torchsft.parallel.stages import plan_stages
from torchsft.parallel.world import World

TOOL = str(Path(__file__).with_name("convert_checkpoint.py"))
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 18432,
    "moe_intermediate_size": 128,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
# What one writes first: all tensors at once, experts stacked, and DCP does the rest.
OBVIOUS = """
import re, sys, glob, torch, torch.distributed.checkpoint as dcp
from collections import defaultdict
from safetensors.torch import load_file
tensors, experts = {}, defaultdict(dict)
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    tensors |= load_file(path)
for key in list(tensors):
    if match := re.fullmatch(r"(.*mlp.experts)\\.(\\d+)\\.(.*)", key):
        experts[f"{match[1]}.{match[3]}"][int(match[2])] = tensors.pop(key)
for name, parts in experts.items():
    tensors[name] = torch.stack([parts[i] for i in range(len(parts))])
    parts.clear()
dcp.save(tensors, checkpoint_id=sys.argv[2], no_dist=True)
"""


def write_source(directory: Path, config: dict[str, Any], file_bytes: float = 1e9) -> int:
    """Write a Hugging Face directory of random bf16 weights; return its bytes of tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = build_model(config)
    pieces = [piece for pieces in model.checkpoint_pieces().values() for piece in pieces]
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: list[dict[str, Tensor]] = [{}]
    weight_map, size, total = {}, 0.0, 0

    def flush() -> None:
        name = f"model-{len(files):05d}.safetensors"
        save_file(files[-1], directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(files[-1], name))
        files[-1].clear()

    for i, piece in enumerate(pieces):
        fp32 = piece.key.endswith("e_score_correction_bias")
        count = torch.Size(piece.hf_shape).numel()
        values = (
            noise.roll(i)[: min(count, len(noise))]
            .repeat(-(-count // len(noise)))[:count]
            .view(piece.hf_shape)
            .clone()
        )
        if size + values.nbytes > file_bytes and files[-1]:
            flush()
            files.append({})
            size = 0.0
        files[-1][piece.key] = values.float() if fp32 else values
        size += values.nbytes
        total += files[-1][piece.key].nbytes
    flush()
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return total


def _resident(root: int) -> int:
    """Return bytes in memory of a process and its descendants."""
    try:
        own = int(Path("/proc", str(root), "statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
        children = [
            path.read_text() for path in Path("/proc", str(root), "task").glob("*/children")
        ]
    except OSError:  # ended meanwhile
        return 0
    return own + sum(map(_resident, map(int, " ".join(children).split())))


def watched(command: Sequence[str]) -> tuple[float, int]:
    """Return seconds that a command takes, and the peak of its processes' memory in bytes.

    Raises:
        CalledProcessError: it failed.
    """
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
        reader.start()
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        reader.join()
    if process.returncode:
        print(errors[0][-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, peak


def build(config: dict[str, Any], parallel: Parallel, world: World) -> LanguageModel:
    """Return the part of the model that this rank holds; uninitialised."""
    plan = plan_stages(parallel, read_model_config(config), microbatches=8)
    with torch.device("meta"):
        model = build_model(config, **plan.model_part(0))
        stages = split(model, plan, 0)
    parallelize(stages, world, torch.float32, reshard_after_forward=reshard_after_forward(parallel))
    for stage in stages:
        stage.to_empty(device=world.device)
    model.init_buffers()
    return model


def load(source: str, ep: int) -> dict[str, float]:
    """Load a directory into a sharded fp32 model: seconds, bytes read, bytes that this rank
    holds.
    """
    parallel = Parallel(ep=ep)
    with World(parallel, 0) as world:
        config = huggingface.read_config(source)
        model = build(config, parallel, world)
        held = sum(
            t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes
            for t in model.state_dict().values()
        )
        world.barrier()
        began = time.perf_counter()
        with torch.device("meta"):
            index = huggingface.check_weights(source, model.family(model.config))
        read = huggingface.load_weights(model, index)
        world.barrier()
        return {"seconds": time.perf_counter() - began, "read": read, "held": held}


def save(directory: str, config: dict[str, Any], mode: str, repeats: int) -> list[dict[str, float]]:
    """Save weights and moments, while this rank computes: stall and time of each."""
    parallel = Parallel(ep=2)
    with World(parallel, 0) as world:
        model = build(config, parallel, world)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(0.5)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizer(model, Optim())
        optimizer.step()
        optimizer.zero_grad()
        group = dist.new_group(backend="gloo")
        checkpointer = state.Checkpointer(
            directory, mode=mode, if_busy="wait", keep=1, keep_every=0, keep_best=0, group=group
        )
        results, x = [], torch.randn(256, 256)
        for step in range(1, repeats + 1):
            world.barrier()
            checkpointer.save(step, model, optimizer, extra={}, config={})
            while not (reports := checkpointer.reports()):
                for _ in range(50):  # training goes on
                    x = (x @ x).clamp_(-1, 1)
            (report,) = reports
            if report.error:
                raise OSError(report.error)
            results.append(
                {
                    "stall": report.stall_seconds,
                    "write": report.write_seconds,
                    "bytes": report.bytes,
                }
            )
        checkpointer.wait()
    return results


def run(
    json_path: Path | None,
    repeats: int,
    config: dict[str, Any] | None = None,
    state_config: dict[str, Any] | None = None,
) -> Any:
    """Measure and print; also written to `json_path` where one is given."""
    small = CONFIG | {
        "num_hidden_layers": 2,
        "vocab_size": 2048,
        "hidden_size": 2048,
        "intermediate_size": 4096,
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        base = Path(work)
        source, size = base / "hf", 0

        def timed(name: str, command: Sequence[str], read: int) -> None:
            for path in map(Path, command[-1:]):
                shutil.rmtree(path, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            seconds, peak = watched(command)
            results[name] = {
                "seconds": seconds,
                "MB/s": read / seconds / 1e6,
                "peak GB": peak / 1e9,
            }
            if "cp -r" in results:
                results[name]["of cp -r"] = results[name]["MB/s"] / results["cp -r"]["MB/s"]
            print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)

        def tool(*arguments: str) -> list[str]:
            return [sys.executable, TOOL, *arguments]

        size = write_source(source, CONFIG)
        print(f"{size / 1e9:.2f} GB in {len(list(source.iterdir()))} files", flush=True)
        copy, dcp, back = base / "copy", base / "dcp", base / "back"
        # the source is in memory from now on as far as it goes
        watched(["cp", "-r", str(source), str(copy)])
        timed("cp -r", ["cp", "-r", str(source), str(copy)], size)
        timed(
            "cp -r and sync", ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(copy)], size
        )
        shutil.rmtree(copy)
        timed("to-dcp, 2 workers", tool("to-dcp", "--workers", "2", str(source), str(dcp)), size)
        timed("to-dcp, 1 worker", tool("to-dcp", "--workers", "1", str(source), str(dcp)), size)
        timed(
            "to-hf bf16, 2 workers",
            tool("to-hf", "--dtype", "bf16", "--workers", "2", str(dcp), str(back)),
            size,
        )
        timed(
            "to-hf bf16, 1 worker",
            tool("to-hf", "--dtype", "bf16", "--workers", "1", str(dcp), str(back)),
            size,
        )
        shutil.rmtree(back)
        fp8 = base / "fp8"
        timed(
            "to-hf fp8, 2 workers",
            tool("to-hf", "--dtype", "fp8", "--workers", "2", str(dcp), str(fp8)),
            size,
        )
        shutil.rmtree(dcp)
        stored = sum(path.stat().st_size for path in fp8.glob("*.safetensors"))
        timed(
            "to-dcp from fp8, 2 workers",
            tool("to-dcp", "--workers", "2", str(fp8), str(dcp)),
            stored,
        )
        shutil.rmtree(dcp)
        timed("obvious script", [sys.executable, "-c", OBVIOUS, str(source), str(dcp)], size)
        shutil.rmtree(dcp)
        timed("cp -r, again", ["cp", "-r", str(source), str(copy)], size)
        shutil.rmtree(copy)
        for directory, total in ((source, size), (fp8, stored)):
            for ranks, ep in ((2, 2), (4, 4), (4, 2)):
                found = on_ranks(ranks, load, source=str(directory), ep=ep)
                name = f"load {directory.name} on {ranks} ranks, ep {ep}"
                results[name] = {
                    "seconds": max(r["seconds"] for r in found),
                    "read / stored": sum(r["read"] for r in found) / total,
                }
                print(
                    name, {key: round(value, 3) for key, value in results[name].items()}, flush=True
                )
        shutil.rmtree(source)
        shutil.rmtree(fp8)
        for mode in ("sync", "async"):
            saves = on_ranks(
                2, save, directory=str(base / mode), config=small, mode=mode, repeats=repeats + 1
            )[0]
            shutil.rmtree(base / mode)
            first, *others = saves
            results[f"save {mode}"] = {
                "GB": first["bytes"] / 1e9,
                "stall": statistics.median(r["stall"] for r in others),
                "first stall": first["stall"],
                "write": statistics.median(r["write"] for r in others),
            }
            print(
                f"save {mode}",
                {key: round(value, 3) for key, value in results[f"save {mode}"].items()},
                flush=True,
            )
        share = results["save async"]["stall"] / results["save sync"]["stall"]
        print(f"stall of an asynchronous save / synchronous save: {share:.1%}")
    if json_path:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    return results
