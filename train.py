"""Train a GPT on a prepared data set.

    python train.py config/quick.toml                        one or more TOML files of settings
    python train.py config/quick.toml --batch_size=32        flags come last and win
    python train.py --resume out/quick                       resume the run in a folder, exactly
    torchrun --standalone --nproc_per_node=2 train.py ...    several processes share each batch

Writes {last,best}.safetensors, {metrics,samples}.jsonl, config.toml and report.html into out_dir.
"""

import sys

from glyphgpt.errors import BROKEN_PIPE_STATUS, UsageError, UserError, exit_on_error, is_broken_pipe, start_script, warn

if __name__ == "__main__":  # while the rest is imported
    start_script()

from glyphgpt.cli import CONFIG, command, parse, printable
from glyphgpt.settings import PATHS, Mode, Network, Optimization, TrainSettings

NANOGPT_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # which its init_from downloads
SILENCE_SECONDS = 15  # at most, where there is no progress bar
USAGE = "python train.py [CONFIG.toml | RUN ...] [--key=value ...]"

if __name__ == "__main__":  # before torch, whose import takes seconds: help and mistakes answer at once
    with exit_on_error():
        SETTINGS, _ = parse(TrainSettings, sys.argv[1:], USAGE, __doc__ or "", files=True)

import math
import signal
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from glyphgpt import checkpoint as checkpoints
from glyphgpt import runtime as runtimes
from glyphgpt.checkpoint import BEST, LAST, Arrays, Checkpoint, TrainState
from glyphgpt.convert import from_huggingface
from glyphgpt.data.batches import Windows, window_starts, windows_per_epoch
from glyphgpt.data.dataset import Dataset, find_dataset, load_dataset
from glyphgpt.data.tokenizers import decode, start_token
from glyphgpt.files import READY, finish_replacement, locked, replace_files, write_atomic
from glyphgpt.inference.generate import LanguageModel, SamplingParams, generate
from glyphgpt.inference.numpy_gpt import NumpyGPT
from glyphgpt.reports import plot
from glyphgpt.reports import run_report as report
from glyphgpt.reports.summary import ModelSummary
from glyphgpt.runtime import Runtime, StopRequest, TorchLM
from glyphgpt.training.distributed import checkpoint_activations, gradient_sync, replicate_model, shard_model
from glyphgpt.training.evaluation import Score, evaluate
from glyphgpt.training.metrics import Metrics, check_trackers
from glyphgpt.training.optimizers import clip_gradients, make_optimizers, set_learning_rate
from glyphgpt.training.schedule import learning_rate
from glyphgpt.training.torch_state import build_model, load_weights, model_arrays, optimizer_arrays, restore_optimizers
from model import GPT, GPTConfig


def main(settings: TrainSettings) -> None:
    """Do what the settings ask for: train, or only evaluate, or only show the network."""
    with runtimes.init_runtime(settings.device, settings.dtype) as runtime:
        settings = resume_after_restart(settings, runtime)
        folder = find_dataset(settings.dataset, Path(settings.data_dir))
        settings = settings.model_copy(update={"dataset": folder.name, "data_dir": str(folder.parent)})
        dataset = load_dataset(folder, folder.parent)
        settings, first = begin_with(settings, dataset)
        check_text(settings, dataset)
        check_trackers(settings)
        if settings.summary:
            if runtime.is_main:
                print(ModelSummary(settings, dataset.tokenizer.vocab_size, settings.batch_size).table())
            return
        with runtimes.oom_hint("batch_size (and raise gradient_accumulation_steps), block_size or n_embd"):
            if settings.eval_only:
                score = score_best(settings, dataset, runtime)
                if runtime.is_main:
                    print(f"{settings.out_dir}/{BEST}: validation {score}")
            else:
                Trainer(settings, dataset, runtime, first).train()


def resume_after_restart(settings: TrainSettings, runtime: Runtime) -> TrainSettings:
    """Complete what a killed process left half done; resume where the torchrun that began this run has restarted it."""
    out_dir, ours = Path(settings.out_dir), False
    if runtime.is_main:
        if (out_dir / READY).exists():
            with locked(out_dir, "--out_dir=ANOTHER"):
                finish_replacement(out_dir)
        torchrun = runtimes.torchrun_id()
        with suppress(UserError):
            ours = bool(torchrun) and checkpoints.read_metadata(out_dir / LAST).torchrun == torchrun
    (begun,) = runtime.sum(float(ours))  # the first process decides for all
    return settings.model_copy(update={"resume": True, "overwrite": False}) if begun else settings


