"""Trained models, ready to be asked: on a CPU without torch, which takes longer to import than to sample."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from glyphgpt import checkpoint as checkpoints
from glyphgpt.checkpoint import Checkpoint
from glyphgpt.data.tokenizers import Tokenizer, tokenizer_from_dict
from glyphgpt.errors import UserError
from glyphgpt.inference.generate import LanguageModel
from glyphgpt.inference.numpy_gpt import NumpyGPT

if TYPE_CHECKING:
    from glyphgpt.runtime import Runtime
    from model import GPT


def open_checkpoint(place: str, data_dir: Path) -> tuple[Checkpoint, Tokenizer]:
    """Load the checkpoint that a run or file holds, without its optimizer, and its tokenizer.

    Raises:
        UserError: there is none, it is damaged, or its parts do not belong together.
    """
    checkpoint = checkpoints.load_checkpoint(checkpoints.find_checkpoint(Path(place)), with_optimizer=False)
    tokenizer = tokenizer_from_dict(checkpoint.metadata.tokenizer, data_dir)
    if tokenizer.vocab_size != checkpoint.metadata.model.get("vocab_size"):
        raise UserError(f"{checkpoint.path}: its tokenizer and its network differ in their vocabularies")
    return checkpoint, tokenizer


@contextmanager
def language_model(checkpoint: Checkpoint, device: str, dtype: str, remedy: str) -> Iterator[LanguageModel]:
    """Make a checkpoint's model ready to decode; `remedy` is what to lower when memory runs out.

    Raises:
        UserError: config and weights do not belong together, the weights are no numbers, or memory ran out.
    """
    if device == "cpu" or (device == "auto" and not gpu_driver()):
        try:
            yield on_cpu(checkpoint)
        except MemoryError as error:
            raise UserError(f"out of memory; lower {remedy}") from error
        return
    with torch_model(checkpoint, device, dtype, f"{remedy}, or use --device=cpu") as (model, runtime):
        from glyphgpt.runtime import TorchLM  # noqa: PLC0415

        yield on_cpu(checkpoint) if runtime.device.type == "cpu" else TorchLM(model, runtime)


def on_cpu(checkpoint: Checkpoint) -> NumpyGPT:
    """Return a checkpoint's decoder.

    Raises:
        UserError: config and weights do not belong together, or the weights are no numbers.
    """
    checkpoint.check_weights()
    try:
        return NumpyGPT(checkpoint.metadata.model, checkpoint.model)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise UserError(f"{checkpoint.path}: its config and its weights do not belong together") from error


@contextmanager
def torch_model(checkpoint: Checkpoint, device: str, dtype: str, remedy: str) -> Iterator[tuple["GPT", "Runtime"]]:
    """Make a checkpoint's torch model ready on a device; `remedy` is what to do when memory runs out, after "lower"."""
    from glyphgpt import runtime as runtimes  # noqa: PLC0415  (torch, only where it is used)
    from glyphgpt.training.torch_state import build_model  # noqa: PLC0415
    from model import GPT, GPTConfig  # noqa: PLC0415

    with (
        runtimes.init_runtime(device, dtype) as runtime,
        runtimes.oom_hint(remedy),
    ):
        yield build_model(checkpoint, GPT, GPTConfig).to(runtime.device).eval(), runtime


def gpu_driver() -> bool:
    """Tell whether CUDA's driver is installed, which is sooner seen than torch is imported."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True
