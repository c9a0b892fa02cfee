"""The dial, `--minutes`: choose the settings with which this machine learns a text best in a given time.

The module is a recipe; `Dial.choose` follows it from top to bottom. Settings that a config or a flag gives stay, and
the others are chosen around them. The result is ordinary settings, which the run's config.toml repeats.

The constants were fitted to the experiments in bench/LOG.md, under "the dial".
"""

from glyphgpt.startup import seconds_since_start

import math
import shutil
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from glyphgpt.cli import count
from glyphgpt.data.dataset import Dataset
from glyphgpt.errors import UsageError
from glyphgpt.runtime import Runtime, is_out_of_memory
from glyphgpt.settings import TrainSettings
from glyphgpt.training.evaluation import affordable_tokens, sample_tokens
from glyphgpt.training.optimizers import NGRAM_LR_SCALE

Values = dict[str, Any]

ARCHITECTURE: Values = {
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "relu2",
    "qk_norm": True,
    "tie_embeddings": False,
    "ngram": 4,
    "token_shift": True,
}
OPTIMIZER: Values = {
    "optimizer": "muon",
    "beta1": 0.8,
    "beta2": 0.95,
    "grad_clip": 0.0,  # the size of Muon's updates does not depend on the gradient's
    "schedule": "linear",
    "warmup_steps": 0,
    "min_lr": 0.0,
}
NETWORKS = ((1, 128), (2, 128), (4, 128), (6, 192), (6, 256), (6, 384), (8, 512), (12, 768))
"""Numbers of blocks and channels, from small to large."""
HEAD_SIZE = 64
TOKENS_PER_WEIGHT, FEW_TOKENS_PER_WEIGHT = 10.0, 4.0
"""A network pays if it sees this many tokens for each weight of its blocks (fewer for two blocks), or a small text
MAX_EPOCHS times."""
WEIGHTS_PER_TOKEN = 100
"""Weights of the blocks, for each token of the text, above which a larger network does not help."""
MAX_EPOCHS = 6
"""Reading a text more often than this makes the validation loss worse, or hardly better."""
CONTEXTS = ((1_500_000, 128), (math.inf, 256))
"""The context of runs of up to that many tokens."""
WHOLE_RECORDS, RECORD_CONTEXT = 0.99, 2
"""The part of the records that the context should hold, if it need not be larger than so many times."""
STEP_TOKENS, FEW_TOKENS = 2048, 600_000
"""Tokens of a step in runs of up to FEW_TOKENS tokens; in longer ones it grows with the cube root of the run."""
ENOUGH_STEPS, LEAST_STEP_TOKENS = 1000, 256
"""Where there is time enough, a text is read in this many steps, unless they would be smaller than this."""
LEARNING_RATE, FEW_STEPS, RATE_POWER = 0.02, 72, 0.36
"""Learning rate of a run of FEW_STEPS steps, and the power of the steps by which it falls."""
MANY_STEPS = 700
"""A shorter run needs less weight decay."""
NGRAM_ROWS, MANY_NGRAM_ROWS, MANY_TOKENS, MANY_ROWS_COST = 8192, 32_768, 2_000_000, 1.1
"""Rows of each n-gram table; more where a run sees so much text and a step takes less than so many times as long."""

BPE_CHARACTERS, LARGEST_ALPHABET = 900_000, 256
"""Least characters of a text, and most different ones, for which BPE tokens were better where time is short."""
BPE_HINT = (
    "\n  hint:    there is more text than time for it; BPE tokens (prepare.py --tokenizer=bpe --vocab_size=512) would "
    "probably reach fewer bits per character"
)

