"""Let a translator see its whole source both ways, as an encoder does, and compare the losses.

    python prepare.py multi30k_de_en
    python lessons/prefix_mask.py                                    five minutes of two CPU cores
    python lessons/prefix_mask.py --max_steps=200 --dataset=pairs    lines of a source, a tab and its translation

A decoder reads a source and a translation as one text, and each character sees only those before it. The source is
known before the translation begins, so its characters could see all of each other: the mask of a prefix language model
(Raffel et al. 2020, section 3.2.1). What they predict is then known, so only the translation is left to learn from. The
loop of train.py trains model.py in three ways, and the table shows the loss of the validation text's translations.
"""

import math
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from glyphgpt import runtime as runtimes
from glyphgpt.cli import command, parse, read_toml
from glyphgpt.data.batches import inputs_and_targets
from glyphgpt.data.dataset import Dataset, Split, load_dataset
from glyphgpt.data.rows import Row, evaluation_blocks
from glyphgpt.data.tokenizers import Tokenizer
from glyphgpt.errors import UsageError, exit_on_error, shorten
from glyphgpt.runtime import Runtime
from glyphgpt.settings import CountOrZero, Settings, SingleLine, TrainSettings
from model import GPT, CausalSelfAttention, LayerCache, causal_mask
from train import Trainer

CONFIG = Path(__file__).parent.parent / "config" / "translate.toml"
NETWORK = {"n_layer": 2, "n_head": 2, "n_embd": 128, "compile": False}
"""Changes to the config, so that the lesson ends in minutes."""
EVAL_BATCH = 32
USAGE = "python lessons/prefix_mask.py [--key=value ...]"


class PrefixSettings(Settings):
    """Settings of prefix_mask.py"""

    dataset: SingleLine = "multi30k_de_en"
    """Name of a dataset of records: a source, a tab, and its translation."""
    max_steps: CountOrZero = 800
    """Updates of each training."""
    data_dir: SingleLine = "data"
    """Folder of the datasets."""


class Way(NamedTuple):
    """A way to train a translator."""

    prefix: bool
    """Whether the characters of a source see all of each other."""
    learns_source: bool
    """Whether the source is predicted too."""


WAYS = {
    "causal mask, both sides": Way(prefix=False, learns_source=True),  # model.py as it is
    "causal mask, translation only": Way(prefix=False, learns_source=False),
    "prefix mask, translation only": Way(prefix=True, learns_source=False),
}


def find_sources(tokens: Tensor, end: int, tab: int) -> Tensor:
    """Return where tokens (B, T) are part of a source, (B, T): from the token before a record up to the tab.

    >>> find_sources(torch.tensor([[9, 1, 2, 8, 3, 9, 4, 8]]), end=9, tab=8).int().tolist()
    [[1, 1, 1, 0, 0, 1, 1, 0]]
    """
    tabs = (tokens == tab).cumsum(1)
    tabs_before_record = tabs.where(tokens == end, 0).cummax(1).values
    return tabs == tabs_before_record


def prefix_mask(tokens: Tensor, sources: Tensor, end: int) -> Tensor:
    """Return which tokens (B, T) each of them may see, (B, 1, T, T): those before it, and all of its own source."""
    records = (tokens == end).cumsum(1)
    same = (records[:, :, None] == records[:, None, :]) & sources[:, :, None] & sources[:, None, :]
    T = tokens.size(1)
    return (causal_mask(T, tokens.device) | same)[:, None]


class MaskedAttention(nn.Module):
    """The attention of a block, with a mask that is set before each pass."""

    def __init__(self, original: CausalSelfAttention) -> None:
        super().__init__()
        self.original = original
        self.mask: Tensor  # (B, 1, T, T)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:  # noqa: ARG002
        """Map (B, T, C) to (B, T, C)."""
        q, k, v = self.original.project_qkv(x)  # (B, H, T, D) each
        return self.original.project_out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))