def begin_with(settings: TrainSettings, dataset: Dataset) -> tuple[TrainSettings, GPT | None]:
    """Load the model to begin with, if there is one, and take its network over into the settings.

    Raises:
        UsageError: the settings name another network, or a model as nanoGPT does.
    """
    if settings.init_from in NANOGPT_MODELS and not Path(settings.init_from).exists():
        raise UsageError(
            f"init_from = '{settings.init_from}' is nanoGPT's way; here it is a folder with config.json and "
            "model.safetensors: download them from Hugging Face (hf download "
            f"openai-community/{settings.init_from} --local-dir FOLDER), then --init_from=FOLDER"
        )
    last = Path(settings.out_dir) / LAST
    if not settings.init_from or (settings.resume and not last.exists()):
        return settings, None
    place = last if settings.resume else Path(settings.init_from)
    if from_huggingface.is_there(place):
        checkpoint = from_huggingface.read(place, Path(settings.data_dir))
    else:
        checkpoint = checkpoints.load_checkpoint(checkpoints.find_checkpoint(place), with_optimizer=False)
    check_vocabulary(checkpoint, dataset)
    first = build_model(checkpoint, GPT, GPTConfig)
    form = {name: getattr(first.config, name) for name in Network.model_fields.keys() - {"dropout"}}
    if "block_size" in settings.model_fields_set and settings.block_size < form["block_size"]:
        form["block_size"] = settings.block_size
    for name in settings.model_fields_set & form.keys():
        if getattr(settings, name) != form[name]:
            raise UsageError(
                f"{name} = {getattr(settings, name)} is not that of {checkpoint.path}, {form[name]}; leave it out"
            )
    return settings.model_copy(update=form), None if settings.resume else first


def check_text(settings: TrainSettings, dataset: Dataset) -> None:
    """Compare the text's length with the context's.

    Raises:
        UserError: the text to train on is shorter than a window.
    """
    train, val, block_size = dataset.train.tokens, dataset.val.tokens, settings.block_size
    if train <= block_size:
        raise UserError(
            f"{dataset.folder}: {train:,} tokens to train on do not fill a window of block_size + 1 = "
            f"{block_size + 1:,}; lower block_size to at most {train - 1:,}, or prepare a longer text"
        )
    if val <= block_size:
        warn(f"the validation text has {val:,} tokens, less than block_size = {block_size:,}: its loss says little")


def score_best(settings: TrainSettings, dataset: Dataset, runtime: Runtime) -> Score:
    """Evaluate a run's best model on the validation split."""
    best = checkpoints.load_checkpoint(Path(settings.out_dir) / BEST, with_optimizer=False)
    check_vocabulary(best, dataset)
    model = build_model(best, GPT, GPTConfig).to(runtime.device)
    return evaluate(
        model,
        Windows(dataset.val, runtime.device),
        runtime,
        block_size=model.config.block_size,
        batch_size=settings.batch_size,
        max_tokens=settings.eval_tokens,
    )


