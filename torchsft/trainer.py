"""One run: build -> step -> evaluate -> save, read from top to bottom."""

import dataclasses
import datetime
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchsft import ops
from torchsft.checkpoint import huggingface, state
from torchsft.checkpoint.endings import about, read_generation_config, stop_ids
from torchsft.checkpoint.overwrite import make_way
from torchsft.checkpoint.publish import gather_objects
from torchsft.checkpoint.resume import checkpoints_of, find_start
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import read_json_object
from torchsft.config import Config, InputError, to_dict
from torchsft.data.prepare import open_streams, prepare, prepare_eval
from torchsft.data.stream import (
    Background,
    EvalSet,
    Step,
    StreamLoader,
    TrainLoader,
    microbatches_per_step,
)
from torchsft.data.template import Sample
from torchsft.data.tokenizer import load_tokenizer, read_chat_template
from torchsft.evaluation import evaluate_loss
from torchsft.interruption import Preemption
from torchsft.metrics.logger import MetricsLogger, bars_can_be_drawn
from torchsft.metrics.throughput import device_bytes, memory_gib, mfu, peak_tflops
from torchsft.metrics.timing import Stopwatch, process_age
from torchsft.models.attention import choose_implementation
from torchsft.models.deepseek_v3 import PARTS, DeepseekV3, DeepseekV3Config, initial_value
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.optim.schedule import lr_factor
from torchsft.optim.selection import select
from torchsft.parallel.apply import parallelize
from torchsft.parallel.fsdp import held_bytes
from torchsft.parallel.gradients import clip_factor, global_norm, scale_gradients
from torchsft.parallel.pipeline import (
    build_pipeline,
    first_trained,
    plan_stages,
    reshard_after_forward,
    split,
    weight_pass_possible,
)
from torchsft.parallel.stages import ZERO_BUBBLE
from torchsft.parallel.world import World, mesh_sizes

# saved in checkpoints
COUNTERS = ("step", "updates", "skipped", "skipped_in_a_row", "first_loss", "last_loss")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def resolve(config: Config) -> Config:
    """Replace what is automatic by what this machine and number of ranks make of it: what runs, and
    what is saved. An
    InputError: the mesh sizes do not fit the number of ranks.
    """
    parallel, ranks = config.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    # a look at a layout, without its ranks
    if config.print_config and "WORLD_SIZE" not in os.environ:
        sequence = parallel.cp * parallel.tp
        shard = (
            parallel.ep // math.gcd(parallel.ep, sequence)
            if parallel.dp_shard == -1
            else parallel.dp_shard
        )
        ranks = parallel.pp * parallel.dp_replicate * shard * sequence
    parallel = dataclasses.replace(
        parallel, dp_shard=mesh_sizes(parallel, ranks)["dense"]["dp_shard"]
    )
    precision, train = config.precision, config.train
    if precision.compute == "auto":
        precision = dataclasses.replace(
            precision, compute="bf16" if torch.cuda.is_available() else "fp32"
        )
    if train.steps is None and train.epochs is None:
        train = dataclasses.replace(train, epochs=1)
    data = dataclasses.replace(
        config.data, template_date=config.data.template_date or first_day(config)
    )
    return dataclasses.replace(
        config, parallel=parallel, precision=precision, train=train, data=data
    )


def first_day(config: Config) -> str:
    """The day (YYYY-MM-DD) on which this run started first: that of the run which it continues,
    else today.
    """
    saved, resumed = Path(config.output) / "config.json", config.checkpoint.resume
    found: Mapping[str, Any] = {}
    try:
        if resumed not in ("auto", "never"):
            found = state.saved_config(resumed)
        elif saved.exists():
            found = read_json_object(saved)
    except InputError:  # which `checkpoint_to_continue` tells
        pass
    known = found.get("data")
    day = known.get("template_date") if isinstance(known, Mapping) else None
    return day or datetime.date.today().isoformat()


