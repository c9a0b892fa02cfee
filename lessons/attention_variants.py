"""Train model.py with variants of attention, and compare their losses and samples.

    python lessons/attention_variants.py                                   every variant, nine minutes of one CPU core
    python lessons/attention_variants.py --only=squared,no_mask
    python lessons/attention_variants.py --only=inverse --max_steps=1000   does the variant only need more steps?

Each variant puts a score function and a mask of attention.py into the blocks of model.py. The loop of train.py trains
it on Tiny Shakespeare twice: with config/quick.toml, and with the same settings but without the other parts that see
earlier characters (n-gram tables and token shift). Prints a Markdown table for each, and keeps no files.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from attention import (
    MaskFunction,
    ScoreFunction,
    anticausal_mask,
    causal_mask,
    dot_product,
    inverse,
    negated,
    no_mask,
    self_mask,
    squared,
    unscaled,
)
from glyphgpt import runtime as runtimes
from glyphgpt.cli import parse, read_toml
from glyphgpt.data.dataset import Dataset, load_dataset
from glyphgpt.data.tokenizers import decode, start_token
from glyphgpt.errors import UsageError, exit_on_error, shorten
from glyphgpt.inference.generate import SamplingParams, generate
from glyphgpt.inference.torch_lm import TorchLM
from glyphgpt.runtime import Runtime
from glyphgpt.settings import CountOrZero, Settings, SingleLine, TrainSettings
from model import GPT, CausalSelfAttention, LayerCache, NoRotation
from train import Trainer

QUICK = Path(__file__).parent.parent / "config" / "quick.toml"
CONFIGS: dict[str, dict[str, Any]] = {
    "quick": {},
    "attention only": {"ngram": 1, "token_shift": False, "qk_norm": False, "max_steps": 250},
}
"""Changes to config/quick.toml. Its n-gram tables and token shift know the last characters without attention, and its
normalized queries and keys limit scores to √D."""

SAMPLE_CHARACTERS = 80
USAGE = "python lessons/attention_variants.py [--key=value ...]"


class ModelVariant(NamedTuple):
    """A change to the attention of model.py."""

    score: ScoreFunction = dot_product
    mask: MaskFunction = causal_mask
    position: Literal["none", "learned", "sinusoidal", "rotary"] = "rotary"


MODEL_VARIANTS = {
    "unchanged": None,  # model.py as it is
    "dot_product": ModelVariant(),
    "negated": ModelVariant(score=negated),
    "squared": ModelVariant(score=squared),
    "inverse": ModelVariant(score=inverse),
    "unscaled": ModelVariant(score=unscaled),
    "self_only": ModelVariant(mask=self_mask),
    "anticausal": ModelVariant(mask=anticausal_mask),
    "no_mask": ModelVariant(mask=no_mask),
    "no_positions": ModelVariant(position="none"),
    "learned": ModelVariant(position="learned"),
    "sinusoidal": ModelVariant(position="sinusoidal"),
}


class VariantSettings(Settings):
    """Settings of attention_variants.py"""

    only: SingleLine = ""
    """Names of the variants to train, separated by commas; empty trains all."""
    max_steps: CountOrZero = 0
    """Updates of each training; 0 makes 72 with quick and 250 with attention only."""
    data_dir: SingleLine = "data"
    """Folder of the datasets."""


class VariantAttention(nn.Module):
    """The attention of a block, with another score function and mask between its projections."""

    def __init__(self, original: CausalSelfAttention, variant: ModelVariant) -> None:
        super().__init__()
        self.original, self.mask = original, variant.mask
        self.score: Callable[..., Any] = variant.score  # accepts tensors too

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:  # noqa: ARG002
        """Map (B, T, C) to (B, T, C). The cache stays empty: tokens that see the future change with each new token."""
        q, k, v = self.original.project_qkv(x)  # (B, H, T, D) each
        scores = self.score(q, k)  # (B, H, T, T)
        mask = torch.from_numpy(self.mask(x.size(1))).to(x.device)  # (T, T)
        weights = scores.where(mask, -torch.inf).softmax(-1)  # (B, H, T, T)
        return self.original.project_out(weights @ v)


def apply_variant(model: GPT, variant: ModelVariant) -> None:
    """Replace the attention of every block; the parameters stay the same."""
    for block in model.blocks:
        original = block.attention
        assert isinstance(original, CausalSelfAttention)
        if variant.position == "none":
            original.rotary = NoRotation()
        block.attention = VariantAttention(original, variant)


class VariantTrainer(Trainer):
    """The training loop of train.py with a variant of the model, evaluated once at the end."""

    def __init__(
        self, settings: TrainSettings, dataset: Dataset, runtime: Runtime, variant: ModelVariant | None
    ) -> None:
        super().__init__(settings, dataset, runtime)
        if variant:
            apply_variant(self.model, variant)

    def evaluate_and_save(self) -> None:
        """Evaluate the validation split at the end only."""
        if self.state.step == self.settings.max_steps:
            super().evaluate_and_save()

    @torch.no_grad()
    def generation_loss(self) -> float:
        """Return the mean loss of the character after a full window, where no mask can show the future."""
        T = self.settings.block_size
        starts = range(0, self.dataset.val.tokens - T, T)
        windows = self.val_reader.read([[range(start, start + T + 1)] for start in starts], T + 1)  # (B, T + 1)
        with self.runtime.autocast():
            logits = self.model.eval().next_logits(windows[:, :-1])  # (B, V)
        return F.cross_entropy(logits.float(), windows[:, -1]).item()

    def generate_text(self) -> str:
        """Return a sample from the variant, generated without a cache."""
        tokenizer = self.dataset.tokenizer
        tokens = generate(
            TorchLM(self.model.eval(), self.runtime),
            np.array([start_token(tokenizer)]),
            block_size=self.settings.block_size,
            num_samples=1,
            max_new_tokens=SAMPLE_CHARACTERS,
            params=SamplingParams(temperature=0.8),
            seed=self.settings.seed,
            use_cache=False,
        )
        return decode(tokenizer, [int(token) for (token,) in tokens])


def make_train_settings(
    variant: ModelVariant | None, config: str, settings: VariantSettings, out_dir: str
) -> TrainSettings:
    """Return the settings with which train.py trains a variant."""
    changes: dict[str, Any] = {"data_dir": settings.data_dir, "out_dir": out_dir, "sample_tokens": 0}
    changes |= {"report": False}
    if settings.max_steps:
        changes["max_steps"] = settings.max_steps
    if variant and variant.position != "none":  # apply_variant makes "none" from rotary positions
        changes["position"] = variant.position
    return TrainSettings.model_validate({**read_toml(str(QUICK)), **CONFIGS[config], **changes})


def main(settings: VariantSettings) -> None:
    """Train each variant with each config, and print a row of the table after each training."""
    names = settings.only.split(",") if settings.only else list(MODEL_VARIANTS)
    for name in names:
        if name not in MODEL_VARIANTS:
            raise UsageError(f"no variant is named '{shorten(name)}'; choose from {', '.join(MODEL_VARIANTS)}")
    with runtimes.init_runtime("auto", "auto") as runtime:
        data_dir = Path(settings.data_dir)
        dataset = load_dataset(data_dir / "shakespeare_char", data_dir)
        for config in CONFIGS:
            print(f"\n{config}:\n\n| variant | validation loss | generation loss | sample |\n|---|---|---|---|")
            for name in names:
                tqdm.write(f"{config}, {name}", file=sys.stderr)
                variant = MODEL_VARIANTS[name]
                with tempfile.TemporaryDirectory() as out_dir, redirect_stdout(StringIO()):  # hides train.py's messages
                    train_settings = make_train_settings(variant, config, settings, out_dir)
                    trainer = VariantTrainer(train_settings, dataset, runtime, variant)
                    trainer.train()
                losses = f"{trainer.state.best_loss:.3f} | {trainer.generation_loss():.2f}"
                text = shorten(trainer.generate_text().replace("\n", "↵"))
                print(f"| {name} | {losses} | `{text}` |")


if __name__ == "__main__":
    with exit_on_error():
        SETTINGS, ARGUMENTS = parse(VariantSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
        if ARGUMENTS:
            raise UsageError(f"unexpected argument '{shorten(ARGUMENTS[0])}'; choose variants with --only=NAME,...")
        main(SETTINGS)
