"""What if attention were another? Train the real model with a change in it, and see.

    python lessons/what_ifs.py                                   all of them: some nine minutes of one CPU core
    python lessons/what_ifs.py --only=squared,no_mask
    python lessons/what_ifs.py --only=inverse --max_steps=1000   does it only take longer?

Takes model.py and train.py as they are, and puts the scores and masks of attention.py in the middle of each block. Each
change is trained on Tiny Shakespeare twice: as config/quick.toml has it, and with attention alone. Prints a table in
Markdown for each; nothing is kept.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from attention import Mask, Score, causal, dot, inverse, itself, negated, no_mask, other_half, squared, unscaled
from glyphgpt import runtime as runtimes
from glyphgpt.cli import parse, printable, read_toml
from glyphgpt.data.dataset import Dataset, load_dataset
from glyphgpt.data.tokenizers import decode, start_token
from glyphgpt.errors import UsageError, exit_on_error
from glyphgpt.inference.generate import SamplingParams, generate
from glyphgpt.runtime import Runtime, TorchLM
from glyphgpt.settings import CountOrZero, Settings, SingleLine, TrainSettings
from model import GPT, CausalSelfAttention, LayerKVCache, NoRotation
from train import Trainer

QUICK = Path(__file__).parent.parent / "config" / "quick.toml"
FORMS: dict[str, dict[str, Any]] = {
    "quick": {},
    "attention alone": {"ngram": 1, "token_shift": False, "qk_norm": False, "max_steps": 250},
}
"""Changes to config/quick.toml. Its n-gram tables and token shift know the last characters without attention, and its
normalised queries and keys keep scores within √D."""

CHARACTERS = 80  # of a sample
USAGE = "python lessons/what_ifs.py [--key=value ...]"


class WhatIf(NamedTuple):
    """A change of attention."""

    score: Score = dot
    mask: Mask = causal
    position: Literal["none", "learned", "sinusoidal", "rotary"] = "rotary"


WHAT_IFS = {
    "plain": None,  # model.py as it is
    "dot": WhatIf(),
    "negated": WhatIf(score=negated),
    "squared": WhatIf(score=squared),
    "inverse": WhatIf(score=inverse),
    "unscaled": WhatIf(score=unscaled),
    "itself": WhatIf(mask=itself),
    "other_half": WhatIf(mask=other_half),
    "no_mask": WhatIf(mask=no_mask),
    "no_position": WhatIf(position="none"),
    "learned": WhatIf(position="learned"),
    "sinusoidal": WhatIf(position="sinusoidal"),
}


class WhatIfSettings(Settings):
    """Settings of what_ifs.py"""

    only: SingleLine = ""
    """Names of what-ifs, with commas between them; all when left out."""
    max_steps: CountOrZero = 0
    """Updates of each training; 0 takes 72 as quick, 250 with attention alone."""
    data_dir: SingleLine = "data"
    """Folder of the data sets."""


class WhatIfAttention(nn.Module):
    """A block's attention, written out between its heads and their merging, where score and mask can be others."""

    def __init__(self, own: CausalSelfAttention, what_if: WhatIf) -> None:
        super().__init__()
        self.own, self.mask = own, what_if.mask
        self.score: Callable[..., Any] = what_if.score  # which takes tensors too

    def forward(self, x: Tensor, cache: LayerKVCache | None = None) -> Tensor:  # noqa: ARG002
        """Map (B, T, C) to (B, T, C). A cache stays empty: where characters look ahead, each new one changes all."""
        q, k, v = self.own.project_qkv(x)  # (B, H, T, D) each
        scores = self.score(q, k)  # (B, H, T, T)
        mask = torch.from_numpy(self.mask(x.size(1))).to(x.device)  # (T, T)
        weights = scores.where(mask, -torch.inf).softmax(-1)  # (B, H, T, T)
        return self.own.project_out(weights @ v)


