"""The checkpoint format: write, verify, read. No other module knows it.

A checkpoint is one safetensors file, and nothing in it is executed. The tensors' names start with `model.` or
`optimizer.`; the header holds everything else as JSON. The header also holds a SHA-256 of the whole file, computed with
zeros in place of the digest, so truncation and changed bytes are detected before a weight is used.

Reading a checkpoint does not need torch; `glyphgpt/training/torch_state.py` moves tensors from and to torch. No random
state is saved: every random number of training follows from the seed and the step.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glyphgpt.cli import ROOT, command, from_here, is_path
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST, META, atomic_path, copy_mode, fsync_dir, fsync_file
from glyphgpt.settings import CountOrZero, ModelConfig, NotNegative

FORMAT = 1

_DIGEST_KEY = b'"sha256":"'
_NO_DIGEST = b"0" * 64
_CHUNK_BYTES = 1 << 22

Arrays = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]


class TrainState(BaseModel):
    """How far a run has come. With the weights and the optimizer state, it is all that resuming needs."""

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")

    step: CountOrZero = 0
    """Updates done."""
    seconds: NotNegative = 0.0
    """Time spent so far."""
    best_loss: float = math.inf
    """Lowest validation loss so far, in nats per token."""
    improved_loss: float = math.inf
    """Validation loss when it last improved by more than its standard error."""
    evaluations_since_improvement: CountOrZero = 0

    planned_at: CountOrZero = 0
    """Step at which `max_steps` last changed, to keep to the time of a run."""
    planned_rate: NotNegative = 0.0
    """Learning rate at that step, from which it falls in a line to its end."""

    def record(self, loss: float, standard_error: float) -> bool:
        """Record a validation loss, and return whether it is the lowest so far."""
        best = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        self.evaluations_since_improvement += 1
        if loss < self.improved_loss - standard_error:
            self.improved_loss, self.evaluations_since_improvement = loss, 0
        return best


class Metadata(BaseModel):
    """Everything in a checkpoint that is not a tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    format: Annotated[int, Field(ge=1)] = FORMAT
    model: dict[str, Any]
    """The network's config, unchecked; `Checkpoint.config` is checked."""
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    data: str
    """Fingerprint of the dataset."""
    val_loss: float | None
    """Validation loss of these weights, if they were evaluated."""
    state: TrainState
    scaler: dict[str, int | float]
    """State of the gradient scaler of float16."""
    torchrun: str = ""
    """Fingerprint of the torchrun job that wrote this checkpoint; the job resumes it after a restart."""
    wandb_id: str = ""
    """Id of the Weights & Biases run, which a resumed run continues."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: metadata, and arrays by name. `path` is the file it was read from."""

    metadata: Metadata
    model: Arrays
    optimizer: Arrays = field(default_factory=dict)
    path: Path = Path()

    @cached_property
    def config(self) -> ModelConfig:
        """The network's config, after the weights have been checked against it.

        Raises:
            UserError: The config is not valid, the weights do not match it, or some weights are not finite.
        """
        if not all(np.isfinite(array).all() for array in self.model.values()):
            raise UserError(f"{self.path}: some weights are not finite; use an earlier checkpoint")
        try:
            return check_weights(self.metadata.model, self.model)
        except ValueError as error:
            raise UserError(f"{self.path}: its config and its weights do not belong together") from error


def check_weights(config: dict[str, Any], weights: Arrays) -> ModelConfig:
    """Return a network's config after checking that the weights have its names, shapes and dtype.

    Neither is trusted: until they match, time and memory do not depend on the config's numbers.

    Raises:
        ValueError: The config is not valid, or the weights do not match it.
    """
    checked = ModelConfig.model_validate(config)
    shapes = {name: weight.shape for name, weight in weights.items()}
    if max(checked.n_layer, checked.ngram) > len(weights) or shapes != weight_shapes(checked):
        raise ValueError("the weights are not those of the config")
    if not all(weight.dtype == np.float32 for weight in weights.values()):
        raise ValueError("the weights are not float32")
    return checked


