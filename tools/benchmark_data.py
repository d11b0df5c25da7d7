"""`tools/benchmark.py data`: from conversations to packed rows, beside the bare tokenizer and TRL's
SFTTrainer.

The data is the questions and answers of a JSONL file (GSM8K's train.jsonl beside the project),
repeated with a running number in each question to 200,000 different conversations. Both sides use
one tokenizer, a byte-level BPE with 32,000 entries trained on that text, and one ChatML template
with `{% generation %}` around the trained text, so that TRL's assistant-only loss takes it as it
is. Everything runs in processes of its own, one after the other; memory is the peak of all
processes of a side together. TRL is timed around `SFTTrainer._prepare_dataset`, model and start-up
left out, with assistant-only loss and its best-fit decreasing packing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchsft.config import InputError

SOURCE = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
SEQ_LEN = 4096
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' "
    "%}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] "
    "+ '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif "
    "%}"
)


def write_inputs(where: Path, conversations: int) -> None:
    """`chats.jsonl` and the tokenizer directory `model`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not SOURCE.is_file():
        raise InputError(
            f"{SOURCE} does not exist; put GSM8K's train.jsonl there (a question and "
            f"an answer a line)"
        )
    pairs = [
        (row["question"], row["answer"]) for row in map(json.loads, SOURCE.read_text().splitlines())
    ]
    with open(where / "chats.jsonl", "w") as file:
        for i in range(conversations):
            question, answer = pairs[i % len(pairs)]
            messages = [
                {"role": "user", "content": f"{i}. {question}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(where / "model")


# ---------------------------------------------------------------- what runs in a process of its own


def encode_side(where: Path) -> dict[str, float]:
    """Samples per second of rendering + tokenising + masking, and of the bare tokenizer on the same
    texts; one process.
    """
    from torchsft.data.formats import Conversation
    from torchsft.data.template import ChatTokenizer
    from torchsft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(where / "model")
    chat = ChatTokenizer(tokenizer)
    with open(where / "chats.jsonl") as file:
        examples = [
            Conversation(str(i), json.loads(line)["messages"])
            for i, line in zip(range(20_000), file, strict=False)
        ]
    texts = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in example.messages)
        for example in examples
    ]
    batches = range(0, len(examples), 256)

    def bare() -> None:
        for i in batches:
            tokenizer.backend_tokenizer.encode_batch(texts[i : i + 256], add_special_tokens=False)

    def ours() -> None:
        for i in batches:
            chat.encode(examples[i : i + 256])

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    seconds(bare), seconds(ours)  # both have words in their caches from here on
    rounds = [(seconds(bare), seconds(ours)) for _ in range(3)]
    return {
        "bare tokenizer, samples/s": len(examples) / min(bare for bare, _ in rounds),
        "render + tokenise + mask, samples/s": len(examples) / min(ours for _, ours in rounds),
    }


def torchsft_side(where: Path) -> dict[str, float]:
    """Everything that a training run does before its first step, without and with the cache; then
    packing alone.
    """
    from torchsft.config import Data
    from torchsft.data.prepare import prepare
    from torchsft.data.stream import TrainLoader
    from torchsft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(where / "model")
    options = Data(seq_len=SEQ_LEN, cache=str(where / "cache"))
    began = time.perf_counter()
    (source,) = prepare([str(where / "chats.jsonl")], tokenizer, options)
    built = time.perf_counter() - began
    began = time.perf_counter()
    (source,) = prepare([str(where / "chats.jsonl")], tokenizer, options)
    opened = time.perf_counter() - began
    # a step is a row
    one = {
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "data_rank": 0,
        "data_size": 1,
        "pad_token_id": 0,
    }
    began = time.perf_counter()
    rows = TrainLoader([source], seq_len=SEQ_LEN, seed=0, **one).steps_in_epoch(0)
    packed = time.perf_counter() - began
    return {
        "samples": source.report.samples,
        "prepare, s": built,
        "pack, s": packed,
        "rows": rows,
        "fill": source.report.tokens / (rows * SEQ_LEN),
        "supervised": source.report.supervised_tokens,
        "second start, s": opened,
    }