COMPILE_STARTS, COMPILE_LAYER_STARTS, COMPILE_PAYS = 4.5, 3.4, 3.5
"""Time to compile a network without blocks, and each block, in units of the time in which this program started, which
measures the machine; how many times that long a run must be to compile."""
END_SECONDS = 0.5
"""Time to build the model, save it, and write the report."""
LONG_SECONDS = 30
"""A shorter run is evaluated only at its end, and does not try float32 where bfloat16 is the default."""
MEASURE_TIME = 0.007
"""Fraction of the time for measuring one candidate."""
MARGIN = 0.03
"""Fraction of the time that is kept for what was not foreseen."""
CHECKS, FEWEST_CHECKS, RECENT_CHECKS, TOLERANCE = 40, 4, 10, 0.05
"""How often a run's speed is checked, over how many checks, and the change of its steps that is ignored."""


@dataclass(frozen=True)
class Costs:
    """Times that were measured, in seconds."""

    step: float
    """A training step."""
    eval_token: float
    """The evaluation of a token."""


UNKNOWN = Costs(math.inf, math.inf)


class Dial:
    """The choice of settings for a run of `minutes`.

    All processes choose the same, as they share their measurements.
    """

    def __init__(
        self,
        settings: TrainSettings,
        dataset: Dataset,
        runtime: Runtime,
        measure: Callable[[TrainSettings, float], Costs],
    ) -> None:
        """Begin with the given settings.

        Args:
            measure: Returns the costs of a run with the given settings, from a few steps that take about the given
                number of seconds.
        """
        self.settings, self.dataset, self.runtime = settings, dataset, runtime
        self.given = set(settings.model_fields_set)
        self.seconds = settings.minutes * 60
        self.measure_here = measure
        self.start_seconds = self.measuring_seconds = 0.0
        self.costs = UNKNOWN

    def clock(self) -> float:
        """Return the seconds since the start of the program."""
        return self.runtime.mean(seconds_since_start())

    def measure(self, settings: TrainSettings) -> Costs:
        """Return the costs of a run with these settings, infinite ones if memory runs out."""
        try:
            costs = self.measure_here(settings, MEASURE_TIME * self.seconds)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            costs = UNKNOWN
        return Costs(self.runtime.mean(costs.step), self.runtime.mean(costs.eval_token))

    def choose(self) -> TrainSettings:
        """Return the settings.

        Raises:
            UsageError: The given settings contradict each other.
        """
        self.start_seconds = self.clock()
        self.set(**ARCHITECTURE, **OPTIMIZER)
        self.set(init="gpt2" if self.settings.tie_embeddings else "zero", ngram_rows=NGRAM_ROWS)
        self.choose_network()
        self.choose_tables()
        self.choose_precision()
        self.choose_steps()
        self.choose_rates()
        self.measuring_seconds = self.clock() - self.start_seconds
        return self.settings

    def with_values(self, **values: Any) -> TrainSettings:
        """Return the settings with these values, except where others are given.

        Raises:
            UsageError: The given settings contradict each other.
        """
        chosen = {key: value for key, value in values.items() if key not in self.given}
        settings = self.settings.model_copy(update=chosen)
        if problems := list(settings.conflicts()):
            raise UsageError("\n".join(problems))
        return settings

    def set(self, **values: Any) -> None:
        """Choose these values, except where others are given."""
        self.settings = self.with_values(**values)

    def choose_network(self) -> None:
        """Choose the largest network that sees enough tokens in the time."""
        for layers, channels in NETWORKS:
            candidate = self.with_values(**self.network(layers, channels), **self.batch())
            first = self.costs == UNKNOWN
            if candidate == self.settings and not first:
                continue  # the sizes are given
            if not first and not self.pays(candidate, self.costs):
                break  # a larger network is slower still
            costs = self.measure(candidate)
            if not first and not self.pays(candidate, costs):
                break
            self.settings, self.costs = candidate, costs
            if first:
                self.choose_threads()
        if (chosen := self.with_values(**self.batch())) != self.settings:
            self.settings, self.costs = chosen, self.measure(chosen)
        self.enlarge_batch()

    def choose_tables(self) -> None:
        """Choose larger n-gram tables if the run sees much text, and they hardly slow the network down."""
        seen = min(self.dataset.train.tokens, self.tokens_in_time(self.settings, self.costs))
        if self.settings.ngram > 1 and seen >= MANY_TOKENS:
            self.try_change(MANY_ROWS_COST, ngram_rows=MANY_NGRAM_ROWS)

    def enlarge_batch(self) -> None:
        """Double small steps, which process fewer tokens a second, until a small text can be read often enough."""
        text = self.dataset.train.tokens
        while (
            "batch_size" not in self.given
            and self.settings.tokens_per_step < STEP_TOKENS
            and self.tokens_in_time(self.settings, self.costs) < MAX_EPOCHS * text / 2
        ):
            larger = self.with_values(batch_size=2 * self.settings.batch_size)
            costs = self.measure(larger)
            if self.tokens_in_time(larger, costs) <= self.tokens_in_time(self.settings, self.costs):
                break
            self.settings, self.costs = larger, costs

    def pays(self, settings: TrainSettings, costs: Costs) -> bool:
        """Return whether a network sees enough tokens if a step has these costs."""
        text = self.dataset.train.tokens
        if weights(settings) > WEIGHTS_PER_TOKEN * text:
            return False
        tokens_per_weight = TOKENS_PER_WEIGHT if settings.n_layer > 2 else FEW_TOKENS_PER_WEIGHT
        enough = min(tokens_per_weight * weights(settings), MAX_EPOCHS * text)
        return self.tokens_in_time(settings, costs) >= enough

    def tokens_in_time(self, settings: TrainSettings, costs: Costs) -> float:
        """Return how many tokens a run can see in the remaining time."""
        return (self.seconds - self.clock()) / costs.step * settings.tokens_per_step

    def choose_threads(self) -> None:
        """Halve the number of threads as long as that makes steps faster: cores may be busy, or the network small."""
        if self.device != "cpu":
            return
        self.set(threads=torch.get_num_threads())
        while self.settings.threads > 1 and self.try_change(threads=self.settings.threads // 2):
            pass

    def try_change(self, allowed: float = 1.0, **values: Any) -> bool:
        """Choose these values if a step then takes less than `allowed` times as long; return whether it does."""
        candidate = self.with_values(**values)
        if candidate == self.settings or (costs := self.measure(candidate)).step >= allowed * self.costs.step:
            return False
        self.settings, self.costs = candidate, costs
        return True

    def network(self, layers: int, channels: int) -> Values:
        """Return the sizes of a network of about this shape that fits the sizes that are given."""
        given = self.settings
        if "n_embd" in self.given:
            channels = given.n_embd
            heads = max(
                n for n in range(1, channels + 1) if channels % n == 0 and (n == 1 or channels // n >= HEAD_SIZE)
            )
        else:
            heads = given.n_head if "n_head" in self.given else max(1, channels // HEAD_SIZE)
            channels = heads * 2 * max(1, round(channels / heads / 2))
        return {"n_layer": layers, "n_embd": channels, "n_head": heads}

    def batch(self) -> Values:
        """Return the context and the batch for as many tokens as the time, or the text, allows."""
        in_time = self.tokens_in_time(self.settings, self.costs)
        tokens = min(in_time, MAX_EPOCHS * self.dataset.train.tokens)
        size = STEP_TOKENS * max(1.0, tokens / FEW_TOKENS) ** (1 / 3)
        if tokens < in_time:
            size = min(size, max(tokens / ENOUGH_STEPS, LEAST_STEP_TOKENS))
            context = CONTEXTS[-1][1]
        else:
            context = next(context for limit, context in CONTEXTS if tokens <= limit)
        if context < self.record_size <= RECORD_CONTEXT * context:
            context = self.record_size
        context = max(1, min(context, self.dataset.train.tokens - 1))
        context = self.settings.block_size if "block_size" in self.given else context
        world_size = self.runtime.world_size  # processes share a batch evenly
        return {"block_size": context, "batch_size": world_size * max(1, round(size / context / world_size))}

    @cached_property
    def record_size(self) -> int:
        """The tokens of a long record, but not of the longest ones; 0 where there are no records."""
        ends = self.dataset.train.record_ends
        return 0 if ends is None else math.ceil(np.quantile(np.diff(ends), WHOLE_RECORDS))

    def choose_precision(self) -> None:
        """Choose the precision and whether to compile, by trying."""
        dtype = str(self.runtime.configured(self.settings.dtype, 0).dtype).removeprefix("torch.")
        self.set(dtype=dtype, compile=False)
        if self.device == "cpu" and self.seconds >= LONG_SECONDS:
            self.try_change(dtype="float32")
        can_compile = self.device == "cuda" or shutil.which("g++")
        compile_seconds = self.start_seconds * (COMPILE_STARTS + COMPILE_LAYER_STARTS * self.settings.n_layer)
        if can_compile and self.seconds - self.clock() > COMPILE_PAYS * compile_seconds:
            self.try_change(compile=True)

    @property
    def device(self) -> str:
        """The type of the device."""
        return self.runtime.device.type

    def choose_steps(self) -> None:
        """Choose as many steps as the time allows, and when to evaluate."""

        def with_steps(steps: int) -> TrainSettings:
            return self.with_values(max_steps=steps, **self.evaluations(steps))

        def seconds(steps: int) -> float:
            settings = with_steps(steps)
            evaluations = (steps - 1) // settings.eval_every * self.evaluation_seconds(settings)
            return steps * self.costs.step + evaluations + self.end_seconds(settings)

        left = self.seconds * (1 - MARGIN) - self.clock()
        self.settings = with_steps(max(1, bisect_right(range(1, self.most_steps() + 1), left, key=seconds)))

    def most_steps(self) -> int:
        """Return after how many steps the text has been read MAX_EPOCHS times."""
        return max(1, MAX_EPOCHS * self.dataset.train.tokens // self.settings.tokens_per_step)

    def evaluation_seconds(self, settings: TrainSettings) -> float:
        """Return the time of an evaluation during training."""
        val = self.dataset.val.tokens
        return min(sample_tokens(settings) or val, val) * self.costs.eval_token

    def end_seconds(self, settings: TrainSettings) -> float:
        """Return the time between the last step and the end of the program."""
        seconds, val = END_SECONDS + self.evaluation_seconds(settings), self.dataset.val.tokens
        if settings.eval_tokens == "auto" and val <= affordable_tokens(settings, settings.max_steps):
            seconds += val * self.costs.eval_token
        return seconds

    def evaluations(self, steps: int) -> Values:
        """Return when to evaluate: at the end, and ten times in a run of minutes."""
        count = 1 if self.seconds < LONG_SECONDS else 4 if self.seconds < 120 else 10
        return {"eval_every": -(-steps // count)}

    def choose_rates(self) -> None:
        """Choose the learning rate and the weight decays for the number of steps and epochs."""
        steps = max(1, self.settings.max_steps)
        self.set(learning_rate=LEARNING_RATE * min(1.0, (FEW_STEPS / steps) ** RATE_POWER))
        epochs = steps * self.settings.tokens_per_step / self.dataset.train.tokens
        length = min(1.0, steps / MANY_STEPS)
        # logarithms of the factors by which weights shrink during the run
        shrink = max(0.6 * epochs, length**2)
        ngram_shrink = max(min(6 * epochs, 3 * epochs**2), 12 * length**3)
        rates = self.settings.learning_rate * steps / 2  # the sum over a linear schedule
        self.set(weight_decay=shrink / rates, ngram_weight_decay=ngram_shrink / (NGRAM_LR_SCALE * rates))

    def pace(self) -> "Pace | None":
        """Return what keeps the run to its time, or None if the number of steps is given."""
        if "max_steps" in self.given:
            return None
        end = self.seconds * (1 - MARGIN) - self.end_seconds(self.settings)
        evaluation = self.evaluation_seconds(self.settings)
        return Pace(
            self.runtime, self.settings, end=end, evaluation=evaluation, most_steps=self.most_steps(),
            rescale_evaluations="eval_every" not in self.given,
        )  # fmt: skip

    def description(self) -> str:
        """Return what was chosen and why, in a few lines."""
        chosen, text = self.settings, self.dataset.train
        epochs = chosen.max_steps * chosen.tokens_per_step / text.tokens
        seen = chosen.max_steps * chosen.tokens_per_step / weights(chosen)
        machine = count(chosen.threads, "thread") if self.device == "cpu" else self.device
        return (
            f"{count(chosen.minutes, 'minute')} for {text.tokens:,} tokens, vocabulary "
            f"{self.dataset.tokenizer.vocab_size:,}; measured the machine in {self.measuring_seconds:.1f} s\n"
            f"  network: {count(chosen.n_layer, 'block')}, {chosen.n_embd} channels, context {chosen.block_size}; it "
            f"sees {seen:.1f} tokens for each weight of its blocks\n"
            f"  speed:   {self.costs.step * 1000:.0f} ms a step: {chosen.dtype}, {machine}, "
            f"{'compiled' if chosen.compile else 'not compiled'}\n"
            f"  steps:   {chosen.max_steps:,} of {chosen.batch_size} x {chosen.block_size} tokens, "
            f"{epochs:.2f} epochs\n"
            f"  rates:   learning rate {chosen.learning_rate:.3g}, weight decay {chosen.weight_decay:.2g}, "
            f"{chosen.ngram_weight_decay:.2g} of the n-gram tables" + (BPE_HINT if self.suggests_bpe(epochs) else "")
        )

    def suggests_bpe(self, epochs: float) -> bool:
        """Return whether a run of so many epochs would probably reach fewer bits per character with BPE tokens."""
        text, tokenizer = self.dataset.train, self.dataset.tokenizer
        is_alphabet = tokenizer.kind == "char" and tokenizer.vocab_size <= LARGEST_ALPHABET
        return is_alphabet and text.tokens >= BPE_CHARACTERS and round(epochs) < MAX_EPOCHS


class Pace:
    """Keeps a run to its time: changes its number of steps when the machine becomes slower or faster."""

    def __init__(
        self,
        runtime: Runtime,
        settings: TrainSettings,
        *,
        end: float,
        evaluation: float,
        most_steps: int,
        rescale_evaluations: bool = True,
    ) -> None:
        """Let the last step end `end` seconds after the start of the program.

        Args:
            evaluation: Seconds of an evaluation.
            most_steps: The run never gets longer than this.
            rescale_evaluations: Whether to change eval_every in proportion to max_steps.
        """
        self.runtime, self.end, self.evaluation, self.most_steps = runtime, end, evaluation, most_steps
        self.rescale_evaluations = rescale_evaluations
        self.every = max(1, settings.max_steps // CHECKS)
        self.times = deque[float](maxlen=self.every * RECENT_CHECKS)
        self.last = 0.0

    def revise(self, step: int, settings: TrainSettings) -> TrainSettings:
        """Return the settings, with other max_steps if the time allows much more or much less.

        Every process must call this after every step, before the step's evaluation.
        """
        now, max_steps, eval_every = seconds_since_start(), settings.max_steps, settings.eval_every
        if self.last and (step - 1) % eval_every:  # otherwise the time includes an evaluation
            self.times.append(now - self.last)
        self.last = now
        if step % self.every or step < FEWEST_CHECKS * self.every or step >= max_steps:
            return settings
        evaluations = (max_steps - 1) // eval_every - (step - 1) // eval_every  # the one of this step is due
        left = self.end - self.runtime.mean(now) - evaluations * self.evaluation
        step_seconds = self.runtime.mean(sum(self.times) / max(1, len(self.times)))
        revised = min(step + max(1, int(left / max(step_seconds, 1e-6))), self.most_steps)
        if abs(revised - max_steps) <= TOLERANCE * max_steps:
            return settings
        if self.rescale_evaluations:
            eval_every = math.ceil(eval_every * revised / max_steps)
        return settings.model_copy(update={"max_steps": revised, "eval_every": eval_every})


def weights(settings: TrainSettings) -> int:
    """Return the number of weights in the blocks' matrices."""
    return 12 * settings.n_layer * settings.n_embd**2