class Trainer:
    """Everything that one rank holds of a run; `run()` is the whole of it. An InputError: options,
    data, weights and output directory do not fit together; before any weight is loaded where
    possible.
    """

    def __init__(
        self,
        config: Config,  # as the command line gave it, with `model.path` and `data.train` set
        world: World,  # this rank among the others
        # Writes inputs that `config` names, on the main rank, once nothing speaks against the
        # output directory.
        generate: Callable[[], None] | None = None,
        # Generates answers to `eval_samples` "before" or "after" training: how many are right, how
        # many ended by themselves, and how many there are.
        answer: Callable[["Trainer", str], tuple[int, int, int]] | None = None,
    ) -> None:
        self.world, self.answer = world, answer
        self.clock = Stopwatch(process_age())
        self.log: MetricsLogger | None = None  # on the main rank, once everything is built
        self.config = config = resolve(config)
        self.output = Path(config.output)
        if config.model.path is None or not config.data.train:
            raise InputError(
                "--model.path and --data.train must both be given (or neither, for "
                "the debug preset)"
            )
        self.source = Path(config.model.path)
        self.start = find_start(config, tell=world.is_main)
        self.checkpoint = self.start.checkpoint
        makes_way = config.overwrite and bool(self.start.replaces)  # the old export too
        if config.checkpoint.export != "none" and not makes_way:
            huggingface.check_target(self.source, Folder(self.export_place("hf")))
        how = {
            name: getattr(config.checkpoint, name)
            for name in ("mode", "if_busy", "keep", "keep_every", "keep_best")
        }
        where = checkpoints_of(self.output, config.checkpoint.remote)
        self.checkpointer = state.Checkpointer(where, **how, group=world.writers)
        self.preemption = Preemption(tell=world.is_main)
        if generate:
            if world.is_main:
                generate()
            world.barrier()

        self.model_config = DeepseekV3Config.from_hf(huggingface.read_config(self.source))
        # see `end_tokens`; those that the checkpoint to continue from knows
        self.earlier_ends: list[int] = []
        stop_ids(*self.base_configs(), ())  # refuses what it cannot use
        self.lay_out()
        with self.clock("tokenising"):
            self.load_data()
        self.step = 0  # steps taken, skipped ones included
        self.updates = 0  # steps that changed the weights: what the learning-rate schedule counts
        # changed nothing: gradient not finite, or nothing supervised
        self.skipped = self.skipped_in_a_row = 0
        self.first_loss = self.last_loss = math.nan
        self.signalled = False  # a rank has been told to end; as all ranks know it
        # a rank knows of a checkpoint that failed since the last step; as all ranks know it
        self.unwritten = False
        # checkpoints that have ended and have not been told of yet
        self.ended: list[state.Report] = []
        self.failed = ""  # what befell the newest checkpoint, if it failed
        self.faults = 0  # of the output, where the run goes on nevertheless
        with self.clock("loading"):
            self.build_model()
        world.barrier()  # every rank has looked at the output directory
        if world.is_main:
            self.log = self.open_output()

    def lay_out(self) -> None:
        """Meta device -> this rank's part of the model -> sharded: no memory yet, but all that can
        be refused is.
        """
        config, world, options, train = (
            self.config,
            self.world,
            self.config.model,
            self.config.train,
        )
        parallel, dtype = config.parallel, DTYPES[config.precision.compute]
        choose_implementation(options.attention, world.device, dtype)
        microbatches = microbatches_per_step(
            train.global_batch_size, train.micro_batch_size, world.data_size
        )
        tokens, ranks = train.micro_batch_size * config.data.seq_len, parallel.cp * parallel.tp
        if tokens % ranks:
            fault = (
                f"the {tokens} tokens of a microbatch do not divide over cp {parallel.cp} x tp "
                f"{parallel.tp} ranks"
            )
            raise InputError(
                f"{fault}; set --data.seq-len to {-(-config.data.seq_len // ranks) * ranks}"
            )
        if options.ops == "plain" and parallel.tp > 1:
            fault = "--model.ops plain has no loss over a split vocabulary"
            raise InputError(f"{fault}; set --parallel.tp to 1, not {parallel.tp}")
        ops.use_plain(options.ops == "plain")
        self.plan = plan_stages(parallel, self.model_config, microbatches)
        kinds = {
            "attention": options.attention,
            "experts": options.experts,
            "loss_chunk": options.loss_chunk,
        }
        self.weights, pp_rank = None, world.dense.get_local_rank("pp")
        with torch.device("meta"):
            whole = DeepseekV3(self.model_config, **kinds)
            self.shapes = {
                name: tuple(parameter.shape) for name, parameter in whole.named_parameters()
            }
            self.selection = select(
                self.shapes, train.freeze, config.optim.parameter_groups(), PARTS
            )
            self.selection.apply(whole)
            # else the Hugging Face directory's weights are not read
            if self.checkpoint is None and not options.random_init:
                self.weights = huggingface.check_weights(self.source, whole)
            self.model = DeepseekV3(self.model_config, **kinds, **self.plan.model_part(pp_rank))
            self.selection.apply(self.model)
            self.stages = split(self.model, self.plan, pp_rank)
        recompute, reshard = (
            train.activation_checkpointing == "full",
            reshard_after_forward(parallel),
        )
        parallelize(
            self.stages,
            world,
            dtype,
            activation_checkpointing=recompute,
            reshard_after_forward=reshard,
        )
        sharded, gathered = held_bytes(self.model, dtype, reshard)  # activations are not counted
        memory = device_bytes(world.device)
        if memory is not None and sharded + gathered > memory:
            remedy = "raise --parallel.pp, --parallel.ep or --parallel.tp"
            if gathered < memory:
                remedy = (
                    f"start at least {math.ceil(world.size * sharded / (memory - gathered))} ranks"
                )
            fault = (
                f"rank {world.rank} would hold {(sharded + gathered) / 1e9:.1f} GB of weights, "
                f"gradients and moments"
            )
            raise InputError(f"{fault}, but its device has {memory / 1e9:.1f} GB; {remedy}")
        shape = {"microbatches": microbatches, "tokens": tokens, "dtype": dtype}
        shape["first_trained"] = first_trained(whole, self.plan)
        self.pipeline = build_pipeline(self.stages, self.plan, parallel, world, **shape)

    def load_data(self) -> None:
        """Tokenizer, training loader, evaluation batches, number of steps."""
        config, world, data, train = self.config, self.world, self.config.data, self.config.train
        if config.eval.answers and not (data.eval and self.answer):
            lacks = (
                "this recipe cannot generate any"
                if data.eval
                else "there is no --data.eval to take questions from"
            )
            raise InputError(f"--eval.answers is {config.eval.answers}, but {lacks}")
        if config.checkpoint.keep_best and not data.eval:
            lacks = "without --data.eval no checkpoint has an eval loss; give held-out data"
            raise InputError(
                f"--checkpoint.keep-best is {config.checkpoint.keep_best}, but {lacks}"
            )
        if data.streaming and train.steps is None:
            fault = (
                f"--data.streaming reads an unknown number of samples, but --train.epochs is "
                f"{train.epochs}"
            )
            raise InputError(f"{fault}; give --train.steps")
        # Read now: the export has what was trained with, whatever becomes of the file.
        self.chat_template = read_chat_template(data.chat_template) if data.chat_template else None
        self.tokenizer = load_tokenizer(
            self.source, chat_template=data.chat_template, date=data.template_date
        )
        vocab, known = (
            {"vocab_size": self.model_config.vocab_size},
            self.model_config.max_position_embeddings,
        )
        read = vocab | {"progress": config.metrics.progress and bars_can_be_drawn()}
        batch = {"seq_len": data.seq_len, "micro_batch_size": train.micro_batch_size}
        batch |= {"data_rank": world.data_rank, "data_size": world.data_size}
        batch["pad_token_id"] = 0  # any id will do: padding is known by its place
        order = batch | {"packing": data.packing, "buffer": data.packing_buffer, "seed": train.seed}
        order["cost"] = self.model_config.flops if data.balance == "attention" else None
        order["global_batch_size"] = train.global_batch_size
        if data.streaming:
            loader = StreamLoader(open_streams(data.train, self.tokenizer, data, **vocab), **order)
        else:
            sources = prepare(data.train, self.tokenizer, data, **read)
            for source in sources:
                self.say("\n  skipped: ".join([str(source.report), *source.report.faults]))
                for text in source.report.kept:
                    self.say(f"  kept: {text}")
            if (longest := max(source.report.longest for source in sources)) > known:
                most = f"the model's max_position_embeddings is {known}"
                self.say(f"warning: the longest sample has {longest} tokens, but {most}")
            loader = TrainLoader(sources, **order)
        self.eval_samples: list[Sample] = []  # of which answers are generated
        self.eval_sets: dict[str, EvalSet] = {}
        for name, sources in prepare_eval(data.eval, self.tokenizer, data, **read).items():
            for source in sources:
                self.say(
                    "\n  skipped: ".join([f"eval {name}: {source.report}", *source.report.faults])
                )
                self.eval_samples += source.samples[: config.eval.answers - len(self.eval_samples)]
            self.eval_sets[name] = EvalSet(sources, **batch)
        self.total_steps = train.steps or loader.steps_in(train.epochs)
        if self.checkpoint and (reached := state.saved_step(self.checkpoint)) > self.total_steps:
            fault = f"--train.steps or --train.epochs let the run end after step {self.total_steps}"
            raise InputError(
                f"{fault}, but it has reached step {reached} ({self.checkpoint}); "
                f"give at least that many steps"
            )
        self.loader = Background(loader, data.workers, world.device)
        lr_factor(0, config.optim, self.total_steps)  # refuses a schedule that does not fit

    def build_model(self) -> None:
        """Memory and weights: no rank ever holds more than its share of the model."""
        config, world = self.config, self.world
        for stage in self.stages:
            stage.to_empty(device=world.device)
        self.model.init_buffers()
        self.optimizer = build_optimizer(self.model, config.optim, self.selection.groups)
        if self.checkpoint:
            self.resume(self.checkpoint)
        elif self.weights is None:
            self.say(f"random weights from seed {config.train.seed}")
            huggingface.initialise_weights(self.model, config.train.seed, initial_value)
        else:
            self.say(f"loading weights from {self.source}")
            huggingface.load_weights(self.model, self.weights)
        self.model.train()

    def resume(self, path: str) -> None:
        """Continue from a checkpoint: weights, moments, counters, data position."""
        config = self.config
        extra = state.load(path, self.model, self.optimizer)
        if missing := {*COUNTERS, "data"} - extra.keys():
            raise InputError(
                f"checkpoint {path} is damaged: trainer.json lacks "
                f"{', '.join(sorted(missing))}; use an older one"
            )
        for name in COUNTERS:
            setattr(self, name, extra[name])
        self.loader.load_state_dict(extra["data"])
        self.earlier_ends = extra.get("end_tokens", [])  # older checkpoints have none
        self.say(f"continuing from {path} at step {self.step} of {self.total_steps}")
        if self.start.longer and self.step < self.total_steps:
            last = self.updates + self.total_steps - self.step - 1
            factors = (
                lr_factor(update, config.optim, self.total_steps) for update in (self.updates, last)
            )
            now, end = (config.optim.lr * factor for factor in factors)
            course = f"its {config.optim.schedule} schedule now ends at step {self.total_steps}"
            self.say(
                f"{self.start.longer}: {course}; the learning rate goes on at {now:.3g} and "
                f"ends at {end:.3g}"
            )

    def open_output(self) -> MetricsLogger:
        """Write the resolved configuration and open the metric files, where an earlier run makes
        way first (main rank only).
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if self.start.replaces:
            removed = make_way(self.config, str(self.checkpointer.folder))
            names = [path.removeprefix(f"{self.output}/") for path in removed]
            self.say(f"{self.start.replaces}; removed: {', '.join(names) or 'nothing'}")
        text, options = json.dumps(to_dict(self.config), indent=2), self.config.metrics
        Folder(self.output).write_text("config.json.partial", text + "\n")
        # whole or not there
        os.replace(self.output / "config.json.partial", self.output / "config.json")
        shown = {
            "tensorboard": options.tensorboard,
            "progress": options.progress,
            "config_text": text,
        }
        return MetricsLogger(
            self.output, total_steps=self.total_steps, start_step=self.step, **shown
        )

    def run(self) -> None:
        """Train to the last step, with evaluation, checkpoints, export and a closing summary.

        Ctrl-C, SIGTERM and SIGUSR1 end it early, after a step and its checkpoint, without an error;
        the same command continues.

        Raises:
            InputError: too many steps in a row changed nothing.
            OSError: the output cannot be written and --checkpoint.on-error is stop, or the last
                save failed.
        """
        self.say(self.describe())
        self.world.barrier()  # the output is open
        if self.step == self.total_steps:
            again = (
                "it is evaluated and exported again; to train longer, raise --train.steps or "
                "--train.epochs"
            )
            self.say(
                f"this run is complete: {again}; to train anew, choose another --output or "
                f"delete this one"
            )
        with self.preemption:
            evaluation, tokens, seconds = self.train()
        if self.signalled:
            done = (
                f"after step {self.step} of {self.total_steps} and its checkpoint"
                if self.step
                else "before the first step"
            )
            self.say(f"ended by {self.preemption}, {done}; the same command continues from there")
        else:
            if self.eval_sets and not evaluation:  # a finished run was started again
                with self.clock("evaluation"):
                    evaluation = evaluate_loss(self.pipeline, self.eval_sets, self.world)
            matches = None
            if self.config.eval.answers:
                with self.clock("answers"):
                    matches = self.answer(self, "after")
            if self.config.checkpoint.export != "none":
                with self.clock("export"):
                    self.export()
        if self.failed:
            raise OSError(
                f"{self.failed}; it was the last one: mend that and run the same command again"
            )
        if self.log:
            with self.output_may_fail():
                self.log.close()
            if not self.signalled:
                self.say(self.summary(evaluation, tokens, seconds, matches))
        if self.config.data.streaming:
            # what has been read of it, some steps ahead of what was trained
            for source in self.loader.loader.sources:
                self.say("\n  skipped: ".join([f"streamed {source.report}", *source.report.faults]))

    def train(self) -> tuple[dict[str, float], float, float]:
        """Steps, evaluations and checkpoints, to the last step or until a signal comes. Returns
        what the last step's evaluation found, if there was one; tokens and seconds of the steps.
        """
        config, evaluation = self.config, {}
        if config.eval.answers and self.step == 0:
            with self.clock("answers"):
                self.answer(self, "before")
            self.agree()
        tokens = seconds = 0.0
        # the earlier run may have been ended before that of its last checkpoint's step
        self.export_step(again=False)
        while self.step < self.total_steps and not self.signalled:
            with self.clock("waiting for data"):
                step = next(self.loader)
            with self.clock("training steps"):
                record, scalars = self.train_step(step)
            tokens += record["tokens"]
            seconds += record["step_seconds"]
            evaluation = {}
            if self.eval_sets and self.due(config.eval.every) and not self.signalled:
                with self.clock("evaluation"):
                    evaluation = evaluate_loss(self.pipeline, self.eval_sets, self.world)
                record |= evaluation
                self.agree()
            with self.output_may_fail():
                if self.log:
                    self.log.step(self.step, record, scalars)
            self.tell()
            if self.skipped_in_a_row >= config.train.max_nonfinite_steps:
                last = f"the last with norm {record['grad_norm']} at step {self.step}"
                remedy = "lower --optim.lr, look at the data or raise --train.max-nonfinite-steps"
                raise InputError(
                    f"{self.skipped_in_a_row} steps in a row changed nothing, {last}; {remedy}"
                )
            if self.due(config.checkpoint.every) or self.signalled:
                with self.clock("checkpoints"):
                    self.save(evaluation.get("eval_loss"))
            with self.clock("export"):
                self.export_step()
        self.agree()
        return evaluation, tokens, seconds

    def agree(self) -> None:
        """Learn whether a signal has come to any rank; collective, for where no step ends."""
        self.signalled = bool(self.world.sum([float(self.preemption.received is not None)]))

    def due(self, every: int) -> bool:
        """True at every `every`-th step and at the last one."""
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def train_step(self, step: Step) -> tuple[dict[str, Any], dict[str, float]]:
        """One optimizer step on this rank's microbatches of a global batch. Every microbatch gives
        a *sum* of weighted token losses, which is divided by the loss weight of the whole global
        batch, known before the first backward pass. So neither accumulation nor the number of ranks
        can change a gradient. Returns what metrics.jsonl says of the step, and further TensorBoard
        scalars; the same on every rank.
        """
        config, world, batches, began = (
            self.config,
            self.world,
            step.microbatches,
            time.perf_counter(),
        )
        lengths = [b.cu_seqlens.diff().tolist() for b in batches]
        counts = [
            float(sum(b.loss_weights.double().sum() for b in batches)),
            float(sum((b.loss_weights != 0).sum() for b in batches)),
            float(sum(map(sum, lengths))),
            sum(self.model_config.flops(documents) for documents in lengths),
        ]
        weight, supervised, tokens, flops = world.sum(
            counts if world.is_reader else [0.0] * len(counts)
        ).tolist()
        for moe in self.model.moe_layers().values():
            moe.balance_scale = config.train.aux_loss / max(tokens, 1)
        loss_sum = self.pipeline.step(batches, max(weight, 1e-30))

        norm_tensor = global_norm(self.model.parameters())
        norm = norm_tensor.item()
        factor = lr_factor(self.updates, config.optim, self.total_steps)
        lr = config.optim.lr * factor
        if math.isfinite(norm) and weight > 0:
            if config.optim.clip_norm is not None:
                scale_gradients(
                    self.model.parameters(), clip_factor(norm_tensor, config.optim.clip_norm)
                )
            set_lr(self.optimizer, factor)
            self.optimizer.step()
            self.updates += 1
            self.skipped_in_a_row = 0
        else:  # nothing changes: weights, moments, schedule
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad()
        self.step += 1

        self.ended += self.checkpointer.reports()
        loss, aux_loss, load = self.collect(loss_sum, weight, tokens)
        seconds = time.perf_counter() - began
        if math.isnan(self.first_loss):
            self.first_loss = loss
        self.last_loss = loss
        record = {
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens": int(tokens),
            "supervised_tokens": int(supervised),
        }
        record |= {
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "epoch": step.epoch,
        }
        record["data_wait_share"] = self.loader.waited / (self.loader.waited + seconds)
        if config.train.aux_loss:
            record["aux_loss"] = aux_loss
        scalars = {
            "speed/supervised_tokens_per_second": supervised / seconds,
            "optim/skipped_steps": self.skipped,
        }
        scalars |= {
            f"data/epochs/{name}": n
            for name, n in self.loader.loader.source_epochs(step.state).items()
        }
        for group in config.optim.parameter_groups():
            if group.lr is not None:
                scalars[f"optim/lr/{group.pattern}"] = factor * group.lr
        scalars |= memory_gib(world.device) | load
        if peak := config.metrics.peak_tflops or peak_tflops(world.device):
            scalars["speed/mfu"] = mfu(flops / world.size, seconds, peak)
        return record, scalars

    def collect(
        self, loss_sum: torch.Tensor, weight: float, tokens: float
    ) -> tuple[float, float, dict[str, float]]:
        """Over all ranks: mean loss, balance loss (as it is minimised) and expert load: the busiest
        expert's over the mean, per MoE layer; counters start anew. One collective, that the host
        waits for; it also settles `signalled` and `unwritten`.
        """
        layers, experts = self.model_config.num_hidden_layers, self.model_config.n_routed_experts
        # Every rank has the same places for all layers and fills in its own.
        counts = torch.zeros(layers, 1 + experts, dtype=torch.float64, device=self.world.device)
        for name, moe in self.model.moe_layers().items():
            counts[int(name), 0] = moe.balance_loss
            counts[int(name), 1:] = moe.expert_load
            moe.init_buffers()
        # The ranks of a tensor group each have the loss of all of its tokens.
        mine = (
            loss_sum if self.world.dense.get_local_rank("tp") == 0 else torch.zeros_like(loss_sum)
        )
        flags = counts.new_tensor(
            [self.preemption.received is not None, any(report.error for report in self.ended)]
        )
        total, signalled, unwritten, *counts = self.world.sum(
            torch.cat([mine[None], flags, counts.flatten()])
        ).tolist()
        self.signalled, self.unwritten = signalled > 0, unwritten > 0
        scalars, balance = {}, 0.0
        for layer in range(layers):
            if self.model_config.is_moe(layer):
                layer_balance, *load = counts[layer * (1 + experts) : (layer + 1) * (1 + experts)]
                balance += layer_balance
                scalars[f"expert_load/layer_{layer}_max_over_mean"] = (
                    max(load) * experts / max(sum(load), 1.0)
                )
        return (
            total / max(weight, 1e-30),
            self.config.train.aux_loss * balance / max(tokens, 1),
            scalars,
        )

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of this step; beside training, unless it is the last one. `score`: its
        eval loss, if known.
        """
        last = self.signalled or self.step == self.total_steps
        if last:
            self.checkpointer.wait()  # it must not be left out since another is being written
        extra = {name: getattr(self, name) for name in COUNTERS} | {
            "data": self.loader.state_dict()
        }
        extra["end_tokens"] = self.end_tokens()
        config = to_dict(self.config)
        if not self.checkpointer.save(
            self.step, self.model, self.optimizer, extra=extra, config=config, score=score, now=last
        ):
            self.say(f"no checkpoint of step {self.step}: the one before is still being written")
        if last or self.config.checkpoint.mode == "sync":  # all ranks know how it went
            self.ended += self.checkpointer.reports()
            self.unwritten = any(report.error for report in self.ended)
            self.tell()

    def tell(self) -> None:
        """Say how saves ended. An OSError, on all ranks at one step: one failed on any, and
        --checkpoint.on-error is stop.
        """
        if self.unwritten and not any(report.error for report in self.ended):
            self.checkpointer.wait()  # another rank heard of it first
            self.ended += self.checkpointer.reports()
        ended, self.ended, self.unwritten = self.ended, [], False
        for report in ended:
            self.failed = report.error or ""
            with self.output_may_fail():
                if self.failed:
                    raise OSError(self.failed)
                if self.log:
                    times = {
                        "stall_seconds": report.stall_seconds,
                        "write_seconds": report.write_seconds,
                    }
                    self.log.scalars(
                        report.step, {f"checkpoint/{name}": value for name, value in times.items()}
                    )
            if not self.failed:
                size, seconds, stall = (
                    f"{report.bytes / 1e6:,.1f} MB",
                    report.write_seconds,
                    report.stall_seconds,
                )
                self.say(
                    f"checkpoint {report.path}: {size} written in {seconds:.2f} s, training "
                    f"waited {stall:.2f} s"
                )

    @contextmanager
    def output_may_fail(self) -> Iterator[None]:
        """An OSError in here ends the run, or is only told: as --checkpoint.on-error says."""
        try:
            yield
        except OSError as error:
            if self.config.checkpoint.on_error == "stop":
                raise
            self.faults += 1
            if self.world.is_main:
                print(
                    f"warning: {error}; training goes on (fault {self.faults} of the output)",
                    file=sys.stderr,
                    flush=True,
                )

    def end_tokens(self) -> list[int]:
        """Ids of the tokens that ended turns trained so far, the most frequent first. With
        --data.streaming only rank 0's list
        counts: the ranks may have read on by different amounts.
        """
        counts = Counter()
        for source in self.loader.loader.sources:
            counts.update({int(token): turns for token, turns in source.report.ends.items()})
        frequent = sorted(counts, key=lambda token: (-counts[token], token))
        return list(dict.fromkeys([*self.earlier_ends, *frequent]))

    def base_configs(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """config.json and generation_config.json of the model directory that the run began with."""
        return huggingface.read_config(self.source), read_generation_config(self.source)

    def stop_tokens(self) -> list[int]:
        """Ids of the tokens at which answers end when an export of this moment is served;
        collective.
        """
        return gather_objects(stop_ids(*self.base_configs(), self.end_tokens()))[0]

    def export(self, name: str = "hf") -> None:
        """Write the weights and all that belongs to them as the Hugging Face directory
        OUTPUT/`name`. An OSError, on every
        rank: it could not be written.
        """
        ends, options = self.end_tokens(), self.config.checkpoint
        place = self.export_place(name)
        self.say(
            f"exporting {options.export} weights to "
            f"{place}{about(*self.base_configs(), ends, self.tokenizer)}"
        )
        try:
            given = {"ends": ends, "chat_template": self.chat_template}
            huggingface.export(self.model, place, DTYPES[options.export], self.source, **given)
        except OSError as error:
            fault = f"the export to {place} could not be written ({error})"
            if self.step < self.total_steps:
                raise OSError(fault) from error
            known = self.failed or "the last checkpoint is complete"
            raise OSError(f"{fault}; {known}: mend that and run the same command again") from error

    def export_step(self, again: bool = True) -> None:
        """Export this step's weights where --checkpoint.export-every says so; of the last one,
        `run` does. `again`: also where that is done already.
        """
        every, name = self.config.checkpoint.export_every, f"hf-step-{self.step:08d}"
        due = every > 0 and self.step > 0 and self.step % every == 0
        if not due or self.step == self.total_steps or self.signalled:
            return
        if not again and gather_objects(Folder(self.export_place(name)).has("config.json"))[0]:
            return
        try:
            with self.output_may_fail():
                self.export(name)
        except OSError:
            self.checkpointer.wait()  # that of this step is to be complete
            raise

    def export_place(self, name: str) -> str:
        """The directory or URL of an export."""
        remote = self.config.checkpoint.remote
        return f"{remote.rstrip('/')}/{name}" if remote else str(self.output / name)

    def describe(self) -> str:
        """What is about to be trained, and how."""
        config, world, train = self.config, self.world, self.config.train
        numbers = {name: math.prod(shape) for name, shape in self.shapes.items()}
        parameters = sum(numbers.values())
        frozen = sum(numbers[name] for name in self.selection.frozen)
        axes = {axis: world.dense[axis].size() for axis in world.dense.mesh_dim_names}
        axes |= {axis: world.expert[axis].size() for axis in ("ep", "edp")}
        shown = [f"{axis} {size}" for axis, size in axes.items() if size > 1 or axis == "dp_shard"]
        if config.parallel.pp > 1:
            per_stage = "+".join(str(len(layers)) for layers in self.plan.layers)
            shown.append(f"{config.parallel.pp_schedule} over stages of {per_stage} layers")
            full = train.activation_checkpointing == "full"
            if config.parallel.pp_schedule in ZERO_BUBBLE and (full or not weight_pass_possible()):
                reason = "activation checkpointing" if full else f"torch {torch.__version__}"
                shown.append(
                    f"with whole backward passes ({reason}) and the bubbles that this "
                    f"schedule else fills"
                )
        model = f"{parameters / 1e6:,.2f} M parameters"
        if frozen:
            model += f", of which {(parameters - frozen) / 1e6:,.2f} M are trained"
            if (
                self.model_config.tie_word_embeddings
                and "model.embed_tokens.weight" in self.selection.frozen
            ):
                model += (
                    " (frozen with the embeddings: the output embedding, which is tied to them)"
                )
        model += f", {config.precision.compute} compute"
        steps = (
            f"steps {self.step} -> {self.total_steps} of {train.global_batch_size} rows of "
            f"{config.data.seq_len} tokens"
        )
        return f"{model}, on {world.size} x {world.device.type}: {', '.join(shown)}; {steps}"

    def summary(
        self,
        evaluation: dict[str, float],
        tokens: float,
        seconds: float,
        matches: tuple[int, int, int] | None,
    ) -> str:
        """What a run ends with."""
        rows = {
            "steps": f"{self.step} ({self.skipped} skipped)",
            "loss": f"{self.first_loss:.4f} -> {self.last_loss:.4f}",
        }
        if evaluation:
            losses = [key for key in evaluation if key.startswith("eval_loss")]
            for key in losses:  # of all sets together, and of each of several
                perplexity = evaluation[key.replace("loss", "perplexity", 1)]
                name = key if "/" in key else "eval loss"
                rows[name] = f"{evaluation[key]:.4f} (perplexity {perplexity:.3f})"
        if matches:
            right, ended, count = matches
            share = f"{100 * right / count:.1f} %"
            rows["exact answers"] = (
                f"{right} of {count} ({share}); {ended} of {count} ended by themselves"
            )
        if self.faults:
            rows["output faults"] = f"{self.faults}: see the warnings above"
        if tokens:
            rows["tokens/s"] = (
                f"{tokens / seconds:,.0f} in {seconds:.0f} s of training steps (padding not "
                f"counted)"
            )
        rows["time"] = self.clock.shown()
        names = ["config.json", "metrics.jsonl", "tensorboard", "checkpoints", "hf"]
        names += sorted(path.name for path in self.output.glob("hf-step-*"))
        rows["outputs"] = (
            f"{self.output}: {', '.join(n for n in names if (self.output / n).exists())}"
        )
        if self.config.metrics.tensorboard:
            rows["TensorBoard"] = f"tensorboard --logdir {self.output / 'tensorboard'}"
        width = max(17, 2 + max(map(len, rows)))
        return "".join(f"\n{name:<{width}}{text}" for name, text in rows.items())

    def say(self, text: str) -> None:
        """Print on the main rank, without breaking the progress bar."""
        if self.log:
            self.log.message(text)
        elif self.world.is_main:
            print(text, flush=True)
