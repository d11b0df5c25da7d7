"""One run: build, step, evaluate, save; read from top to bottom."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from torchsft.checkpoint import huggingface, state
from torchsft.checkpoint.hf_directory import check_export
from torchsft.checkpoint.overwrite import make_way
from torchsft.checkpoint.resume import find_start
from torchsft.checkpoint.storage import Folder, root_of
from torchsft.checkpoint.weight_files import Weights
from torchsft.config import Config, InputError, to_dict
from torchsft.data.background import Background
from torchsft.data.run_data import DataRank, check_options, load_run_data, with_faults
from torchsft.data.stream import Step
from torchsft.evaluation import Evaluation
from torchsft.garbage import Collector
from torchsft.interruption import Preemption
from torchsft.metrics.late import Counters, Mark, TakenStep, describe_step
from torchsft.metrics.logger import MetricsLogger, bars_can_be_drawn
from torchsft.metrics.step import (
    GlobalBatch,
    StepResults,
    count_rows,
    expert_loads,
    set_loss_scales,
    sum_results,
)
from torchsft.metrics.summary import (
    Answers,
    ParameterCounts,
    Speed,
    describe_run,
    summarise_run,
)
from torchsft.metrics.timing import Stopwatch, process_age
from torchsft.models.families import family_of, read_model_config
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.optim.schedule import describe_rest, lr_factor
from torchsft.output import Exporter, RunOutput, base_configs, end_tokens
from torchsft.parallel.compile import compiled_message
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.gradients import clip_factor, global_norm, scale_gradients
from torchsft.parallel.memory import check_memory
from torchsft.parallel.stages import microbatches_in_flight
from torchsft.parallel.world import World
from torchsft.planning.build import plan_model
from torchsft.resolution import resolve


class Trainer:
    """Everything that one rank holds of a run; `run()` is the whole of it."""

    def __init__(
        self,
        config: Config,
        world: World,
        generate: Callable[[], None] | None = None,
        answer: Callable[["Trainer", str], Answers] | None = None,
    ) -> None:
        """Build a run on this rank.

        Args:
            config: as the command line gave it, with `model.path` and `data.train` set.
            world: this rank among the others.
            generate: writes inputs that `config` names, on the main rank, once nothing speaks
                against the output directory.
            answer: generates answers to `run_data.eval_samples` "before" or "after" training.

        Raises:
            InputError: options, data, weights and output directory do not fit together; before any
                weight is loaded where possible.
        """
        self.world, self.answer = world, answer
        self.clock = Stopwatch(process_age())
        self.config = config = resolve(config)
        if config.model.path is None or not config.data.train:
            raise InputError(
                "--model.path and --data.train must both be given (or neither, for "
                "the debug preset)"
            )
        self.source = Path(config.model.path)
        self.start = find_start(config, announce=world.is_main)
        self.check_export_place()
        self.output = RunOutput(config, world)
        self.preemption = Preemption(announce=world.is_main)
        self.signalled = False  # a rank has been told to end; as all ranks know it
        self.counters = Counters()
        self.taken: TakenStep | None = None  # the last step, while its results are not yet read
        self.ended: Mark | None = None  # where the last step ended
        self.speed = Speed(0.0, 0.0)  # of the steps whose results are read
        self.collector = Collector(config.train.collect_garbage_every)
        # Tokens that ended turns which the run trained before the checkpoint that it continues.
        self.earlier_end_tokens: list[int] = []
        if generate:
            if world.is_main:
                generate()
            world.barrier()

        config_json, _ = base_configs(self.source)
        self.family = family_of(config_json)
        self.model_config = read_model_config(config_json)
        check_export(config_json, config)
        self.plan_model()
        with self.clock("tokenising"):
            self.load_data()
        with self.clock("loading"):
            self.build_model()
        world.barrier()  # every rank has looked at the output directory
        if world.is_main:
            self.output.log = self.open_output()

    def check_export_place(self) -> None:
        """Refuse a place for the export that holds something else, before anything is loaded."""
        if self.config.checkpoint.export == "none":
            return
        if self.config.overwrite and self.start.replaces:  # an old export makes way too
            return
        root = root_of(self.config.output, self.config.checkpoint.remote)
        huggingface.check_target(self.source, Folder(f"{root}/hf"))

    # ------------------------------------------------------------------------------------------
    # build

    def plan_model(self) -> None:
        """Distribute the model over the ranks on the meta device.

        That takes no memory yet, but refuses everything that does not fit together.
        """
        config, world = self.config, self.world
        plan = plan_model(config, self.family, self.model_config, world)
        self.plan, self.model, self.stages = plan, plan.model, plan.stages
        self.weights: Weights | None = None
        # A run that continues, or begins at random, does not read the directory's weights.
        if self.start.checkpoint is None and not config.model.random_init:
            self.weights = huggingface.check_weights(self.source, plan.whole)
            if note := huggingface.note_on_mtp(self.weights, plan.whole):
                self.output.message(note)
            if config.router.bias_update_rate:
                huggingface.check_moving_bias(self.weights, plan.whole)
        in_flight = microbatches_in_flight(
            config.parallel, world.dense.get_local_rank("pp"), plan.microbatches
        )
        check_memory(plan.model, plan.compute, plan.reshard, config, world, in_flight)
        self.pipeline = plan.pipeline(config, world)

    def load_data(self) -> None:
        """Load tokenizer, training rows and evaluation sets, and count the steps."""
        config, model_config = self.config, self.model_config
        check_options(config, can_answer=self.answer is not None)
        self.run_data = load_run_data(
            config,
            self.source,
            DataRank(self.world.data_rank, self.world.data_size),
            vocab_size=model_config.vocab_size,
            max_position_embeddings=model_config.max_position_embeddings,
            attention_cost=model_config.flops,
            progress=config.metrics.progress and bars_can_be_drawn(),
            message=self.output.message,
        )
        self.total_steps = self.run_data.total_steps
        self.evaluation = Evaluation(
            self.pipeline, self.run_data.eval_sets, self.model.layer_experts(), self.world
        )
        count = partial(count_rows, flops=model_config.flops)
        workers, device = config.data.workers, self.world.device
        self.loader = Background(self.run_data.loader, workers, device, count)
        self.data_state = self.loader.state_dict()  # behind the last step that was taken
        if self.start.checkpoint:
            self.check_length(self.start.checkpoint)
        lr_factor(0, config.optim, self.total_steps)  # refuses a schedule that does not fit
        self.exporter = Exporter(
            self.output, self.source, self.run_data.tokenizer, self.run_data.chat_template
        )

    def check_length(self, checkpoint: str) -> None:
        """Refuse a run that would end before the checkpoint that it continues."""
        reached = state.saved_step(checkpoint)
        if reached > self.total_steps:
            raise InputError(
                f"--train.steps or --train.epochs let the run end after step {self.total_steps}, "
                f"but it has reached step {reached} ({checkpoint}); give at least that many steps"
            )

    def build_model(self) -> None:
        """Allocate memory and load weights: no rank ever holds more than its share of the model."""
        config, world = self.config, self.world
        allocate(self.stages, world.device, config.optim.offload)
        options = config.optim, self.plan.selection.groups
        self.optimizer = build_optimizer(self.model, *options, self.stages)
        if self.start.checkpoint:
            self.resume(self.start.checkpoint)
        elif self.weights is None:
            self.output.message(f"random weights from seed {config.train.seed}")
            huggingface.initialise_weights(self.model, config.train.seed)
        else:
            self.output.message(f"loading weights from {self.source}")
            huggingface.load_weights(self.model, self.weights)
        self.model.train()

    def resume(self, checkpoint: str) -> None:
        """Continue from a checkpoint: weights, moments, counters, data position."""
        extra = state.load(checkpoint, self.model, self.optimizer)
        names = [field.name for field in dataclasses.fields(Counters)]
        missing = {*names, "data"} - extra.keys()
        if missing:
            raise InputError(
                f"checkpoint {checkpoint} is damaged: trainer.json lacks "
                f"{', '.join(sorted(missing))}; use an older one"
            )
        self.counters = Counters(**{name: extra[name] for name in names})
        self.loader.load_state_dict(extra["data"])
        self.data_state = self.loader.state_dict()
        self.earlier_end_tokens = extra.get("end_tokens", [])  # older checkpoints have none
        self.evaluation.base_routing = extra.get("base_routing")
        step = self.counters.step
        self.output.message(f"continuing from {checkpoint} at step {step} of {self.total_steps}")
        if self.start.longer and step < self.total_steps:
            taken = step, self.counters.updates
            changed = describe_rest(*taken, self.config.optim, self.total_steps)
            self.output.message(f"{self.start.longer}: {changed}")

    def open_output(self) -> MetricsLogger:
        """Write the resolved configuration and open the metric files, where an earlier run makes
        way first (main rank only).
        """
        directory, options = self.output.directory, self.config.metrics
        directory.mkdir(parents=True, exist_ok=True)
        if self.start.replaces:
            removed = make_way(self.config)
            names = [path.removeprefix(f"{directory}/") for path in removed]
            listed = ", ".join(names) or "nothing"
            self.output.message(f"{self.start.replaces}; removed: {listed}")
        text = json.dumps(to_dict(self.config), indent=2)
        Folder(directory).write_text("config.json.partial", text + "\n")
        # The file is whole or not there.
        os.replace(directory / "config.json.partial", directory / "config.json")
        return MetricsLogger(
            directory,
            total_steps=self.total_steps,
            start_step=self.counters.step,
            tensorboard=options.tensorboard,
            progress=options.progress,
            config_text=text,
        )

    # ------------------------------------------------------------------------------------------
    # run

    def run(self) -> None:
        """Train to the last step, with evaluation, checkpoints, export and a closing summary.

        Ctrl-C, SIGTERM and SIGUSR1 end it early, after a step and its checkpoint, without an error;
        the same command continues.

        Raises:
            InputError: too many steps in a row changed nothing.
            OSError: the output cannot be written and --checkpoint.on-error is stop, or the last
                save failed.
        """
        self.output.message(self.describe())
        self.world.barrier()  # the output is open
        if self.counters.step == self.total_steps:
            self.output.message(
                "this run is complete: it is evaluated and exported again; to train longer, raise "
                "--train.steps or --train.epochs; to train anew, choose another --output or delete "
                "this one"
            )
        with self.preemption, self.collector:
            evaluation = self.train()
        answers = None
        if self.signalled:
            self.output.message(self.describe_early_end())
        else:
            if self.run_data.eval_sets and not evaluation:  # a finished run was started again
                evaluation = self.evaluate()
            if self.config.eval.answers:
                answers = self.generate_answers("after")
            if self.config.checkpoint.export != "none":
                with self.clock("export"):
                    self.export("hf")
        if self.output.last_failure:
            raise OSError(
                f"{self.output.last_failure}; it was the last one: mend that and run the same "
                "command again"
            )
        if self.output.log:
            with self.output.may_fail():
                self.output.log.close()
            if not self.signalled:
                self.output.message(self.summarise(evaluation, answers))
        if self.config.data.streaming:
            # What has been read of it, some steps ahead of what was trained.
            for source in self.run_data.loader.sources:
                report = source.report
                self.output.message(with_faults(f"streamed {report}", report.faults))

    def train(self) -> dict[str, float]:
        """Take steps, with evaluations and checkpoints, to the last one or until a signal comes.

        The results of a step are read in the middle of the next one, or where something is due
        behind it. Of a signal all ranks learn before a step begins, which then is not taken; but
        one step is always saved before the run ends.

        Returns:
            What the last step's evaluation found, if there was one.
        """
        config, counters = self.config, self.counters
        if counters.step == 0:
            with self.clock("evaluation"):
                self.evaluation.base_routing = self.evaluation.routing()
        if config.eval.answers and counters.step == 0:
            self.generate_answers("before")
            self.share()
        # The earlier run may have been ended before the export of its last checkpoint's step.
        self.export_step(repeat=False)
        evaluation: dict[str, float] = {}
        started_at = paused_at = counters.step
        intervals = config.eval.every, config.checkpoint.every, config.checkpoint.export_every
        while counters.step < self.total_steps and not self.signalled:
            with self.clock("waiting for data"):
                try:
                    step = next(self.loader)
                except (InputError, OSError):  # of the data
                    self.finish_step()  # which metrics.jsonl would lack
                    raise
            with self.clock("training steps"):
                batch = self.count(step)
                if self.output.save_failed:
                    self.finish_step()  # before `report_saves` ends the run
                self.output.report_saves()
                if not (self.signalled and counters.step > paused_at):
                    self.begin_step(step, batch)
            if config.model.compile and counters.step == started_at + 1:
                self.output.message(compiled_message())
            pause = self.signalled or any(map(self.at_interval, intervals))
            if pause:
                evaluation, paused_at = self.pause(), counters.step
            self.collector.behind_step(counters.step, pause)
        self.share()
        return evaluation

    def pause(self) -> dict[str, float]:
        """Evaluate, log, save and export behind a step, as far as it is due.

        Returns:
            What the evaluation found, if there was one.
        """
        with self.clock("training steps"):
            if self.taken:
                self.taken.ended.wait()
            if not self.signalled:
                self.share()
        evaluation: dict[str, float] = {}
        if self.evaluates_now():
            evaluation = self.evaluate()
            self.share()
        self.finish_step(evaluation)
        self.output.report_saves()
        if self.at_interval(self.config.checkpoint.every) or self.signalled:
            with self.clock("checkpoints"):
                self.save(evaluation.get("eval_loss"))
        with self.clock("export"):
            self.export_step()
        return evaluation

    def at_interval(self, every: int) -> bool:
        """Whether this is an `every`-th step (0: no step is), or the last one."""
        step = self.counters.step
        return step == self.total_steps or (every > 0 and step % every == 0)

    def evaluates_now(self) -> bool:
        """Whether the evaluation sets are gone through behind this step."""
        if not self.run_data.eval_sets or self.signalled:
            return False
        return self.at_interval(self.config.eval.every)

    def share(self, *numbers: float) -> list[float]:
        """Sum numbers that hosts know over all ranks. With them all ranks learn whether a signal
        has come to any, and whether any knows of a save that failed.

        One collective, among hosts: none waits for a device.
        """
        self.output.collect_reports()
        received, failed = self.preemption.received is not None, self.output.knows_of_failed_save
        signals, failures, *sums = self.world.sum(
            [float(received), float(failed), *numbers]
        ).tolist()
        self.signalled, self.output.save_failed = signals > 0, failures > 0
        return sums

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the evaluation sets; see `Evaluation`."""
        with self.clock("evaluation"):
            return self.evaluation.run(self.output.message)

    def generate_answers(self, when: str) -> Answers:
        """Generate answers "before" or "after" training, as the recipe does."""
        with self.clock("answers"):
            return self.answer(self, when)

    # ------------------------------------------------------------------------------------------
    # step

    def train_step(self, step: Step) -> tuple[dict[str, Any], dict[str, float]]:
        """Take one step and read its results, for who takes steps one by one.

        Returns:
            What metrics.jsonl says of the step, and further TensorBoard scalars; the same on every
            rank.
        """
        self.begin_step(step, self.count(step))
        return self.read_step(self.taken)

    def count(self, step: Step) -> GlobalBatch:
        """Sum a step's rows over all ranks; of those that share rows, one counts them. With it the
        step begins.
        """
        self.begun = Mark(self.world.device)
        return GlobalBatch(*self.share(*(n * self.world.is_reader for n in step.sums)))

    def begin_step(self, step: Step, batch: GlobalBatch) -> None:
        """Launch one optimizer step on this rank's microbatches of a global batch, and meanwhile
        read the results of the step before.

        Every microbatch gives a *sum* of weighted token losses, which is divided by the loss weight
        of the whole global batch, known before the first backward pass. So neither accumulation nor
        the number of ranks can change a gradient.
        """
        waited = self.loader.waited
        layer_experts, moe_layers = self.model.layer_experts(), self.model.moe_layers()
        set_loss_scales(self.pipeline.modules, self.config, batch, len(layer_experts))
        loss_sum = self.pipeline.step(step.microbatches, batch.divisor)
        self.finish_step()  # whether it counted decides the learning rate
        lr_scale = lr_factor(self.counters.updates, self.config.optim, self.total_steps)
        norm, found_inf = self.update_weights(batch.loss_weight, lr_scale)
        last = self.pipeline.modules[-1]
        sums = sum_results(loss_sum, last, moe_layers, layer_experts, self.world)
        rate = self.config.router.bias_update_rate
        if rate and batch.loss_weight > 0:
            loads = expert_loads(sums, layer_experts)
            for name, moe in moe_layers.items():
                moe.move_bias(loads[int(name)], rate * (1 - found_inf))
        self.counters.step += 1
        self.data_state = step.state
        norm, sums = (tensor.to("cpu", non_blocking=True) for tensor in (norm, sums))
        before, self.ended = self.ended, Mark(self.world.device)
        marks = before, self.begun, self.ended
        self.taken = TakenStep(step.epoch, step.state, batch, lr_scale, waited, norm, sums, *marks)

    def finish_step(self, evaluation: dict[str, float] | None = None) -> None:
        """Read and log the results of the last step, if that is still to be done.

        Args:
            evaluation: what was found behind it.

        Raises:
            InputError: too many steps in a row changed nothing.
            OSError: the log cannot be written and --checkpoint.on-error is stop.
        """
        if self.taken is None:
            return
        record, scalars = self.read_step(self.taken)
        seconds = self.speed.seconds + record["step_seconds"]
        self.speed = Speed(self.speed.tokens + record["tokens"], seconds)
        counters = self.counters
        with self.output.may_fail():
            if self.output.log:
                self.output.log.step(counters.step, record | (evaluation or {}), scalars)
        if counters.skipped_in_a_row >= self.config.train.max_nonfinite_steps:
            raise InputError(
                f"{counters.skipped_in_a_row} steps in a row changed nothing, the last with "
                f"norm {record['grad_norm']} at step {counters.step}; lower --optim.lr, look "
                "at the data or raise --train.max-nonfinite-steps"
            )

    def read_step(self, taken: TakenStep) -> tuple[dict[str, Any], dict[str, float]]:
        """Wait for a step, count it, and return what `train_step` does."""
        self.taken = None
        taken.ended.wait()
        results = StepResults.of(taken.norm, taken.sums, self.model.layer_experts())
        batch = taken.batch
        updated = math.isfinite(results.norm) and batch.loss_weight > 0
        self.counters.add(results.loss_sum / batch.divisor, updated)
        mtp_layers = self.model.depth - self.model_config.num_hidden_layers
        record, scalars = describe_step(taken, results, self.config, mtp_layers, self.world.device)
        scalars["optim/skipped_steps"] = self.counters.skipped
        for name, epochs in self.run_data.loader.source_epochs(taken.data_state).items():
            scalars[f"data/epochs/{name}"] = epochs
        return record, scalars

    def update_weights(self, loss_weight: float, lr_scale: float) -> tuple[Tensor, Tensor]:
        """Clip the gradients and step the optimizer. A step whose norm is not finite, as the device
        alone knows, or that has nothing supervised, changes neither weights nor moments.

        Returns:
            The norm of the gradients before clipping, and 1.0 where it is not finite, else 0.0:
            scalars on the device of the gradients.
        """
        optim = self.config.optim
        norm = global_norm(self.pipeline.parameters())
        found_inf = 1 - norm.isfinite().float()
        if loss_weight > 0:
            if optim.clip_norm is not None:
                factor = clip_factor(norm, optim.clip_norm)
                scale_gradients(self.model.parameters(), factor)
            set_lr(self.optimizer, lr_scale)
            self.optimizer.found_inf = found_inf
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, found_inf

    # ------------------------------------------------------------------------------------------
    # save and export

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of this step.

        Args:
            score: its eval loss, if known.
        """
        extra = dataclasses.asdict(self.counters)
        extra["data"] = self.data_state
        extra["end_tokens"] = self.end_tokens()
        extra["base_routing"] = self.evaluation.base_routing
        self.output.save(
            self.counters.step,
            self.model,
            self.optimizer,
            extra=extra,
            score=score,
            last=self.signalled or self.counters.step == self.total_steps,
        )

    def end_tokens(self) -> list[int]:
        """Return the ids of the tokens that ended turns trained so far, the most frequent first.

        With --data.streaming only rank 0's list counts: the ranks may have read on by different
        amounts.
        """
        ends = [source.report.ends for source in self.run_data.loader.sources]
        return end_tokens(ends, self.earlier_end_tokens)

    def stop_tokens(self) -> list[int]:
        """Return the ids at which answers end when an export of this moment is served."""
        return self.exporter.stop_tokens(self.end_tokens())

    def export(self, name: str) -> None:
        """Write the weights and all that belongs to them as OUTPUT/`name`.

        Raises:
            OSError: on every rank: it could not be written.
        """
        try:
            self.exporter.export(self.model, name, self.end_tokens())
        except OSError as error:
            if self.counters.step < self.total_steps:
                raise
            known = self.output.last_failure or "the last checkpoint is complete"
            raise OSError(f"{error}; {known}: mend that and run the same command again") from error

    def export_step(self, repeat: bool = True) -> None:
        """Export this step's weights where --checkpoint.export-every asks for it.

        Not those of the last step, nor of one at which a signal ends the run: `run` exports the
        first, and the run that continues the second.

        Args:
            repeat: whether to write an export that is there already.
        """
        every, step = self.config.checkpoint.export_every, self.counters.step
        name = f"hf-step-{step:08d}"
        if every == 0 or step == 0 or step % every:
            return
        if step == self.total_steps or self.signalled:
            return
        if not repeat and self.exporter.exists(name):
            return
        try:
            with self.output.may_fail():
                self.export(name)
        except OSError:
            self.output.checkpointer.wait()  # that of this step is to be complete
            raise

    # ------------------------------------------------------------------------------------------
    # describe

    def describe(self) -> str:
        """Say what is about to be trained, and how."""
        numbers = {name: p.numel() for name, p in self.plan.whole.named_parameters()}
        frozen = self.plan.selection.frozen
        tied = self.model_config.tie_word_embeddings
        parameters = ParameterCounts(
            all=sum(numbers.values()),
            frozen=sum(numbers[name] for name in frozen),
            tied_head_is_frozen=tied and "model.embed_tokens.weight" in frozen,
            untrained=self.family.untrained,
        )
        config = self.config
        rows = f"{config.train.global_batch_size} rows of {config.data.seq_len} tokens"
        steps = f"steps {self.counters.step} -> {self.total_steps} of {rows}"
        return describe_run(config, self.world, parameters, self.plan.layers, steps, self.model)

    def describe_early_end(self) -> str:
        """Say where a signal has ended the run."""
        done = "before the first step"
        if self.counters.step:
            done = f"after step {self.counters.step} of {self.total_steps} and its checkpoint"
        return f"ended by {self.preemption}, {done}; the same command continues from there"

    def summarise(self, evaluation: dict[str, float], answers: Answers | None) -> str:
        """Say what a run has done."""
        counters = self.counters
        return summarise_run(
            steps=f"{counters.step} ({counters.skipped} skipped)",
            losses=f"{counters.first_loss:.4f} -> {counters.last_loss:.4f}",
            evaluation=evaluation,
            answers=answers,
            output_faults=self.output.faults,
            speed=self.speed,
            time=self.clock.shown(),
            output=self.output.directory,
            tensorboard=self.config.metrics.tensorboard,
        )
