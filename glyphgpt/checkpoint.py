"""The one owner of the checkpoint format: save, verify, load.

A checkpoint is one safetensors file; nothing in it is ever executed. Tensors stand under `model.` and
`optimizer.`; the rest is JSON in the header. A SHA-256 of the whole file, taken with the digest's own place
filled with zeros, stands in the header too: whatever is cut or flipped is found before a weight is used.

torch is not needed to read one; `glyphgpt/training/torch_state.py` takes tensors out of and into torch.

There is no random state to save: every random number of training follows from the seed and the step.
"""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glyphgpt.cli import ROOT, command, from_here
from glyphgpt.errors import UserError
from glyphgpt.files import copy_mode, fsync_dir, fsync_file
from glyphgpt.settings import CountOrZero, NotNegative

FORMAT = 1
BEST = "best.safetensors"
LAST = "last.safetensors"

_DIGEST_KEY = b'"sha256":"'
_NO_DIGEST = b"0" * 64
_CHUNK_BYTES = 1 << 22

Arrays = dict[str, NDArray[Any]]


class TrainState(BaseModel):
    """Where a run stands: with the weights and the optimizer, all that resuming needs."""

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")

    step: CountOrZero = 0
    """Updates done."""
    seconds: NotNegative = 0.0
    """Time spent so far."""
    best_loss: float = math.inf
    """Of the validation split, nats per token."""
    evaluations_since_best: CountOrZero = 0


class Metadata(BaseModel):
    """All of a checkpoint that is not a tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    format: Annotated[int, Field(ge=1)] = FORMAT
    model: dict[str, Any]
    """The model's config."""
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    data: str
    """Fingerprint of the data set."""
    val_loss: float | None
    """Of these very weights, where they were evaluated."""
    state: TrainState
    scaler: dict[str, int | float]
    """State of float16's gradient scaler."""
    torchrun: str = ""
    """Fingerprint of the torchrun that wrote this, which resumes it after a restart."""
    wandb_id: str = ""
    """Of the run at Weights & Biases, which a resumed run continues."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, its tensors as arrays by name; `path` is where it came from."""

    metadata: Metadata
    model: Arrays
    optimizer: Arrays = field(default_factory=dict)
    path: Path = Path()

    def check_weights(self) -> None:
        """Make sure that the model's weights are numbers.

        Raises:
            UserError: some are infinite or no number.
        """
        if not all(np.isfinite(array).all() for array in self.model.values()):
            raise UserError(f"{self.path}: some weights are not finite; use an earlier checkpoint")


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint beside `path`, flush it, seal it, and rename it into place.

    Raises:
        UserError: it could not be written; what stood at `path` is untouched.
    """
    tensors = {f"model.{name}": value for name, value in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    header = {"glyphgpt": checkpoint.metadata.model_dump_json(), "sha256": _NO_DIGEST.decode()}
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, unfinished, header)
        copy_mode(path.parent, unfinished)  # safetensors makes it private
        with unfinished.open("r+b") as file:
            place = _digest_place(file, path)
            digest = _digest(file, place)
            file.seek(place)
            file.write(digest)
            file.flush()
            fsync_file(file.fileno())
        unfinished.replace(path)
        fsync_dir(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        before = "; the checkpoint before it is as it was" if path.exists() else ""
        raise UserError(f"{path}: could not be written: {_reason(error)}{before}") from error


def load_checkpoint(path: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint onto the CPU, verified.

    Raises:
        UserError: it is missing, damaged, of a newer format, or no checkpoint of glyphgpt.
    """
    try:
        with path.open("rb") as file:
            place = _digest_place(file, path)
            digest = _digest(file, place)
            file.seek(place)
            if file.read(len(_NO_DIGEST)) != digest:
                raise UserError(f"{path}: damaged: its checksum does not match; use another checkpoint")
        with safe_open(path, framework="numpy") as file:
            info = _read_info((file.metadata() or {}).get("glyphgpt", ""), path)
            wanted = [name for name in file.keys() if with_optimizer or name.startswith("model.")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in wanted}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no checkpoint there") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {_reason(error)}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short: {_reason(error)}; use another checkpoint") from error
    parts: dict[str, Arrays] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"{path}: holds a tensor of an unknown kind, {name!r}")
        parts[part][rest] = tensor
    return Checkpoint(info, parts["model"], parts["optimizer"], path)


def read_metadata(path: Path) -> Metadata:
    """Read what a checkpoint tells of itself, without its tensors and so unverified: to show, not to go on from.

    Raises:
        UserError: it is missing, or no checkpoint of glyphgpt.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return _read_info((file.metadata() or {}).get("glyphgpt", ""), path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {_reason(error)}") from error


def find_checkpoint(place: Path) -> Path:
    """Return the checkpoint file that a path names: itself, or a run's best, or its last.

    Raises:
        UserError: the run holds none yet.
    """
    if not place.is_dir():
        return place
    for name in (BEST, LAST):
        if (place / name).is_file():
            return place / name
    train = command("train.py", from_here(ROOT / "config" / "quick.toml"), f"--out_dir={place}")
    raise UserError(f"{place}: no checkpoint in this folder; train first, for example: {train}")


def _read_info(text: str, path: Path) -> Metadata:
    try:
        data = json.loads(text)
        newer = isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT
        if newer:
            raise UserError(f"{path}: written by a newer glyphgpt (format {data['format']}); update glyphgpt")
        return Metadata.model_validate(data)
    except (ValueError, RecursionError) as error:  # ValidationError is a ValueError
        raise UserError(f"{path}: no checkpoint of glyphgpt: its header tells nothing of a model") from error


def _digest_place(file: BinaryIO, path: Path) -> int:
    """Return where in a safetensors file the digest stands: 8 bytes of header length, then the JSON header."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if length <= size - 8 else b""
    if not header.startswith(b"{"):
        raise UserError(f"{path}: no checkpoint of glyphgpt, or cut short")
    place = header.find(_DIGEST_KEY)
    if place < 0:
        raise UserError(f"{path}: a safetensors file, but no checkpoint of glyphgpt")
    return 8 + place + len(_DIGEST_KEY)


def _digest(file: BinaryIO, place: int) -> bytes:
    """Return the SHA-256 of a file in hexadecimal, the digest's own place taken as zeros."""
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(place))
    file.seek(len(_NO_DIGEST), os.SEEK_CUR)
    digest.update(_NO_DIGEST)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest().encode()


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