def check_vocabulary(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Make sure that a checkpoint reads the data set's ids as they are meant.

    Raises:
        UserError: its tokenizer is another.
    """
    if checkpoint.metadata.tokenizer != dataset.meta.tokenizer:
        raise UserError(
            f"{checkpoint.path} and {dataset.folder} differ in their vocabularies; use the dataset of that run, or "
            f"prepare yours for it: {command('prepare.py', 'FILE', '--name=NAME', f'--vocabulary={checkpoint.path}')}"
        )


def diverged(step: int, what: str, when: str) -> UserError:
    """Return the failure that says what is not finite, and what to change."""
    return UserError(
        f"step {step:,}: {what}: not finite, so training stopped {when}; the checkpoints are as they were; "
        "lower learning_rate or raise warmup_steps, then go on with --resume"
    )


@dataclass(frozen=True)
class Update:
    """What one update looked like."""

    loss: float
    """Of the batch, before the update, in nats per token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float


class Trainer:
    """One run: a model, its optimizers, its data, and how far it has come."""

    def __init__(self, settings: TrainSettings, dataset: Dataset, runtime: Runtime, first: GPT | None = None) -> None:
        """Build everything anew, with the weights of `first` if it is there; `train` resumes if that is asked for."""
        self.settings, self.dataset, self.runtime = settings, dataset, runtime
        self.out_dir = Path(settings.out_dir)
        self.sequences = settings.batch_size * settings.gradient_accumulation_steps
        if self.sequences % runtime.world_size:
            raise UsageError(
                f"{runtime.world_size} processes cannot share {self.sequences} sequences evenly; change batch_size "
                f"or gradient_accumulation_steps so that their product is a multiple of {runtime.world_size}"
            )
        torch.manual_seed(settings.seed)
        form = settings.model_dump(include={field.name for field in fields(GPTConfig)})
        self.config = GPTConfig(vocab_size=dataset.tokenizer.vocab_size, **form)
        self.model = GPT(self.config)
        if first:
            shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
            weights = {name: tensor[: shapes[name][0]] for name, tensor in first.state_dict().items()}  # of positions
            self.model.load_state_dict(weights)
        if settings.activation_checkpointing:
            checkpoint_activations(self.model)
        self.sharded = settings.parallel == "fsdp" and runtime.world_size > 1
        if self.sharded and runtime.dtype == torch.float16:
            raise UsageError("parallel = 'fsdp' does not go with float16; take --dtype=bfloat16 or float32")
        if self.sharded:
            shard_model(self.model, runtime)  # which moves a block at a time
        self.model.to(runtime.device)
        self.parameters = list(self.model.parameters())
        products = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
        self.optimizers = make_optimizers(self.model, settings, products)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
        self.train_windows = Windows(dataset.train, runtime.device)
        self.val_windows = Windows(dataset.val, runtime.device)
        self.state = TrainState()
        self.wandb_id = ""
        self.begun = settings.resume
        self.stop = StopRequest()

    def train(self) -> None:
        """Train from where the run stands until max_steps, until patience runs out, or until asked to stop."""
        if self.settings.resume and not (self.out_dir / LAST).exists():
            instead = (
                "begin anew with --overwrite" if (self.out_dir / BEST).exists() else "leave --resume out to begin one"
            )
            raise UserError(f"{self.out_dir}: no run to resume here; {instead}")
        with locked(self.out_dir, "--out_dir=ANOTHER") if self.runtime.is_main else nullcontext():
            self.open_run()
            self.preflight()
            stopped_by = self.loop()
        self.runtime.barrier()  # none leaves while another still receives what it sent
        self.farewell(stopped_by)

    def loop(self) -> signal.Signals | None:
        """Update, evaluate and save until the end; return the signal that stopped it before."""
        settings, state = self.settings, self.state
        self.started = time.perf_counter() - state.seconds
        stopping = False
        hidden = None if self.runtime.is_main else True  # None hides the bar where there is no terminal
        bar = tqdm(total=settings.max_steps, initial=state.step, unit="step", disable=hidden)
        self.metrics = Metrics(settings, wandb_id=self.wandb_id, silent=not self.runtime.is_main)
        with closing(self.metrics), self.stop.listening(), bar:
            if settings.resume:
                self.write_config(self.out_dir)
                self.metrics.open(keep_steps=state.step)
            self.forward = self.make_forward()
            if not settings.resume:
                self.evaluate_and_save()
            while state.step < settings.max_steps and not stopping and not self.out_of_patience():
                update, stopping = self.update()
                self.tell(update, bar)
                if state.step % settings.eval_every == 0 or state.step == settings.max_steps:
                    self.evaluate_and_save()
                elif stopping or (settings.save_every and state.step % settings.save_every == 0):
                    self.save(self.weights())
        return self.stop.signal or signal.SIGTERM if stopping else None

    def open_run(self) -> None:
        """Load the last checkpoint to resume, or make sure that the folder may take a new run; write nothing.

        Raises:
            UsageError: the folder holds a run, and neither resume nor overwrite is set.
            UserError: what there is to resume does not fit the settings.
        """
        settings, out_dir = self.settings, self.out_dir
        if settings.resume:
            self.restore(checkpoints.load_checkpoint(out_dir / LAST))
        elif any((out_dir / name).exists() for name in (BEST, LAST)) and not settings.overwrite:
            resume = "--resume to continue it, " if (out_dir / LAST).exists() else ""
            raise UsageError(
                f"{out_dir} holds a run already; add {resume}--overwrite to replace it, or --out_dir=ANOTHER"
            )
        self.runtime.barrier()  # every process has looked before one writes

    def begin_run(self, files: dict[str, Checkpoint]) -> None:
        """Put a new run into its folder with its first checkpoints, and take away what an earlier one left there.

        An earlier run stays whole until now, when there is something to put in its place.
        """
        with replace_files(self.out_dir, stale=(report.PAGE, plot.PICTURE)) as new:
            for name, checkpoint in files.items():
                checkpoints.save_checkpoint(checkpoint, new / name)
            self.metrics.write_held(new)
            self.write_config(new)
        self.metrics.open(keep_steps=math.inf)
        self.begun = True

    def write_config(self, folder: Path) -> None:
        """Write the settings that this run can be resumed or repeated with, from any working directory."""
        if self.runtime.is_main:
            settings = self.settings.model_dump(exclude=set(Mode.model_fields))
            absolute = {key: str(Path(settings[key]).absolute()) for key in PATHS if settings[key]}
            write_atomic(folder / CONFIG, tomli_w.dumps(settings | absolute).encode())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's weights, optimizer state and progress.

        Raises:
            UserError: it is of another model or vocabulary.
        """
        check_vocabulary(checkpoint, self.dataset)
        saved, wanted = checkpoint.metadata.model, asdict(self.config)
        for name in wanted.keys() - {"dropout"}:
            if saved.get(name) != wanted[name]:
                there = printable(str(saved.get(name)))
                raise UserError(f"{checkpoint.path}: {name} is {there} there, but {wanted[name]} in the settings")
        was, now = checkpoint.metadata.settings, self.settings.model_dump()
        decisive = {"dropout", *Optimization.model_fields} - {"max_steps"}  # training longer is what resuming is for
        changed = [
            f"{key} {printable(str(was.get(key)))} -> {now[key]}"
            for key in now
            if key in decisive and was.get(key) != now[key]
        ]
        if changed and self.runtime.is_main:
            warn(f"settings changed since the run began: {', '.join(changed)}")
        if checkpoint.metadata.data != self.dataset.meta.fingerprint and self.runtime.is_main:
            warn(f"{self.dataset.folder} is not the data that the run began with; it goes on, but not exactly")
        load_weights(self.model, checkpoint)
        restore_optimizers(self.model, self.optimizers, checkpoint)
        if checkpoint.metadata.scaler:  # the run may have begun in another precision
            self.scaler.load_state_dict(checkpoint.metadata.scaler)
        self.state, self.wandb_id = checkpoint.metadata.state, checkpoint.metadata.wandb_id

    def preflight(self) -> None:
        """Say what the run means before it starts."""
        settings, train = self.settings, self.dataset.train.tokens
        tokens = self.sequences * settings.block_size
        epochs = settings.max_steps * self.sequences / windows_per_epoch(train, settings.block_size)
        processes = f", {self.runtime.world_size} processes" if self.runtime.world_size > 1 else ""
        parameters = sum(parameter.numel() for parameter in self.parameters)
        self.say(
            f"{self.out_dir}: {parameters:,} parameters on {self.runtime.device}, "
            f"{str(self.runtime.dtype).removeprefix('torch.')}{processes}; {tokens:,} tokens a step, "
            f"{settings.max_steps:,} steps = {epochs:.2f} epochs over {train:,} tokens"
        )

    def make_forward(self) -> nn.Module:
        """Return the model as training calls it: compiled, and averaging gradients over processes."""
        example = self.batch()[: self.settings.batch_size]
        compiled = runtimes.compile_or_eager(
            self.model, self.settings.compile, self.runtime, (example[:, :-1], example[:, 1:])
        )
        return replicate_model(compiled, self.runtime) if self.runtime.world_size > 1 and not self.sharded else compiled

    def batch(self) -> Tensor:
        """Return this process's share of the step's sequences, each with its target: (share, block_size + 1)."""
        length = self.settings.block_size + 1
        sequences = self.train_windows.read(self.starts(self.state.step), length)
        self.train_windows.prefetch(self.starts(self.state.step + 1), length)
        return sequences

    def starts(self, step: int) -> NDArray[np.int64]:
        """Return where this process's share of a step's sequences start in the text."""
        settings, share = self.settings, self.sequences // self.runtime.world_size
        first = step * self.sequences + self.runtime.rank * share
        return window_starts(self.dataset.train.tokens, settings.block_size, settings.seed, first, share)

    def update(self) -> tuple[Update, bool]:
        """Do one update; return how it went, and whether any process was asked to stop.

        Raises:
            UserError: loss or gradients are not finite; the weights are left as they were.
        """
        settings, runtime, step = self.settings, self.runtime, self.state.step
        rate = learning_rate(step, settings)
        set_learning_rate(self.optimizers, rate)
        if settings.dropout:  # dropout follows from seed and step, so there is no random state to save
            seed = np.random.SeedSequence((settings.seed, step, runtime.rank))
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        share_loss = self.gradients(self.batch())
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
        grad_norm = clip_gradients(self.parameters, settings.grad_clip)
        loss_sum, stops = runtime.sum(share_loss, float(self.stop.signal is not None))
        loss = loss_sum / runtime.world_size
        if not (math.isfinite(loss) and (math.isfinite(grad_norm) or self.scaler.is_enabled())):  # it skips such steps
            raise diverged(step + 1, f"loss {loss:.4g}, gradient norm {grad_norm:.4g}", "before the update")
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)  # type: ignore[arg-type]
        for parameter in self.parameters:
            parameter.grad = None
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3:  # from 65,536: one halving after another
            raise diverged(step + 1, "gradients at every scale", "after many updates left out")
        self.state.step += 1
        return Update(loss, grad_norm, rate), stops > 0

    def gradients(self, sequences: Tensor) -> float:
        """Add up the gradients of the mean loss over sequences, batch_size or fewer at a time; return the loss."""
        total = torch.zeros((), device=self.runtime.device)
        parts = torch.tensor_split(sequences, math.ceil(len(sequences) / self.settings.batch_size))
        for number, part in enumerate(parts, start=1):
            with gradient_sync(self.forward, now=number == len(parts)):
                with self.runtime.autocast():
                    loss = self.forward(part[:, :-1], part[:, 1:]) * (len(part) / len(sequences))
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total.item()

    def tell(self, update: Update, bar: "tqdm[Any]") -> None:
        """Show an update on the progress bar, and log it when it is time."""
        step, tokens = self.state.step, self.sequences * self.settings.block_size
        speed = bar.format_dict["rate"] or 0.0
        bar.set_postfix_str(f"loss {update.loss:.3f}, {speed * tokens:,.0f} tokens/s", refresh=False)
        bar.update()
        if bar.disable and time.perf_counter() - self.told > SILENCE_SECONDS:
            self.say(f"step {step:,}: training loss {update.loss:.3f}")
        if step % self.settings.log_every == 0:
            self.metrics.write("train", step, **asdict(update), tokens=step * tokens, seconds=self.seconds())

    def seconds(self) -> float:
        """Return the time spent on this run, in this process and those before it."""
        return round(time.perf_counter() - self.started, 3)

    def evaluate_and_save(self) -> None:
        """Score the validation split, log it, keep the best weights, save the last, and show a sample.

        Raises:
            UserError: the loss is not finite; nothing is saved.
        """
        settings, state = self.settings, self.state
        score = evaluate(
            self.model,
            self.val_windows,
            self.runtime,
            block_size=settings.block_size,
            batch_size=settings.batch_size,
            max_tokens=settings.eval_tokens,
        )
        if not math.isfinite(score.loss):
            raise diverged(state.step, f"validation loss {score.loss}", "before saving")
        tokens = state.step * self.sequences * settings.block_size
        self.metrics.write("val", state.step, **asdict(score), tokens=tokens, seconds=self.seconds())
        better = score.loss < state.best_loss
        state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
        weights, sample = self.weights(), ""
        if settings.sample_tokens and (self.runtime.is_main or self.runtime.device.type != "cpu"):
            sample = self.sample(weights)
            self.metrics.write_sample(state.step, sample)  # before the checkpoint, after which it would not come
        if better:
            state.best_loss = score.loss
        self.save(weights, score, best=better)
        self.say(f"step {state.step:,}: validation {score}{', the best so far' if better else ''}")
        if sample:
            self.say("".join(f"  | {line}\n" for line in sample.splitlines()))

    def weights(self) -> Arrays:
        """Return the model's weights, or nothing in processes that do not write; every one must ask."""
        return model_arrays(self.model, keep=self.runtime.is_main)

    def save(self, weights: Arrays, score: Score | None = None, *, best: bool = False) -> None:
        """Write last.safetensors, all that resuming needs, and before it best.safetensors, the model alone, if asked.

        In the other order a killed run would promise a best that is not there.
        """
        optimizer = optimizer_arrays(self.model, self.optimizers, keep=self.runtime.is_main)
        if not self.runtime.is_main:
            return
        self.state.seconds = self.seconds()
        info = checkpoints.Metadata(
            model=asdict(self.config),
            tokenizer=self.dataset.meta.tokenizer,
            settings=self.settings.model_dump(exclude=set(PATHS)),
            data=self.dataset.meta.fingerprint,
            val_loss=score.loss if score else None,
            state=self.state,
            scaler=self.scaler.state_dict(),
            torchrun=runtimes.torchrun_id(),
            wandb_id=self.metrics.wandb_id,
        )
        files = {BEST: Checkpoint(info, weights)} if best else {}
        files[LAST] = Checkpoint(info, weights, optimizer)
        if not self.begun:
            self.begin_run(files)
            return
        for name, checkpoint in files.items():
            checkpoints.save_checkpoint(checkpoint, self.out_dir / name)

    def sample(self, weights: Arrays) -> str:
        """Generate a little text, the same way each time; on GPUs in every process, which may hold but a shard."""
        self.model.eval()
        if self.runtime.device.type == "cpu":
            model: LanguageModel = NumpyGPT(asdict(self.config), weights)
        else:
            model = TorchLM(self.model, self.runtime)
        tokens = generate(
            model,
            np.array([start_token(self.dataset.tokenizer)]),
            block_size=self.settings.block_size,
            num_samples=1,
            max_new_tokens=self.settings.sample_tokens,
            rule=SamplingParams(temperature=0.8),
            seed=self.settings.seed,
        )
        text = decode(self.dataset.tokenizer, [int(token[0]) for token in tokens])
        self.model.train()
        return text

    def out_of_patience(self) -> bool:
        """Tell whether the validation loss has not improved for `patience` evaluations."""
        return 0 < self.settings.patience <= self.state.evaluations_since_best

    def farewell(self, stopped_by: signal.Signals | None) -> None:
        """Say how the run ended and what to do next; a signal becomes the exit status."""
        settings, state, out_dir = self.settings, self.state, self.out_dir
        resume = self.resume_command()
        if stopped_by and state.step < settings.max_steps:
            self.say(f"stopped by {stopped_by.name} at step {state.step:,}, saved; resume it: {resume}")
            self.report()
            raise SystemExit(128 + stopped_by)
        if self.out_of_patience():
            self.say(f"stopped at step {state.step:,}: no better loss in {settings.patience} evaluations")
            self.say(f"train on all the same: {resume} --patience=0")
        sample = command("sample.py", out_dir)
        self.say(f"best validation loss {state.best_loss:.4f}; sample it: {sample}")
        if state.step >= settings.max_steps:
            self.say(f"train longer: {resume} --max_steps={2 * state.step or 1000}")
        self.report()
        if settings.plot and self.runtime.is_main and plot.installed():
            try:
                plot.draw([out_dir], out_dir / plot.PICTURE)
                self.say(f"losses and speed as a picture: {out_dir / plot.PICTURE}")
            except Exception as error:  # matplotlib's, say, that finds no room for its cache; the run itself is safe
                warn(f"no picture of the losses: {error}")
        if self.stop.broken_pipe:
            raise SystemExit(BROKEN_PIPE_STATUS)

    def resume_command(self) -> str:
        """Return the command that resumes this run."""
        return command("train.py", "--resume", self.out_dir)

    def report(self) -> None:
        """Tell the run in a page, if that is asked for; what goes wrong there is no more than a warning."""
        if not (self.settings.report and self.runtime.is_main):
            return
        page = self.out_dir / report.PAGE
        try:
            report.write(self.out_dir, page)
            self.say(f"the run as a page: {page}")
        except (UserError, OSError) as error:
            warn(str(error))

    def say(self, text: str) -> None:
        """Print, from one process only, without breaking the progress bar; a reader that has gone stops the run."""
        self.told = time.perf_counter()
        if self.runtime.is_main:
            try:
                tqdm.write(text)
            except OSError as error:
                if is_broken_pipe(error):
                    self.stop.stop_on_broken_pipe()


if __name__ == "__main__":
    with exit_on_error():
        main(SETTINGS)
