"""Train a GPT on a prepared dataset.

    python train.py config/quick.toml                        one or more TOML files of settings
    python train.py config/quick.toml --batch_size=32        flags override files
    python train.py --resume out/quick                       continue the run in a folder, exactly
    torchrun --standalone --nproc_per_node=2 train.py ...    several processes share each batch

Writes {last,best}.safetensors, {metrics,samples}.jsonl, config.toml and report.html to out_dir.
"""

import glyphgpt.startup  # first: handles --help and usage errors before torch is imported

import math
import signal
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from glyphgpt.checkpoint import Arrays, Checkpoint, Metadata, TrainState, find_checkpoint
from glyphgpt.data.batches import PADDING, Reader, inputs_and_targets
from glyphgpt.data.dataset import Dataset, find_dataset, load_dataset
from glyphgpt.data.rows import Row, training_rows
from glyphgpt.errors import UsageError
from glyphgpt.files import BEST, LAST
from glyphgpt.gpu import WARM_UP_CALLS, CudaGraph, HostCopy, graph_pays, peak_flops, to_device
from glyphgpt.inference.generate import SamplingParams, generate_text
from glyphgpt.inference.numpy_gpt import NumpyGPT
from glyphgpt.inference.score import Score
from glyphgpt.inference.torch_lm import TorchLM
from glyphgpt.reports.run_report import LiveReport
from glyphgpt.reports.summary import ModelSummary
from glyphgpt.runtime import Runtime, compile_or_eager, init_runtime, oom_hint, should_compile, torchrun_id
from glyphgpt.settings import PATHS, ModelConfig, TrainSettings
from glyphgpt.training.dial import Costs, Dial, Pace
from glyphgpt.training.distributed import checkpoint_activations, gradient_sync, replicate_model, shard_model
from glyphgpt.training.evaluation import affordable_tokens, evaluate, evaluate_best, sample_tokens
from glyphgpt.training.init_from import load_init_model
from glyphgpt.training.metrics import check_trackers
from glyphgpt.training.optimizers import clip_gradients, make_optimizers, set_learning_rate
from glyphgpt.training.run import (
    Run,
    StepMetrics,
    check_lengths,
    check_new,
    check_train_length,
    diverged,
    resume_after_restart,
    run_finished,
)
from glyphgpt.training.schedule import learning_rate
from glyphgpt.training.torch_state import load_weights, model_arrays, optimizer_arrays, restore_optimizers
from model import GPT, GPTConfig

MEASURED_STEPS = 12
"""Most steps that measure a run's speed; the first one does not count."""
LEAST_SCALE = 1e-3
"""The least scale of float16's gradients, which begins with 65,536 and is halved at every overflow."""


def main(settings: TrainSettings, *_configs: str) -> None:
    """Train, evaluate, or print a summary of the model, as the settings ask."""
    remedy = "batch_size (and raise gradient_accumulation_steps), block_size or n_embd"
    with oom_hint(remedy), init_runtime(settings.device, settings.dtype) as initial:
        settings = resume_after_restart(settings, initial)
        folder = find_dataset(settings.dataset, Path(settings.data_dir))
        settings = settings.model_copy(update={"dataset": folder.name, "data_dir": str(folder.parent)})
        dataset = load_dataset(folder, folder.parent)
        settings, init_model = load_init_model(settings, dataset)
        check_trackers(settings)
        pace = None
        if settings.minutes:
            check_new(settings)
            if initial.is_main:
                print("measuring the machine (a few seconds; half a minute if it compiles)", flush=True)
            dial = Dial(settings, dataset, initial, partial(measure, dataset, initial))
            settings, pace = dial.choose(), dial.pace()
            if initial.is_main:
                print(dial.description(), flush=True)
        check_lengths(settings, dataset)
        runtime = initial.configured(settings.dtype, settings.threads)
        if settings.summary:
            result = ModelSummary(settings, dataset.tokenizer.vocab_size, settings.batch_size).table()
        elif settings.eval_only:
            path = find_checkpoint(Path(settings.out_dir))
            result = f"{path}: validation {evaluate_best(settings, dataset, runtime)}"
        else:
            result = ""
            Trainer(settings, dataset, runtime, init_model, pace).train()
        if result and runtime.is_main:
            print(result)