def weight_shapes(config: ModelConfig) -> Shapes:
    """Return the shape of each weight of a network, by its name in model.py."""
    C, V = config.n_embd, config.vocab_size
    shapes: Shapes = {"token_embedding.weight": (V, C)}
    shapes |= {f"ngram_embedding.tables.{i}.weight": (config.ngram_rows, C) for i in range(config.ngram - 1)}
    shapes |= {"token_shift.mix": (C,)} if config.token_shift else {}
    shapes |= {"position.embedding.weight": (config.block_size, C)} if config.position == "learned" else {}
    shapes |= {} if config.tie_embeddings else {"head.weight": (V, C)}
    norms = ["norm"]
    for layer in range(config.n_layer):
        linear = {"attention.qkv": (3 * C, C), "attention.out": (C, C), "mlp.up": (4 * C, C), "mlp.down": (C, 4 * C)}
        for name, shape in linear.items():
            shapes[f"blocks.{layer}.{name}.weight"] = shape
            shapes |= {f"blocks.{layer}.{name}.bias": shape[:1]} if config.bias else {}
        norms += [f"blocks.{layer}.attention_norm", f"blocks.{layer}.mlp_norm"]
    if config.norm == "layernorm":
        shapes |= {f"{norm}.weight": (C,) for norm in norms}
        shapes |= {f"{norm}.bias": (C,) for norm in norms} if config.bias else {}
    return shapes


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint and its digest, flush it to the disk, and rename it into place.

    Raises:
        UserError: The checkpoint could not be written; the file that was at `path` is unchanged.
    """
    tensors = {f"model.{name}": value for name, value in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    header = {"glyphgpt": checkpoint.metadata.model_dump_json(), "sha256": _NO_DIGEST.decode()}
    with atomic_path(path) as unfinished:
        write_safetensors(unfinished, tensors, header)
        with unfinished.open("r+b") as file:
            offset = _digest_offset(file, path)
            digest = _digest(file, offset)
            file.seek(offset)
            file.write(digest)
            file.flush()
            fsync_file(file.fileno())
    fsync_dir(path.parent)


def write_safetensors(path: Path, tensors: Arrays, header: dict[str, str]) -> None:
    """Write a safetensors file with the permissions of its folder.

    Raises:
        OSError: The file could not be written.
    """
    try:
        save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, path, header)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    copy_mode(path.parent, path)  # safetensors makes the file private


def load_checkpoint(path: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint, after verifying its digest.

    Raises:
        UserError: The file is missing, damaged, of a newer format, or not a checkpoint of glyphgpt.
    """
    try:
        with path.open("rb") as file:
            offset = _digest_offset(file, path)
            digest = _digest(file, offset)
            file.seek(offset)
            if file.read(len(_NO_DIGEST)) != digest:
                raise UserError(f"{path}: damaged: its checksum does not match; use another checkpoint")
        with safe_open(path, framework="numpy") as file:
            metadata = _parse_metadata(file.metadata(), path)
            wanted = [name for name in file.keys() if with_optimizer or name.startswith("model.")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in wanted}
    except FileNotFoundError as error:
        in_out = Path("out") / path
        hint = f"; did you mean {in_out}?" if is_path(str(in_out)) else ""
        raise UserError(f"{path}: no such run or checkpoint{hint}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated: {error}; use another checkpoint") from error
    parts: dict[str, Arrays] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"{path}: holds a tensor of an unknown kind, {name!r}")
        parts[part][rest] = tensor
    return Checkpoint(metadata, parts["model"], parts["optimizer"], path)


def read_metadata(path: Path) -> Metadata:
    """Read a checkpoint's metadata without its tensors, and so without verifying the digest.

    Raises:
        UserError: The file is missing or not a checkpoint of glyphgpt.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return _parse_metadata(file.metadata(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint file that a path names: the file itself, or the best or last checkpoint of a run's folder.

    Raises:
        UserError: The folder has no checkpoint.
    """
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    if (path / META).exists():
        train = command("train.py", f"--dataset={path}", f"--out_dir=out/{path.name}", "--minutes=1")
        raise UserError(f"{path} is a dataset, not a run; train on it: {train}")
    train = command("train.py", from_here(ROOT / "config" / "quick.toml"), f"--out_dir={path}")
    raise UserError(f"{path}: no checkpoint in this folder; train first, for example: {train}")


def _parse_metadata(header: dict[str, str] | None, path: Path) -> Metadata:
    try:
        data = json.loads((header or {}).get("glyphgpt", ""))
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise UserError(f"{path}: written by a newer glyphgpt (format {data['format']}); update glyphgpt")
        return Metadata.model_validate(data)
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        raise UserError(f"{path}: not a checkpoint of glyphgpt: its header does not describe a model") from error


def _digest_offset(file: BinaryIO, path: Path) -> int:
    """Return the offset of the digest in a safetensors file, which starts with the header's length and the header."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if length <= size - 8 else b""
    if not header.startswith(b"{"):
        raise UserError(f"{path}: not a checkpoint of glyphgpt, or truncated")
    offset = header.find(_DIGEST_KEY)
    if offset < 0:
        raise UserError(f"{path}: a safetensors file, but not a checkpoint of glyphgpt")
    return 8 + offset + len(_DIGEST_KEY)


def _digest(file: BinaryIO, offset: int) -> bytes:
    """Return the SHA-256 of a file in hexadecimal, computed with zeros in place of the digest at `offset`."""
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(offset))
    file.seek(len(_NO_DIGEST), os.SEEK_CUR)
    digest.update(_NO_DIGEST)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest().encode()
