"""A model as one HTML page that writes text and shows what the model expects, in any browser and without a network.

The page holds the weights and the network of model.py in JavaScript (templates/gpt.js). It says how the model was
trained, but holds nothing of the training text, and no paths.
"""

import base64
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glyphgpt.checkpoint import Arrays, Checkpoint
from glyphgpt.data.tokenizers import BPETokenizer, Tokenizer, start_token
from glyphgpt.files import write_atomic
from glyphgpt.reports.templates import render
from glyphgpt.settings import PATHS, Mode, TrainSettings
from glyphgpt.training.metrics import read_samples

ALIGNMENT = 4
"""JavaScript's typed arrays begin at multiples of the size of their numbers."""


class WeightsFile:
    """Weights in one sequence of bytes, with an index of where each is."""

    def __init__(self) -> None:
        """Create an empty file."""
        self.index: list[dict[str, Any]] = []
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, name: str, weight: np.ndarray[Any, Any], *, int8: bool) -> None:
        """Add a weight as float16, or as float32 if it is too large for that; a matrix, if `int8` is set, as int8.

        Each row of an int8 matrix has its own factor: the largest absolute value divided by 127.
        """
        entry: dict[str, Any] = {"name": name, "shape": weight.shape}
        if int8 and weight.ndim == 2:
            factors = np.maximum(np.abs(weight).max(axis=1), 1e-30) / 127
            entry["values"] = self._append("int8", np.rint(weight / factors[:, None]).astype(np.int8))
            entry["factors"] = self._append("float32", factors.astype("<f4"))
        elif np.abs(weight).max() <= np.finfo(np.float16).max:
            entry["values"] = self._append("float16", weight.astype("<f2"))
        else:
            entry["values"] = self._append("float32", weight.astype("<f4"))
        self.index.append(entry)

    def _append(self, kind: str, values: np.ndarray[Any, Any]) -> dict[str, Any]:
        """Append numbers; return their type, and where they are."""
        place = {"type": kind, "offset": self._length, "size": values.size}
        data = values.tobytes()
        data += bytes(-len(data) % ALIGNMENT)
        self._parts.append(data)
        self._length += len(data)
        return place

    def base64(self) -> str:
        """Return the bytes in base64."""
        return base64.b64encode(b"".join(self._parts)).decode()


def write_model_page(
    path: Path,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    *,
    title: str = "",
    int8: bool = False,
    text: str = "",
    view: Literal["surprise", "attention"] = "surprise",
) -> int:
    """Write a page; return its size in bytes.

    Args:
        title: The name of the page; by default that of the checkpoint's folder.
        int8: Store the matrices as int8 instead of float16, which halves the page.
        text: The text that the page shows first. If it is empty, the model begins to write at once.
        view: What the colors of the text show first.

    Raises:
        UserError: The checkpoint is damaged, or the page could not be written.
    """
    title = title or checkpoint.path.absolute().parent.name
    data = page_data(checkpoint, tokenizer, title=title, int8=int8) | {"text": text, "view": view}
    page = render("page.html", data).encode()
    write_atomic(path, page)
    return len(page)


def page_data(checkpoint: Checkpoint, tokenizer: Tokenizer, *, title: str, int8: bool) -> dict[str, Any]:
    """Return the data of a page, without the text that it shows."""
    config = checkpoint.config
    tensors, weights = encode_weights(checkpoint.model, int8=int8)
    parameters = sum(weight.size for weight in checkpoint.model.values())
    return {
        "title": title,
        "tagline": f"A GPT of {parameters:,} parameters. It runs in this page: nothing is sent anywhere.",
        "config": config.model_dump() | {"embedding_scale": config.embedding_scale},
        "tokenizer": tokenizer_data(tokenizer),
        "start": tokenizer.token_bytes(start_token(tokenizer)).decode("utf-8", "replace"),
        "tensors": tensors,
        "weights": weights,
        "about": {
            "facts": facts(checkpoint, parameters, int8=int8),
            "settings": settings_rows(checkpoint),
            "samples": [
                {"caption": f"step {row['step']:,}", "text": row["text"]}
                for row in read_samples(checkpoint.path.parent)
            ],
        },
    }


def encode_weights(model: Arrays, *, int8: bool) -> tuple[list[dict[str, Any]], str]:
    """Return the index of the weights, and their bytes in base64."""
    file = WeightsFile()
    for name, weight in model.items():
        file.add(name, weight, int8=int8)
    return file.index, file.base64()


def tokenizer_data(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the page needs to encode and decode; a character of a BPE vocabulary stands for a byte."""
    if (end := tokenizer.end_of_record) is not None:
        separator = tokenizer.token_bytes(end).decode()
        return {"kind": "records", "base": tokenizer_data(tokenizer.base), "separator": separator, "end": end}
    if not isinstance(tokenizer, BPETokenizer):
        return tokenizer.to_dict()
    vocabulary = [tokenizer.token_bytes(token).decode("latin-1") for token in range(tokenizer.vocab_size)]
    return {"kind": "bpe", "vocabulary": vocabulary}


def facts(checkpoint: Checkpoint, parameters: int, *, int8: bool) -> list[tuple[str, str]]:
    """Return names and values of what a reader wants to know first."""
    config, metadata = checkpoint.config, checkpoint.metadata
    rows = [
        ("Network", f"{config.n_layer} blocks of {config.n_head} heads, {config.n_embd} channels"),
        ("Parameters", f"{parameters:,}, here in {'int8' if int8 else 'float16'}"),
        ("Context", f"{config.block_size:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,} {metadata.tokenizer['kind']} tokens"),
    ]
    if settings := train_settings(checkpoint):
        tokens = metadata.state.step * settings.tokens_per_step
        rows += [("Dataset", settings.dataset), ("Training", f"{metadata.state.step:,} steps, {tokens:,} tokens")]
    if metadata.val_loss is not None:
        rows.append(("Validation loss", f"{metadata.val_loss:.4f} nats per token"))
    return [*rows, ("Made with", "glyphgpt")]


def train_settings(checkpoint: Checkpoint) -> TrainSettings | None:
    """Return the settings of a checkpoint's training, or None if it has none, as after a conversion."""
    try:
        return TrainSettings.model_validate(checkpoint.metadata.settings) if checkpoint.metadata.settings else None
    except ValueError:
        return None


def settings_rows(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Return names and values, as in TOML, of the settings that differ from their defaults."""
    settings = train_settings(checkpoint)
    return [
        (key, json.dumps(getattr(settings, key), ensure_ascii=False))
        for key, field in TrainSettings.model_fields.items()
        if settings and key not in {*PATHS, *Mode.model_fields} and getattr(settings, key) != field.default
    ]