class Translator(nn.Module):
    """A model with the mask and the loss of one way."""

    def __init__(self, model: GPT, way: Way, end: int, tab: int) -> None:
        super().__init__()
        self.model, self.way, self.end, self.tab = model, way, end, tab
        self.attentions = list[MaskedAttention]()
        for block in model.blocks if way.prefix else []:
            assert isinstance(block.attention, CausalSelfAttention)
            block.attention = MaskedAttention(block.attention)
            self.attentions.append(block.attention)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of targets (B, T) after tokens (B, T)."""
        return self.loss(tokens, targets, with_source=self.way.learns_source)

    def loss(self, tokens: Tensor, targets: Tensor, *, with_source: bool) -> Tensor:
        """Return the mean loss, with or without that of the sources."""
        sources = find_sources(tokens, self.end, self.tab)
        for attention in self.attentions:
            attention.mask = prefix_mask(tokens, sources, self.end)
        return self.model(tokens, targets if with_source else targets.masked_fill(sources, -1))


class PrefixTrainer(Trainer):
    """The training loop of train.py with another mask and loss."""

    def __init__(self, settings: TrainSettings, dataset: Dataset, runtime: Runtime, way: Way) -> None:
        super().__init__(settings, dataset, runtime)
        end, tab = dataset.tokenizer.end_of_text, int(dataset.tokenizer.encode("\t")[0])
        assert end is not None
        self.translator = Translator(self.model, way, end, tab)

    def make_forward(self) -> nn.Module:
        """Return the model for training."""
        return self.translator

    def evaluate_and_save(self) -> None:
        """Do nothing: the translations are evaluated instead, at the end."""

    @torch.no_grad()
    def translation_loss(self) -> float:
        """Return the mean loss of the translations in the validation split, in nats per character."""
        self.model.eval()
        starts, sizes = evaluation_blocks(self.dataset.val, self.settings.block_size)
        total = count = 0.0
        for order in np.array_split(np.argsort(sizes), math.ceil(len(sizes) / EVAL_BATCH)):  # of similar sizes
            rows: list[Row] = [[range(starts[i], starts[i] + sizes[i] + 1)] for i in order]
            inputs, targets = inputs_and_targets(self.val_reader.read(rows, sizes[order[-1]] + 1))
            sources = find_sources(inputs, self.translator.end, self.translator.tab)
            targets = targets.masked_fill(sources, -1)
            if (predicted := int((targets >= 0).sum())) == 0:
                continue
            with self.runtime.autocast():
                total += self.translator.loss(inputs, targets, with_source=True).item() * predicted
            count += predicted
        return total / count


def has_pairs(tokenizer: Tokenizer, split: Split) -> bool:
    """Return whether a split consists of records, each with a tab."""
    ends = split.record_ends
    if ends is None or tokenizer.unknown_characters("\t"):
        return False
    is_tab = split.slice(0, split.tokens) == tokenizer.encode("\t")[0]
    return bool(np.logical_or.reduceat(is_tab, ends[:-1]).all())


def main(settings: PrefixSettings) -> None:
    """Train in each way, and print a row of the table after each training."""
    data_dir = Path(settings.data_dir)
    dataset = load_dataset(data_dir / settings.dataset, data_dir)
    if not all(has_pairs(dataset.tokenizer, split) for split in (dataset.train, dataset.val)):
        prepared = command("prepare.py", "PAIRS.txt", "--records=lines")
        raise UsageError(f"{dataset.folder}: has no pairs; prepare lines of text, tab, translation: {prepared}")
    changes: dict[str, Any] = {**NETWORK, "dataset": settings.dataset, "data_dir": settings.data_dir}
    changes |= {"max_steps": settings.max_steps, "sample_tokens": 0, "report": False}
    print("| mask, and what is learned | loss of the translations |\n|---|---|")
    with runtimes.init_runtime("auto", "auto") as runtime:
        for name, way in WAYS.items():
            tqdm.write(name, file=sys.stderr)
            with tempfile.TemporaryDirectory() as out_dir, redirect_stdout(StringIO()):  # hides train.py's messages
                values = {**read_toml(str(CONFIG)), **changes, "out_dir": out_dir}
                trainer = PrefixTrainer(TrainSettings.model_validate(values), dataset, runtime, way)
                trainer.train()
            print(f"| {name} | {trainer.translation_loss():.3f} |")


if __name__ == "__main__":
    with exit_on_error():
        SETTINGS, ARGUMENTS = parse(PrefixSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
        if ARGUMENTS:
            raise UsageError(f"unexpected argument '{shorten(ARGUMENTS[0])}'; name a dataset with --dataset=NAME")
        main(SETTINGS)