def change(model: GPT, what_if: WhatIf) -> None:
    """Put a what-if into every block; the parameters stay the same ones."""
    for block in model.blocks:
        own = block.attention
        assert isinstance(own, CausalSelfAttention)
        if what_if.position == "none":
            own.rotary = NoRotation()
        block.attention = WhatIfAttention(own, what_if)


class WhatIfTrainer(Trainer):
    """A run of train.py with a changed model, silent, and evaluated at its end only."""

    def __init__(self, settings: TrainSettings, dataset: Dataset, runtime: Runtime, what_if: WhatIf | None) -> None:
        super().__init__(settings, dataset, runtime)
        if what_if:
            change(self.model, what_if)

    def say(self, text: str) -> None:  # noqa: ARG002
        """Leave it to the table."""
        self.told = time.perf_counter()

    def evaluate_and_save(self) -> None:
        """Score the validation split at the end."""
        if self.state.step == self.settings.max_steps:
            super().evaluate_and_save()

    @torch.no_grad()
    def loss_in_writing(self) -> float:
        """Return the mean loss of the character after each full window: there is no future yet to look at."""
        length = self.settings.block_size
        starts = np.arange(0, self.dataset.val.tokens - length, length)
        sequences = self.val_windows.read(starts, length + 1)  # (B, T + 1)
        with self.runtime.autocast():
            logits = self.model.eval().next_logits(sequences[:, :-1])  # (B, V)
        return F.cross_entropy(logits.float(), sequences[:, -1]).item()

    def write(self) -> str:
        """Return a sample, through the changed model and without a cache."""
        tokenizer = self.dataset.tokenizer
        tokens = generate(
            TorchLM(self.model.eval(), self.runtime),
            np.array([start_token(tokenizer)]),
            block_size=self.settings.block_size,
            num_samples=1,
            max_new_tokens=CHARACTERS,
            rule=SamplingParams(temperature=0.8),
            seed=self.settings.seed,
            use_cache=False,
        )
        return decode(tokenizer, [int(token) for (token,) in tokens])


def settings_of(what_if: WhatIf | None, form: str, given: WhatIfSettings, out_dir: str) -> TrainSettings:
    """Return the settings of one training."""
    changes: dict[str, Any] = {"data_dir": given.data_dir, "out_dir": out_dir, "sample_tokens": 0}
    changes |= {"plot": False, "report": False}
    if given.max_steps:
        changes["max_steps"] = given.max_steps
    if what_if and what_if.position != "none":  # which is rotary without its rotation
        changes["position"] = what_if.position
    return TrainSettings.model_validate({**read_toml(str(QUICK)), **FORMS[form], **changes})


def main(given: WhatIfSettings) -> None:
    """Train each what-if in each form, and print a row for each as it is done."""
    names = given.only.split(",") if given.only else list(WHAT_IFS)
    for name in names:
        if name not in WHAT_IFS:
            raise UsageError(f"there is no what-if '{printable(name)}'; here: {', '.join(WHAT_IFS)}")
    with runtimes.init_runtime("auto", "auto") as runtime:
        data_dir = Path(given.data_dir)
        dataset = load_dataset(data_dir / "shakespeare_char", data_dir)
        for form in FORMS:
            print(f"\n{form}:\n\n| what if | validation loss | loss in writing | what it writes |\n|---|---|---|---|")
            for name in names:
                tqdm.write(f"{form}, {name}", file=sys.stderr)
                with tempfile.TemporaryDirectory() as out_dir:
                    what_if = WHAT_IFS[name]
                    trainer = WhatIfTrainer(settings_of(what_if, form, given, out_dir), dataset, runtime, what_if)
                    trainer.train()
                losses = f"{trainer.state.best_loss:.3f} | {trainer.loss_in_writing():.2f}"
                written = printable(trainer.write().replace("\n", "↵"))
                print(f"| {name} | {losses} | `{written}` |")


if __name__ == "__main__":
    with exit_on_error():
        SETTINGS, WORDS = parse(WhatIfSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
        if WORDS:
            raise UsageError(f"what is '{printable(WORDS[0])}'? choose what-ifs with --only=NAME,...")
        main(SETTINGS)