def measure(dataset: Dataset, runtime: Runtime, settings: TrainSettings, seconds: float) -> Costs:
    """Return the costs of a run with these settings, from a few steps of it that take about this many seconds."""
    check_train_length(settings, dataset)
    trainer = Trainer(settings, dataset, runtime.configured(settings.dtype, settings.threads))
    trainer.forward = trainer.make_forward()
    if trainer.graph.enabled:
        for _ in range(WARM_UP_CALLS + 1):
            trainer.step(trainer.next_batch())
    times: list[float] = []
    total = 0.0
    while len(times) < 2 or (total < seconds and len(times) < MEASURED_STEPS):
        start = time.perf_counter()
        trainer.step(trainer.next_batch()).results.read()
        times.append(time.perf_counter() - start)
        total = runtime.mean(sum(times))  # all processes take equally many steps
    start = time.perf_counter()
    tokens = trainer.evaluate(max_tokens=settings.tokens_per_step).eval_tokens
    return Costs(step=median(times[1:]), eval_token=(time.perf_counter() - start) / tokens)


@dataclass(frozen=True)
class Update:
    """An update of the weights, which a GPU may still be computing."""

    step: int
    learning_rate: float
    results: HostCopy
    """The loss, the number of processes that received a signal, and the gradients' norm."""