def trl_side(where: Path) -> dict[str, float]:
    """Measure the same with TRL: `SFTTrainer._prepare_dataset`, twice; the second time from the
    cache of `datasets`.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from trl.trainer import sft_trainer

    times: dict[str, float] = {}
    pack, prepare = sft_trainer.pack_dataset, SFTTrainer._prepare_dataset

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            times[name] = times.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    sft_trainer.pack_dataset = timed("pack", pack)
    SFTTrainer._prepare_dataset = timed("prepare", prepare)
    tokenizer = AutoTokenizer.from_pretrained(where / "model")
    sizes = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    arguments = SFTConfig(
        output_dir=str(where / "trl"),
        max_length=SEQ_LEN,
        packing=True,
        packing_strategy="bfd",
        padding_free=True,
        assistant_only_loss=True,
        dataset_num_proc=os.cpu_count(),
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    results: dict[str, float] = {}
    for start in ("first", "second"):
        times.clear()
        began = time.perf_counter()
        dataset = load_dataset(
            "json",
            data_files=str(where / "chats.jsonl"),
            split="train",
            cache_dir=str(where / "datasets"),
        )
        loaded = time.perf_counter() - began
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
        )
        if start == "first":
            results["prepare, s"] = loaded + times["prepare"] - times["pack"]
            results["pack, s"] = times["pack"]
        else:
            results["second start, s"] = loaded + times["prepare"]
    packed = trainer.train_dataset
    tokens = sum(len(ids) for ids in packed["input_ids"])
    return results | {
        "samples": len(dataset),
        "rows": len(packed),
        "fill": tokens / (len(packed) * SEQ_LEN),
    }


SIDES = {"encode": encode_side, "torchsft": torchsft_side, "trl": trl_side}


# ---------------------------------------------------------------- the measurement


def _resident(pid: int) -> int:
    """Return bytes of memory of a process and all of its children that no other process of them
    shares (PSS).
    """
    total, found = 0, [pid]
    while found:
        process = Path(f"/proc/{found.pop()}")
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            for task in (process / "task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except (OSError, StopIteration):
            continue
    return total


def measure(side: str, where: Path, threads: int | None = None) -> dict[str, float]:
    """Run a side in a process of its own; adds the peak of its memory."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        )
    }
    if threads is not None:
        environment |= {"RAYON_NUM_THREADS": str(threads)}
    out = where / f"{side}.json"
    command = [sys.executable, "-m", "tools.benchmark_data", side, str(where), str(out)]
    process = subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL
    )
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.25):
            peak = max(peak, _resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        raise InputError(
            f"the side {side} of the benchmark ended with exit code {code}; its error is above"
        )
    return json.loads(out.read_text()) | {"peak GB": peak / 1e9}


def run(json_path: Path | None, conversations: int, with_trl: bool) -> None:
    """Measure, print a table, and write it to `json_path`."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        write_inputs(where, conversations)
        results = {
            "one thread": measure("encode", where, threads=1),
            "all threads": measure("encode", where),
        }
        results["torchsft"] = measure("torchsft", where)
        if with_trl:
            results["trl"] = measure("trl", where)
    print(
        f"{conversations:,} conversations, Python {platform.python_version()}, {os.cpu_count()} "
        f"cores"
    )
    for side, found in results.items():
        print(side)
        for name, value in found.items():
            print(f"  {name:<40} {value:,.4g}" if value < 100 else f"  {name:<40} {value:,.0f}")
    for name in ("one thread", "all threads"):
        found = results[name]
        share = found["render + tokenise + mask, samples/s"] / found["bare tokenizer, samples/s"]
        print(f"share of the bare tokenizer's speed, {name}: {share:.2f} (target 0.7)")
    if json_path:
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    name, where, out = sys.argv[1:]
    Path(out).write_text(json.dumps(SIDES[name](Path(where))))
