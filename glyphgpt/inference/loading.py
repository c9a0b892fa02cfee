"""Load a trained model for inference. A CPU samples without torch, whose import takes longer than most samples."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from glyphgpt.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from glyphgpt.data.tokenizers import Tokenizer, tokenizer_from_dict
from glyphgpt.errors import UserError
from glyphgpt.inference.numpy_gpt import NumpyGPT

LITTLE_WORK = 1e10
"""Tokens times weights that a CPU computes in the few seconds in which torch and CUDA start."""

if TYPE_CHECKING:
    from glyphgpt.inference.torch_lm import TorchLM
    from glyphgpt.runtime import Runtime
    from model import GPT


def open_checkpoint(path: Path, data_dir: Path) -> tuple[Checkpoint, Tokenizer]:
    """Load the checkpoint of a run or file, without its optimizer state, and its tokenizer.

    Raises:
        UserError: There is no checkpoint, it is damaged, or its parts do not belong together.
    """
    checkpoint = load_checkpoint(find_checkpoint(path), with_optimizer=False)
    tokenizer = tokenizer_from_dict(checkpoint.metadata.tokenizer, data_dir)
    if tokenizer.vocab_size != checkpoint.config.vocab_size:
        raise UserError(f"{checkpoint.path}: its tokenizer and its network differ in vocabulary size")
    return checkpoint, tokenizer


@contextmanager
def language_model(
    checkpoint: Checkpoint, device: str, dtype: str, remedy: str, tokens: int | None = None
) -> Iterator["NumpyGPT | TorchLM"]:
    """Yield a checkpoint's model on a device, ready to decode.

    Args:
        device: "auto" is a GPU if there is one, but the CPU if there is little to generate.
        remedy: What to lower when memory runs out.
        tokens: How many tokens to generate, if that is known.

    Raises:
        UserError: The config and the weights do not belong together, or memory ran out.
    """
    if device == "cpu" or (device == "auto" and (is_little_work(checkpoint, tokens) or not has_gpu_driver())):
        try:
            yield NumpyGPT(checkpoint.config, checkpoint.model)
        except MemoryError as error:
            raise UserError(f"out of memory; lower {remedy}") from error
        return
    with torch_model(checkpoint, device, dtype, f"{remedy}, or use --device=cpu") as (model, runtime):
        from glyphgpt.inference.torch_lm import TorchLM, cast_weights  # noqa: PLC0415  (imports torch)

        if runtime.device.type == "cpu":
            yield NumpyGPT(checkpoint.config, checkpoint.model)
        else:
            cast_weights(model, runtime.dtype)
            yield TorchLM(model, runtime)


@contextmanager
def torch_model(checkpoint: Checkpoint, device: str, dtype: str, remedy: str) -> Iterator[tuple["GPT", "Runtime"]]:
    """Yield a checkpoint's torch model in evaluation mode on a device; `remedy` names what to lower without memory.

    Raises:
        UserError: The config and the weights do not belong together, or memory ran out.
    """
    from glyphgpt.runtime import init_runtime, oom_hint  # noqa: PLC0415  (imports torch)
    from glyphgpt.training.torch_state import build_model  # noqa: PLC0415

    with oom_hint(remedy), init_runtime(device, dtype) as runtime:
        yield build_model(checkpoint).to(runtime.device).eval(), runtime


def is_little_work(checkpoint: Checkpoint, tokens: int | None) -> bool:
    """Return whether a CPU generates this many tokens before a program would have started to use a GPU."""
    weights = sum(array.size for array in checkpoint.model.values())
    return tokens is not None and tokens * weights < LITTLE_WORK


def has_gpu_driver() -> bool:
    """Return whether CUDA's driver is installed. This check is faster than importing torch."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True