class Trainer:
    """A model, its optimizers, its data, and the progress of the run."""

    def __init__(
        self,
        settings: TrainSettings,
        dataset: Dataset,
        runtime: Runtime,
        init_model: GPT | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Build everything for a new run, with the weights of `init_model` if there is one.

        Raises:
            UsageError: The processes cannot share a batch evenly, or cannot shard a model in float16.
        """
        self.settings, self.dataset, self.runtime, self.pace = settings, dataset, runtime, pace
        self.sequences_per_step = settings.batch_size * settings.gradient_accumulation_steps
        if self.sequences_per_step % runtime.world_size:
            raise UsageError(
                f"{runtime.world_size} processes cannot share {self.sequences_per_step} sequences evenly; change "
                f"batch_size or gradient_accumulation_steps so that their product is a multiple of {runtime.world_size}"
            )
        self.sharded = settings.parallel == "fsdp" and runtime.world_size > 1
        if self.sharded and runtime.dtype == torch.float16:
            raise UsageError("parallel = 'fsdp' does not support float16; use --dtype=bfloat16 or float32")
        torch.manual_seed(settings.seed)
        network = settings.model_dump(include={field.name for field in fields(GPTConfig)})
        self.config = GPTConfig(vocab_size=dataset.tokenizer.vocab_size, **network)
        self.model = self.make_model(init_model)
        if settings.dropout:
            torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN rounds the rate of dropout to sixteenths
        self.parameters = list(self.model.parameters())
        muon_dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
        self.optimizers = make_optimizers(self.model, settings, muon_dtype)
        self.scaler = self.make_scaler()
        self.rows = training_rows(dataset.train, settings.block_size, settings.seed)
        self.train_reader = Reader(dataset.train, runtime.device)
        self.val_reader = Reader(dataset.val, runtime.device)
        self.state = TrainState()
        on_gpu = runtime.device.type == "cuda"
        summary = ModelSummary(settings, self.config.vocab_size, self.sequences_per_step)
        flops, peak = summary.training_flops if on_gpu else 0, peak_flops(runtime)
        self.run = Run(settings, runtime, seconds_at_peak=flops / peak if peak else 0.0)
        self.report = LiveReport(self.run.folder, self.run.log, enabled=runtime.is_main and settings.report)
        self.stopping = False
        self.updates_ahead = int(on_gpu)
        """How many updates may be started before the results of an earlier one are read."""
        can_capture = not settings.activation_checkpointing  # which reads the state of the random numbers on the host
        self.graph = CudaGraph(enabled=can_capture and graph_pays(runtime, flops))

    def make_model(self, init_model: GPT | None) -> GPT:
        """Return the model on its device, with the weights of `init_model` if there is one."""
        model = GPT(self.config)
        model.label_smoothing = self.settings.label_smoothing
        if init_model:
            weights = init_model.state_dict()
            if "position.embedding.weight" in weights:  # a smaller block_size has fewer positions
                weights["position.embedding.weight"] = weights["position.embedding.weight"][: self.config.block_size]
            model.load_state_dict(weights)
        if self.settings.activation_checkpointing:
            checkpoint_activations(model)
        if self.sharded:
            shard_model(model, self.runtime)  # moves the model to the GPU block by block, as it may not fit whole
        return model.to(self.runtime.device)

    def train(self) -> None:
        """Train, or resume training, until max_steps, until patience runs out, or until a signal asks to stop.

        Raises:
            SystemExit: A signal or a broken pipe stopped the run; with the exit status.
        """
        run = self.run
        with run.locked():
            if checkpoint := run.load_last():
                self.restore(checkpoint)
            parameters = sum(parameter.numel() for parameter in self.parameters)
            run.log_start(parameters, self.dataset.train.tokens, self.rows.per_epoch, self.state.step)
            with run.recording(self.state):
                self.forward = self.make_forward()
                if not checkpoint:
                    self.begin()
                self.report.begin()
                self.loop()
                if run_finished(self.settings, self.state) and math.isinf(self.state.best_loss):
                    self.evaluate_and_save()  # resumed with a max_steps that it had already reached
        self.runtime.barrier()  # no process exits while another still receives from it
        interrupted = self.stopping and not run_finished(self.settings, self.state)
        stopped_by = (run.stop.signal or signal.SIGTERM) if interrupted else None
        run.log_end(self.state, stopped_by)
        self.report.finish(None if interrupted else self.dataset)
        if status := run.exit_status(stopped_by):
            raise SystemExit(status)

    def begin(self) -> None:
        """Save before the first step, so that a full disk shows now; evaluate the weights if they are trained ones."""
        if self.settings.init_from or not self.settings.max_steps:
            self.evaluate_and_save()
        else:
            self.save(self.weights())

    def loop(self) -> None:
        """Update, log, evaluate and save until the run ends."""
        state, updates = self.state, deque[Update]()
        while not self.stopping and not run_finished(self.settings, state):
            updates.append(self.step(self.next_batch()))
            self.read_results(updates, keep=self.updates_ahead)
            evaluating = state.step % self.settings.eval_every == 0 or state.step == self.settings.max_steps
            saving = self.settings.save_every > 0 and state.step % self.settings.save_every == 0
            if evaluating or saving or self.stopping:
                self.read_results(updates)
            if evaluating:
                self.evaluate_and_save()
                self.report.renew()
            elif saving or self.stopping:
                self.save(self.weights())

    def read_results(self, updates: deque[Update], keep: int = 0) -> None:
        """Read and log the results of the oldest updates, until there are only `keep`.

        Sets `stopping` if any process received a signal.

        Raises:
            UserError: The loss or the gradients were not finite. That update changed no weights.
        """
        while len(updates) > keep:
            update = updates.popleft()
            loss, stops, grad_norm = update.results.read()
            # a CUDA graph does not see a signal; without other processes, nobody has to agree on the step to stop at
            signaled = self.runtime.world_size == 1 and self.run.stop.signal is not None
            self.stopping = self.stopping or stops > 0 or signaled
            uses_scaler = self.scaler.is_enabled()  # where gradients overflow, it lowers its scale
            if not math.isfinite(loss if uses_scaler else loss + grad_norm):
                problem = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
                raise diverged(update.step, problem, "before the update")
            if uses_scaler and not math.isfinite(grad_norm) and self.scaler.get_scale() < LEAST_SCALE:
                raise diverged(update.step, "gradients at every scale", "after many skipped updates")
            self.run.log_step(update.step, StepMetrics(loss, grad_norm, update.learning_rate))
            self.keep_pace(update.step)

    def keep_pace(self, step: int) -> None:
        """Change max_steps if the run, after this step, would end too late or too early for `minutes`."""
        settings = self.pace.revise(step, self.settings) if self.pace else self.settings
        if settings != self.settings:
            self.state.planned_rate = learning_rate(self.state, self.settings)
            self.state.planned_at = self.state.step
            self.settings = settings
            self.run.change_settings(settings)

    def next_batch(self) -> Tensor:
        """Return this process's sequences of the next update, (sequences, block_size + 1): inputs and targets."""
        length = self.settings.block_size + 1
        batch = self.train_reader.read(self.batch_rows(self.state.step), length)
        self.train_reader.prefetch(self.batch_rows(self.state.step + 1), length)
        return batch

    def batch_rows(self, step: int) -> list[Row]:
        """Return the rows of the training split that are this process's sequences of an update."""
        count = self.sequences_per_step // self.runtime.world_size
        return self.rows.take(step * self.sequences_per_step + self.runtime.rank * count, count)

    def step(self, batch: Tensor) -> Update:
        """Update the weights with the gradients of a batch, unless these are not finite.

        The host does not wait for a GPU here, so that the GPU always has work to do.
        """
        rate = learning_rate(self.state, self.settings)
        self.seed_dropout()
        rate_on_device = to_device(torch.tensor(rate), self.runtime.device)
        results = self.graph.call(self.update, batch, rate_on_device, on_failure=self.forget_update)
        self.state.step += 1
        return Update(self.state.step, rate, HostCopy(results))

    def update(self, batch: Tensor, rate: Tensor) -> Tensor:
        """Update the weights with the gradients of a batch, at a learning rate, unless they are not finite.

        Returns:
            The loss, the number of processes that received a signal, and the gradients' norm.
        """
        set_learning_rate(self.optimizers, rate)
        own_loss = self.backward(batch)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
        grad_norm = clip_gradients(self.parameters, self.settings.grad_clip)
        signaled = torch.full_like(own_loss, self.run.stop.signal is not None)
        shared = torch.stack((own_loss / self.runtime.world_size, signaled))
        self.runtime.sum_(shared)
        results = torch.cat((shared, grad_norm[None]))
        for optimizer in self.optimizers:
            optimizer.step(skip=~results.isfinite().all())
        self.scaler.update()
        self.clear_gradients()
        return results

    def clear_gradients(self) -> None:
        """Free the memory of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def forget_update(self) -> None:
        """Undo what an update that could not be captured has changed: the gradients, and the scaler's view of them."""
        self.clear_gradients()
        state = self.scaler.state_dict()
        self.scaler = self.make_scaler()
        self.scaler.load_state_dict(state)

    def make_scaler(self) -> torch.amp.GradScaler:
        """Return a scaler of the loss for float16, whose gradients would otherwise underflow."""
        return torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)

    def seed_dropout(self) -> None:
        """Seed dropout by the step, so that there is no random state to save."""
        if self.settings.dropout:
            seed = np.random.SeedSequence((self.settings.seed, self.state.step, self.runtime.rank))
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def micro_batches(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Divide a batch into parts of at most batch_size sequences, equal ones, as others would be compiled again."""
        count = math.ceil(len(batch) / self.settings.batch_size)
        return batch.tensor_split(next(n for n in range(count, len(batch) + 1) if len(batch) % n == 0))

    def backward(self, batch: Tensor) -> Tensor:
        """Accumulate the gradients of a batch's mean loss, one micro-batch at a time; return the loss.

        For the gradients, the mean is over all places of the batch, also those without a target, so that processes and
        micro-batches weigh their targets alike.
        """
        total, targets_seen = torch.zeros((), device=self.runtime.device), torch.zeros((), device=self.runtime.device)
        places = batch[:, 1:].numel()
        micro_batches = self.micro_batches(batch)
        for number, micro_batch in enumerate(micro_batches, start=1):
            inputs, targets = inputs_and_targets(micro_batch)
            count = (targets != PADDING).sum()
            with gradient_sync(self.forward, now=number == len(micro_batches)):
                with self.runtime.autocast():
                    loss = self.forward(inputs, targets) * (count / places)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            targets_seen += count
        return total * places / targets_seen

    def evaluate_and_save(self) -> None:
        """Evaluate on the validation split, log the score and a sample, and save.

        Raises:
            UserError: The loss is not finite. Nothing is saved.
        """
        settings, state = self.settings, self.state
        score = self.evaluate(sample_tokens(settings))
        if not math.isfinite(score.loss):
            raise diverged(state.step, f"validation loss {score.loss}", "before saving")
        self.run.write_metrics("val", state.step, score)
        weights = self.weights()
        sample = self.sample(weights)
        best = state.record(score.loss, score.standard_error)
        self.save(weights, score, best=best)
        self.run.log(f"step {state.step:,}: validation {score}{', the best so far' if best else ''}")
        if sample:
            self.run.log("".join(f"  | {line}\n" for line in sample.splitlines()))
        if run_finished(settings, state):
            self.evaluate_whole_split(score, current=best)

    def evaluate(self, max_tokens: int = 0) -> Score:
        """Return the score of the weights on a sample of the validation split, or on the whole split."""
        return evaluate(
            self.model, self.val_reader, self.runtime,
            block_size=self.settings.block_size, batch_size=self.settings.batch_size, max_tokens=max_tokens,
        )  # fmt: skip

    def evaluate_whole_split(self, score: Score, *, current: bool) -> None:
        """Log the best model's score on the whole validation split, if that takes little of the run's time.

        Args:
            score: The last score.
            current: Whether the current weights are the best ones.
        """
        settings, tokens = self.settings, self.dataset.val.tokens
        read_already = settings.eval_tokens != "auto" or score.eval_tokens == tokens - 1
        if read_already or tokens > affordable_tokens(settings, self.state.step):
            return
        if current:
            score = self.evaluate()
        elif self.runtime.world_size == 1:
            score = evaluate_best(settings, self.dataset, self.runtime)
        else:
            return  # other processes may be on machines without the file
        self.run.log_best(self.state.step, score)

    def sample(self, weights: Arrays) -> str:
        """Generate and record a short text, with the same seed each time; "" if there is none to generate here."""
        on_cpu = self.runtime.device.type == "cpu"
        if not self.settings.sample_tokens or (on_cpu and not self.runtime.is_main):
            return ""  # on GPUs every process takes part, as it may hold only a shard of the weights
        self.model.eval()
        text = generate_text(
            NumpyGPT(ModelConfig(**asdict(self.config)), weights) if on_cpu else TorchLM(self.model, self.runtime),
            self.dataset.tokenizer,
            block_size=self.settings.block_size,
            max_new_tokens=self.settings.sample_tokens,
            params=SamplingParams(temperature=0.8),
            seed=self.settings.seed,
        )
        self.model.train()
        self.run.metrics.write_sample(self.state.step, text)  # before the checkpoint, or a kill could lose it
        return text

    def weights(self) -> Arrays:
        """Return the weights by name, empty except in the main process; all processes must call this."""
        return model_arrays(self.model, keep=self.runtime.is_main)

    def save(self, weights: Arrays, score: Score | None = None, *, best: bool = False) -> None:
        """Write last.safetensors, to resume from, and before it best.safetensors if this is the best model."""
        optimizer = optimizer_arrays(self.model, self.optimizers, keep=self.runtime.is_main)
        if not self.runtime.is_main:
            return
        self.state.seconds = self.run.seconds()
        metadata = Metadata(
            model=asdict(self.config),
            tokenizer=self.dataset.meta.tokenizer,
            settings=self.settings.model_dump(exclude=set(PATHS)),
            data=self.dataset.meta.fingerprint,
            val_loss=score.loss if score else None,
            state=self.state,
            scaler=self.scaler.state_dict(),
            torchrun=torchrun_id(),
            wandb_id=self.run.metrics.wandb_id,
        )
        checkpoints = {BEST: Checkpoint(metadata, weights)} if best else {}
        self.run.save(checkpoints | {LAST: Checkpoint(metadata, weights, optimizer)})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load weights, optimizer state and progress from a checkpoint.

        Raises:
            UserError: The checkpoint is of another network, vocabulary or optimizer.
        """
        self.run.check_resumable(checkpoint, ModelConfig(**asdict(self.config)), self.dataset)
        load_weights(self.model, checkpoint)
        restore_optimizers(self.model, self.optimizers, checkpoint)
        if checkpoint.metadata.scaler:  # empty unless the run used float16
            self.scaler.load_state_dict(checkpoint.metadata.scaler)
        self.state = checkpoint.metadata.state

    def make_forward(self) -> nn.Module:
        """Return the model for training: compiled if the settings say so, and averaging gradients over processes."""
        forward: nn.Module = self.model
        if should_compile(self.settings.compile, self.runtime, self.settings.max_steps):
            example = inputs_and_targets(self.micro_batches(self.next_batch())[0])
            forward = compile_or_eager(forward, self.runtime, example)
        return replicate_model(forward, self.runtime) if self.runtime.world_size > 1 and not self.sharded else forward


if __name__ == "__main__":
    glyphgpt.startup.run("train.py", main)
